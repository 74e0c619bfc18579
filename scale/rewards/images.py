"""Preprocessing of images in torch, so that gradients reach the pixels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def three_channels(images: Tensor) -> Tensor:
    """Return (n, 3, height, width): grey images are repeated.

    Raises:
        ValueError: if there are neither 1 nor 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


def resize_and_crop(images: Tensor, side: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """Return (n, channels, side, side): the shorter edge is resized to `side`, with antialias, the centre is cut out.

    Pillow's filter, without its rounding to 8 bits and clipping, so that the result is linear in the pixels.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != side:
        height, width = side * height // short, side * width // short
        images = interpolate(images, (height, width), mode=mode, align_corners=False, antialias=True)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[..., top : top + side, left : left + side]


def standardise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (images - mean) / std, channel by channel."""
    shift, scale = (torch.tensor(values).to(images)[:, None, None] for values in (mean, std))
    return (images - shift) / scale
