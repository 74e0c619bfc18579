"""Gibbs laws with everything known: potentials V(params, x) and rewards of the Implicit Diffusion experiments.

Particles are (r, n, d), parameters (r, ...): one for each of r repetitions. The exact quantities of the same problems
are in theory/langevin.py and theory/gibbs.py, which share no code with these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from algorithms.chain import Params


@dataclass(frozen=True, eq=False)
class SoftmaxMixture:
    """V = -log sum_j softmax(theta)_j exp(-|x - mu_j|^2 / (2 variance)): the weights are learned (section A.1).

    Attributes:
        centres: mu, (k, d).
        variance: of every component.
    """

    centres: Tensor
    variance: float

    @cached_property
    def _scaled(self) -> Tensor:
        return self.centres / self.variance

    @cached_property
    def _offset(self) -> Tensor:
        return self.centres.square().sum(-1) / (-2 * self.variance)

    def _logits(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return weights + (mu . x - |mu|^2 / 2) / variance, (r, k, n), for weights (r, k)."""
        # Components before particles: sums over six numbers that lie side by side are slow.
        bias = weights + self._offset.to(x)
        return torch.baddbmm(bias[..., None], self._scaled.to(x).expand(len(x), -1, -1), x.mT)

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        logits = self._logits(torch.log_softmax(params["theta"], -1), x)
        return x.square().sum(-1) / (2 * self.variance) - torch.logsumexp(logits, -2)

    def slope(self, params: Params, x: Tensor) -> Tensor:
        """Return (x - E[mu | x]) / variance, (r, n, d)."""
        posterior = torch.softmax(self._logits(params["theta"], x), -2)
        mean = self._scaled.to(x).mT.expand(len(x), -1, -1) @ posterior
        return x / self.variance - mean.mT

    def pull(self, params: Params, x: Tensor, weight: Tensor) -> Params:
        """Return sum_i weight_i (softmax(theta) - posterior(x_i)), (r, k), under its name."""
        posterior = torch.softmax(self._logits(params["theta"], x), -2)
        prior = torch.softmax(params["theta"], -1)
        return {"theta": prior * weight.sum(-1, keepdim=True) - (posterior @ weight[..., None])[..., 0]}

    def curvature(self, params: Params) -> float:
        return 1 / self.variance

    def log_density(self, params: Params, x: Tensor) -> Tensor:
        """Return log pi(x), (r, n)."""
        dimension = self.centres.shape[1]
        return -self(params, x) - 0.5 * dimension * math.log(2 * math.pi * self.variance)


def hexagon(radius: float, origin: bool = False) -> Tensor:
    """Return the vertices of a regular hexagon, (6, 2), the first on the x_1 axis; with the origin as a seventh row."""
    angles = torch.arange(6, dtype=torch.float64) * (math.pi / 3)
    vertices = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return torch.cat([vertices, torch.zeros(1, 2, dtype=torch.float64)]) if origin else vertices


@dataclass(frozen=True)
class HalfPlaneBump:
    """R = 1(x_1 > 0) exp(-|x - centre|^2 / width) / scale; `smooth` replaces the indicator by a logistic function.

    The indicator's own gradient is zero almost everywhere and misses its jump.

    Attributes:
        smooth: None for the indicator, or the length over which the logistic function rises.
    """

    centre: tuple[float, float]
    width: float
    scale: float
    smooth: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x[..., 0], x[..., 1]
        distance = (first - self.centre[0]).square() + (second - self.centre[1]).square()
        gate = first > 0 if self.smooth is None else torch.sigmoid(first / self.smooth)
        return gate * torch.exp(distance * (-1 / self.width)) * (1 / self.scale)


@dataclass(frozen=True)
class Translated:
    """V = stiffness |x - theta|^2 / 2: the Gibbs law's mean is learned."""

    stiffness: float

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return 0.5 * self.stiffness * (x - params["theta"][:, None]).square().sum(-1)

    def curvature(self, params: Params) -> float:
        if not self.stiffness > 0:
            raise ValueError(f"stiffness must be > 0, or exp(-V) is not integrable, got {self.stiffness}")
        return self.stiffness


@dataclass(frozen=True)
class Scaled:
    """V = e^theta |x|^2 / 2: the Gibbs law's precision is learned; theta is (r, 1)."""

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return 0.5 * params["theta"].exp() * x.square().sum(-1)

    def curvature(self, params: Params) -> float:
        return float(params["theta"].exp().max())


@dataclass(frozen=True)
class Nearness:
    """R = -strength |x - centre|^2 / 2."""

    centre: float
    strength: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * self.strength * (x - self.centre).square().sum(-1)


@dataclass(frozen=True)
class SquareNearness:
    """R = -(|x|^2 - target)^2 / 2."""

    target: float

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * (x.square().sum(-1) - self.target).square()
