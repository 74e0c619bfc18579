"""Verdicts on the mean of a random vector, valid at every look and for heavy tails, without asymptotics.

One assumption: every coordinate X of a sample has kurtosis E(X - mu)^4 / Var(X)^2 <= kappa, and rows are independent
with one law. For polynomials of Gaussians and random signs `gaussian_polynomial_kurtosis` makes it a theorem.

The rows are read in three stages (derived in docs/statistics.md):

1. variance: pairs Y = (X - X')^2 / 2 bound the variance from above, because Y >= 0 and E Y^2 <= K Var(X)^2;
2. pilot: Catoni's interval on a fixed number of rows gives a centre c and |mu - c| <= w;
3. stream: looks j = 1, 2, ... at row counts that double. With phi(x) = x - x^3/6 held constant beyond |x| = sqrt(2),
   c + sum_i phi(lambda_j (X_i - c)) / (n_j lambda_j) lies within
   lambda_j (Var + w^2) / 2 + log(2 / a_j) / (n_j lambda_j) of mu with probability 1 - a_j.

No row is kept after the pilot: one running sum per planned look and coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.polynomial.hermite_e import hermegauss, hermeval
from numpy.typing import ArrayLike, NDArray

from verdicts.proportions import Verdict

Array = NDArray[np.float64]
Sample = Callable[[int], ArrayLike]  # block index -> rows (n, D); the same rows for the same index, whenever asked

VARIANCE_SHARE = 0.25  # of the error probability; the rest pays for the intervals of the mean
PILOT_ROWS_PER_LOG = 100  # makes the pilot's half-width about a seventh of a standard deviation
PILOT_BISECTIONS = 40
NEWTON_STEPS = 4  # of the pilot: a bracket of the root saves most of the sums that bisection would ask for
NARROW = 1e-11  # of the first bracket, the width of that one: above the rounding of the sums
KURTOSIS_ALLOWANCE = 2  # a sample kurtosis scatters around the true one; beyond this factor the assumption is in doubt
PIECE = 2**16  # numbers handled at once: their temporaries fit into a core's cache
LARGEST = 1e70  # magnitudes outside (1 / LARGEST, LARGEST) would overflow in a fourth power
SQRT2 = math.sqrt(2)
DISJOINT = "Two looks disagree: rows are dependent, of changing law, or of larger kurtosis than declared."


@dataclass(frozen=True)
class Plan:
    """How one verdict is reached.

    `alpha`: probability of a wrong verdict, over all coordinates and looks; `kurtosis`: the assumed bound kappa of
    every coordinate; `max_samples`: rows after which the check gives up; `rounding`: relative rounding error of a
    sample, which widens every interval by `rounding` times the largest magnitude seen.

    Raises:
        ValueError: unless 0 < alpha < 1, kurtosis >= 1 (no law has less), max_samples >= 1, 0 <= rounding < 1.
    """

    alpha: float
    kurtosis: float
    max_samples: int
    rounding: float = 64 * float(np.finfo(float).eps)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha!r}, must lie in (0, 1)")
        if not 1 <= self.kurtosis < math.inf:
            raise ValueError(f"kurtosis is {self.kurtosis!r}, must be finite and at least 1")
        if self.max_samples < 1:
            raise ValueError(f"max_samples is {self.max_samples!r}, must be at least 1")
        if not 0 <= self.rounding < 1:
            raise ValueError(f"rounding is {self.rounding!r}, must lie in [0, 1)")


class Look(NamedTuple):
    """One look: rows read so far, then estimate and interval of (mean - reference), each of shape (D,)."""

    samples: int
    estimate: Array
    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class MeanResult:
    """A verdict with its numbers; arrays have shape (D,).

    `estimate` is of the mean; `lower` and `upper` bound (mean - reference). `coordinate` decided: the one refuted most
    clearly, otherwise the one whose interval reaches furthest relative to its margin. `measured_kurtosis` is a
    diagnostic without a guarantee (nan where a coordinate does not vary). `note` is empty or says what to distrust.
    """

    verdict: Verdict
    estimate: Array
    reference: Array
    lower: Array
    upper: Array
    margin: Array
    samples: int
    looks: tuple[Look, ...]
    coordinate: int
    measured_kurtosis: Array
    note: str = ""


def gaussian_polynomial_kurtosis(degree: int, rarest: float = 1.0) -> float:
    """Return a bound on the kurtosis of polynomials of `degree` in independent Gaussians and random signs.

    It is the largest eigenvalue of the moments E[h_a h_b h_c h_d] of the normalised Hermite polynomials up to `degree`,
    at most 9^degree. If the polynomial itself is drawn at random from a finite set, independently of the Gaussians,
    `rarest` is the smallest probability with which one of them is drawn.

    Raises:
        ValueError: unless 1 <= degree <= 12 and 0 < rarest <= 1.
    Source: derived in docs/statistics.md; 9^degree is the Bonami lemma (O'Donnell, Analysis of Boolean Functions, 9.1).

    >>> [round(gaussian_polynomial_kurtosis(d), 1) for d in (1, 2, 3, 4)]
    [3.0, 16.8, 116.0, 816.8]
    """
    if degree not in range(1, 13):
        raise ValueError(f"degree is {degree!r}, must be an integer from 1 to 12")
    if not 0 < rarest <= 1:
        raise ValueError(f"rarest is {rarest!r}, must lie in (0, 1]")
    nodes, weights = hermegauss(2 * degree + 1)  # exact for the polynomials of degree 4 * degree that are integrated
    # A random choice of polynomial shifts its mean, so that the constant joins the basis.
    orders = range(1 if rarest == 1 else 0, degree + 1)
    basis = np.stack([hermeval(nodes, np.eye(degree + 1)[k]) / math.sqrt(math.factorial(k)) for k in orders])
    products = (basis[:, None] * basis[None]).reshape(-1, len(nodes)) * np.sqrt(weights / weights.sum())
    return float(np.linalg.eigvalsh(products @ products.T)[-1]) / rarest


def pilot_samples(plan: Plan, dimension: int) -> int:
    """Return the rows that the variance and pilot stages read before the first look.

    >>> pilot_samples(Plan(alpha=1e-6, kurtosis=116, max_samples=10**7), dimension=4)
    18140
    """
    return 2 * _variance_pairs(plan, dimension) + _pilot_rows(plan, dimension)


def planned_half_width(plan: Plan, deviation: ArrayLike) -> Array:
    """Return the half-width (D,) to expect at the end of the budget, for standard deviations (D,).

    Infinite if `plan.max_samples` ends before the first look.

    >>> planned_half_width(Plan(alpha=1e-6, kurtosis=3, max_samples=10**6), [1.0]).round(4)
    array([0.0064])
    """
    deviation = np.asarray(deviation, dtype=float)
    dimension = len(deviation)
    if pilot_samples(plan, dimension) > plan.max_samples:
        return np.full(dimension, np.inf)
    schedule = _schedule(plan, dimension) or [_pilot_rows(plan, dimension)]
    look, rows = len(schedule), schedule[-1]
    pairs = _variance_pairs(plan, dimension) + rows // 2
    shortfall = math.sqrt(2 * _pair_constant(plan) * _variance_log(plan, dimension, look) / pairs)
    return deviation * math.sqrt(2 * _log_term(plan, dimension, look) / (rows * (1 - shortfall)))


def equivalence(
    sample: Sample,
    reference: ArrayLike,
    margin: ArrayLike,
    plan: Plan,
    on_look: Callable[[Look], None] | None = None,
) -> MeanResult:
    """Judge whether the mean of the rows of `sample` is `reference` (D,), up to `margin` (D,) or one number.

    Refuted if some coordinate's interval of (mean - reference) excludes 0; else verified if every interval lies inside
    [-margin, margin]; else the reading goes on, and ends inconclusive at `plan.max_samples`. With probability at least
    1 - plan.alpha neither a mean equal to the reference is refuted nor one further off than the margin verified.
    `sample(b)` has shape (n, D), n >= 2, and depends on b alone. `on_look` is called with every look.

    Raises:
        ValueError: if reference or margin have the wrong shape or values, or a block has a wrong shape or a value that
            is not finite (the text names the block).
    """
    reference = _vector("reference", reference)
    margin = _margins(margin, len(reference))
    return _judge(sample, reference, margin, plan, on_look, _equivalent)


def above(sample: Sample, bound: ArrayLike, plan: Plan, on_look: Callable[[Look], None] | None = None) -> MeanResult:
    """Judge whether the mean of the rows of `sample` exceeds `bound` (D,) in every coordinate.

    Verified if every lower limit of (mean - bound) is positive, refuted if some upper limit is negative. Everything
    else is as in `equivalence`; the result's margin is zero.
    """
    bound = _vector("bound", bound)
    return _judge(sample, bound, np.zeros(len(bound)), plan, on_look, _above)


def _equivalent(lower: Array, upper: Array, margin: Array) -> tuple[Verdict, int]:
    near, far = np.maximum(lower, -upper), np.maximum(np.abs(lower), np.abs(upper))
    excluded = near > 0
    if np.any(excluded):
        return "refuted", int(np.argmax(np.divide(near, far, out=np.zeros_like(near), where=excluded)))
    return "verified" if np.all(far <= margin) else "inconclusive", int(np.argmax(far / margin))


def _above(lower: Array, upper: Array, margin: Array) -> tuple[Verdict, int]:
    if np.any(upper < 0):
        return "refuted", int(np.argmin(upper))
    return "verified" if np.all(lower > 0) else "inconclusive", int(np.argmin(lower))


def _judge(
    sample: Sample,
    reference: Array,
    margin: Array,
    plan: Plan,
    on_look: Callable[[Look], None] | None,
    decide: Callable[[Array, Array, Array], tuple[Verdict, int]],
) -> MeanResult:
    """Read looks until `decide(lower, upper, margin)` returns a verdict; intervals of all looks are intersected."""
    dimension = len(reference)
    lower, upper = np.full(dimension, -np.inf), np.full(dimension, np.inf)
    estimate, kurtosis = np.full(dimension, np.nan), np.full(dimension, np.nan)
    looks: list[Look] = []
    verdict: Verdict = "inconclusive"
    notes: list[str] = []
    samples, coordinate = 0, 0
    for samples, centre, half_width, measured in _looks(sample, np.abs(reference), plan):
        kurtosis = measured
        lower = np.maximum(lower, centre - reference - half_width)
        upper = np.minimum(upper, centre - reference + half_width)
        estimate = centre - reference
        if np.any(lower > upper):
            notes.append(DISJOINT)
            break
        estimate = np.clip(estimate, lower, upper)
        looks.append(Look(samples, estimate, lower, upper))
        if on_look is not None:
            on_look(looks[-1])
        verdict, coordinate = decide(lower, upper, margin)
        if verdict != "inconclusive":
            break
    if not samples:
        needed = pilot_samples(plan, dimension)
        notes.append(f"max_samples is {plan.max_samples}, but {needed} rows come before the first look.")
    if np.any(kurtosis > KURTOSIS_ALLOWANCE * plan.kurtosis):
        notes.append(f"Kurtosis measured {np.nanmax(kurtosis):.3g}, declared at most {plan.kurtosis:.3g}.")
        verdict = "inconclusive" if verdict == "verified" else verdict
    return MeanResult(
        verdict=verdict,
        estimate=estimate + reference,
        reference=reference,
        lower=lower,
        upper=upper,
        margin=margin,
        samples=samples,
        looks=tuple(looks),
        coordinate=coordinate,
        measured_kurtosis=kurtosis,
        note=" ".join(notes),
    )


def _looks(sample: Sample, scale: Array, plan: Plan) -> Iterator[tuple[int, Array, Array, Array]]:
    """Yield (rows read, centre, half-width, measured kurtosis) at each look; `scale` (D,) starts the rounding error.

    Nothing is yielded if `plan.max_samples` ends before the first look.
    """
    dimension = len(scale)
    fixed_rows = pilot_samples(plan, dimension)
    if fixed_rows > plan.max_samples:
        return
    rows = _Rows(sample, dimension)
    pairs = _Pairs(plan, dimension)

    for piece in rows.take(2 * _variance_pairs(plan, dimension)):
        pairs.add(piece)
        scale = np.maximum(scale, np.abs(piece).max(axis=1))
    floor = np.maximum(plan.rounding * scale, 1 / LARGEST)  # of the standard deviation; constants have rounding only
    variance = np.maximum(pairs.variance_bound(0), floor**2)

    pilot = np.concatenate(list(rows.take(_pilot_rows(plan, dimension))), axis=1)
    scale = np.maximum(scale, np.abs(pilot).max(axis=1))
    centre, radius = _catoni_interval(pilot, variance, _log_term(plan, dimension, 0))
    yield rows.count, centre, radius + plan.rounding * scale, pairs.kurtosis()

    pairs.add(pilot)
    schedule = _schedule(plan, dimension)
    if not schedule:
        return
    logs = np.array([_log_term(plan, dimension, look) for look in range(1, len(schedule) + 1)])
    # What the variance bound will have come down to by look j is foreseen from the pilots alone, so that lambda_j does
    # not depend on the rows that it weighs.
    foreseen = np.stack([pairs.foreseen(look, rows_ahead) for look, rows_ahead in enumerate(schedule, start=1)])
    lambdas = np.sqrt(2 * (logs / schedule)[:, None] / (np.maximum(foreseen, floor**2) + radius**2))
    sums = np.zeros_like(lambdas)
    read = 0
    for look, planned in enumerate(schedule, start=1):
        for piece in rows.take(planned - read):
            pairs.add(piece)
            scale = np.maximum(scale, np.abs(piece).max(axis=1))
            _add_truncated(sums[look - 1 :], lambdas[look - 1 :], piece - centre[:, None])
        read = planned
        variance = np.minimum(variance, np.maximum(pairs.variance_bound(look), floor**2))
        rate = lambdas[look - 1]
        half_width = rate * (variance + radius**2) / 2 + logs[look - 1] / (planned * rate)
        estimate = centre + sums[look - 1] / (planned * rate)
        yield rows.count, estimate, half_width + plan.rounding * scale, pairs.kurtosis()


def _weight(look: int) -> float:
    """Return the share of look 0, 1, 2, ... in an error probability; all shares sum to one."""
    return 1 / ((look + 1) * (look + 2))


def _log_term(plan: Plan, dimension: int, look: int) -> float:
    """Return log(2 / a) with a the error probability of one coordinate's interval at this look."""
    return math.log(2 * dimension / ((1 - VARIANCE_SHARE) * plan.alpha * _weight(look)))


def _variance_log(plan: Plan, dimension: int, look: int) -> float:
    """Return log(1 / a) with a the error probability of one coordinate's variance bound at this look."""
    return math.log(dimension / (VARIANCE_SHARE * plan.alpha * _weight(look)))


def _pair_constant(plan: Plan) -> float:
    """Return K of E Y^2 <= K Var^2 for Y = (X - X')^2 / 2, which is (kappa + 3) / 2."""
    return (plan.kurtosis + 3) / 2


def _variance_pairs(plan: Plan, dimension: int) -> int:
    """Return the pairs after which the first variance bound is twice the mean of Y."""
    return math.ceil(8 * _pair_constant(plan) * _variance_log(plan, dimension, 0))


def _pilot_rows(plan: Plan, dimension: int) -> int:
    return math.ceil(PILOT_ROWS_PER_LOG * _log_term(plan, dimension, 0))


def _schedule(plan: Plan, dimension: int) -> list[int]:
    """Return the streamed rows of looks 1, 2, ...: doubling, from about what the pilots took to what is left."""
    left = plan.max_samples - pilot_samples(plan, dimension)
    planned = max(_variance_pairs(plan, dimension), _pilot_rows(plan, dimension))
    schedule = []
    while planned < left:
        schedule.append(planned)
        planned *= 2
    return [*schedule, left] if left else schedule


class _Rows:
    """Reads a sampler's blocks in order and hands its rows out, columns first, in pieces that fit the cache."""

    def __init__(self, sample: Sample, dimension: int) -> None:
        self.sample = sample
        self.dimension = dimension
        self.count = 0  # rows handed out
        self._size = 0  # rows of a block
        self._next = 0
        self._rest = np.empty((0, dimension))

    def take(self, count: int) -> Iterator[Array]:
        """Yield the next `count` rows as pieces of shape (D, rows)."""
        piece_rows = max(2, PIECE // self.dimension)
        while count:
            if not len(self._rest):
                self._rest = self._block()
            piece, self._rest = np.split(self._rest, [min(count, piece_rows)])
            count -= len(piece)
            self.count += len(piece)
            yield np.ascontiguousarray(piece.T)

    def _block(self) -> Array:
        index, self._next = self._next, self._next + 1
        block = np.asarray(self.sample(index), dtype=float)
        if block.ndim != 2 or block.shape[0] < 2 or block.shape[1] != self.dimension:
            raise ValueError(f"sample({index}) has shape {block.shape}, must be (n, {self.dimension}) with n >= 2")
        self._size = self._size or len(block)
        if len(block) != self._size:
            raise ValueError(f"sample({index}) has {len(block)} rows, must have {self._size} as block 0 has")
        if not np.abs(block).max() < LARGEST:
            raise ValueError(f"sample({index}) holds {np.abs(block).max()}, must be finite and below {LARGEST:g}")
        return block


class _Pairs:
    """Running moments of Y = (X - X')^2 / 2 over disjoint pairs of rows, and what they say about the variance."""

    def __init__(self, plan: Plan, dimension: int) -> None:
        self.plan = plan
        self.dimension = dimension
        self.count = 0
        self._first = np.zeros(dimension)
        self._second = np.zeros(dimension)

    def add(self, piece: Array) -> None:
        """Add the pairs of a piece (D, rows): its first half against its second half."""
        half = piece.shape[1] // 2
        y = piece[:, :half] - piece[:, half : 2 * half]
        y *= y
        y *= 0.5
        self.count += half
        self._first += y.sum(axis=1)
        self._second += np.einsum("dn,dn->d", y, y)

    def variance_bound(self, look: int) -> Array:
        """Return an upper confidence bound (D,) of the variance that fails with this look's error probability."""
        return self._first / self.count / (1 - self._shortfall(look, self.count))

    def foreseen(self, look: int, rows_ahead: int) -> Array:
        """Return what `variance_bound(look)` would be after `rows_ahead` more rows like those seen."""
        return self._first / self.count / (1 - self._shortfall(look, self.count + rows_ahead // 2))

    def kurtosis(self) -> Array:
        """Return the plug-in kurtosis 2 mean(Y^2) / mean(Y)^2 - 3; nan where all rows are equal."""
        square = self._first**2 / self.count
        return 2 * np.divide(self._second, square, out=np.full(self.dimension, np.nan), where=square > 0) - 3

    def _shortfall(self, look: int, count: int) -> float:
        """Return rho such that mean(Y) < (1 - rho) Var has at most this look's error probability."""
        return math.sqrt(2 * _pair_constant(self.plan) * _variance_log(self.plan, self.dimension, look) / count)


def _truncated_sum(scaled: Array) -> Array:
    """Return the sum over the last axis of phi(scaled)."""
    held = np.clip(scaled, -SQRT2, SQRT2)
    return held.sum(axis=-1) - np.einsum("...n,...n,...n->...", held, held, held) / 6


def _add_truncated(sums: Array, lambdas: Array, deviations: Array) -> None:
    """Add sum_i phi(lambda deviation_i) to `sums` (looks, D), for `lambdas` (looks, D) and `deviations` (D, rows).

    Where no deviation reaches the constant part of phi, the first and third power sums serve every look at once.
    """
    first = deviations.sum(axis=1)
    third = np.einsum("dn,dn,dn->d", deviations, deviations, deviations)
    reached = lambdas * np.abs(deviations).max(axis=1) > SQRT2
    sums += np.where(reached, 0, lambdas * first - lambdas**3 * third / 6)
    for look in np.flatnonzero(reached.any(axis=1)):
        columns = reached[look]
        sums[look, columns] += _truncated_sum(lambdas[look, columns, None] * deviations[columns])


def _catoni_interval(rows: Array, variance: Array, log_term: float) -> tuple[Array, Array]:
    """Return centre and half-width (D,) of {m : |sum_i phi(lambda (X_i - m))| <= n lambda^2 variance / 2 + log_term}.

    `rows` has shape (D, n), `variance` (D,) bounds the variance. Source: Catoni (2012), Challenging the empirical mean
    and empirical variance, with the phi of Catoni and Giulini (2017).
    """
    n = rows.shape[1]
    rate = np.sqrt(2 * log_term / (n * variance))
    level = 2 * log_term
    # phi(x) >= 2x/3 on [0, sqrt 2]: beyond this reach of all rows the sum has passed the level.
    reach = 1.5 * level / (n * rate)
    low, high = rows.min(axis=1) - reach, rows.max(axis=1) + reach
    # The sum falls in m. The outer ends of both brackets are kept, so stopping early only widens the interval.
    target = np.array([[level], [-level]])
    narrow = _roots_within(rows, rate, target, NARROW * (high - low))
    ends = np.empty_like(narrow[0])
    for k, d in np.ndindex(ends.shape):
        # Where a bracket of the root is known, only middles inside it need the sum.
        known, unknown = (float(bound[k, d]) for bound in (narrow if k == 0 else narrow[::-1]))
        outer, inner = (float(end[d]) for end in ((low, high) if k == 0 else (high, low)))
        side = 1 if k == 0 else -1
        for _ in range(PILOT_BISECTIONS):
            middle = (outer + inner) / 2
            if side * (middle - known) <= 0:
                outer = middle
            elif side * (middle - unknown) >= 0:
                inner = middle
            elif side * (_truncated_sum(rate[d] * (rows[d] - middle)) - target[k, 0]) > 0:
                outer = middle
            else:
                inner = middle
        ends[k, d] = outer
    return (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2


def _roots_within(rows: Array, rate: Array, target: Array, width: Array) -> tuple[Array, Array]:
    """Return brackets (2, D), `width` (D,) to either side, of the m with sum_i phi(rate (X_i - m)) = target (2, 1).

    Found by Newton's method and proved by the signs at both ends; infinite where they prove nothing.
    """
    m = rows.mean(axis=1) - target / (rows.shape[1] * rate)
    for _ in range(NEWTON_STEPS):
        scaled = rate[:, None] * (rows - m[:, :, None])
        held = np.clip(scaled, -SQRT2, SQRT2)
        square = held * held
        slope = scaled.shape[-1] - square.sum(axis=-1) / 2  # the constant parts of phi add nothing
        found = held.sum(axis=-1) - np.einsum("...n,...n->...", square, held) / 6 - target
        m = m + np.divide(found, rate * slope, out=np.zeros_like(m), where=slope > 0)
    lower, upper = m - width, m + width
    below, above = (_truncated_sum(rate[:, None] * (rows - end[:, :, None])) - target for end in (lower, upper))
    return np.where(below > 0, lower, -np.inf), np.where(above < 0, upper, np.inf)


def _vector(name: str, values: ArrayLike) -> Array:
    vector = np.atleast_1d(np.asarray(values, dtype=float))
    if vector.ndim != 1 or not vector.size or not np.all(np.isfinite(vector)):
        raise ValueError(f"{name} has shape {vector.shape}, must be a non-empty vector of finite numbers")
    return vector


def _margins(margin: ArrayLike, dimension: int) -> Array:
    margins = np.asarray(margin, dtype=float)
    if margins.shape not in ((), (dimension,)):
        raise ValueError(f"margin has shape {margins.shape}, must be one number or ({dimension},)")
    if not np.all(np.isfinite(margins) & (margins > 0)):
        raise ValueError(f"margin is {margin!r}, must be positive and finite")
    return np.broadcast_to(margins, (dimension,)).copy()
