"""Distances between clouds of points, each read beside its sampling floor.

Two independent samples of one law lie apart: by about n^(-1/2) in sliced Wasserstein-2, and by more, the higher the
dimension, in Wasserstein-2. A distance therefore means nothing by itself. `floor` measures how far apart fresh samples
of one law are at the same n, and `measure` puts a value beside that interval and beside a permutation test.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toy.data import Sampler
from verdicts.streams import Stream
from verdicts.two_sample import Statistic, two_sample

Array = NDArray[np.float64]
Measure = Callable[[Array, Array, np.random.Generator], float]  # clouds (n, d) and (m, d), randomness for projections
Name = Literal["w2", "sliced_w2"]

MAX_ITERATIONS = 10_000_000  # 10 000 points in the plane need about 200 000
OPTIMAL = 1  # POT's result_code
RELATIVE_GAP, ABSOLUTE_GAP = 1e-6, 1e-12  # of the squared distance; of clouds scaled into [-1, 1]
BLOCK = 2**20  # pairs of points looked at together when the optimum is checked


class NotConverged(RuntimeError):
    """The transport solver stopped before the optimum, or its answer is not certified by its own dual."""


def wasserstein2(a: ArrayLike, b: ArrayLike, max_iterations: int = MAX_ITERATIONS) -> float:
    """Return the Wasserstein-2 distance of clouds a (n, d) and b (m, d), equal weights in each: the root of the cost.

    The cost is the least mean squared Euclidean distance over all couplings, by POT's network simplex: `emd2_lazy`,
    which computes costs when it needs them, in O(n + m) memory (10 MiB at 5000 points; the matrix form takes 1 GiB).
    Time grows faster than n m: in the plane about 0.05, 1, 8 and 40 s at 500, 2000, 5000 and 10 000 points.

    POT's tolerance is absolute, and it calls wrong plans optimal when costs are as small as 1e-12; so the clouds are
    centred and scaled first. The answer is accepted only if the dual proves that the square lies within 1e-6 of itself,
    plus 1e-12 of the squared extent of the clouds, of the optimum.

    Raises:
        ValueError: unless both clouds are finite, (n, d) and (m, d) with n, m >= 2, and max_iterations >= 1.
        NotConverged: if the solver stops early or the proof fails.
    """
    x, y = _pair(a, b)
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations!r}, must be at least 1")
    x, y, scale = _scaled(x, y)
    if scale == 0:  # all points are one
        return 0.0
    pot = _pot()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is raised below
        cost, log = pot.emd2_lazy(x, y, numItermax=max_iterations, log=True, return_matrix=False)
    if log["result_code"] != OPTIMAL or log["warning"] is not None:
        raise NotConverged(
            f"emd2 stopped with result_code {log['result_code']} ({log['warning']}) at numItermax = {max_iterations}"
        )
    gap = float(cost) - _dual_bound(x, y, log["u"], log["v"])
    if not gap <= RELATIVE_GAP * float(cost) + ABSOLUTE_GAP:
        raise NotConverged(
            f"emd2's cost {float(cost):.6g} is proved only to within {gap:.2g} of the optimum (numItermax = "
            f"{max_iterations})"
        )
    return scale * math.sqrt(max(float(cost), 0.0))


def sliced_wasserstein2(a: ArrayLike, b: ArrayLike, generator: np.random.Generator, projections: int = 100) -> float:
    """Return the root of the mean, over random directions, of the squared Wasserstein-2 distance on the line.

    Clouds (n, d) and (m, d); on the line the optimal coupling joins equal quantiles, for n = m the sorted points.
    Source: Bonneel et al. 2015; at any number of directions the square is unbiased for the mean over the sphere.
    Memory is O((n + m) * projections).

    Raises:
        ValueError: unless both clouds are finite, (n, d) and (m, d) with n, m >= 2, and projections >= 1.
    """
    x, y = _pair(a, b)
    if projections < 1:
        raise ValueError(f"projections is {projections!r}, must be at least 1")
    directions = generator.normal(size=(x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    x, y, scale = _scaled(x, y)
    first, second = _ordered(x, directions), _ordered(y, directions)
    n, m = len(x), len(y)
    if n == m:
        return scale * math.sqrt(np.square(first - second).mean())
    # Both quantile functions are steps; in units of 1 / (n m) they jump at multiples of m and of n.
    jumps = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    gaps = first[:, jumps[:-1] // m] - second[:, jumps[:-1] // n]
    return scale * math.sqrt(float(np.square(gaps).mean(axis=0) @ (np.diff(jumps) / (n * m))))


def _ordered(cloud: Array, directions: Array) -> Array:
    """Return the projections of a cloud (n, d) on directions (d, p), each in order: (p, n)."""
    projected = directions.T @ cloud.T
    projected.sort(axis=1)
    return projected


def _scaled(x: Array, y: Array) -> tuple[Array, Array, float]:
    """Return the clouds centred and divided by the scale that brings them into [-1, 1]^d, and that scale, or 0."""
    centre = 0.5 * (x.mean(axis=0) + y.mean(axis=0))
    x, y = x - centre, y - centre
    scale = float(max(np.abs(x).max(), np.abs(y).max()))
    return (x / scale, y / scale, scale) if scale > 0 else (x, y, scale)


DISTANCES: dict[str, Measure] = {"w2": lambda a, b, generator: wasserstein2(a, b), "sliced_w2": sliced_wasserstein2}


@dataclass(frozen=True)
class Floor:
    """How far apart two fresh samples of one law are: an interval that holds another such distance.

    Attributes:
        distance: a name in `DISTANCES`, or the function.
        n: points in each sample.
        level: probability that a further distance of two fresh samples lies in [low, high].
        values: the distances found, in the order of the repetitions.
    """

    distance: Name | Measure
    n: int
    low: float
    high: float
    level: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def floor(
    source: Sampler | ArrayLike,
    n: int,
    repetitions: int,
    stream: Stream,
    distance: Name | Measure = "w2",
    level: float = 0.8,
) -> Floor:
    """Return the interval of the distance between two independent samples of size n of the law of `source`.

    Of R + 1 exchangeable distances each is equally likely to be the k-th smallest, so a further one lies between the
    k-th smallest and the k-th largest of R with probability 1 - 2k / (R + 1), whatever its law; the interval takes the
    largest k that gives `level`. With a pool (N, d) each repetition takes 2n of its points without replacement; that
    is exact if the repetitions share no points, so nearly so if N is much more than 2 n R.

    Raises:
        ValueError: unless n >= 2, a pool has 2n points, the distance is known, 0 < level < 1, and there are enough
            repetitions for the level: 2 / (1 - level) - 1.
    """
    evaluate = _measure(distance)
    draw = _draw(source)
    if n < 2:
        raise ValueError(f"n is {n!r}, must be at least 2")
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}, must lie in (0, 1)")
    rank = math.floor((1 - level) / 2 * (repetitions + 1) + 1e-9)
    if rank < 1:
        needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
        raise ValueError(f"repetitions is {repetitions!r}, must be at least {needed} for level {level}")
    values: list[float] = []
    for repetition in range(repetitions):
        own = stream.child("floor", repetition)
        first, second = draw(n, 2, own)
        values.append(evaluate(first, second, own.child("projections").generator()))
    ordered = sorted(values)
    return Floor(distance, n, ordered[rank - 1], ordered[-rank], 1 - 2 * rank / (repetitions + 1), tuple(values))


@dataclass(frozen=True)
class Distance:
    """A distance to a law, beside what an exact sample of the law would give.

    Attributes:
        value: distance of n samples to n fresh points of the law.
        floor_low, floor_high, level: interval that holds `value` with this probability if the samples have the law.
        p_value: of the permutation test of equal laws, on the same two clouds.
    """

    value: float
    n: int
    floor_low: float
    floor_high: float
    level: float
    p_value: float

    @property
    def at_floor(self) -> bool:
        """Whether samples of the law itself are as far away: the value is not above the floor's interval."""
        return self.value <= self.floor_high


def measure(
    samples: ArrayLike,
    source: Sampler | ArrayLike,
    found: Floor,
    stream: Stream,
    permutations: int = 199,
    statistic: Statistic = "sliced_wasserstein",
) -> Distance:
    """Return the distance of `samples` (n, d) to n fresh points of `source`, beside the floor `found` of that source.

    Equal streams draw equal points, so that different distances look at the same pair of clouds.

    Raises:
        ValueError: unless there are n = found.n samples, of the source's dimension and finite.
    """
    cloud = _cloud("samples", samples)
    if len(cloud) != found.n:
        raise ValueError(f"samples has {len(cloud)} points, must have the floor's n = {found.n}")
    (reference,) = _draw(source)(found.n, 1, stream.child("reference"))
    value = _measure(found.distance)(cloud, reference, stream.child("projections").generator())
    test = two_sample(cloud, reference, stream.child("test"), permutations, statistic)
    return Distance(value, found.n, found.low, found.high, found.level, test.p_value)


def _measure(distance: Name | Measure) -> Measure:
    if callable(distance):
        return distance
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}, must be a function or one of {sorted(DISTANCES)}")
    return DISTANCES[distance]


def _draw(source: Sampler | ArrayLike) -> Callable[[int, int, Stream], list[Array]]:
    """Return (n, clouds, stream) -> that many independent clouds of n points."""
    if callable(source):
        return lambda n, clouds, stream: [
            _drawn(source(n, stream.child("points", i).generator()), n) for i in range(clouds)
        ]
    pool = _cloud("source", source)

    def draw(n: int, clouds: int, stream: Stream) -> list[Array]:
        if len(pool) < clouds * n:
            raise ValueError(f"source has {len(pool)} points, must have at least {clouds * n} for samples of n = {n}")
        chosen = stream.child("points").generator().permutation(len(pool))[: clouds * n]
        return np.split(pool[chosen], clouds)

    return draw


def _drawn(points: np.ndarray, n: int) -> Array:
    cloud = _cloud("source", points)
    if len(cloud) != n:
        raise ValueError(f"source gave {len(cloud)} points, must give the n = {n} it is asked for")
    return cloud


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    x, y = _cloud("a", a), _cloud("b", b)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"b has {y.shape[1]} columns, must have {x.shape[1]} as a does")
    return x, y


def _cloud(name: str, points: ArrayLike) -> Array:
    cloud = np.asarray(points, dtype=np.float64)
    if cloud.ndim != 2 or cloud.shape[0] < 2 or cloud.shape[1] < 1:
        raise ValueError(f"{name} has shape {cloud.shape}, must be (n, d) with n >= 2 and d >= 1")
    if not np.isfinite(cloud).all():
        raise ValueError(f"{name} holds a point that is not finite, all must be")
    return cloud


def _dual_bound(a: Array, b: Array, u: Array, v: Array) -> float:
    """A lower bound of the optimal cost: mean u + mean v, lowered until u_i + v_j <= |a_i - b_j|^2 holds for all pairs.

    Any such potentials bound the cost of every coupling from below (weak duality).
    """
    slack = math.inf
    rows = max(1, BLOCK // len(b))
    for start in range(0, len(a), rows):
        block = a[start : start + rows]
        costs = np.zeros((len(block), len(b)))
        for k in range(a.shape[1]):
            costs += np.square(block[:, None, k] - b[:, k])
        slack = min(slack, float((costs - u[start : start + rows, None] - v).min()))
    return float(u.mean() + v.mean()) + min(slack, 0.0)


def _pot() -> Any:
    """Import POT, for NumPy alone unless the caller's environment says otherwise.

    It would import every array library that it can find, which takes about ten seconds.
    """
    for library in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot
