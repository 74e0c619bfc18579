"""Two-dimensional data sets, drawn from a NumPy generator: clouds of shape (n, 2), roughly in [-1.5, 1.5]^2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Sampler = Callable[[int, np.random.Generator], np.ndarray]


def swiss_roll(samples: int, generator: np.random.Generator) -> np.ndarray:
    """A spiral arm of one and a half turns with noise of standard deviation 0.05."""
    angle = 1.5 * np.pi * (1 + 2 * generator.random(samples))
    arm = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) / 10
    return arm + 0.05 * generator.standard_normal((samples, 2))


def two_moons(samples: int, generator: np.random.Generator) -> np.ndarray:
    """Two interleaved half circles with noise of standard deviation 0.05."""
    upper = generator.random(samples) < 0.5
    angle = np.pi * generator.random(samples)
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return np.stack([x, y], 1) + 0.05 * generator.standard_normal((samples, 2))


def three_modes(samples: int, generator: np.random.Generator) -> np.ndarray:
    """An asymmetric mixture of three Gaussians."""
    means = np.array([[-1.0, -0.5], [0.9, -0.2], [0.1, 1.0]])
    component = generator.choice(3, samples, p=[0.5, 0.3, 0.2])
    return means[component] + 0.2 * generator.standard_normal((samples, 2))


DATA: dict[str, Sampler] = {"swiss_roll": swiss_roll, "two_moons": two_moons, "three_modes": three_modes}
