r"""Guided sampling: a chain steered to a target of the linearised reward (Guo et al. 2024, arXiv 2404.14743).

The chain predicts the noise in x_t, hence x_0-hat = E[x_0 | x_t]. Guidance adds the gradient of a look-ahead loss,

    epsilon + noise_level(t) b_t grad_{x_t} (y - r_lin(x_0-hat(x_t)))^2 / 2,      r_lin(x_0) = offset + <gradient, x_0>,

which is the score less b_t grad (...), as epsilon = -noise_level(t) * score. The gradient goes through the network.
Published forms count b differently: beta(t) (y - ...)^2 without the half is b = 2 beta.

    samples, rounds = guided_sampling(chain, params, reward, strength=0.5, targets=(1.0, 2.0), samples=64, generator=g)

is "Generative Bilevel", Algorithm 5: sample, linearise the reward at the mean of the samples, sample with the next
target. For a constant b its law is not the tilt exp(r / lambda) of the chain's own: the variance along the gradient
shrinks, and the mean does not leave the neighbourhood of reward y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from algorithms.chain import Around, Chain, Condition, Noise, Params, advance, for_reward, of_samples

Reward = Callable[[Tensor, Tensor | None], Tensor]
"""reward(x_0 (n, *shape), condition) -> (n,), with autograd's gradient; an `algorithms.objective.Reward` is one."""

Gradient = Literal["mean", "samples", "own", "released"]


@runtime_checkable
class Predicting(Chain, Protocol):
    """A chain whose steps come from a prediction of the noise: mean(...) == step(x, predict(...), t).

    x_t is a multiple of x_0 plus noise_level(t) times standard normal noise.
    """

    def predict(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        """Return the predicted noise epsilon, (n, *shape); samples must not influence each other."""
        ...

    def denoised(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return x_0-hat, (n, *shape): the x_0 for which `epsilon` is the noise in x_t = x."""
        ...

    def step(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return the mean of x_{t-1}, (n, *shape)."""
        ...

    def noise_level(self, t: int) -> float:
        """Return sqrt(1 - alpha_bar_t), or sigma_t where the noise is added to an unscaled x_0."""
        ...


@dataclass(frozen=True, eq=False)
class Linearised:
    """r_lin(x_0) = offset + <gradient, x_0>, one for all samples or one for each.

    Attributes:
        gradient: (*shape), or (n, *shape).
        offset: a number, or (n,) with a gradient for each sample.
    """

    gradient: Tensor
    offset: Tensor | float

    def __call__(self, x0: Tensor) -> Tensor:
        """Return r_lin of samples (n, *shape), (n,).

        Raises:
            ValueError: if the gradient is neither of one sample's shape nor of all samples'.
        """
        if self.gradient.shape not in (x0.shape, x0.shape[1:]):
            raise ValueError(
                f"gradient has shape {tuple(self.gradient.shape)}: must be {tuple(x0.shape[1:])}, or "
                f"{tuple(x0.shape)} for one of each sample"
            )
        return self.offset + (self.gradient * x0).flatten(1).sum(1)

    def of(self, samples: slice | Tensor) -> Linearised:
        """Return the linearised reward of some of the samples."""
        if isinstance(self.offset, Tensor) and self.offset.dim() == 1:
            return Linearised(self.gradient[samples], self.offset[samples])
        return self


@dataclass(frozen=True, eq=False)
class Guided(Around):
    """A chain steered to r_lin(x_0) = target, as a `Chain` for sampling: its mean has no graph.

    Every sample has its own loss. Only the mean differs from the given chain's; of a deterministic chain that is the
    guided ODE's step, whose law differs from the guided SDE's.

    Attributes:
        strength: b > 0, of every step, or (T,) with entry t - 1 that of step t.
        target: y.

    Raises:
        ValueError: if the chain does not predict noise; if the strength is not positive and finite, or not one number
            per step; if the target is not finite.
    """

    chain: Predicting
    strength: float | Sequence[float]
    target: float
    reward: Linearised

    def __post_init__(self) -> None:
        _check_chain(self.chain)
        _check_strength(self.strength, self.chain.steps)
        if not math.isfinite(self.target):
            raise ValueError(f"target must be finite, got {self.target}")

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        fixed = {name: p.detach() for name, p in params.items()}  # autograd then keeps what x's gradient needs only
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            epsilon = self.chain.predict(fixed, leaf, t, condition)
            miss = self.target - self.reward(self.chain.denoised(leaf, epsilon, t))
            # The sum, not the mean: a sample's gradient must not depend on how many others there are.
            (slope,) = torch.autograd.grad(0.5 * miss.square().sum(), leaf)
        scale = self.chain.noise_level(t) * _at(self.strength, t)
        return self.chain.step(leaf.detach(), epsilon.detach() + scale * slope, t)


@dataclass(frozen=True)
class Round:
    """What a round of guided sampling aimed at (None before there is guidance) and its samples' mean reward."""

    target: float | None
    reward: float


Callback = Callable[[int, Round, Tensor], None]
"""Called as callback(number, round, samples) after every round; round 0 is the one without guidance."""


def guided_sampling(
    chain: Predicting,
    params: Params,
    reward: Reward,
    *,
    strength: float | Sequence[float],
    targets: Sequence[float],
    samples: int,
    generator: torch.Generator,
    condition: Condition = None,
    gradient: Gradient = "mean",
    redraw: bool = False,
    batch: int | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, tuple[Round, ...]]:
    """Return the samples of the last round, (n, *shape), and all rounds: "Generative Bilevel", Algorithm 5.

    Round 0 samples the chain itself; round k steers it to targets[k - 1] of the reward linearised at the samples of
    round k - 1 (`linearise`).

    Args:
        strength: b, as in `Guided`.
        targets: y of rounds 1, 2, ..., which must not fall.
        condition: of the samples; its rows must be alike for the reward where they share a linearisation.
        gradient: where the reward is linearised. "released" also divides the strength by the number of samples, as the
            mean over the batch in the released code's loss does.
        redraw: draw new noise every round: given the linearisation, samples are then independent draws of the guided
            chain. By default all rounds share their noise, so that they differ by the guidance alone and a sample has
            a predecessor whose gradient is its own.
        batch: samples at a time, to save memory. All noise is drawn before, so that it does not move the result.

    Raises:
        ValueError: as `Guided` and `linearise`; if targets are empty, not finite or fall, there are no samples, batch
            is not positive, or `redraw` takes a sample's "own" predecessor from it; if params is empty.
    """
    _check_chain(chain)
    _check_strength(strength, chain.steps)
    goals = tuple(float(y) for y in targets)
    if not goals or not all(map(math.isfinite, goals)) or any(b < a for a, b in zip(goals, goals[1:], strict=False)):
        raise ValueError(f"targets must be finite numbers, at least one, that do not fall, got {list(goals)}")
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    _check_gradient(gradient, condition)
    if redraw and gradient in ("own", "released"):
        raise ValueError(
            f"redraw must be False with gradient={gradient!r}: fresh samples have no gradient of their own"
        )
    if not params:
        raise ValueError("params must hold a tensor, whose type and device are the latents', got none")

    parts = list(_parts(samples, batch))
    divided = samples if gradient == "released" else 1
    b = strength / divided if isinstance(strength, int | float) else [s / divided for s in strength]
    noise = _draw(chain, params, samples, generator)
    x0 = _sample(lambda part: chain, params, noise, condition, parts)
    rounds: list[Round] = []

    def record(target: float | None) -> None:
        with torch.no_grad():
            rounds.append(Round(target, float(_values(reward, x0, condition, parts).mean())))
        if callback is not None:
            callback(len(rounds) - 1, rounds[-1], x0)

    record(None)
    for target in goals:
        linear = linearise(reward, x0, condition, gradient, batch)
        if redraw:
            noise = _draw(chain, params, samples, generator)
        x0 = _sample(partial(_steered, chain, b, target, linear), params, noise, condition, parts)
        record(target)
    return x0, tuple(rounds)


def linearise(
    reward: Reward, x0: Tensor, condition: Condition = None, gradient: Gradient = "mean", batch: int | None = None
) -> Linearised:
    """Return the reward linearised at samples x0 (n, *shape).

    * "mean": value and gradient at the mean of the samples, as Algorithm 5 says.
    * "samples": the mean gradient of the samples, through their mean and their mean reward.
    * "own": each sample's own value and gradient.
    * "released": each sample's own gradient, through the sample and the *mean* reward of the batch: what the released
      code does where its reward returns a column (n, 1), which broadcasts.

    Raises:
        ValueError: if `gradient` is unknown, or shared by samples of different conditions; if the reward does not
            return (n,) with a graph to x0, or its value or gradient is not finite; if batch is not positive.
    """
    _check_gradient(gradient, condition)
    x0 = x0.detach()
    if gradient == "mean":
        points, condition, parts = x0.mean(0, keepdim=True), of_samples(condition, slice(0, 1)), [slice(0, 1)]
    else:
        points, parts = x0, list(_parts(len(x0), batch))
    values = torch.empty(len(points), dtype=x0.dtype, device=x0.device)
    slopes = torch.empty_like(points)
    for part in parts:
        values[part], slopes[part] = _slope(reward, points[part], of_samples(condition, part))
    if gradient in ("mean", "samples"):
        shared = slopes.mean(0)
        return Linearised(shared, values.mean() - (shared * points.mean(0)).sum())
    if gradient == "released":
        values = values.mean().expand(len(values))
    return Linearised(slopes, values - (slopes * points).flatten(1).sum(1))


def _slope(reward: Reward, x0: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Return the rewards (n,) of samples and their gradients (n, *shape)."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        values = _value(reward, leaf, condition)
        slope = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
    if slope is None:
        raise ValueError("reward must be differentiable: its value has no gradient in the samples")
    if not bool(slope.isfinite().all()):
        raise ValueError("reward must have finite gradients, got one that is not")
    return values.detach().to(x0), slope


def _values(reward: Reward, x0: Tensor, condition: Condition, parts: Sequence[slice]) -> Tensor:
    return torch.cat([_value(reward, x0[part], of_samples(condition, part)) for part in parts])


def _value(reward: Reward, x0: Tensor, condition: Condition) -> Tensor:
    values = reward(x0, for_reward(condition))
    if values.shape != (len(x0),):
        raise ValueError(f"reward must return shape ({len(x0)},), one number per sample, got {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"reward must be finite, got {values.detach()[~values.isfinite()][0].item()}")
    return values


def _draw(chain: Chain, params: Params, samples: int, generator: torch.Generator) -> Noise:
    """Draw the noise of all samples on the generator's device, and put it on the parameters'."""
    like = next(iter(params.values()))
    options = {"generator": generator, "dtype": like.dtype, "device": generator.device}
    initial = torch.randn(samples, *chain.shape, **options).to(like.device)
    steps = torch.randn(chain.steps, samples, *chain.shape, **options).to(like.device)
    return Noise(initial, steps, torch.zeros(samples, dtype=torch.long))


def _steered(
    chain: Predicting, strength: float | Sequence[float], target: float, reward: Linearised, part: slice
) -> Guided:
    """Return the guided chain of some of the samples."""
    return Guided(chain, strength, target, reward.of(part))


def _sample(
    chain_of: Callable[[slice], Chain], params: Params, noise: Noise, condition: Condition, parts: Sequence[slice]
) -> Tensor:
    """Return x_0 of all samples, (n, *shape), one part of them after another."""
    ends: list[Tensor] = []
    for part in parts:
        chain, own = chain_of(part), noise.of(part)
        x = chain.initial(own.initial)
        steps = range(chain.steps, 0, -1)
        ends.append(advance(chain, params, x, own, steps, of_samples(condition, part))[0][-1])
    return torch.cat(ends)


def _parts(samples: int, batch: int | None) -> Iterator[slice]:
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    size = batch or max(samples, 1)
    return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def _at(strength: float | Sequence[float], t: int) -> float:
    return float(strength) if isinstance(strength, int | float) else float(strength[t - 1])


def _check_chain(chain: object) -> None:
    wanted = ("initial", "mean", "std", "predict", "denoised", "step", "noise_level")
    missing = [name for name in wanted if not callable(getattr(chain, name, None))]
    if missing:
        raise ValueError(f"chain must predict noise, but {type(chain).__name__} has no method {', '.join(missing)}")


def _check_strength(strength: float | Sequence[float], steps: int) -> None:
    each = [strength] if isinstance(strength, int | float) else list(strength)
    if len(each) != steps and not isinstance(strength, int | float):
        raise ValueError(f"strength has {len(each)} entries: must have one for each of the chain's {steps} steps")
    if not all(0 < b < math.inf for b in each):
        raise ValueError(f"strength must be positive and finite, got {strength}")


def _check_gradient(gradient: str, condition: Condition) -> None:
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")
    told = for_reward(condition)
    if gradient in ("mean", "samples") and told is not None and not bool((told == told[:1]).all()):
        raise ValueError(
            f"condition must be alike for all samples with gradient={gradient!r}, which they share: use 'own'"
        )
