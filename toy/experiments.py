"""Blocks of independent estimates for the verdicts: block b of a stream is always the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.baselines import Constant
from algorithms.chain import Around, Chain, Noise, Params, rollout
from algorithms.division import Division
from algorithms.estimators import Estimator, policy_gradient
from algorithms.objective import Objective
from algorithms.sweep import Directional
from verdicts.streams import Stream

Block = Callable[[int], np.ndarray]
Sampler = Callable[[Stream], Block]

PIECE = 1024  # samples that are drawn together
GRADIENTS = 1 << 21  # numbers of per-sample gradients that are made together


def generator(stream: Stream, block: int) -> torch.Generator:
    """Return the torch generator of one block."""
    return torch.Generator().manual_seed(stream.child("block", block).integer())


def batches(
    chain: Chain, params: Params, estimator: Estimator, size: int, group: int, source: torch.Generator
) -> Noise:
    """Draw `size` roll-outs in consecutive batches of `group`: stratified outcomes are drawn batch by batch.

    Raises:
        ValueError: if the batches are not whole.
    """
    if size % group:
        raise ValueError(f"size must be whole batches of group = {group}, got {size}")
    noise = estimator.draw(chain, params, size, source)
    if group == 1 or not estimator.credit.stratified:
        return noise
    drawn = [estimator.credit.draw(group, source) for _ in range(size // group)]
    return replace(noise, outcome=torch.cat(drawn))


def draw(chain: Chain, params: Params, n: int, stream: Stream) -> np.ndarray:
    """Return n samples x_0 (n, *shape) of a chain, float64."""
    noise = policy_gradient(chain.steps).draw(chain, params, n, torch.Generator().manual_seed(stream.integer()))
    # In pieces whose hidden layers fit into the processor's cache.
    parts = [rollout(chain, params, noise.of(piece)).latents[0] for piece in Division(PIECE).pieces(n)]
    return torch.cat(parts).double().numpy()


def gradients(
    chain: Chain, params: Params, objective: Objective, estimator: Estimator, size: int = 1 << 15, group: int = 1
) -> Sampler:
    """Sample per-sample gradients, all parameters flattened: blocks (size / group, p).

    With `group` > 1, consecutive samples are averaged: the unit of independence when a baseline, or the stratified
    drawing of outcomes, couples them.
    """
    # Gradients of many parameters are made in pieces of whole groups that do not outgrow the processor's cache; where a
    # baseline may look at all samples, in one.
    piece = GRADIENTS // sum(p.numel() for p in params.values()) // group * group
    pieces = Division(max(piece, group) if isinstance(estimator.baseline, Constant) else None).pieces(size)

    def of(noise: Noise) -> Tensor:
        each = estimator.per_sample(chain, params, objective, noise)
        flat = torch.cat([each[name].flatten(1) for name in params], 1)
        return flat.reshape(-1, group, flat.shape[1]).mean(1)

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = batches(chain, params, estimator, size, group, generator(stream, index))
            return torch.cat([of(noise.of(piece)) for piece in pieces]).numpy()

        return block

    return sampler


@dataclass(frozen=True, eq=False)
class _Replayed(Around):
    """A chain that remembers the last means that it gave without a graph, for one set of parameters."""

    chain: Chain
    given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or condition is not None:
            return self.chain.mean(params, x, t, condition)
        if t not in self.given or not torch.equal(self.given[t][0], x):
            self.given[t] = x, self.chain.mean(params, x, t, None)
        return self.given[t][1]


def directional_differences(
    chain: Chain,
    params: Params,
    pairs: Sequence[tuple[Objective, Estimator]],
    against: Estimator,
    direction: Params,
    size: int = 1 << 12,
) -> Sampler:
    """Sample derivative estimates along a direction, each pair's estimator less `against`, on the same roll-outs.

    Blocks (size, len(pairs)). No estimator may need parameter noise.
    """

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = against.draw(chain, params, size, generator(stream, index))
            # All these sweeps make the same roll-outs and visit the steps at the same states: once is enough.
            replayed, known = _Replayed(chain), dict[Any, Any]()

            def along(estimator: Estimator, objective: Objective) -> Tensor:
                readout = Directional(params, size, direction, known)
                copies = estimator.feed(replayed, params, objective, noise, None, readout)
                return readout.total / len(copies)

            firsts = [along(against, objective) for objective, _ in pairs]
            columns = [along(e, objective) - first for (objective, e), first in zip(pairs, firsts, strict=True)]
            return torch.stack(columns, 1).numpy()

        return block

    return sampler


def statistics(
    chain: Chain, params: Params, estimator: Estimator, statistic: Callable[[Tensor], Tensor], size: int = 1 << 15
) -> Sampler:
    """Sample a statistic (n, d) -> (n, D) of the chain's output x_0."""

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = estimator.draw(chain, params, size, generator(stream, index))
            return statistic(rollout(chain, params, noise).latents[0]).numpy()

        return block

    return sampler


def mapped(sampler: Sampler, change: Callable[[np.ndarray], np.ndarray]) -> Sampler:
    """Return the sampler whose blocks are `change` of the blocks of `sampler`."""

    def changed(stream: Stream) -> Block:
        block = sampler(stream)
        return lambda index: change(block(index))

    return changed
