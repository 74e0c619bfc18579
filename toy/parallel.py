"""Many runs of one small chain in one batch: every run has parameters, samples and gradients of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from algorithms.baselines import LeaveOneOut
from algorithms.chain import Chain, Condition, Noise, Params
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from algorithms.training import Method


@dataclass(frozen=True, eq=False)
class Parallel:
    """Many runs of one chain at once: parameters (runs, *shape), and samples run by run. No run sees another."""

    chain: Chain
    runs: int

    @property
    def steps(self) -> int:
        return self.chain.steps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.chain.shape

    def initial(self, noise: Tensor) -> Tensor:
        return self.chain.initial(noise)

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        def one(p: Params, y: Tensor) -> Tensor:
            return self.chain.mean(p, y, t, None)

        return torch.func.vmap(one)(params, x.unflatten(0, (self.runs, -1))).flatten(0, 1)

    def std(self, t: int) -> float:
        return self.chain.std(t)

    def stacked(self, params: Params) -> Params:
        """Return one copy of the parameters per run."""
        return {name: p.expand(self.runs, *p.shape).clone() for name, p in params.items()}


@dataclass(frozen=True, eq=False)
class EachRun:
    """A method on the runs of a `Parallel` chain: each gets the gradient of its own batch mean."""

    method: Method
    runs: int

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradients of ascent in the `.grad`s, and all runs' returns (n,)."""
        for returns in self.method.updates(chain, params, objective, samples, generator, condition):
            for p in params.values():
                if p.grad is not None:
                    p.grad *= self.runs  # the mean over all runs' samples divides by their number too
            yield returns


class SideBySide:
    """An estimator on the runs of a `Parallel` chain: what each run would do alone, with its own draws and baseline.

    It counts the updates it has made, so that a batch of runs needs an object of its own. The estimator has one credit
    matrix, no parameter noise, and a baseline that is constant or the whole batch's leave-one-out mean.

    Attributes:
        generators: update u -> one generator per run.
    """

    def __init__(self, estimator: Estimator, generators: Callable[[int], list[torch.Generator]]) -> None:
        self.estimator, self.generators, self._made = estimator, generators, 0

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradients of ascent in the `.grad`s, and all runs' returns (n,); `generator` is not used."""
        self._made += 1
        sources = self.generators(self._made)
        batch, made = samples // len(sources), self.estimator
        if made.baseline == LeaveOneOut():
            made = replace(made, baseline=LeaveOneOut(batch))
        drawn = [made.draw(chain, params, batch, source) for source in sources]
        noise = Noise(
            torch.cat([each.initial for each in drawn]),
            torch.cat([each.steps for each in drawn], 1),
            torch.cat([each.outcome for each in drawn]),
        )
        returns = made.accumulate(chain, params, objective, noise, condition)
        for p in params.values():
            if p.grad is not None:
                p.grad *= len(sources)  # the mean over all runs' samples divides by their number too
        yield returns
