"""Learning a noise schedule while the network is trained (Generative bilevel, section 4.2 and Algorithm 6).

    x: the schedule's parameters;  u: the network's;  alpha_bar(x) from a `Family`
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    lower level   g(x, u) = E |network - eps|^2 / d  (eq. 24),  or E |network - v_t|^2 / d
    upper level   f(x, u) = quality of the samples of S deterministic DDIM steps with the network          (eq. 26)

The two lower levels are the same loss with weights 1 and 1 / alpha_bar_t (Salimans and Ho 2022), and a network that can
be any function has the same minimiser under both. Where a schedule ends near alpha_bar = 0 the second is needed: DDIM
divides an error of eps by sqrt(alpha_bar_T), which is 5e-5 for the cosine schedule of 1000 steps.

Both are objectives for `algorithms.bilevel`: g for autograd, whose derivative in x is, for a network that predicts eps,
appendix D.2's; and f for two-point estimates with the same initial noise at both points (`ZerothOrder`), or for
autograd through the sampler.

    lower, upper = ScoreMatching(family, network, batch), Quality(family, network, distance, noise, S=10)
    f, g = ZerothOrder(upper, std, directions), Smooth(lower)
    run = PenaltyBilevel(f, g, Descent(f, g, adam), x, u, gamma=100.0, optimizer=adam, project=family.valid)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from algorithms.bilevel import Draw
from algorithms.chain import Params
from algorithms.schedules import Family, ddim_times

Network = Callable[[Params, Tensor, Tensor], Tensor]
"""network(u, x_t, t): what is predicted of x_t (*batch, n, *shape) at times t, (n,) of 1..T, as (*batch, n, *shape)."""

Target = Literal["epsilon", "v"]
"""What a network predicts."""

Batch = Callable[[Draw], tuple[Tensor, Tensor, Tensor]]
"""A draw's data x_0 and noise, each (*batch, n, *shape), and times (n,) of 1..T."""


@dataclass(frozen=True, eq=False)
class ScoreMatching:
    """The lower level: the mean squared error of the network's prediction, per number, (*batch,).

    Raises:
        ValueError: for an unknown target.
    """

    family: Family
    network: Network
    batch: Batch
    target: Target = "v"

    def __post_init__(self) -> None:
        _check_target(self.target)

    def __call__(self, x: Params, u: Params, draw: Draw) -> Tensor:
        data, noise, times = self.batch(draw)
        alpha_bar = self.family(x)
        level = _spread(alpha_bar[..., times], data)
        signal, spread = root(level), root(1 - level)
        noisy = signal * data + spread * noise
        wanted = noise if self.target == "epsilon" else signal * noise - spread * data
        error = (self.network(u, noisy, times) - wanted).square()
        return error.flatten(alpha_bar.ndim - 1).mean(-1)


@dataclass(eq=False)
class Quality:
    """The upper level: a distance of the samples from the data, (*batch,).

    Attributes:
        distance: (samples (*batch, n, *shape), draw) -> (*batch,), smaller is better.
        noise: a draw's initial noise, (*batch, n, *shape).
        S: steps of the sampler, at `ddim_times`.
        calls: how often samples have been drawn.
        network_calls: how often the network has been called on a whole batch.

    Raises:
        ValueError: unless 2 <= S <= T, or for an unknown target; in a call, as `ddim` does.
    """

    family: Family
    network: Network
    distance: Callable[[Tensor, Draw], Tensor]
    noise: Callable[[Draw], Tensor]
    S: int
    target: Target = "v"
    calls: int = 0
    network_calls: int = 0
    times: Tensor = field(init=False)

    def __post_init__(self) -> None:
        _check_target(self.target)
        self.times = ddim_times(self.family.T, self.S)

    def __call__(self, x: Params, u: Params, draw: Draw) -> Tensor:
        return self.distance(self.sample(x, u, self.noise(draw)), draw)

    def sample(self, x: Params, u: Params, noise: Tensor) -> Tensor:
        """Return the samples (*batch, n, *shape) that S steps of DDIM make of initial noise of that shape."""
        self.calls += 1
        self.network_calls += self.S
        return ddim(self.network, u, noise, self.family(x)[..., self.times], self.times, self.target)


def ddim(network: Network, u: Params, noise: Tensor, alpha_bar: Tensor, times: Tensor, target: Target = "v") -> Tensor:
    """Take deterministic DDIM steps (Song et al. 2021, eq. 12; eta = 0) from the last of the times to x_0.

    Args:
        noise: x_T, (*batch, n, *shape).
        alpha_bar: at the times, (*batch, S), falling.
        times: (S,), increasing: what the network is told.

    Returns:
        (*batch, n, *shape).

    Raises:
        ValueError: for an unknown target, or if eps is the target and an alpha_bar is 0, by whose root it divides.
    """
    _check_target(target)
    if target == "epsilon" and not bool((alpha_bar > 0).all()):
        raise ValueError("target must be 'v' where alpha_bar is 0, got 'epsilon'")
    x, n = noise, noise.shape[alpha_bar.ndim - 1]
    for i in range(len(times) - 1, -1, -1):
        level = _spread(alpha_bar[..., i : i + 1], x)
        below = torch.ones_like(level) if i == 0 else _spread(alpha_bar[..., i - 1 : i], x)
        signal, spread = root(level), root(1 - level)
        output = network(u, x, times[i].to(noise.device).expand(n))
        if target == "v":
            clean, epsilon = signal * x - spread * output, signal * output + spread * x
        else:
            clean, epsilon = (x - spread * output) / signal, output
        x = root(below) * clean + root(1 - below) * epsilon
    return x


def root(level: Tensor) -> Tensor:
    """The square root, as a constant where the level is 0: the form "chen" ends there, whatever its parameters."""
    return torch.where(level > 0, level, 1.0).sqrt() * (level > 0)


def _check_target(target: str) -> None:
    if target not in get_args(Target):
        raise ValueError(f"target must be one of {get_args(Target)}, got {target!r}")


def _spread(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))
