"""A convolutional critic of images and latents for shortcut fine-tuning; parameters are passed in, as everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from algorithms.chain import Params

KERNEL = 4
SLOPE = 0.2


@dataclass(frozen=True)
class ConvCritic:
    """Convolutions that halve the side, and a last one whose outputs are averaged (SFT-PG, appendix D.2).

    All have filters of 4 x 4; those that halve have padding 1, stride 2 and leaky ReLUs of slope 0.2. In the paper
    there are three, with 256, 512 and 1024 channels; the last has stride 1 and no padding. Here its filter is as large
    as what is left of the image, where that is smaller than 4.

    Attributes:
        shape: (channels, height, width) of a sample.
        widths: channels after each halving; `default_widths` for a small critic.

    Raises:
        ValueError: if the shape is not one of an image, or the widths are none, not positive or more than the image
            can be halved.
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be (channels, height, width), got {tuple(self.shape)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be one or more numbers of channels >= 1, got {self.widths}")
        most = halvings(self.shape)
        if len(self.widths) > most:
            raise ValueError(f"widths must be at most {most} for samples of shape {self.shape}, got {self.widths}")

    def initial(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Draw parameters, uniform in +-1 / sqrt(inputs) as torch.nn.Conv2d's are."""
        params: Params = {}
        inputs, (height, width) = self.shape[0], self.shape[1:]
        for i, outputs in enumerate((*self.widths, 1)):
            last = i == len(self.widths)
            kernel = (min(KERNEL, height), min(KERNEL, width)) if last else (KERNEL, KERNEL)
            for name, shape in ((f"weight{i}", (outputs, inputs, *kernel)), (f"bias{i}", (outputs,))):
                uniform = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
                params[name] = (2 * uniform - 1) / math.sqrt(inputs * kernel[0] * kernel[1])
            inputs, height, width = outputs, height // 2, width // 2
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return the scores (n,) of samples (n, *shape)."""
        for i in range(len(self.widths)):
            x = functional.conv2d(x, params[f"weight{i}"], params[f"bias{i}"], stride=2, padding=1)
            x = functional.leaky_relu(x, SLOPE)
        last = len(self.widths)
        return functional.conv2d(x, params[f"weight{last}"], params[f"bias{last}"]).mean((1, 2, 3))


def halvings(shape: tuple[int, ...]) -> int:
    """Return how often an image (channels, height, width) can be halved before a side is gone.

    >>> halvings((1, 8, 8)), halvings((4, 2, 2)), halvings((4, 64, 64))
    (3, 1, 6)
    """
    return int(math.log2(min(shape[1:])))


def default_widths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels of a small critic: 32, 64, 128 as far as a side of two is left, and at least the first.

    >>> default_widths((1, 8, 8)), default_widths((4, 2, 2)), default_widths((4, 64, 64))
    ((32, 64), (32,), (32, 64, 128))
    """
    return (32, 64, 128)[: max(halvings(shape) - 1, 1)]
