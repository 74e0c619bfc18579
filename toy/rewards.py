"""Rewards that excite what a quadratic cannot: a kink, an oscillation, bumps, a step, smooth ramps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.chain import Condition
from algorithms.objective import Reward


@dataclass(frozen=True)
class Sine:
    """Oscillating: R(x) = sum_i sin(frequency x_i)."""

    frequency: float
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return torch.sin(self.frequency * x0).sum(1)


@dataclass(frozen=True)
class Power:
    """Polynomial: R(x) = sum_i x_i^exponent."""

    exponent: int
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return (x0**self.exponent).sum(1)


@dataclass(frozen=True)
class Kink:
    """Kinked: R(x) = -sum_i |x_i - target|; Lipschitz, which is what column 0 needs."""

    target: float
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return -(x0 - self.target).abs().sum(1)


@dataclass(frozen=True)
class Bump:
    """Smooth and bounded: R(x) = exp(-|x - target|^2 / (2 width^2)), the same target in every coordinate."""

    target: float
    width: float
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return torch.exp(-0.5 * (x0 - self.target).square().sum(1) / self.width**2)


@dataclass(frozen=True)
class Bumps:
    """A mixture of bumps: R(x) = sum_i weights[i] exp(-|x - targets[i]|^2 / (2 width^2)).

    Raises:
        ValueError: unless there is one weight per target, at least one of them, and width > 0.
    """

    targets: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    width: float
    differentiable: bool = True

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.weights):
            raise ValueError(f"weights must be one per target, got {len(self.weights)} for {len(self.targets)} targets")
        if not self.width > 0:
            raise ValueError(f"width must be > 0, got {self.width}")

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        squares = (x0[:, None] - x0.new_tensor(self.targets)).square().sum(2)
        return torch.exp(-0.5 * squares / self.width**2) @ x0.new_tensor(self.weights)


@dataclass(frozen=True)
class LogCosh:
    """A smooth valley: R(x) = weight log cosh(<direction, x>).

    |weight| |direction| bounds its gradient, and |weight| |direction|^2 its Hessian; both are sharp.
    """

    direction: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        z = _along(x0, self.direction)
        return self.weight * (torch.logaddexp(z, -z) - math.log(2.0))


@dataclass(frozen=True)
class Tanh:
    """A smooth step: R(x) = weight tanh(<direction, x>).

    |weight| |direction| bounds its gradient, and 4 / 3^1.5 |weight| |direction|^2 its Hessian; both are sharp.
    """

    direction: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.weight * torch.tanh(_along(x0, self.direction))


@dataclass(frozen=True)
class Softplus:
    """A smooth ramp: R(x) = weight log(1 + exp(sharpness (<direction, x> - start))) / sharpness.

    |weight| |direction| bounds its gradient, and sharpness / 4 |weight| |direction|^2 its Hessian; both are sharp.

    Raises:
        ValueError: unless sharpness > 0.
    """

    sharpness: float
    start: float = 0.0
    direction: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    differentiable: bool = True

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be > 0, got {self.sharpness}")

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        z = self.sharpness * (_along(x0, self.direction) - self.start)
        return self.weight / self.sharpness * torch.nn.functional.softplus(z, threshold=40.0)


@dataclass(frozen=True)
class Sum:
    """The sum of rewards, above all of ramps in several directions; differentiable if all of them are.

    Raises:
        ValueError: if there is none.
    """

    terms: tuple[Reward, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms must be at least one reward, got none")

    @property
    def differentiable(self) -> bool:
        return all(term.differentiable for term in self.terms)

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return torch.stack([term(x0, condition) for term in self.terms]).sum(0)


@dataclass(frozen=True)
class Threshold:
    """Black box: 1 where another reward exceeds a level, else 0."""

    reward: Reward
    level: float
    differentiable: bool = False

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return (self.reward(x0, condition) > self.level).to(x0)


@dataclass(frozen=True)
class Indicator:
    """Black box: R(x) = 1 where x_1 > threshold; its autograd gradient is zero, so column 0 is refused."""

    threshold: float
    differentiable: bool = False

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return (x0[:, 0] > self.threshold).to(x0)


def _along(x0: Tensor, direction: tuple[float, ...]) -> Tensor:
    """Return <direction, x> (n,) for states x (n, d)."""
    return x0 @ x0.new_tensor(direction)
