"""The estimators' variance on a learned sampler, measured, with their cost in network calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from algorithms import estimators as named
from algorithms import rlr
from algorithms.baselines import Constant
from algorithms.chain import rollout
from algorithms.estimators import Estimator, antithetic, with_baseline
from algorithms.stratified import fitted_truncation
from algorithms.telescoped import band, telescoped
from toy.comparison import MU, Problem
from toy.experiments import Block, Sampler, generator, gradients
from verdicts.streams import Stream

GROUP = 32  # the batch in which SRT's counts are fixed


@dataclass(frozen=True)
class Candidate:
    """How to make an estimator for a problem; the flags say what it needs."""

    make: Callable[[Problem, torch.Generator], Estimator]
    pathwise: bool = True  # needs the reward's gradient, or at least its continuity
    short: bool = False  # takes time or memory that grows fast with T: T <= 10


def _steps(make: Callable[[int], Estimator]) -> Callable[[Problem, torch.Generator], Estimator]:
    return lambda problem, source: make(problem.chain.steps)


def _tho(width: int) -> Callable[[Problem, torch.Generator], Estimator]:
    def make(problem: Problem, source: torch.Generator) -> Estimator:
        baseline = Constant(mean_return(problem, source))
        support = band(problem.chain.steps, width, pathwise=problem.objective.reward.differentiable)
        arguments = (problem.chain, problem.params, problem.objective, support, source)
        return telescoped(*arguments, baseline=baseline, pilot=512, batch=64)

    return make


def _srt(problem: Problem, source: torch.Generator) -> Estimator:
    return fitted_truncation(problem.chain, problem.params, problem.objective, 2.0, source, pilot=1024)


def _pair(steps: int, h: int) -> Estimator:
    """RLR with blocks of h steps, as the paper's "sub-chain of length h" says, and both signs of the noise."""
    return rlr.rlr(steps, h, MU, reading="II", zeroth="antithetic")


def _zeroth(steps: int) -> Estimator:
    return antithetic(named.zeroth_order(steps, MU), "parameters")


CANDIDATES: dict[str, Candidate] = {
    "first order": Candidate(_steps(named.first_order)),
    "truncated(2)": Candidate(_steps(lambda steps: named.truncated(steps, 2))),
    "SRT(2)": Candidate(_srt),
    "policy gradient": Candidate(_steps(named.policy_gradient), pathwise=False),
    "half order(2)": Candidate(_steps(lambda steps: named.half_order(steps, 2)), pathwise=False),
    "THO(2)": Candidate(_tho(2), pathwise=False),
    "THO(3)": Candidate(_tho(3), pathwise=False, short=True),
    # With jumps in the reward both signs of so small a noise nearly always fall on the same side: nothing to measure.
    "zeroth order, antithetic": Candidate(_steps(_zeroth), short=True),
    "RLR(2), one-sided": Candidate(_steps(lambda steps: rlr.rlr(steps, 2, MU, reading="II")), short=True),
    "RLR(2), antithetic": Candidate(_steps(lambda steps: _pair(steps, 2)), short=True),
    "RLR(5), antithetic": Candidate(_steps(lambda steps: _pair(steps, 5)), short=True),
    "RLR(T-1)": Candidate(_steps(lambda steps: rlr.rlr(steps, steps - 1, MU, reading="II"))),  # its block is 2..T
    "HT-HO(2)": Candidate(_steps(lambda steps: Estimator("HT-HO", rlr.inverse_probability(steps, 2, reading="II")))),
}  # fmt: skip


def names(problem: Problem) -> list[str]:
    """Return the candidates that the problem allows."""
    return [
        name
        for name, candidate in CANDIDATES.items()
        if (problem.objective.reward.differentiable or not candidate.pathwise)
        and (problem.chain.steps <= 10 or not candidate.short)
    ]


def estimator(problem: Problem, name: str, stream: Stream) -> Estimator:
    """Make a candidate, its weights fitted on a pilot of its own, with the mean of other roll-outs as its baseline."""
    made = CANDIDATES[name].make(problem, generator(stream.child("fit", name), 0))
    return with_baseline(made, Constant(mean_return(problem, generator(stream.child("baseline"), 0))))


def mean_return(problem: Problem, source: torch.Generator, samples: int = 16384) -> float:
    """Return the mean reward of some roll-outs."""
    noise = named.first_order(problem.chain.steps).draw(problem.chain, problem.params, samples, source)
    return float(problem.objective.reward(rollout(problem.chain, problem.params, noise).latents[0], None).mean())


@dataclass(frozen=True)
class Measured:
    """One estimator on one problem.

    Attributes:
        relative_variance: of one sample, trace of the covariance over |gradient|^2; for SRT N times a batch's.
        error: its standard error.
        calls: network calls of one sample, copies included.
        unbiased: whether the rows sum to one.
    """

    name: str
    relative_variance: float
    error: float
    calls: float
    unbiased: bool

    @property
    def work(self) -> float:
        """Relative variance times calls: what one network call's worth of averaging leaves."""
        return self.relative_variance * self.calls


def squares(problem: Problem, made: Estimator, size: int = 1024) -> Sampler:
    """Sample squared norms of the estimates, (size, 1); of batches' means, times the batch, for stratified ones."""
    group = GROUP if made.credit.stratified else 1

    def sampler(stream: Stream) -> Block:
        block = gradients(problem.chain, problem.params, problem.objective, made, size * group, group)(stream)
        return lambda index: group * (block(index) ** 2).sum(1, keepdims=True)

    return sampler


def network_calls(made: Estimator) -> float:
    """Return the calls of one sample, antithetic copies included."""
    return made.credit.calls() * 2 ** len(made.flips)


def squared_gradient(problem: Problem, made: Estimator, stream: Stream, blocks: int = 4) -> float:
    """Estimate |gradient|^2 without bias: the mean product of two different samples' estimates."""
    sample = gradients(problem.chain, problem.params, problem.objective, made, 1 << 12)(stream)
    each = np.concatenate([sample(index) for index in range(blocks)])
    total = each.sum(0)
    return float(total @ total - (each**2).sum()) / (len(each) * (len(each) - 1))


def frontier(problem: Problem, stream: Stream, samples: int = 4096) -> tuple[Measured, ...]:
    """Measure every candidate that the task allows, on `samples` roll-outs (a quarter of them with parameter noise)."""
    made = {name: estimator(problem, name, stream) for name in names(problem)}
    square = squared_gradient(problem, made["THO(2)"], stream.child("gradient"))
    return tuple(
        _measured(problem, e, name, square, stream.child("measure", name), samples) for name, e in made.items()
    )


def _measured(problem: Problem, made: Estimator, name: str, square: float, stream: Stream, samples: int) -> Measured:
    group = GROUP if made.credit.stratified else 1
    size = samples // 4 if made.parameter_noise is not None else samples
    each = gradients(problem.chain, problem.params, problem.objective, made, size, group)(stream)(0)
    deviations = group * ((each - each.mean(0)) ** 2).sum(1) * len(each) / (len(each) - 1)
    error = float(deviations.std(ddof=1)) / math.sqrt(len(each))
    unbiased = bool(np.allclose(made.credit.row_sums(), 1))
    return Measured(name, float(deviations.mean()) / square, error / square, network_calls(made), unbiased)
