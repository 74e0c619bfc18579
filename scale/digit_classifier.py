"""A small classifier of the digits: the judge of samples, and a differentiable reward."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from scale.digits import DIGITS, digest, digit_split
from verdicts.streams import Stream

FEATURES = 32
"""Width of the penultimate layer."""

SEED = 0
EPOCHS = 20
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
NOISE = 0.1
"""Standard deviation of the noise on training images: samples of a diffusion model are noisier than the data, and their
judge should not mind."""

VERSION = 1
"""Part of the name of the file; to be raised when the code below trains otherwise with the same settings."""


class DigitClassifier(nn.Module):
    """Map images (n, 1, 8, 8) in [0, 1] to logits (n, 10); smooth, so that its second derivatives exist."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, DIGITS)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features (n, 32)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def digit_classifier(cache: Path) -> DigitClassifier:
    """Return the classifier, trained on the split "train" at first use (seconds) and kept as safetensors in `cache`.

    It is in evaluation mode and its weights take no gradient; gradients reach the images.
    """
    from safetensors.torch import load_file

    classifier = _initial()
    settings = [SEED, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, NOISE]
    name = digest({"version": VERSION, "layers": repr(classifier), "settings": settings})
    file = Path(cache) / f"digit-classifier-{name}.safetensors"
    if not file.exists():
        _save(_trained(), file)
    classifier.load_state_dict(load_file(file))
    return classifier.requires_grad_(False).eval()


def digit_features(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the classifier's penultimate features (n, 32) of images (n, 1, 8, 8) in [0, 1].

    Raises:
        ValueError: if the classifier is not one of ours or the images have another shape.
    """
    if not isinstance(classifier, DigitClassifier):
        raise ValueError(f"classifier must be a DigitClassifier, got {type(classifier).__name__}")
    if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images must have shape (n, 1, 8, 8), got {tuple(images.shape)}")
    return classifier.features(images)


def _initial() -> DigitClassifier:
    with torch.random.fork_rng(devices=[]):  # torch's layers draw initial weights from the global generator only
        torch.manual_seed(Stream(SEED).child("scale", "digits", "classifier", "weights").integer())
        return DigitClassifier()


def _trained() -> DigitClassifier:
    images, labels = digit_split("train")
    classifier = _initial()
    seed = Stream(SEED).child("scale", "digits", "classifier", "batches").integer()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            noise = NOISE * torch.randn(len(chosen), 1, 8, 8, generator=generator)
            loss = functional.cross_entropy(classifier(images[chosen] + noise), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fall.step()
    return classifier


def _save(classifier: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.stem}.", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        save_file(classifier.state_dict(), unfinished)
        os.replace(unfinished, file)
