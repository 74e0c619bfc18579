"""Scores of images by name: `make_scorer("pickscore", {"model": "folder"}, cache, device)`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from scale.reward import Scorer

# Each is built by build(cache, device, *, option=...); imported only when asked for, since some need transformers.
BUILDERS = {
    "brightness": "scale.rewards.plain:brightness",
    "redness": "scale.rewards.plain:redness",
    "symmetry": "scale.rewards.plain:symmetry",
    "jpeg_compressibility": "scale.rewards.plain:jpeg_compressibility",
    "jpeg_incompressibility": "scale.rewards.plain:jpeg_incompressibility",
    "digit": "scale.rewards.digit:digit",
    "clip": "scale.rewards.clip:clip_score",
    "pickscore": "scale.rewards.clip:pick_score",
    "hpsv2": "scale.rewards.clip:hps",
    "aesthetic": "scale.rewards.clip:aesthetic",
    "imagereward": "scale.rewards.blip:image_reward",
    "resnet": "scale.rewards.resnet:resnet",
    "custom": "scale.rewards.custom:custom",
}


def make_scorer(name: str, options: Mapping[str, Any], cache: Path, device: torch.device | str) -> Scorer:
    """Build the score called `name`; its builder's keyword arguments are its options.

    Args:
        name: one of `BUILDERS`.
        options: keyword arguments of the builder.
        cache: the folder for downloads.
        device: where the weights go.

    Raises:
        ValueError: if the name or an option is unknown, an option is missing, or weights cannot be loaded.
    """
    if name not in BUILDERS:
        raise ValueError(f"reward {name!r} is unknown{_nearest(name, BUILDERS)}")
    build = _builder(name)
    known = {p.name: p for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise ValueError(f"reward {name!r} has no option {option!r}{_nearest(option, known)}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"reward {name!r} needs the option {option!r}")
    return build(Path(cache), torch.device(device), **options)


def _builder(name: str) -> Callable[..., Scorer]:
    module, function = BUILDERS[name].split(":")
    return getattr(importlib.import_module(module), function)


def _nearest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}? Known: {', '.join(names)}" if near else "; it has none"
