"""Many runs of one small chain in one batch: every run has parameters, samples and gradients of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from algorithms.baselines import LeaveOneOut
from algorithms.chain import Around, Chain, Condition, Noise, Params, StepConditions
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from algorithms.sweep import Accumulate
from algorithms.training import Method


@dataclass(frozen=True, eq=False)
class Parallel(Around):
    """Many runs of one chain at once: parameters (runs, *shape), and samples run by run. No run sees another.

    The condition tells each sample's run, (n,) from 0 and ascending; without it all runs have as many samples.
    """

    chain: Chain
    runs: int

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        def one(p: Params, y: Tensor) -> Tensor:
            return self.chain.mean(p, y, t, None)

        def all_runs(x: Tensor) -> Tensor:
            return torch.func.vmap(one)(params, x.unflatten(0, (self.runs, -1))).flatten(0, 1)

        if condition is None:
            return all_runs(x)
        # A step is visited with those samples only that need it: each run's are padded to the longest run's number.
        counts = torch.bincount(condition, minlength=self.runs)
        longest, starts = int(counts.max()), counts.cumsum(0) - counts
        place = condition * longest + torch.arange(len(x)) - starts[condition]
        padded = x.new_zeros(self.runs * longest, *x.shape[1:]).index_copy(0, place, x)
        return all_runs(padded).index_select(0, place)

    def split_by_sample(self, params: Params, condition: Tensor | None) -> tuple[Chain, Params]:
        """Return the chain of one run, and each sample's parameters, (n, *shape): those of its run.

        Raises:
            ValueError: if no condition tells the samples' runs.
        """
        if condition is None:
            raise ValueError("condition must tell each sample's run where noise moves the parameters, got none")
        return self.chain, {name: p.index_select(0, condition) for name, p in params.items()}

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


class _RunByRun(Accumulate):
    """Gradients of the batch means of all runs, `total`: (runs, *shape) per parameter; `samples` are those of a run."""

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        for name, xi in unit.items():
            runs = (len(self.total[name]), -1)
            shares = torch.einsum("rn,rn...->r...", coefficient.unflatten(0, runs), xi.unflatten(0, runs))
            self.total[name] += shares / self._samples


def _joined(drawn: list[Noise]) -> Noise:
    """Return the noise of all runs, run by run; that of the parameters is stored."""
    unit = None
    if drawn[0].parameters is not None:
        units = [cast(Mapping[str, Tensor], each.parameters) for each in drawn]
        unit = {name: torch.cat([each[name] for each in units], 1) for name in units[0]}
    return Noise(
        torch.cat([each.initial for each in drawn]),
        torch.cat([each.steps for each in drawn], 1),
        torch.cat([each.outcome for each in drawn]),
        unit,
    )


class SideBySide:
    """An estimator on the runs of a `Parallel` chain: what each run would do alone, with its own draws and baseline.

    It counts the updates it has made, so that a batch of runs needs an object of its own. The estimator's parameter
    noise, if any, is stored, and its baseline is constant or the whole batch's leave-one-out mean.

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
        """Give the gradients of ascent in the `.grad`s, and all runs' returns (n,).

        Neither `generator` nor `condition` is used: each run has its own draws, and a sample is told its run.
        """
        self._made += 1
        sources = self.generators(self._made)
        batch, made = samples // len(sources), self.estimator
        if made.baseline == LeaveOneOut():
            made = replace(made, baseline=LeaveOneOut(batch))
        one = {name: p[0] for name, p in params.items()}
        noise = _joined([made.draw(chain, one, batch, source) for source in sources])
        run = torch.arange(len(sources)).repeat_interleave(batch)
        readout = _RunByRun(params, batch)
        told = StepConditions(run.expand(chain.steps, -1))
        returns = made.feed(chain, params, objective, noise, told, readout)
        for name, p in params.items():
            p.grad = readout.total[name] / len(returns)
        yield torch.cat(returns)
