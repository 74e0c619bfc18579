"""Gradient estimators by their names in the field: a credit matrix, the noise it needs, and wrappers that compose.

estimator = with_baseline(half_order(steps=50, length=5), LeaveOneOut())
noise = estimator.draw(chain, params, samples=64, generator=generator)
estimator.accumulate(chain, params, objective, noise)       # adds the ascent gradient of E[return] to .grad
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from algorithms import credit as credits
from algorithms.baselines import Baseline, Constant
from algorithms.chain import Chain, Condition, Noise, ParameterNoise, Params, Redrawn, Rollout, UnitNoise, of_samples
from algorithms.credit import Credit
from algorithms.division import WHOLE, Division
from algorithms.objective import Objective
from algorithms.sweep import Accumulate, Directional, PerSample, Readout, sweep

Flip = Literal["parameters", "chain"]


@dataclass(frozen=True, eq=False)
class Estimator:
    """An estimator of the gradient of E[return] in the parameters.

    Attributes:
        name: the field's name for it.
        credit: its credit matrix, or law of matrices.
        parameter_noise: noise of the last column, if that is used; the estimate is then one of the smoothed objective.
        baseline: taken off the return before it multiplies a score.
        flips: antithetic copies to average over.
    """

    name: str
    credit: Credit
    parameter_noise: ParameterNoise | None = None
    baseline: Baseline = Constant(0.0)
    flips: tuple[Flip, ...] = ()

    def __post_init__(self) -> None:
        if self.credit.uses_parameter_noise != (self.parameter_noise is not None):
            raise ValueError(f"{self.name}: parameter_noise must be given exactly if the last column is used")

    def draw(self, chain: Chain, params: Params, samples: int, generator: torch.Generator) -> Noise:
        """Draw all randomness of `samples` roll-outs on the generator's device, and put it on the parameters'."""
        like = next(iter(params.values()))
        options = {"generator": generator, "dtype": like.dtype, "device": generator.device}
        initial = torch.randn(samples, *chain.shape, **options).to(like.device)
        steps = torch.randn(chain.steps, samples, *chain.shape, **options).to(like.device)
        outcome = self.credit.draw(samples, generator)
        return Noise(initial, steps, outcome, self._draw_unit(chain, params, samples, generator))

    def _draw_unit(self, chain: Chain, params: Params, samples: int, generator: torch.Generator) -> UnitNoise | None:
        source = self.parameter_noise
        if source is None:
            return None
        if not source.redrawn:
            return {name: source.draw((chain.steps, samples, *p.shape), generator, p) for name, p in params.items()}
        seeds = torch.randint(2**62, (len(params), chain.steps, samples), generator=generator, device=generator.device)
        pairs = zip(seeds.cpu(), params.items(), strict=True)
        return {name: Redrawn(source, own, p.detach()) for own, (name, p) in pairs}

    def per_sample(
        self, chain: Chain, params: Params, objective: Objective, noise: Noise, condition: Condition = None
    ) -> Params:
        """Return each sample's estimate, (n, *parameter shape) per parameter."""
        readout = PerSample(params, noise.samples)
        copies = len(self.feed(chain, params, objective, noise, condition, readout))
        return {name: value / copies for name, value in readout.total.items()}

    def directional(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        noise: Noise,
        direction: Params,
        condition: Condition = None,
    ) -> Tensor:
        """Return each sample's estimate of the derivative along `direction`, (n,)."""
        readout = Directional(params, noise.samples, direction)
        copies = len(self.feed(chain, params, objective, noise, condition, readout))
        return readout.total / copies

    def accumulate(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        noise: Noise,
        condition: Condition = None,
        division: Division = WHOLE,
        roll: Rollout | None = None,
    ) -> Tensor:
        """Add the batch mean of the estimates to the parameters' `.grad` (the direction of ascent).

        `noise` and `condition` are the whole batch's; where `division` shares it with other processes, only this one's
        share of the mean is added. `roll` is the share's roll-outs, if other parameters made them (see `sweep`).
        Returns the returns of all roll-outs of the share, those of antithetic copies after the others'.
        """
        own = division.own(noise.samples)
        readout = Accumulate(params, noise.samples)
        arguments = (chain, params, objective, noise.of(own), of_samples(condition, own), readout, division, roll)
        returns = self.feed(*arguments)
        for name, p in params.items():
            grad = readout.total[name] / len(returns)
            p.grad = grad if p.grad is None else p.grad + grad
        return torch.cat(returns)

    def feed(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        noise: Noise,
        condition: Condition,
        readout: Readout,
        division: Division = WHOLE,
        roll: Rollout | None = None,
    ) -> list[Tensor]:
        """Sweep over the noise and its antithetic copies, into one readout; return the returns of each."""
        fixed = {name: p.detach() for name, p in params.items()}
        copies = [noise]
        for flip in self.flips:
            copies += [copy.flip(flip) for copy in copies]
        std = 0.0 if self.parameter_noise is None else self.parameter_noise.std
        return [
            sweep(chain, fixed, objective, self.credit, self.baseline, std, copy, condition, readout, division, roll)
            for copy in copies
        ]


def with_baseline(estimator: Estimator, baseline: Baseline) -> Estimator:
    """Return `estimator` with its returns taken relative to `baseline`; the mean is the same."""
    return replace(estimator, baseline=baseline)


def antithetic(estimator: Estimator, over: Flip) -> Estimator:
    """Return the average of `estimator` and its copy with the sign of one noise reversed, all else in common.

    Over "parameters" the one-sided zeroth-order estimator becomes the two-sided one (SPSA).

    Raises:
        ValueError: if `over` is unknown, already there, or asks for parameter noise that the estimator lacks.
    """
    if over not in ("parameters", "chain"):
        raise ValueError(f"over must be 'parameters' or 'chain', got {over!r}")
    if over in estimator.flips:
        raise ValueError(f"{estimator.name} is already antithetic over {over!r}")
    if over == "parameters" and estimator.parameter_noise is None:
        raise ValueError(f"{estimator.name} has no parameter noise to be antithetic over")
    return replace(estimator, name=f"{estimator.name}, antithetic", flips=(*estimator.flips, over))


def with_redrawn_noise(estimator: Estimator) -> Estimator:
    """Return `estimator` with its parameter noise, if any, drawn again at every use instead of kept."""
    if estimator.parameter_noise is None:
        return estimator
    return replace(estimator, parameter_noise=replace(estimator.parameter_noise, redrawn=True))


def first_order(steps: int) -> Estimator:
    """Full back-propagation through the chain."""
    return Estimator("first order", credits.first_order(steps))


def truncated(steps: int, length: int) -> Estimator:
    """Back-propagation through the last `length` steps (DRaFT-K); biased by the steps it leaves out."""
    return Estimator(f"truncated({length})", credits.truncated(steps, length))


def random_truncation(law: np.ndarray, debiased: bool = False) -> Estimator:
    """Back-propagation through a random number of last steps (AlignProp), debiased by inclusion weights if asked."""
    name = "debiased random truncation" if debiased else "random truncation"
    return Estimator(name, credits.random_truncation(law, debiased))


def stratified_truncation(law: np.ndarray) -> Estimator:
    """SRT: debiased random truncation whose lengths have fixed counts in every batch, in random order."""
    return Estimator("SRT", credits.random_truncation(law, debiased=True, stratified=True))


def half_order(steps: int, length: int) -> Estimator:
    """Half-order estimator over blocks of `length` steps."""
    return Estimator(f"half order({length})", credits.half_order(steps, length))


def policy_gradient(steps: int) -> Estimator:
    """REINFORCE along the chain (DDPO's gradient)."""
    return Estimator("policy gradient", credits.policy_gradient(steps))


def zeroth_order(steps: int, std: float, kind: Literal["gaussian", "rademacher"] = "gaussian") -> Estimator:
    """One-sided zeroth-order estimator with fresh parameter noise at every step; see `antithetic`."""
    return Estimator("zeroth order", credits.zeroth_order(steps), ParameterNoise(std, kind))
