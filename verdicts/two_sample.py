"""Permutation tests of "two clouds of points come from one law", exact for every sample size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from verdicts.streams import Stream

Array = NDArray[np.float64]
Statistic = Literal["energy", "sliced_wasserstein"]

PROJECTIONS = 32
BATCH = 64  # permutations evaluated together
TIE = 1e-12  # statistics this close, relative to the pooled scale, count as equal: rounding must not lower a p-value


@dataclass(frozen=True)
class TwoSample:
    """Observed statistic (energy distance, or squared sliced Wasserstein-2 distance) and its permutation p-value."""

    statistic: float
    p_value: float
    permutations: int


def two_sample(
    x: ArrayLike, y: ArrayLike, stream: Stream, permutations: int = 999, statistic: Statistic = "energy"
) -> TwoSample:
    """Test whether clouds `x` (n, d) and `y` (m, d) come from one law.

    The p-value is (1 + #{permuted >= observed}) / (1 + permutations); if all n + m points are exchangeable it is at
    most `a` with probability at most `a`, for every `a` (derived in docs/statistics.md). Energy costs (n + m)^2 memory.
    A small p-value refutes equality of the laws; a large one verifies nothing.

    Raises:
        ValueError: on shapes other than (n, d) and (m, d) with n, m >= 2, non-finite points, permutations < 1 or an
            unknown statistic.

    >>> g = Stream(1).generator()
    >>> two_sample(g.normal(size=(60, 2)), g.normal(size=(50, 2)) + 2, Stream(2), permutations=99).p_value
    0.01
    """
    x, y = _cloud("x", x), _cloud("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y has {y.shape[1]} columns, must have {x.shape[1]} as x does")
    if permutations < 1:
        raise ValueError(f"permutations is {permutations!r}, must be at least 1")
    pooled = np.concatenate([x, y])
    if statistic == "energy":
        evaluate = _energy(pooled, len(x))
    elif statistic == "sliced_wasserstein":
        evaluate = _sliced_wasserstein(pooled, len(x), stream.child("projections").generator())
    else:
        raise ValueError(f"statistic is {statistic!r}, must be 'energy' or 'sliced_wasserstein'")
    first = np.arange(len(pooled)) < len(x)
    observed = float(evaluate(first[None])[0])
    slack = TIE * float(np.abs(pooled - pooled.mean(axis=0)).max() ** (1 if statistic == "energy" else 2))
    generator = stream.child("permutations").generator()
    reached = 0
    for start in range(0, permutations, BATCH):
        size = min(BATCH, permutations - start)
        labels = generator.permuted(np.broadcast_to(first, (size, len(pooled))), axis=1)
        reached += int(np.count_nonzero(evaluate(labels) >= observed - slack))
    return TwoSample(observed, (1 + reached) / (1 + permutations), permutations)


def _energy(pooled: Array, n: int) -> Callable[[NDArray[np.bool_]], Array]:
    """Return labels (b, n + m) -> energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| (Szekely and Rizzo)."""
    distances = cdist(pooled, pooled)
    total, m = distances.sum(), len(pooled) - n

    def evaluate(labels: NDArray[np.bool_]) -> Array:
        one = labels.astype(float)
        to_first = one @ distances
        within = np.einsum("bi,bi->b", to_first, one)
        across = to_first.sum(axis=1) - within
        return 2 * across / (n * m) - within / n**2 - (total - within - 2 * across) / m**2

    return evaluate


def _sliced_wasserstein(pooled: Array, n: int, generator: np.random.Generator) -> Callable[[NDArray[np.bool_]], Array]:
    """Return labels (b, n + m) -> mean over random directions of the squared Wasserstein-2 distance on the line."""
    directions = generator.normal(size=(pooled.shape[1], PROJECTIONS))
    projected = (pooled @ (directions / np.linalg.norm(directions, axis=0))).T
    order = np.argsort(projected, axis=1)
    ordered = np.take_along_axis(projected, order, axis=1)
    # Both quantile functions are steps; between two neighbouring jumps of either they are constant.
    m = len(pooled) - n
    jumps = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    rank_first, rank_second, widths = jumps[:-1] // m, jumps[:-1] // n, np.diff(jumps) / (n * m)
    if n == m:  # every rank once, in order: without copies
        rank_first = rank_second = slice(None)

    def evaluate(labels: NDArray[np.bool_]) -> Array:
        total = np.zeros(len(labels))
        for values, ranks in zip(ordered, order, strict=True):
            chosen = labels[:, ranks]
            rows = np.arange(0, chosen.size, len(values))[:, None]
            firsts, seconds = (values[np.flatnonzero(part).reshape(len(part), -1) - rows] for part in (chosen, ~chosen))
            total += (firsts[:, rank_first] - seconds[:, rank_second]) ** 2 @ widths
        return total / len(ordered)

    return evaluate


def _cloud(name: str, points: ArrayLike) -> Array:
    cloud = np.asarray(points, dtype=float)
    if cloud.ndim != 2 or cloud.shape[0] < 2 or cloud.shape[1] < 1:
        raise ValueError(f"{name} has shape {cloud.shape}, must be (n, d) with n >= 2 and d >= 1")
    if not np.all(np.isfinite(cloud)):
        raise ValueError(f"{name} holds a non-finite point, must be finite")
    return cloud
