"""Reward tuning on samples of a known law: Algorithm 2 of Generative bilevel, from several starts and many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from algorithms.bilevel import PenaltyBilevel, Record
from algorithms.tilting import STRENGTH, Gate, MinusUpper, Regularised, Tilt, at_least, uniform
from verdicts.streams import Stream

Points = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
"""Draws so many samples of the pre-trained model: their upper and lower rewards, each (count,)."""


@dataclass(frozen=True)
class Plan:
    """How a run goes: Adam with steps rate / (1 + update / halving); the last `late` strengths are averaged.

    Attributes:
        n: samples of an update.
        smallest: strength, to which a step is projected.
        effective: least effective sample size of an estimate that is followed; 0 follows them all.
    """

    n: int
    updates: int = 150
    gamma: float = 100.0
    rate: float = 0.2
    halving: float = 15.0
    late: int = 60
    smallest: float = 0.05
    effective: float = 50.0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, eq=False)
class Course:
    """What runs did.

    Attributes:
        path: (updates + 1, starts, runs) strengths.
        refused: (updates, starts, runs), whether the gate did.
        found: (starts, runs), averages of the last strengths.
    """

    path: np.ndarray
    refused: np.ndarray
    found: np.ndarray


def tune(points: Points, starts: tuple[float, ...], plan: Plan, runs: int, stream: Stream) -> Course:
    """Tune the strength from every start, `runs` times each; runs are independent, and the starts of one share samples.

    Raises:
        ValueError: if late is not in [1, updates], or as the algorithm does.
    """
    if not 1 <= plan.late <= plan.updates:
        raise ValueError(f"late must lie in [1, updates], got {plan.late} of {plan.updates}")
    first = torch.tensor(starts, dtype=torch.float64)[:, None].expand(-1, runs).contiguous()
    path, refused = [first.numpy().copy()], list[np.ndarray]()
    samples: dict[int, tuple[Tensor, Tensor]] = {}

    def rewards(update: int) -> tuple[Tensor, Tensor]:
        if update not in samples:  # y and z of an update ask for the same
            generator = torch.Generator().manual_seed(stream.child("samples", update).integer())
            drawn = points(generator, runs * plan.n)
            samples.clear()
            samples[update] = (drawn[0].reshape(1, runs, plan.n), drawn[1].reshape(1, runs, plan.n))
        return samples[update]

    made: list[torch.optim.Optimizer] = []

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(tensors, lr=plan.rate))
        return made[0]

    def after(update: int, record: Record) -> None:
        path.append(record.x[STRENGTH].numpy())
        refused.append(np.zeros_like(path[0], bool) if record.refused is None else record.refused.numpy())
        for group in made[0].param_groups:
            group["lr"] = plan.rate / (1 + update / plan.halving)

    run = PenaltyBilevel(
        MinusUpper(),
        Regularised(plan.direction),
        Tilt(rewards),
        {STRENGTH: first},
        uniform(first, plan.n),
        gamma=plan.gamma,
        optimizer=optimizer,
        project=at_least(plan.smallest),
        gate=Gate(plan.effective) if plan.effective else None,
        callback=after,
    )
    run.run(plan.updates)
    followed = np.array(path)
    return Course(followed, np.array(refused), followed[-plan.late :].mean(0))
