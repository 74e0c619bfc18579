"""Fine-tuning a learned sampler by every method at equal cost: RLR's Figures 3 and 4 and its Table 5 on a toy.

The rules, the same for all methods and declared before any run that is reported:

* Cost is counted in network evaluations, a backward pass into the parameters being two (`Credit.calls`). Every run may
  spend the same number; what a method spends on pilots, antithetic copies or further passes over a batch counts.
* Every batch has the same number of roll-outs. All methods but PPO and DRaFT-LV run by the one sweep, and these two go
  step by step as well, so that none holds more than one step's activations beside the latents: equal memory.
* Adam with torch's defaults and one learning rate, no clipping, no average of the parameters. Every method that uses
  scores takes the leave-one-out mean off the returns.
* Curves show the mean reward of fresh roll-outs, the same ones for all methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms import rlr
from algorithms.baselines import Constant, LeaveOneOut
from algorithms.chain import Chain, Condition, ParameterNoise, Params, for_reward, rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic, with_baseline
from algorithms.losses import PPO, DraftLV
from algorithms.objective import Objective, Reward
from algorithms.stratified import fitted_truncation
from algorithms.telescoped import FOLDS, band, telescoped
from algorithms.training import FromEstimator, Method, Settings, Trainer
from theory import schedules
from toy.ddpm import train
from toy.experiments import generator
from toy.parallel import Parallel, SideBySide
from toy.rewards import Bumps, Threshold
from verdicts.streams import Stream

H, MU = 2, 1e-3  # RLR's sub-chain, of two steps in reading II, and parameter noise (appendix A.2)
PPO_EPOCHS, PPO_CLIP = 2, 0.2
DRAFT_COPIES = 2  # DRaFT-LV's n in its paper
# A pilot is four batches, and is drawn again when what was spent since the last one is three times its cost: pilots
# take a quarter of the budget.
PILOT_BATCHES, SPENT_BETWEEN = FOLDS, 3

# The rate whose median over all methods' final rewards was best, four other root seeds (101..104) with one run each:
# 0.41, 0.50, 0.00 for the narrow reward and 1.29, 1.35, 0.69 for the broad one. Fixed before the reported runs.
RATES = (3e-3, 1e-2, 3e-2)
LEARNING_RATE = 1e-2


@dataclass(frozen=True, eq=False)
class Problem:
    """A pre-trained sampler, what it is tuned for, and what makes the condition of n roll-outs, if it takes one."""

    chain: Chain
    params: Params
    objective: Objective
    condition: Callable[[int], Condition] = lambda samples: None


@dataclass(frozen=True)
class Plan:
    """What every method is given.

    Attributes:
        calls: network evaluations of one run.
        batch: roll-outs per batch.
        points: checkpoints, equally spaced in calls, the pre-trained sampler among them.
        evaluation: roll-outs that a checkpoint is judged by.

    Raises:
        ValueError: if there are fewer than two points.
    """

    calls: int = 51_200
    batch: int = 32
    learning_rate: float = LEARNING_RATE
    points: int = 13
    evaluation: int = 1024

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points must be >= 2, got {self.points}")


@dataclass(frozen=True, eq=False)
class Contender:
    """A method with its cost in network evaluations.

    Attributes:
        calls: of one update, on one batch.
        pilot: of one pilot; there is one before the first of each `every` updates.
    """

    method: Method
    calls: float
    pilot: float = 0.0
    every: int = 1

    def spent(self, updates: int) -> float:
        """Return the cost of the first `updates` updates."""
        return updates * self.calls + math.ceil(updates / self.every) * self.pilot

    def affordable(self, calls: float) -> int:
        """Return how many updates cost no more than `calls`."""
        updates = int(calls / self.calls)
        while updates and self.spent(updates) > calls:
            updates -= 1
        return updates


@dataclass(frozen=True, eq=False)
class Curve:
    """A run: the mean reward after so many network evaluations, (points,) each.

    Attributes:
        updates: batches drawn by then.
    """

    calls: np.ndarray
    reward: np.ndarray
    updates: np.ndarray


@dataclass(frozen=True, eq=False)
class Curves:
    """Runs of several seeds: calls (points,), reward (seeds, points), updates (points,)."""

    calls: np.ndarray
    reward: np.ndarray
    updates: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[Curve]) -> Curves:
        """Stack runs with the same checkpoints."""
        return cls(runs[0].calls, np.stack([run.reward for run in runs]), runs[0].updates)

    @property
    def final(self) -> np.ndarray:
        """Reward at the end of each run, (seeds,)."""
        return self.reward[:, -1]

    @property
    def average(self) -> np.ndarray:
        """Reward averaged over each run's checkpoints after the first, (seeds,): how early it rises."""
        return self.reward[:, 1:].mean(1)

    @property
    def fallen(self) -> np.ndarray:
        """How far each run ends below its best checkpoint, (seeds,)."""
        return self.reward.max(1) - self.final


class Refitted:
    """An estimator fitted on a pilot of fresh roll-outs, and fitted again every so many updates.

    It counts the updates it has made, so that a run of its own needs an object of its own.
    """

    def __init__(self, fit: Callable[[Params, torch.Generator], Estimator], every: int) -> None:
        self._fit, self._every, self._made = fit, every, 0
        self._method: Method | None = None

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradient of ascent in the `.grad`s, and the batch's returns (n,)."""
        if self._made % self._every == 0 or self._method is None:
            self._method = FromEstimator(self._fit({name: p.detach() for name, p in params.items()}, generator))
        self._made += 1
        yield from self._method.updates(chain, params, objective, samples, generator, condition)


TARGETS = ((0.9, 0.3), (-0.6, 0.6), (0.2, -0.9))
WEIGHTS = (1.0, 0.6, 0.4)
REWARDS: dict[str, Reward] = {
    "narrow": Bumps(TARGETS, WEIGHTS, 0.35),
    "broad": Bumps(TARGETS, WEIGHTS, 1.0),
    "black box": Threshold(Bumps(TARGETS, WEIGHTS, 0.35), 0.5),
}


def swiss_roll(reward: str, root: Stream, cache: Path, steps: int = 10) -> Problem:
    """Return the task: the swiss-roll sampler that this root seed trains, and one of `REWARDS`.

    The schedule suits ten steps; with more of them each adds in proportion less noise.
    """
    schedule = schedules.linear(steps, 0.05, 0.5) if steps <= 10 else schedules.linear(steps, 0.5 / steps, 7.5 / steps)
    chain, params = train("swiss_roll", schedule, root.child("toy", "ddpm"), cache, width=24)
    return Problem(chain, params, Objective(REWARDS[reward]))


def contender(name: str, problem: Problem, batch: int) -> Contender:
    """Build a method by its name, one of `METHODS`, `BLACK_BOX` or `ABLATION`, for a problem.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {sorted(_BUILDERS)}, got {name!r}")
    return _BUILDERS[name](problem, batch)


def run(name: str, problem: Problem, plan: Plan, stream: Stream, seed: int) -> Curve:
    """Fine-tune by one method; at each checkpoint it has spent what the checkpoint allows, or just less.

    Raises:
        ValueError: if the name is unknown.
    """
    return follow(contender(name, problem, plan.batch), name, problem, plan, stream, seed)


def follow(found: Contender, name: str, problem: Problem, plan: Plan, stream: Stream, seed: int) -> Curve:
    """Fine-tune by a contender under a name, which its training draws depend on."""
    calls = np.linspace(0, plan.calls, plan.points)
    updates = [found.affordable(c) for c in calls]
    reward = _train_and_judge(found.method, problem, plan, updates, stream.child(name), seed, stream)
    return Curve(calls, reward, np.array(updates))


def runs(name: str, problem: Problem, plan: Plan, stream: Stream, seeds: Sequence[int]) -> list[Curve]:
    """Do what `run` does for each seed, side by side where the method allows it: the same curves, to rounding.

    Raises:
        ValueError: if the name is unknown.
    """
    found = contender(name, problem, plan.batch)
    if not side_by_side(found.method, problem):
        return [run(name, problem, plan, stream, seed) for seed in seeds]  # each with a method of its own
    calls = np.linspace(0, plan.calls, plan.points)
    updates = [found.affordable(c) for c in calls]
    rewards = _train_and_judge_all(found.method, problem, plan, updates, stream.child(name), seeds, stream)
    return [Curve(calls, reward, np.array(updates)) for reward in rewards]


def compare(
    names: Sequence[str], problem: Problem, plan: Plan, stream: Stream, seeds: Sequence[int]
) -> dict[str, Curves]:
    """Run several methods with several seeds."""
    return {name: Curves.of(runs(name, problem, plan, stream, seeds)) for name in names}


def truncation(length: int, problem: Problem, plan: Plan, updates: int, stream: Stream, seeds: Sequence[int]) -> Curves:
    """Fine-tune by back-propagation through the last `length` steps, so many updates whatever they cost (Figure 3)."""
    estimator = named.truncated(problem.chain.steps, length)
    found = fixed_cost(estimator, plan.batch)
    marks = np.linspace(0, updates, plan.points).round().astype(int)
    rewards = _train_and_judge_all(
        found.method, problem, plan, marks.tolist(), stream.child(estimator.name), seeds, stream
    )
    return Curves(marks * found.calls, rewards, marks)


def wins(a: np.ndarray, b: np.ndarray) -> int:
    """Return for how many seeds `a` is above `b`."""
    return int((a > b).sum())


def untuned(problem: Problem, plan: Plan, stream: Stream, seed: int) -> Curve:
    """Judge the pre-trained sampler at every checkpoint, as if it had been tuned."""
    reward = [_judge(problem, problem.params, plan, stream, seed, point) for point in range(plan.points)]
    return Curve(np.linspace(0, plan.calls, plan.points), np.array(reward), np.zeros(plan.points, int))


def _train_and_judge(
    method: Method, problem: Problem, plan: Plan, updates: Sequence[int], own: Stream, seed: int, shared: Stream
) -> np.ndarray:
    """Return the mean rewards (points,) after each of the numbers of updates.

    Training draws from `own`, evaluation from `shared`, below different names: nothing is judged by what it saw.
    """
    training = own.child("training", seed)
    trainer = Trainer(
        problem.chain,
        problem.params,
        problem.objective,
        method,
        Settings(max(1, updates[-1]), plan.batch, plan.learning_rate),
        lambda update: generator(training, update),
        problem.condition(plan.batch),
    )
    rewards = []
    for point, until in enumerate(updates):
        trainer.run(until - trainer.done)
        rewards.append(_judge(problem, trainer.result().params, plan, shared, seed, point))
    return np.array(rewards)


def side_by_side(method: Method, problem: Problem) -> TypeGuard[FromEstimator]:
    """Return whether a method can make many runs in one batch, each with its own parameters, noise and baseline.

    It must then be an estimator that is not fitted to the parameters, and nothing may be conditioned.
    """
    if not isinstance(method, FromEstimator) or problem.condition(1) is not None:
        return False
    made = method.estimator
    stored = made.parameter_noise is None or not made.parameter_noise.redrawn
    return stored and (made.baseline == LeaveOneOut() or isinstance(made.baseline, Constant))


def _train_and_judge_all(
    method: Method,
    problem: Problem,
    plan: Plan,
    updates: Sequence[int],
    own: Stream,
    seeds: Sequence[int],
    shared: Stream,
) -> np.ndarray:
    """Do what `_train_and_judge` does for every seed, (seeds, points), from the same draws.

    These runs are small, and made one by one they spend their time between torch's operations.
    """
    if not side_by_side(method, problem):
        return np.stack([_train_and_judge(method, problem, plan, updates, own, seed, shared) for seed in seeds])
    chain = Parallel(problem.chain, len(seeds))
    trainings = [own.child("training", seed) for seed in seeds]
    trainer = Trainer(
        chain,
        chain.stacked(problem.params),
        problem.objective,
        SideBySide(method.estimator, lambda update: [generator(training, update) for training in trainings]),
        Settings(max(1, updates[-1]), plan.batch * len(seeds), plan.learning_rate),
        lambda update: generator(own, update),  # of no use: each run draws from its own
    )
    rewards = []
    for point, until in enumerate(updates):
        trainer.run(until - trainer.done)
        now = trainer.result().params
        each = [{name: p[i] for name, p in now.items()} for i in range(len(seeds))]
        rewards.append([_judge(problem, p, plan, shared, s, point) for p, s in zip(each, seeds, strict=True)])
    return np.array(rewards).T


def _judge(problem: Problem, params: Params, plan: Plan, shared: Stream, seed: int, point: int) -> float:
    """Return the mean reward of fresh roll-outs, the same ones for whatever has these streams, seed and point."""
    source = generator(shared.child("evaluation", seed), point)
    noise = named.first_order(problem.chain.steps).draw(problem.chain, params, plan.evaluation, source)
    condition = problem.condition(plan.evaluation)
    x0 = rollout(problem.chain, params, noise, condition).latents[0]
    return float(problem.objective.reward(x0, for_reward(condition)).mean())


def fixed_cost(estimator: Estimator, batch: int) -> Contender:
    """Return an estimator as a contender: one update costs its matrix's calls, for each antithetic copy."""
    return Contender(FromEstimator(estimator), batch * estimator.credit.calls() * 2 ** len(estimator.flips))


def _scored(name: str, credit: Credit) -> Estimator:
    """An estimator with the baseline that all scores get, and RLR's parameter noise where the matrix asks for it."""
    noise = ParameterNoise(MU) if credit.uses_parameter_noise else None
    return Estimator(name, credit, noise, LeaveOneOut())


def _align_prop(steps: int) -> Estimator:
    """K uniform on 1..T - 1, an option of the released code: the last step always, the first one of the chain never."""
    law = np.full(steps, 1 / (steps - 1))
    law[-1] = 0
    return named.random_truncation(law)


def _fixed(build: Callable[[int], Estimator]) -> Builder:
    return lambda problem, batch: fixed_cost(build(problem.chain.steps), batch)


def _ppo(problem: Problem, batch: int) -> Contender:
    """The roll-out also gives the old log-densities; each pass over the batch is a gradient through every step."""
    steps = problem.chain.steps
    return Contender(PPO(PPO_CLIP, PPO_EPOCHS), batch * steps * (1 + 3 * PPO_EPOCHS))


def _draft_lv(problem: Problem, batch: int) -> Contender:
    return Contender(DraftLV(DRAFT_COPIES), batch * (problem.chain.steps + 3 * (DRAFT_COPIES + 1)))


def _tho(problem: Problem, batch: int) -> Contender:
    chain, objective = problem.chain, problem.objective
    support = band(chain.steps, 2, objective.reward.differentiable)

    def fit(params: Params, source: torch.Generator) -> Estimator:
        return telescoped(
            chain,
            params,
            objective,
            support,
            source,
            baseline=LeaveOneOut(),
            pilot=PILOT_BATCHES * batch,
            batch=batch,
            condition=problem.condition(batch),
        )

    return _refitted(fit, _on(support), batch)


def _srt(problem: Problem, batch: int) -> Contender:
    """Its cost is linear in the length, so that of the expected length 2 is that of any law."""
    chain, objective = problem.chain, problem.objective

    def fit(params: Params, source: torch.Generator) -> Estimator:
        size = PILOT_BATCHES * batch
        return fitted_truncation(chain, params, objective, 2.0, source, pilot=size, condition=problem.condition(size))

    full = credits.first_order(chain.steps)
    return _refitted(fit, credits.truncated(chain.steps, 2), batch, full)


def _refitted(
    fit: Callable[[Params, torch.Generator], Estimator], used: Credit, batch: int, read: Credit | None = None
) -> Contender:
    update = batch * used.calls()
    pilot = PILOT_BATCHES * batch * read_out(used if read is None else read)
    every = math.ceil(SPENT_BETWEEN * pilot / update)
    return Contender(Refitted(fit, every), update, pilot, every)


def read_out(credit: Credit) -> float:
    """Return the network evaluations that reading out each source of one sample by itself takes.

    T for the roll-out, one for each step visited, two for each source of each row, one for each costate pulled back.
    """
    w = credit.matrices[0, :, :-1] != 0
    steps = np.arange(1, credit.steps + 1)[:, None]
    later = w[::-1].cumsum(0)[::-1] - w > 0
    pulled = later & (np.arange(credit.steps + 1) <= steps)
    return float(credit.steps + credit.visits()[0].sum() + 2 * w.sum() + pulled.sum())


def _on(support: np.ndarray) -> Credit:
    """All sources of a support on: what a matrix on it costs at most."""
    return Credit.of(np.concatenate([support.astype(float), np.zeros((len(support), 1))], 1))


Builder = Callable[[Problem, int], Contender]

_BUILDERS: dict[str, Builder] = {
    "first order": _fixed(named.first_order),
    "DDPO": _fixed(lambda steps: with_baseline(named.policy_gradient(steps), LeaveOneOut())),
    "DDPO, PPO-clip": _ppo,
    "AlignProp, uniform": _fixed(_align_prop),
    "DRaFT-1": _fixed(lambda steps: named.truncated(steps, 1)),
    "DRaFT-LV": _draft_lv,
    "RLR as printed": _fixed(lambda steps: _scored("RLR as printed", rlr.as_printed(steps, H))),
    "RLR": _fixed(lambda steps: rlr.rlr(steps, H, MU, reading="II", baseline=LeaveOneOut())),
    "RLR, antithetic": _fixed(
        lambda steps: rlr.rlr(steps, H, MU, reading="II", zeroth="antithetic", baseline=LeaveOneOut())
    ),
    "RLR without ZO": _fixed(lambda steps: _scored("RLR without ZO", rlr.without_zeroth_order(steps, H, reading="II"))),
    "RLR without HO": _fixed(lambda steps: _scored("RLR without HO", rlr.without_half_order(steps, H, reading="II"))),
    "THO(2)": _tho,
    "SRT(2)": _srt,
    "zeroth order, antithetic": _fixed(
        lambda steps: antithetic(with_baseline(named.zeroth_order(steps, MU), LeaveOneOut()), "parameters")
    ),
}

METHODS: tuple[str, ...] = (
    "first order",
    "SRT(2)",
    "AlignProp, uniform",
    "DRaFT-1",
    "DRaFT-LV",
    "THO(2)",
    "DDPO",
    "DDPO, PPO-clip",
    "RLR, antithetic",
    "RLR",
    "RLR as printed",
)
BLACK_BOX: tuple[str, ...] = ("DDPO", "DDPO, PPO-clip", "THO(2)", "zeroth order, antithetic")
# Table 5. V1 is back-propagation through the last step alone.
ABLATION: dict[str, str] = {
    "V1: without HO and ZO": "DRaFT-1",
    "V2: without ZO": "RLR without ZO",
    "V3: without HO": "RLR without HO",
    "RLR": "RLR",
}
