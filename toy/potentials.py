"""Gibbs laws with everything known: potentials V(params, x) and rewards of the Implicit Diffusion experiments.

Particles are (r, n, d), parameters (r, ...): one for each of r repetitions. The exact quantities of the same problems
are in theory/langevin.py and theory/gibbs.py, which share no code with these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        # Components before particles: sums over six numbers that lie side by side are slow.
        scaled = self.centres.to(x) / self.variance
        bias = torch.log_softmax(params["theta"], -1) - 0.5 * self.variance * scaled.square().sum(-1)
        logits = torch.baddbmm(bias[..., None], scaled.expand(len(x), -1, -1), x.mT)
        return x.square().sum(-1) / (2 * self.variance) - torch.logsumexp(logits, -2)

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
        distance = (x - x.new_tensor(self.centre)).square().sum(-1)
        first = x[..., 0]
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
