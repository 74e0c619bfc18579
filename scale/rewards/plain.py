"""Scores that need no weights: brightness, redness, symmetry, and the size of the JPEG file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

JPEG_QUALITY = 95


@dataclass(frozen=True)
class PlainScore:
    """A score that looks at the image alone: `score` maps (n, channels, height, width) in [0, 1] to (n,)."""

    name: str
    score: Callable[[Tensor], Tensor]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(images)


def brightness(cache: Path, device: torch.device) -> PlainScore:
    """Mean of all pixels and channels."""
    return PlainScore("brightness", lambda images: images.flatten(1).mean(1), differentiable=True)


def redness(cache: Path, device: torch.device) -> PlainScore:
    """Mean over the pixels of red less the mean of green and blue; raises ValueError if there is no colour."""
    return PlainScore("redness", _redness, differentiable=True)


def symmetry(cache: Path, device: torch.device) -> PlainScore:
    """Minus the mean squared difference from the image mirrored left to right."""
    return PlainScore("symmetry", lambda x: -(x - x.flip(-1)).square().flatten(1).mean(1), differentiable=True)


def jpeg_compressibility(cache: Path, device: torch.device) -> PlainScore:
    """Minus the kilobytes (1000 bytes) of the image as JPEG of quality 95, as in DDPO (Black et al. 2023), 5.1."""
    return PlainScore("jpeg_compressibility", lambda images: -_jpeg_kilobytes(images), differentiable=False)


def jpeg_incompressibility(cache: Path, device: torch.device) -> PlainScore:
    """Plus the kilobytes (1000 bytes) of the image as JPEG of quality 95, as in DDPO (Black et al. 2023), 5.1."""
    return PlainScore("jpeg_incompressibility", _jpeg_kilobytes, differentiable=False)


def _redness(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        raise ValueError(f"images must have 3 channels for the reward 'redness', got {images.shape[1]}")
    red, green, blue = images.flatten(2).mean(2).unbind(1)
    return red - 0.5 * (green + blue)


def _jpeg_kilobytes(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels to be JPEGs, got {images.shape[1]}")
    bytes_ = (images.detach() * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1)
    return images.new_tensor([_jpeg_size(image) / 1000 for image in bytes_])


def _jpeg_size(image: Tensor) -> int:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1).numpy()).save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.tell()
