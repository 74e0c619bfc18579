"""A synthetic reward: the features of an ImageNet ResNet-18, seen through one random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale.rewards.images import IMAGENET_MEAN, IMAGENET_STD, resize_and_crop, standardise, three_channels
from scale.rewards.weights import pretrained


@dataclass(frozen=True, eq=False)
class ResNetScore:
    """<direction, pooled features>; images are resized to `side` and standardised as for ImageNet, once."""

    model: Any
    direction: Tensor
    side: int
    name: str = "resnet"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = three_channels(images).to(self.direction)
        pixels = standardise(resize_and_crop(pixels, self.side, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        return self.model(pixel_values=pixels).pooler_output.flatten(1) @ self.direction


def resnet(
    cache: Path, device: torch.device, *, model: str = "microsoft/resnet-18", seed: int = 0, side: int = 224
) -> ResNetScore:
    """The reward of the generative bilevel paper's image experiment, with the head's seed made explicit.

    The released code draws the head unseeded and standardises by CLIP's statistics; its features are those of
    ImageNet's ResNet-18, whose own statistics are used here.

    Args:
        model: folder or hub id of a ResNet, or "random" for an untrained ResNet-18 drawn from the same seed.
        seed: of the direction, which is N(0, 1/features) in every coordinate.
        side: pixels of the resized image.

    Raises:
        ValueError: if the model cannot be loaded.
    """
    from transformers import ResNetModel

    network = random_resnet(seed).to(device) if model == "random" else pretrained(ResNetModel, model, cache, device)
    features = network.config.hidden_sizes[-1]
    direction = torch.randn(features, generator=torch.Generator().manual_seed(seed)) / features**0.5
    return ResNetScore(network, direction.to(device), side)


def random_resnet(seed: int) -> Any:
    """Return an untrained ResNet-18, frozen; transformers draws from the global generator, which is put back."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetModel(config).eval().requires_grad_(False)
