"""Baselines: numbers taken off the return before it multiplies a score. They lower variance and leave the mean.

A baseline may depend on the sample's state x_k before the noise that it is paired with, and on other samples, but on
nothing that this noise moves; that is all that its zero mean needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Baseline(Protocol):
    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        """Return the baseline (n,) for the noise of step k, given returns (n,) and the states x_k (n, *shape)."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same number for every sample and step."""

    value: float = 0.0

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        return torch.full_like(returns, self.value)


@dataclass(frozen=True)
class LeaveOneOut:
    """The mean return of the *other* samples of the group; including the sample itself would shrink the gradient.

    Attributes:
        group: consecutive samples that share a baseline (one prompt's, say); None for the whole batch.
    """

    group: int | None = None

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        size = self.group or len(returns)
        if size < 2 or len(returns) % size:
            raise ValueError(f"a leave-one-out baseline needs whole groups of >= 2, got {len(returns)} in {size}s")
        grouped = returns.reshape(-1, size)
        return ((grouped.sum(1, keepdim=True) - grouped) / (size - 1)).flatten()


@dataclass(frozen=True, eq=False)
class Learned:
    """A value function: ridge regression of the return on random Fourier features of x_k, one per step.

    Attributes:
        frequencies: (features, d) and `phases` (features,) of the feature map.
        weights: (T, features + 1 + d); row k - 1 belongs to step k.
    """

    frequencies: Tensor
    phases: Tensor
    weights: Tensor

    @classmethod
    def fit(
        cls, latents: Tensor, returns: Tensor, generator: torch.Generator, features: int = 64, ridge: float = 1e-3
    ) -> Learned:
        """Fit on a pilot batch: latents (T + 1, n, *shape), returns (n,).

        Use the result on fresh roll-outs only: fitted on the samples that it is used on, it would depend on the very
        noise it is paired with, and bias the estimate.
        """
        x = latents[1:].flatten(2)
        options = {"generator": generator, "dtype": x.dtype, "device": generator.device}
        frequencies = torch.randn(features, x.shape[2], **options).to(x.device)
        phases = 2 * torch.pi * torch.rand(features, **options).to(x.device)
        value = cls(frequencies, phases, x.new_zeros(len(x), features + 1 + x.shape[2]))
        for k in range(len(x)):
            phi = value._features(x[k])
            gram = phi.T @ phi + ridge * len(phi) * torch.eye(phi.shape[1], dtype=x.dtype, device=x.device)
            value.weights[k] = torch.linalg.solve(gram, phi.T @ returns)
        return value

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        return self._features(x.flatten(1)) @ self.weights[k - 1]

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cos(x @ self.frequencies.T + self.phases), torch.ones_like(x[:, :1]), x], 1)
