"""Checks on a network to rounding: what a claim of the chapter *At scale* is judged on, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algorithms.baselines import Constant
from algorithms.chain import Condition, Noise, Params, for_reward
from algorithms.estimators import first_order
from claims.claim import Check, Context
from scale import audit
from scale.config import Config, chain_steps, sampled_settings
from scale.task import Task, build
from verdicts import exact
from verdicts.means import MeanResult

LARGE = 50_000_000
"""Parameters from which on a network is not audited in double precision, nor with a graph that is kept whole."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
SAMPLES = 4  # of an identity: each is computed for the whole batch, sample by sample nothing is left to chance


@dataclass(frozen=True, eq=False)
class Model:
    """A model by its settings.

    Attributes:
        name: as the report calls it.
        settings: everything; `settings.audit` says how hard a check tries.
        sampled: whether checks that sample are made too; identities always are.
        densities: whether every step of the chain has noise, without which there is no score and no importance ratio.
        large: whether a graph of fifty steps would not fit into memory.
    """

    name: str
    settings: Config
    sampled: bool = True
    densities: bool = True
    large: bool = False

    @property
    def sampled_steps(self) -> int:
        """Steps of the chain on which estimators are sampled."""
        return chain_steps(sampled_settings(self.settings))

    @property
    def differentiable(self) -> bool:
        """Whether the reward has a gradient, by its name: the checks are listed before anything is loaded."""
        reward = self.settings.reward
        if reward.name == "custom":
            return bool(reward.options.get("differentiable", False))
        return not reward.name.startswith("jpeg")

    def build(self, cache_folder: Path, seed: int) -> Task:
        """Build the task, with this root seed."""
        training = self.settings.training.model_copy(update={"seed": seed})
        return build(self.settings.model_copy(update={"training": training}), cache_folder)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model with what the identities of one run share.

    Attributes:
        params: away from the start by a little: at the start LoRA's second factors are zero, and half of the slopes.
        baseline: of every score, the mean reward of a few roll-outs; the identities hold whatever it is.
        tolerance: of what must agree to rounding.
    """

    task: Task
    params: Params
    baseline: Constant
    tolerance: float

    @property
    def large(self) -> bool:
        return is_large(self.task)

    @property
    def steps(self) -> int:
        return self.task.chain.steps

    def noise(self, samples: int, *address: str) -> tuple[Noise, Condition]:
        """Return roll-outs' noise of this address, and the condition of as many samples."""
        source = self.task.generator("audit", "noise", *address)
        noise = first_order(self.steps).draw(self.task.chain, self.params, samples, source)
        return noise, self.task.condition(samples)

    def directions(self, count: int) -> list[Params]:
        """Return random directions of length one."""
        return [audit.random_direction(self.params, self.task.generator("audit", "direction", i)) for i in range(count)]

    def components(self, gradient: Params, reference: Params) -> np.ndarray:
        """Return a gradient's components along the reference gradient and random directions, as shares of its length.

        Raises:
            ValueError: if the reference is zero.
        """
        size = audit.norm(reference)
        if not size > 0:
            reward = self.task.config.reward.name
            raise ValueError(f"the gradient of reward {reward} is {size} on {SAMPLES} samples: nothing to compare with")
        own = {name: value / size for name, value in reference.items()}
        directions = [own, *self.directions(self.task.config.audit.directions)]
        return np.array([audit.along(gradient, d) for d in directions]) / size


def is_large(task: Task) -> bool:
    """Return whether the network is a large one."""
    return sum(p.numel() for p in task.chain.network.parameters()) > LARGE


@cache
def prepared(model: Model, cache_folder: Path, seed: int) -> Prepared:
    """Build a model for its identities: in double precision where the network is small and runs on the processor."""
    task = model.build(cache_folder, seed)
    dtype = next(task.chain.network.parameters()).dtype
    if dtype == torch.float32 and not is_large(task) and task.device.type == "cpu":
        task, dtype = audit.in_double(task), torch.float64
    drawn = first_order(task.chain.steps).draw(task.chain, task.params, SAMPLES, task.generator("audit", "baseline"))
    condition = task.condition(SAMPLES)
    with torch.no_grad():
        x0 = audit.whole_rollout(task.chain, task.params, drawn, condition)
        mean = float(task.objective.reward(x0, for_reward(condition)).mean())
    return Prepared(task, audit.moved(task, task.generator("audit", "moved")), Constant(mean), TOLERANCES[dtype])


# --- judges -------------------------------------------------------------------------------------------------------

Numbers = Callable[[Prepared], Any]


@dataclass(frozen=True)
class Identity:
    """Two computations on the model agree to rounding."""

    model: Model
    reference: Numbers

    def __call__(self, subject: Numbers, context: Context) -> MeanResult:
        at = prepared(self.model, context.cache, context.stream.seed)
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


def along_names(model: Model) -> tuple[str, ...]:
    """Names of `Prepared.components`."""
    count = model.settings.audit.directions
    return ("along the gradient", *(f"random direction {i + 1}" for i in range(count)))
