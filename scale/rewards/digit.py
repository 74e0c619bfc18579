"""Does the image show the digit that the prompt names? Judged by the small classifier of `scale.digit_classifier`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SIDE = 8


@dataclass(frozen=True, eq=False)
class DigitScore:
    """log-probability of the prompt's digit under a classifier of (n, 1, 8, 8) images into 10 logits."""

    classifier: nn.Module
    name: str = "digit"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        digits = torch.tensor([digit_in(prompt) for prompt in prompts], device=images.device)
        grey = images.mean(1, keepdim=True)
        if grey.shape[-2:] != (SIDE, SIDE):
            grey = nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)
        logits = self.classifier(grey.to(next(self.classifier.parameters())))
        return logits.log_softmax(1).gather(1, digits[:, None]).squeeze(1)


def digit_in(prompt: str) -> int:
    """Return 7 for "7" and for "the digit 7".

    Raises:
        ValueError: if the prompt has neither form.
    """
    match = re.fullmatch(r"(?:the digit )?([0-9])", prompt.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"prompt must be a digit, '7' or 'the digit 7', got {prompt!r}")
    return int(match[1])


def digit(cache: Path, device: torch.device) -> DigitScore:
    """Return the score by the classifier of `scale.digit_classifier`, trained once and kept in `cache`."""
    from scale.digit_classifier import digit_classifier

    return DigitScore(digit_classifier(cache).to(device).eval().requires_grad_(False))
