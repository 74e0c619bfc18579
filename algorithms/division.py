"""How the work on one batch is divided: into micro-batches one after the other, and over processes side by side.

All randomness of a batch is drawn for the whole of it, by every process alike; each then works on its own share, piece
by piece. So the gradient is the whole batch's, to rounding, however it is divided, also where a baseline or a
stratified law ties the samples together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.baselines import Baseline
from algorithms.chain import Params


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Division:
    """A division of batches.

    Attributes:
        micro_batch: samples that a process works on at once; None for all of its share.
        rank, world: which of how many processes this is.
        gather: concatenates the processes' tensors along the first axis, in the order of their ranks.
        add: sums a tensor over the processes.

    Raises:
        ValueError: if micro_batch or world is < 1, or rank is not one of 0..world - 1.
    """

    micro_batch: int | None = None
    rank: int = 0
    world: int = 1
    gather: Callable[[Tensor], Tensor] = _alone
    add: Callable[[Tensor], Tensor] = _alone

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be >= 1 or None, got {self.micro_batch}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must lie in 0..world - 1, got rank = {self.rank}, world = {self.world}")

    def own(self, samples: int) -> slice:
        """Return this process's share of a batch.

        Raises:
            ValueError: if the batch cannot be shared evenly.
        """
        if samples % self.world:
            raise ValueError(f"samples must be a multiple of the {self.world} processes, got {samples}")
        size = samples // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def pieces(self, samples: int) -> list[slice]:
        """Cut `samples` of this process's samples into micro-batches, in order; the last may be smaller."""
        size = self.micro_batch or max(samples, 1)
        return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]

    def baseline(self, baseline: Baseline) -> Baseline:
        """Return `baseline` as seen by this process: of the whole batch's returns and states."""
        return baseline if self.world == 1 else _Gathered(baseline, self)

    def add_gradients(self, params: Params) -> None:
        """Replace every `.grad` by its sum over the processes."""
        if self.world == 1:
            return
        for p in params.values():
            p.grad = self.add(torch.zeros_like(p) if p.grad is None else p.grad)


WHOLE = Division()


@dataclass(frozen=True)
class _Gathered:
    baseline: Baseline
    division: Division

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        everyone = self.division.gather(returns)
        return self.baseline(everyone, self.division.gather(x), k)[self.division.own(len(everyone))]
