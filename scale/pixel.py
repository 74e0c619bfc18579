"""A class-conditional diffusers U-Net in pixel space as a `Chain`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale.libraries import from_pretrained, named_class
from scale.network import NetworkChain
from scale.sampler import GaussianSteps


@dataclass(frozen=True, eq=False)
class PixelChain(NetworkChain):
    """The chain of a `UNet2DModel` over images (channels, height, width) in [-1, 1]; conditions are class labels."""


@dataclass(frozen=True, eq=False)
class PixelDecoder:
    """From pixels in [-1, 1] to images in [0, 1]: the range is converted here, once."""

    chain: NetworkChain
    rows: Tensor

    def __call__(self, x0: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Return the images (n, channels, height, width) of samples with these prompts (n,)."""
        if self.chain.sampler.frozen_last:
            x0 = self.chain.finish(x0, None if prompt is None else self.rows.to(prompt.device)[prompt])
        return (x0 / 2 + 0.5).clamp(0, 1)


def load_unet(path: str, dtype: torch.dtype = torch.float32, revision: str | None = None) -> tuple[Any, Any]:
    """Load a `UNet2DModel` and its scheduler from unet/ and scheduler/ of a local folder, or of a hub id.

    Weights come from safetensors only; of a hub id, nothing but these and the configurations is downloaded.

    Args:
        revision: commit, tag or branch on the hub.

    Raises:
        ValueError: if there are none, they are of other classes, or the network knows no classes; if a revision is
            asked of a local folder.
    """
    diffusers: Any = importlib.import_module("diffusers")
    if Path(path).is_dir() and revision is not None:
        raise ValueError(f"model.revision must be null for a local folder, got {revision!r}")
    folder = path if Path(path).is_dir() else _download(path, revision)
    for part in ("unet", "scheduler"):
        if not (Path(folder) / part).is_dir():
            raise ValueError(f"model.path: the folder {path!r} has no sub-folder {part!r}")
    kind = named_class(Path(folder) / "unet" / "config.json", "model.path")
    if kind != "UNet2DModel":
        raise ValueError(f"model.path: the network in {path!r} is a {kind}, must be a UNet2DModel")
    steps = named_class(Path(folder) / "scheduler" / "scheduler_config.json", "model.path")
    if not hasattr(diffusers, steps):
        raise ValueError(f"model.path: the scheduler in {path!r} is a {steps}, which diffusers does not know")
    network = from_pretrained(
        diffusers.UNet2DModel.from_pretrained,
        str(Path(folder) / "unet"),
        "model.path",
        torch_dtype=dtype,
        use_safetensors=True,
    )
    scheduler = from_pretrained(
        getattr(diffusers, steps).from_pretrained, str(Path(folder) / "scheduler"), "model.path"
    )
    if not network.config.num_class_embeds:
        raise ValueError(f"model.path: the U-Net in {path!r} is told no class (num_class_embeds is not set)")
    return _of_known_dtype(network.eval().requires_grad_(False)), scheduler


def _of_known_dtype(network: Any) -> Any:
    """Let a network take its dtype from its first parameter: diffusers walks all modules to find it, twice a call."""
    kind = type(network)
    found = {"dtype": property(lambda self: next(self.parameters()).dtype), "__module__": kind.__module__}
    network.__class__ = type(kind.__name__, (kind,), found)
    return network


def _download(path: str, revision: str | None) -> str:
    """Return the local folder of a hub id, downloaded at first use."""
    hub: Any = importlib.import_module("huggingface_hub")
    files = ["unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
    return from_pretrained(hub.snapshot_download, path, "model.path", revision=revision, allow_patterns=files)


def pixel_chain(
    network: Any, sampler: GaussianSteps, classes: int, guidance: float, device: torch.device | str = "cpu"
) -> PixelChain:
    """Return the chain of a loaded network. Its label number `classes`, if it has one more than that, is "no class".

    Raises:
        ValueError: if the network knows fewer classes.
    """
    known = network.config.num_class_embeds
    if known < classes:
        raise ValueError(f"prompts: the network knows {known} classes, got {classes}")
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return PixelChain(
        network=network,
        sampler=sampler,
        shape=(network.config.in_channels, height, width),
        told="class_labels",
        table=torch.arange(known, device=device),
        guidance=guidance,
        unconditional=classes if known > classes else None,
    )
