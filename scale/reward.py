"""From a score of images to the reward of a chain: decode x_0, check the images, score each with its own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """From final samples (n, *shape) with their prompts' places (n,) to images (n, channels, height, width) in [0, 1].

    Autograd goes through it.
    """

    def __call__(self, x0: Tensor, prompt: Tensor | None, /) -> Tensor: ...


class Scorer(Protocol):
    """A score of images (n, channels, height, width) in [0, 1], each with its own prompt: returns (n,).

    `differentiable` says whether autograd's gradient in the images is the score's gradient.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class DecodedReward:
    """The score of the decoded sample, as an `algorithms.objective.Reward`.

    Attributes:
        decode: from x_0 to images; the range is converted there and nowhere else.
        scorer: the score; its `differentiable` is the reward's.
        prompts: the texts that a condition points into.

    Raises:
        ValueError: if there are no prompts.
    """

    decode: Decoder
    scorer: Scorer
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.prompts or isinstance(self.prompts, str):
            raise ValueError(f"prompts must be a tuple of at least one text, got {self.prompts!r}")

    @property
    def differentiable(self) -> bool:
        return self.scorer.differentiable

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        """Return the reward of every sample, (n,), in x0's dtype and on its device.

        Args:
            x0: (n, *shape).
            condition: (n,) integers, the place of every sample's prompt in `prompts`; None if there is only one.

        Raises:
            ValueError: if the condition, an image or a score is not what it must be; the message names the first
                offending sample.
        """
        prompts = self._prompts_of(len(x0), condition)
        with nullcontext() if self.differentiable else torch.no_grad():
            images = self.decode(x0, condition)
            _check_images(images, len(x0))
            scores = self.scorer(images, prompts)
            self._check_scores(scores, prompts)
        if self.differentiable and images.requires_grad and not scores.requires_grad:
            raise ValueError(f"reward {self.scorer.name!r} is declared differentiable, but its scores have no gradient")
        return scores.to(x0) if self.differentiable else scores.detach().to(x0)

    def _prompts_of(self, n: int, condition: Tensor | None) -> list[str]:
        if condition is None:
            if len(self.prompts) != 1:
                raise ValueError(f"condition must say which of {len(self.prompts)} prompts is each sample's, got None")
            return [self.prompts[0]] * n
        if condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool:
            raise ValueError(f"condition must hold integers, places of prompts, got {condition.dtype}")
        if condition.shape != (n,):
            raise ValueError(f"condition must have shape ({n},), one place per sample, got {tuple(condition.shape)}")
        places = condition.tolist()
        for sample, place in enumerate(places):
            if not 0 <= place < len(self.prompts):
                raise ValueError(f"condition must be in [0, {len(self.prompts)}), got {place} at sample {sample}")
        return [self.prompts[place] for place in places]

    def _check_scores(self, scores: Tensor, prompts: Sequence[str]) -> None:
        name, n = self.scorer.name, len(prompts)
        if not isinstance(scores, Tensor) or scores.shape != (n,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"reward {name!r} must return a tensor of shape ({n},), one score per image, got {got}")
        bad = (~scores.detach().isfinite()).nonzero()
        if len(bad):
            i = int(bad[0, 0])
            raise ValueError(f"reward {name!r} must be finite, got {scores[i].item()} at sample {i}, {prompts[i]!r}")


def _check_images(images: Tensor, n: int) -> None:
    if images.dim() != 4 or len(images) != n:
        raise ValueError(f"images must have shape ({n}, channels, height, width), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    values = images.detach().flatten(1)
    inside = (values >= 0) & (values <= 1)  # False for NaN too
    if not bool(inside.all()):
        i = int((~inside).any(1).nonzero()[0, 0])
        value = values[i][~inside[i]][0].item()
        raise ValueError(f"images must be finite and in [0, 1], got {value:g} in sample {i}")
