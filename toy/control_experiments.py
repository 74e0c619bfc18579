"""PI-FT's numerical questions on toys: the KL coefficient, and PI-FT beside DPOK; and DPOK's fixed point, exactly.

The rules, declared before any run that is reported:

* Cost is counted in network evaluations, a backward pass into the parameters being two, one into the state alone one.
  The frozen reference's evaluations count: the KL asks for one per step in the roll-out and one in the gradient's
  pass, and first order also pulls its costate back through each of the latter but the last. See `calls`.
* Every update is one optimizer step on one fresh batch of roll-outs, of the same size for all methods. Adam with
  torch's defaults, no clipping, no average of the parameters. Scores get the leave-one-out mean of the run's batch.
* Runs are paired: with one seed, all methods and strengths see the same noise in the same update and are judged on the
  same fresh roll-outs. What is judged is the mean reward, the path KL, and the mean reward less strength times it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from algorithms import estimators as named
from algorithms.baselines import LeaveOneOut
from algorithms.chain import Noise, Params, rollout
from algorithms.estimators import with_baseline
from algorithms.losses import DPOK
from algorithms.objective import KLToReference, Objective, kl_regularised
from algorithms.training import FromEstimator, Method, Settings, Trainer
from theory.control_linear_quadratic import LinearQuadratic
from toy.comparison import Problem
from toy.control import AffineScore, ControlledChain
from toy.experiments import Block, Sampler, generator
from toy.few_step import save
from toy.linear_gaussian import Quadratic
from toy.parallel import EachRun, Parallel
from verdicts.streams import Stream

Name = Literal["PI-FT, first order", "PI-FT, policy gradient", "DPOK"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Plan:
    """What every run is given.

    Attributes:
        calls: network evaluations of one run.
        runs: how many runs with seeds of their own are made at once.
        batch: roll-outs per batch of one run.
        points: checkpoints, equally spaced in calls, the pre-trained sampler among them.
        evaluation: roll-outs that a checkpoint of one run is judged by.

    Raises:
        ValueError: if there are fewer than two points.
    """

    calls: int
    learning_rate: float
    runs: int = 64
    batch: int = 32
    points: int = 7
    evaluation: int = 256

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points must be >= 2, got {self.points}")


@dataclass(frozen=True, eq=False)
class Courses:
    """What became of several runs: (runs, points) each, but calls and updates, (points,).

    Attributes:
        reward: mean reward of fresh roll-outs.
        kl: path KL to the pre-trained sampler, in nats, of the same ones.
        objective: reward less strength times kl.
        gradient: norm of the objective's first-order gradient on the same roll-outs, its sampling noise included; NaN
            where it was not asked for.
        final: parameters at the end, (runs, *shape) each.
    """

    calls: np.ndarray
    updates: np.ndarray
    reward: np.ndarray
    kl: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    final: Params


def method(name: Name, steps: int, batch: int) -> Method:
    """Build a method by its name; `batch` consecutive roll-outs share a baseline.

    "PI-FT" is stochastic gradient ascent of the whole regularised objective, pathwise or by scores; "DPOK" lets the
    scores pay for the reward alone (`algorithms.losses.DPOK`).

    Raises:
        ValueError: if the name is unknown.
    """
    baseline = LeaveOneOut(batch)
    if name == "PI-FT, first order":
        return FromEstimator(named.first_order(steps))
    if name == "PI-FT, policy gradient":
        return FromEstimator(with_baseline(named.policy_gradient(steps), baseline))
    if name == "DPOK":
        return DPOK(baseline)
    raise ValueError(f"name must be one of {sorted(NAMES)}, got {name!r}")


def calls(name: Name, steps: int) -> int:
    """Return the network evaluations of one roll-out and its gradient, those of the frozen reference among them.

    Roll-out: model and reference at each step. Gradient: both again at each step, and two for the backward pass into
    the parameters. First order pulls its costate back through the model in that pass, and through the reference at a
    further evaluation for each step but the first of the chain, before which nothing is to be paid.
    """
    return 6 * steps + (steps - 1 if name == "PI-FT, first order" else 0)


def tune(name: Name, problem: Problem, strength: float, plan: Plan, stream: Stream, gradients: bool = False) -> Courses:
    """Fine-tune with `plan.runs` seeds by one method, at each checkpoint having spent what it allows, or just less.

    `gradients` asks for the norms too.
    """
    chain = Parallel(problem.chain, plan.runs)
    start = chain.stacked(problem.params)
    objective = kl_regularised(problem.objective, strength, start)
    marks = np.linspace(0, plan.calls, plan.points)
    updates = [int(mark // (plan.batch * calls(name, chain.steps))) for mark in marks]
    trainer = Trainer(
        chain,
        start,
        objective,
        EachRun(method(name, chain.steps, plan.batch), plan.runs),
        Settings(max(1, updates[-1]), plan.runs * plan.batch, plan.learning_rate),
        lambda update: generator(stream.child("training"), update),
    )
    judged, norms = [], []
    for point, until in enumerate(updates):
        trainer.run(until - trainer.done)
        now, source = trainer.result().params, generator(stream.child("evaluation"), point)
        noise = named.first_order(chain.steps).draw(chain, now, plan.runs * plan.evaluation, source)
        judged.append(judge(chain, now, problem.objective, start, noise))
        norms.append(gradient_norms(chain, now, objective, noise) if gradients else np.full(plan.runs, np.nan))
    reward, kl = (np.stack(column, 1) for column in zip(*judged, strict=True))
    final = trainer.result().params
    return Courses(marks, np.array(updates), reward, kl, reward - strength * kl, np.stack(norms, 1), final)


def tuned(
    name: Name, problem: Problem, strength: float, plan: Plan, stream: Stream, cache: Path, gradients: bool = False
) -> Courses:
    """Do what `tune` does, or load what an earlier call made: claims examined by several processes share their runs.

    `cache` holds one file per combination of the arguments, the pre-trained parameters among them. The problem's reward
    is known by the stream.
    """
    start = {key: value.tolist() for key, value in sorted(problem.params.items())}
    recipe = [name, strength, asdict(plan), stream.integer(), gradients, start]
    file = cache / f"pift-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.pt"
    if file.exists():
        held = torch.load(file, weights_only=True)
        return Courses(**{key: value if key == "final" else value.numpy() for key, value in held.items()})
    made = tune(name, problem, strength, plan, stream, gradients)
    save({key: value if key == "final" else torch.from_numpy(value) for key, value in vars(made).items()}, file)
    return made


def judge(
    chain: Parallel, params: Params, objective: Objective, reference: Params, noise: Noise
) -> tuple[np.ndarray, np.ndarray]:
    """Return each run's mean reward and path KL, (runs,) each."""
    charge = KLToReference(1.0, reference)

    def cost(mean: Tensor, x: Tensor, t: int) -> Tensor:
        return charge(chain, mean, x, t, None)

    roll = rollout(chain, params, noise, cost=cost)
    reward, spent = objective.reward(roll.latents[0], None), roll.costs.sum(0)
    return reward.reshape(chain.runs, -1).mean(1).numpy(), spent.reshape(chain.runs, -1).mean(1).numpy()


def gradient_norms(chain: Parallel, params: Params, objective: Objective, noise: Noise) -> np.ndarray:
    """Return the norm of each run's first-order gradient, (runs,)."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    named.first_order(chain.steps).accumulate(chain, leaves, objective, noise)
    squares = [p.grad.flatten(1).square().sum(1) for p in leaves.values() if p.grad is not None]
    return chain.runs * torch.stack(squares).sum(0).sqrt().numpy()


# --- DPOK's fixed point, exactly ---------------------------------------------------------------------------------


def dpok_fixed_point(problem: LinearQuadratic) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine controls K (T, d, d), k (T, d) where DPOK's expected gradient vanishes.

    Each maximises E W_{t+1}(Y_{t+1}) - strength_t KL_t at every state, W_t being the expected reward from Y_t on, where
    the optimum has the value V_t, the costs still to come taken off (docs/pift.md, "Experiments"). W_t is quadratic.

    Raises:
        ValueError: if that maximum does not exist at some step.
    """
    schedule, eye = problem.schedule, np.eye(problem.dim)
    P, p = problem.Q, problem.q
    K, k = np.empty_like(problem.F), np.empty_like(problem.f)
    for t in reversed(range(schedule.steps)):
        a, pull = schedule.alpha[t], schedule.sigma[t] ** 2 / schedule.strength[t]
        if np.linalg.eigvalsh(pull * P)[0] <= -1:
            raise ValueError(f"strength[{t}] = {schedule.strength[t]}: too small, step {t} of DPOK has no maximum")
        before = (eye + (1 - a) * problem.F[t]) / np.sqrt(a)
        after = np.linalg.solve(eye + pull * P, before)
        shift = np.linalg.solve(eye + pull * P, (1 - a) * problem.f[t] / np.sqrt(a) + pull * p)
        K[t], k[t] = (np.sqrt(a) * after - eye) / (1 - a), np.sqrt(a) * shift / (1 - a)
        P, p = after.T @ P @ after, after.T @ (p - P @ shift)
    return K, k


def twin(problem: LinearQuadratic) -> Problem:
    """Return the torch chain, zero control and reward of an exact linear-quadratic problem."""
    chain = ControlledChain.of(problem.schedule, AffineScore.of(problem.F, problem.f))
    reward = Quadratic(0.0, torch.tensor(problem.q), torch.tensor(-problem.Q))
    return Problem(chain, chain.parameters(), Objective(reward))


def as_params(problem: LinearQuadratic, K: np.ndarray, k: np.ndarray) -> Params:
    """Return the parameters with which the twin has the controls K y + k: what they are beyond the score."""
    return {"K": torch.tensor(np.concatenate([K - problem.F, (k - problem.f)[..., None]], 2))}


def batch_gradients(
    name: Name, problem: Problem, params: Params, strength: float, batch: int, copies: int = 1024
) -> Sampler:
    """Sample a method's gradients at a point, a batch being the unit: blocks (copies, p), all parameters flattened.

    The KL is to the chain with the problem's own parameters.
    """
    chain = Parallel(problem.chain, copies)
    objective = kl_regularised(problem.objective, strength, chain.stacked(problem.params))
    found = EachRun(method(name, chain.steps, batch), copies)

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            leaves = {key: p.requires_grad_() for key, p in chain.stacked(params).items()}
            list(found.updates(chain, leaves, objective, copies * batch, generator(stream, index)))
            grads = [p.grad.flatten(1) for p in leaves.values() if p.grad is not None]
            return torch.cat(grads, 1).numpy()

        return block

    return sampler
