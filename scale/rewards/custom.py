"""A score of one's own: any Python function `(images, prompts) -> scores`, named "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CustomScore:
    """A user's function as a score; what is not a tensor is made one, in the images' dtype."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Any]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = self.function(images, prompts)
        if isinstance(scores, Tensor):
            return scores
        try:
            return torch.as_tensor(scores, dtype=images.dtype, device=images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"reward {self.name!r} must return numbers, got {type(scores).__name__}") from error


def custom(cache: Path, device: torch.device, *, function: str, differentiable: bool = False) -> CustomScore:
    """Return the function "module:function" as a score.

    Args:
        cache, device: not used.
        function: called with images (n, channels, height, width) in [0, 1] and n prompts; returns n numbers.
        differentiable: whether autograd's gradient of its result is right; if not, it is called without a graph.

    Raises:
        ValueError: if the module or the function does not exist, or it cannot be called.
    """
    module_name, colon, attribute = str(function).partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"function must be 'module:function', got {function!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"function {function!r}: there is no module {error.name!r} on the Python path") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"function {function!r}: module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"function {function!r} must be callable, got {type(found).__name__}")
    return CustomScore(f"custom {function}", found, differentiable)
