"""Small denoising chains of Implicit Diffusion's (5): Euler steps with an exact, an affine or a nonlinear score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.chain import Chain, Noise, Params
from algorithms.objective import Objective
from algorithms.queue import Queue

Score = Callable[[Params, Tensor, float | Tensor], Tensor]
"""score(params, y, time) like y; the time of the noise runs from T down to h."""


@dataclass(frozen=True)
class Denoiser:
    """N Euler steps, h = T/N, of dY = {Y + 2 s(Y, time)} dt + sqrt(2) dB; step t = N..1 is at time t h.

    Latents are (n, d). Scores act entry by entry, so that d entries with parameters (d,) are d chains side by side.

    Attributes:
        start: mean and standard deviation of every entry of Y_0.
        noise: 0 takes the noise of the steps away.
    """

    score: Score
    steps: int
    horizon: float
    dim: int = 1
    start: tuple[float, float] = (0.0, 1.0)
    noise: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def initial(self, noise: Tensor) -> Tensor:
        mean, std = self.start
        return mean + std * noise

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        h = self.horizon / self.steps
        return x + h * (x + 2 * self.score(params, x, t * h))

    def means(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
        h = self.horizon / self.steps
        return x + h * (x + 2 * self.score(params, x, (steps.to(x) * h)[:, None, None]))

    def std(self, t: int) -> float:
        return self.noise * math.sqrt(2 * self.horizon / self.steps)


def of_a_gaussian(params: Params, y: Tensor, time: float | Tensor) -> Tensor:
    """The exact score of data N(theta, 1): the twin of `theory.queue.LinearDenoiser`."""
    return -(y - params["theta"] * torch.exp(-torch.as_tensor(time, dtype=y.dtype)))


def affine(params: Params, y: Tensor, time: float | Tensor) -> Tensor:
    """-y, the score of the standard normal law, plus slope * y + shift: a fine-tuned model beside a pretrained one."""
    return -y + params["slope"] * y + params["shift"]


def two_wells(params: Params, y: Tensor, time: float | Tensor) -> Tensor:
    """The score that makes the drift -y + a sin(2 y) + b, theta = (a, b): the twin of `theory.girsanov.Drift`."""
    return -y + (params["theta"][0] * torch.sin(2 * y) + params["theta"][1]) / 2


@dataclass(frozen=True)
class Miss:
    """R(y) = -|y - target|^2 / 2."""

    target: float
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -0.5 * (x0 - self.target).square().sum(1)


@dataclass(frozen=True)
class Nothing:
    """R = 0: what is left of an objective are its running costs."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return 0 * x0.sum(1)


def by_queue(
    queue: Queue,
    chain: Chain,
    objective: Objective,
    start: Tensor,
    rates: float | Tensor,
    updates: int,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Return theta_0, ..., theta_K (K + 1, d) of plain ascent by a queue, in the parameter "theta" (d,).

    `rates` are of the gradient of the batch mean, one for all entries or one for each.
    """
    theta = start.clone().requires_grad_()
    path = [start.clone()]
    for _ in range(updates):
        for _ in queue.updates(chain, {"theta": theta}, objective, samples, generator):
            assert theta.grad is not None
            with torch.no_grad():
                theta += rates * theta.grad
            theta.grad = None
            path.append(theta.detach().clone())
    return torch.stack(path)


def cubature(chain: Chain) -> Noise:
    """Noise whose plain average is the expectation of every polynomial of degree at most 3 in it.

    With D independent normal numbers to a roll-out these are the 2 D roll-outs with one of them at +-sqrt(D) and zeros
    elsewhere: no sampling error for what is quadratic in the noise, as path KLs of affine chains are.
    """
    size = math.prod(chain.shape)
    count = (chain.steps + 1) * size
    nodes = math.sqrt(count) * torch.cat([torch.eye(count), -torch.eye(count)]).double()
    parts = nodes.reshape(2 * count, chain.steps + 1, *chain.shape).movedim(1, 0)
    return Noise(parts[0], parts[1:], torch.zeros(2 * count, dtype=torch.long))
