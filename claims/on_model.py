"""Checks on a network: what a claim of the chapter *At scale* is judged on, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.baselines import Constant
from algorithms.chain import Condition, Noise, Params, for_reward, of_samples, rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, first_order, policy_gradient, with_baseline
from algorithms.objective import Objective
from algorithms.sweep import DirectionalSources, sweep
from claims.claim import Check, Context
from claims.judges import plan
from scale import audit
from scale.config import Config
from scale.task import Task, build
from toy.experiments import generator
from verdicts import exact, means
from verdicts.means import MeanResult

DOUBLE_UP_TO = 50_000_000
"""Parameters of the largest network that is audited in double precision, on the processor."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, eq=False)
class Model:
    """A model by its settings.

    Attributes:
        name: as the report calls it.
        settings: everything; `settings.audit` says how hard a check tries.
        sampled: whether checks that sample are made too; identities always are.
    """

    name: str
    settings: Config
    sampled: bool = True


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model with what the checks of one run share.

    Attributes:
        params: away from the start by a little: at the start LoRA's second factors are zero, and half of the slopes.
        direction: the natural gradient at the start, fitted on a pilot.
        slope: the derivative along it in the pilot; all sampled numbers are in units of it.
        mean_return: of the pilot, the baseline of every score.
        tolerance: of what must agree to rounding.
    """

    task: Task
    params: Params
    direction: Params
    slope: float
    mean_return: float
    tolerance: float

    @property
    def steps(self) -> int:
        return self.task.chain.steps

    def noise(self, samples: int, *address: str) -> tuple[Noise, Condition]:
        """Return roll-outs' noise of this address, and the condition of as many samples."""
        source = self.task.generator("audit", "noise", *address)
        noise = policy_gradient(self.steps).draw(self.task.chain, self.params, samples, source)
        return noise, self.task.condition(samples)

    def directions(self, count: int) -> list[Params]:
        """Return random directions of length one."""
        return [audit.random_direction(self.params, self.task.generator("audit", "direction", i)) for i in range(count)]

    def components(self, gradient: Params, size: float) -> np.ndarray:
        """Return a gradient's components along the natural and along random directions, in units of `size`."""
        directions = [self.direction, *self.directions(self.task.config.audit.directions)]
        return np.array([audit.along(gradient, d) for d in directions]) / size


@cache
def prepared(model: Model, cache_folder: Path, seed: int, double: bool = False) -> Prepared:
    """Build a model, and fit on a pilot what its checks need.

    Args:
        double: identities are judged in double precision where the network is small; samples in the model's own, which
            is several times faster and exact enough.
    """
    training = model.settings.training.model_copy(update={"seed": seed})
    task = build(model.settings.model_copy(update={"training": training}), cache_folder)
    dtype = next(task.chain.network.parameters()).dtype
    small = sum(p.numel() for p in task.chain.network.parameters()) <= DOUBLE_UP_TO
    if double and dtype == torch.float32 and small and task.device.type == "cpu":
        task, dtype = audit.in_double(task), torch.float64
    count, settings = task.config.audit.pilot, task.config.audit
    noise = policy_gradient(task.chain.steps).draw(task.chain, task.params, count, task.generator("audit", "pilot"))
    condition = task.condition(count)
    direction = audit.natural_direction(task, task.params, noise, condition, settings.batch, ridge=0.1)
    rewards, slopes = [], []
    fresh = policy_gradient(task.chain.steps).draw(task.chain, task.params, count, task.generator("audit", "slope"))
    for start in range(0, count, settings.batch):
        part = slice(start, min(start + settings.batch, count))
        own = of_samples(condition, part)
        x0 = rollout(task.chain, task.params, fresh.of(part), own).latents[0]
        with torch.no_grad():
            rewards.append(task.objective.reward(x0, for_reward(own)))
        slopes.append(reference(task, fresh.of(part), own, direction))
    return Prepared(
        task,
        audit.moved(task, task.generator("audit", "moved")),
        direction,
        float(torch.cat(slopes).mean()),
        float(torch.cat(rewards).mean()),
        TOLERANCES[dtype],
    )


def reference(task: Task, noise: Noise, condition: Condition, direction: Params) -> Tensor:
    """Return each sample's derivative along a direction at the start, by means that share nothing with the sweep.

    By forward mode through the whole roll-out; for a black-box reward by a central difference on common noise.
    """
    if task.objective.reward.differentiable:
        return audit.derivatives(task, task.params, noise, condition, direction)
    step, found = task.config.audit.step, []
    for sign in (1, -1):
        there = {name: p + sign * step * direction[name] for name, p in task.params.items()}
        with torch.no_grad():
            x0 = rollout(task.chain, there, noise, condition).latents[0]
            found.append(task.objective.reward(x0, for_reward(condition)))
    return (found[0] - found[1]) / (2 * step)


# --- judges -------------------------------------------------------------------------------------------------------

Numbers = Callable[[Prepared], Any]


@dataclass(frozen=True)
class Identity:
    """Two computations on the model agree to rounding."""

    model: Model
    reference: Numbers

    def __call__(self, subject: Numbers, context: Context) -> MeanResult:
        at = prepared(self.model, context.cache, context.stream.seed, double=True)
        estimate, expected = (np.atleast_1d(np.asarray(f(at), float)).ravel() for f in (subject, self.reference))
        return exact.agreement(estimate, expected, at.tolerance * max(1.0, float(np.abs(expected).max())))


@dataclass(frozen=True)
class Fewer:
    """The first of two numbers of the model is no larger than `factor` times the second."""

    model: Model
    factor: float

    def __call__(self, subject: Numbers, context: Context) -> MeanResult:
        at = prepared(self.model, context.cache, context.stream.seed)
        smaller, larger = (np.atleast_1d(np.asarray(values, float)) for values in subject(at))
        return exact.ordering(self.factor * larger, smaller, 0.0)


@dataclass(frozen=True, eq=False)
class Block:
    """Roll-outs that all sampled checks of a model share.

    Attributes:
        sources: (n, T, T + 1), each sample's h[t, k] along the direction; 0 for sources that do not exist.
        reference: (n,), each sample's derivative computed otherwise.
    """

    noise: Noise
    condition: Condition
    sources: Tensor
    reference: Tensor


def block_of(at: Prepared, index: int) -> Block:
    """Return block number `index` of a model's shared roll-outs; it is computed once in a process."""
    held = _BLOCKS.setdefault(at, {})
    if index not in held:
        held[index] = _make_block(at, index)
    return held[index]


_BLOCKS: dict[Prepared, dict[int, Block]] = {}


def _make_block(at: Prepared, index: int) -> Block:
    task, size = at.task, at.task.config.audit.batch
    start = with_baseline(Estimator("all", every_source(at)), Constant(at.mean_return))
    noise = start.draw(task.chain, task.params, size, task.generator("audit", "block", index))
    condition = task.condition(size, start=index * size)
    readout = DirectionalSources(task.params, size, at.direction)
    sweep(task.chain, task.params, task.objective, start.credit, start.baseline, 0.0, noise, condition, readout)
    sources = noise.initial.new_zeros(size, at.steps, at.steps + 1)
    for (t, k), value in readout.total.items():
        sources[:, t - 1, k] = value
    return Block(noise, condition, sources, reference(task, noise, condition, at.direction))


def every_source(at: Prepared) -> Credit:
    """Return a matrix with all sources: of the reward only where it has a gradient."""
    w = np.tril(np.ones((at.steps, at.steps + 1)), 1)
    if not at.task.objective.reward.differentiable:
        w[:, 0] = 0
    return Credit.of(np.concatenate([w, np.zeros((at.steps, 1))], 1))


@dataclass(frozen=True, eq=False)
class Sampled:
    """What is sampled: an estimator of the derivative, read off the shared roll-outs' sources.

    Attributes:
        value: (prepared, block, generator) -> (n,) instead, for what is no mixture of sources.
    """

    estimator: Estimator
    value: Callable[[Prepared, Block, torch.Generator], Tensor] | None = None

    def of(self, at: Prepared, block: Block, source: torch.Generator) -> Tensor:
        """Return each sample's estimate of the derivative, (n,)."""
        if self.value is not None:
            return self.value(at, block, source)
        if self.estimator.parameter_noise is not None:
            return own_estimates(self.estimator, at, block, source)
        credit = self.estimator.credit
        weights = torch.from_numpy(credit.matrices[:, :, :-1]).to(block.sources)
        return (weights[credit.draw(len(block.sources), source)] * block.sources).sum((1, 2))


def own_estimates(estimator: Estimator, at: Prepared, block: Block, source: torch.Generator) -> Tensor:
    """Return the estimates of an estimator that puts noise on the parameters, on the block's chain noise."""
    task, size = at.task, block.noise.samples
    drawn = estimator.draw(task.chain, task.params, size, source)
    noise = replace(drawn, initial=block.noise.initial, steps=block.noise.steps)
    return estimator.directional(task.chain, task.params, task.objective, noise, at.direction, block.condition)


@dataclass(frozen=True)
class SameMean:
    """The mean of (estimate - reference) along the natural direction is zero, in units of the derivative."""

    model: Model
    margin: float
    kurtosis: float
    spends = True

    def __call__(self, subject: Callable[[Prepared], Sampled], context: Context) -> MeanResult:
        at = prepared(self.model, context.cache, context.stream.seed)
        what = subject(at)

        def rows(index: int) -> np.ndarray:
            block = block_of(at, index)
            estimate = what.of(at, block, generator(context.stream, index))
            return ((estimate - block.reference) / at.slope).detach().cpu().double().numpy()[:, None]

        limited = replace(context, profile=replace(context.profile, max_samples=at.task.config.audit.samples))
        margin = np.array([self.margin * context.profile.margin_scale])
        return means.equivalence(rows, np.zeros(1), margin, plan(limited, self.kurtosis))


# --- checks -------------------------------------------------------------------------------------------------------


def identical(
    model: Model,
    name: str,
    question: str,
    coordinates: tuple[str, ...],
    *,
    subject: Numbers,
    reference: Numbers,
    controls: dict[str, Numbers],
    printed: Numbers | None = None,
) -> Check:
    """Return the check that two computations on the model agree to rounding."""
    margin_from = (
        "rounding, relative to the largest entry: 1e-9 in double precision, 1e-3 in single, 0.02 to 0.1 in half"
    )
    judge = Identity(model, reference)
    return Check(
        f"{model.name}: {name}", "scale", question, coordinates, judge, subject, controls, printed, margin_from
    )


def same_mean(
    model: Model,
    name: str,
    question: str,
    *,
    subject: Callable[[Prepared], Sampled],
    margin: float,
    controls: dict[str, Callable[[Prepared], Sampled]],
    printed: Callable[[Prepared], Sampled] | None = None,
    kurtosis: float = 200.0,
) -> Check:
    """Return the check that an estimator has the mean of the derivative computed otherwise."""
    return Check(
        f"{model.name}: {name}",
        "scale",
        question,
        ("along the natural gradient",),
        SameMean(model, margin, kurtosis),
        subject,
        controls,
        printed,
        margin_from=f"{margin:g} of the derivative that a pilot measured; declared before sampling",
    )


def along_names(model: Model) -> tuple[str, ...]:
    """Names of `Prepared.components`."""
    count = model.settings.audit.directions
    return ("natural direction", *(f"random direction {i + 1}" for i in range(count)))


def scored(at: Prepared, estimator: Estimator) -> Sampled:
    """Return an estimator with the pilot's mean return as its baseline."""
    return Sampled(with_baseline(estimator, Constant(at.mean_return)))


def times(estimator: Estimator, by: float) -> Estimator:
    """Return an estimator whose credit is multiplied."""
    credit = Credit(estimator.credit.matrices * by, estimator.credit.probabilities, estimator.credit.stratified)
    return replace(estimator, name=f"{estimator.name}, times {by:g}", credit=credit)


def cut_step_by_step(at: Prepared) -> Sampled:
    """Return first order with every step's network output detached by a draw of its own, as TRL's AlignProp had it."""

    def value(p: Prepared, block: Block, source: torch.Generator) -> Tensor:
        uniform = torch.rand(p.steps, block.noise.samples, generator=source).to(block.noise.initial)

        def cut(output: Tensor, t: int) -> Tensor:
            kept = (uniform[t - 1] < (p.steps - t + 1) / p.steps).reshape(-1, *[1] * (output.dim() - 1))
            return torch.where(kept, output, output.detach())

        return audit.derivatives(p.task, p.task.params, block.noise, block.condition, p.direction, cut)

    return Sampled(first_order(at.steps), value)


def denormalised_twice(at: Prepared) -> Sampled:
    """Return first order with released code's reward, which maps images from [-1, 1] to [0, 1] a second time."""

    def value(p: Prepared, block: Block, source: torch.Generator) -> Tensor:
        reward: Any = p.task.objective.reward
        once = reward.decode
        twice = Objective(replace(reward, decode=lambda x0, prompt: once(x0, prompt) / 2 + 0.5))
        task = replace(p.task, objective=twice)
        return audit.derivatives(task, p.task.params, block.noise, block.condition, p.direction)

    return Sampled(first_order(at.steps), value)
