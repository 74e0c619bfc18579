"""Checks on a network by sampling: has an estimator the mean of the derivative, measured along one direction?

Every estimator is sampled along the direction in which it tells most, fitted on a pilot (docs/scale.md). Estimators
that share a `Group` share direction and roll-outs: mixtures of sources are read off one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.baselines import Baseline, Constant, Learned
from algorithms.chain import Condition, Noise, Params, for_reward, rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, first_order, policy_gradient, with_baseline
from algorithms.objective import Objective
from algorithms.sweep import DirectionalSources, sweep
from claims.claim import Check, Context
from claims.judges import plan
from claims.on_model import Model, Prepared
from scale import audit
from scale.config import sampled_settings
from scale.task import Task
from toy.experiments import generator
from verdicts import means
from verdicts.means import MeanResult

KURTOSIS = 50.0  # declared of every difference; estimators' on digits and on the tiny model have 3 to 30
LEARNED_UP_TO = 1024  # numbers in a latent for which a value function is fitted
MOST = 65536  # roll-outs of an estimator, unless the settings say otherwise
SAMPLED_UP_TO = 1_000_000  # parameters of the largest network on which anything is sampled, unless they say so


@dataclass(frozen=True, eq=False)
class Sampling:
    """A model at the start of a run, with what its sampled checks share.

    Attributes:
        task: the model, on a chain of `audit.steps`.
        baseline: of every score: a value function fitted on a pilot; for large latents its mean return.
        gradient: (p,), the pilot's mean gradient.
    """

    task: Task
    baseline: Baseline
    gradient: Tensor
    found: dict[str, Towards] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.task.chain.steps

    def towards(self, group: Group) -> Towards:
        """Return the direction of a group, fitted at its first use."""
        if group.name not in self.found:
            self.found[group.name] = _towards(self, group)
        return self.found[group.name]


@dataclass(frozen=True, eq=False)
class Group:
    """Estimators that are read along one direction, on the same roll-outs.

    Attributes:
        leader: the estimator whose direction it is.
        support: (T, T + 1) of the sources that they mix; None for estimators that put noise on the parameters.
    """

    name: str
    leader: Callable[[Sampling], Estimator]
    support: Callable[[Sampling], np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Towards:
    """A direction of length one, the derivative along it on a pilot (the unit of all sampled numbers), blocks made."""

    direction: Params
    slope: float
    blocks: dict[int, Block] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """Roll-outs that the checks of a group share.

    Attributes:
        sources: (n, T, T + 1), each sample's h[t, k] along the direction; 0 for sources that nobody asked for.
        reference: (n,), each sample's derivative by means that share nothing with the sweep.
    """

    noise: Noise
    condition: Condition
    direction: Params
    sources: Tensor
    reference: Tensor


@cache
def sampling(model: Model, cache_folder: Path, seed: int) -> Sampling:
    """Build a model, and fit on pilots what its sampled checks need."""
    task = replace(model, settings=sampled_settings(model.settings)).build(cache_folder, seed)
    baseline = _baseline(task)
    if task.objective.reward.differentiable:
        gradients = estimates(task, first_order(task.chain.steps), "gradient")
    else:
        gradients = estimates(task, with_baseline(policy_gradient(task.chain.steps), baseline), "gradient")
    return Sampling(task, baseline, gradients.mean(0))


def _baseline(task: Task) -> Baseline:
    """Fit a value function on roll-outs that are used for nothing else."""
    count = 4 * task.config.audit.pilot
    latents, rewards = [], []
    for noise, condition in _batches(task, first_order(task.chain.steps), count, "baseline"):
        roll = rollout(task.chain, task.params, noise, condition)
        latents.append(roll.latents)
        with torch.no_grad():
            rewards.append(task.objective.reward(roll.latents[0], for_reward(condition)))
    returns, size = torch.cat(rewards), int(np.prod(task.chain.shape))
    features = 64
    if size > LEARNED_UP_TO or count < 8 * (size + features):
        return Constant(float(returns.mean()))
    source = task.generator("audit", "features")
    return Learned.fit(torch.cat(latents, 1), returns, source, features)


def _batches(task: Task, estimator: Estimator, count: int, *address: str) -> list[tuple[Noise, Condition]]:
    """Return noise and conditions of `count` roll-outs, in batches of `audit.batch`."""
    size = min(task.config.audit.batch, count)
    return [
        (
            estimator.draw(task.chain, task.params, size, task.generator("audit", *address, i)),
            task.condition(size, start=i * size),
        )
        for i in range(-(-count // size))
    ]


def estimates(task: Task, estimator: Estimator, *address: str) -> Tensor:
    """Return an estimator's estimates on a pilot, (n, p)."""
    found = []
    for noise, condition in _batches(task, estimator, task.config.audit.pilot, "pilot", *address):
        each = estimator.per_sample(task.chain, task.params, task.objective, noise, condition)
        found.append(torch.cat([value.flatten(1) for value in each.values()], 1))
    return torch.cat(found)


def _towards(at: Sampling, group: Group) -> Towards:
    task, leader = at.task, group.leader(at)
    flat = audit.natural_direction(estimates(task, leader, "direction", group.name), at.gradient)
    pieces = flat.split([p.numel() for p in task.params.values()])
    direction = {name: v.reshape(p.shape) for (name, p), v in zip(task.params.items(), pieces, strict=True)}
    plain, count = first_order(at.steps), task.config.audit.pilot
    slopes = [reference(task, *drawn, direction) for drawn in _batches(task, plain, count, "slope", group.name)]
    return Towards(direction, float(torch.cat(slopes).mean()))


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


# --- roll-outs ----------------------------------------------------------------------------------------------------


def block_of(at: Sampling, group: Group, index: int) -> Block:
    """Return block number `index` of a group's roll-outs; it is computed once in a process."""
    towards = at.towards(group)
    if index not in towards.blocks:
        towards.blocks[index] = _make_block(at, group, towards.direction, index)
    return towards.blocks[index]


def _make_block(at: Sampling, group: Group, direction: Params, index: int) -> Block:
    task, size = at.task, at.task.config.audit.batch
    plain = first_order(at.steps)
    noise = plain.draw(task.chain, task.params, size, task.generator("audit", "block", group.name, index))
    condition = task.condition(size, start=index * size)
    sources = noise.initial.new_zeros(size, at.steps, at.steps + 1)
    if group.support is not None:
        mask = group.support(at)
        credit = Credit.of(np.concatenate([mask, np.zeros((at.steps, 1))], 1).astype(float))
        readout = DirectionalSources(task.params, size, direction)
        sweep(task.chain, task.params, task.objective, credit, at.baseline, 0.0, noise, condition, readout)
        for (t, k), value in readout.total.items():
            sources[:, t - 1, k] = value
    return Block(noise, condition, direction, sources, reference(task, noise, condition, direction))


# --- what is sampled ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sampled:
    """An estimator of the derivative, read off a group's roll-outs.

    Attributes:
        value: (sampling, block, generator) -> (n,) instead, for what is no mixture of sources.
    """

    estimator: Estimator
    value: Callable[[Sampling, Block, torch.Generator], Tensor] | None = None

    def of(self, at: Sampling, block: Block, source: torch.Generator) -> Tensor:
        """Return each sample's estimate of the derivative, (n,)."""
        if self.value is not None:
            return self.value(at, block, source)
        if self.estimator.parameter_noise is not None:
            return own_estimates(self.estimator, at, block, source)
        credit = self.estimator.credit
        weights = torch.from_numpy(credit.matrices[:, :, :-1]).to(block.sources)
        return (weights[credit.draw(len(block.sources), source)] * block.sources).sum((1, 2))


def own_estimates(estimator: Estimator, at: Sampling, block: Block, source: torch.Generator) -> Tensor:
    """Return the estimates of an estimator that puts noise on the parameters, on the block's chain noise."""
    task, size = at.task, block.noise.samples
    drawn = estimator.draw(task.chain, task.params, size, source)
    noise = replace(drawn, initial=block.noise.initial, steps=block.noise.steps)
    return estimator.directional(task.chain, task.params, task.objective, noise, block.direction, block.condition)


def scored(at: Prepared | Sampling, estimator: Estimator) -> Estimator:
    """Return an estimator with the baseline of the model's checks."""
    return with_baseline(estimator, at.baseline)


def times(estimator: Estimator, by: float) -> Estimator:
    """Return an estimator whose credit is multiplied."""
    credit = Credit(estimator.credit.matrices * by, estimator.credit.probabilities, estimator.credit.stratified)
    return replace(estimator, name=f"{estimator.name}, times {by:g}", credit=credit)


def cut_step_by_step(at: Sampling) -> Sampled:
    """Return first order with every step's network output detached by a draw of its own, as TRL's AlignProp had it."""

    def value(p: Sampling, block: Block, source: torch.Generator) -> Tensor:
        uniform = torch.rand(p.steps, block.noise.samples, generator=source).to(block.noise.initial)

        def cut(output: Tensor, t: int) -> Tensor:
            kept = (uniform[t - 1] < (p.steps - t + 1) / p.steps).reshape(-1, *[1] * (output.dim() - 1))
            return torch.where(kept, output, output.detach())

        return audit.derivatives(p.task, p.task.params, block.noise, block.condition, block.direction, cut)

    return Sampled(first_order(at.steps), value)


def denormalised_twice(at: Sampling) -> Sampled:
    """Return first order with released code's reward, which maps images from [-1, 1] to [0, 1] a second time."""

    def value(p: Sampling, block: Block, source: torch.Generator) -> Tensor:
        reward: Any = p.task.objective.reward
        once = reward.decode
        twice = Objective(replace(reward, decode=lambda x0, prompt: once(x0, prompt) / 2 + 0.5))
        task = replace(p.task, objective=twice)
        return audit.derivatives(task, p.task.params, block.noise, block.condition, block.direction)

    return Sampled(first_order(at.steps), value)


# --- judge and check ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SameMean:
    """The mean of (estimate - reference) along the group's direction is zero, in units of the derivative."""

    model: Model
    group: Group
    margin: float
    spends = True

    def __call__(self, subject: Callable[[Sampling], Sampled], context: Context) -> MeanResult:
        at = sampling(self.model, context.cache, context.stream.seed)
        what, slope = subject(at), at.towards(self.group).slope

        def rows(index: int) -> np.ndarray:
            block = block_of(at, self.group, index)
            estimate = what.of(at, block, generator(context.stream, index))
            return ((estimate - block.reference) / slope).detach().cpu().double().numpy()[:, None]

        most = self.model.settings.audit.samples
        limited = replace(context, profile=replace(context.profile, max_samples=MOST if most is None else most))
        margin = np.array([self.margin * context.profile.margin_scale])
        return means.equivalence(rows, np.zeros(1), margin, plan(limited, KURTOSIS))


def sampled(
    model: Model,
    group: Group,
    name: str,
    question: str,
    *,
    subject: Callable[[Sampling], Sampled],
    margin: float,
    controls: dict[str, Callable[[Sampling], Sampled]],
    printed: Callable[[Sampling], Sampled] | None = None,
) -> tuple[Check, ...]:
    """Return the check that an estimator has the mean of the derivative, in a tuple; none if nothing is sampled."""
    if not model.sampled:
        return ()
    return (
        Check(
            f"{model.name}: {name}",
            "scale",
            question,
            (f"along the direction of {group.name}",),
            SameMean(model, group, margin),
            subject,
            controls,
            printed,
            margin_from=f"{margin:g} of the derivative that a pilot measured; declared before sampling",
        ),
    )
