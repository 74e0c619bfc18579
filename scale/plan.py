"""Which estimator to take: measured variance, time and memory in, one advice out. Records and arithmetic, no torch.

The variance of a mean over n samples is (variance of one sample) / n; n samples take n times the seconds of one. So the
seconds that a given accuracy takes are proportional to variance x seconds per sample, an estimator's *work*: the
smaller, the better, whatever the accuracy (Glynn and Whitt 1992). It holds for estimators without bias only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNBIASED = "none"
COLUMNS = (
    "estimator",
    "bias",
    "relative variance",
    "calls per sample",
    "seconds per sample",
    "work",
    "peak memory",
    "per further sample",
    "needs",
    "frontier",
)


@dataclass(frozen=True)
class Measured:
    """What was measured of one estimator on one problem.

    Attributes:
        estimator: its name.
        relative_variance: trace of one sample's covariance over the squared norm of the gradient.
        relative_variance_error: standard error of that.
        seconds: per sample, at the measured batch.
        peak_bytes: of one gradient at the measured batch, with all that stands in memory beside it.
        batch: samples of the measured batch.
        bytes_per_sample: by which each further sample raises the peak.
        calls: of the network per sample, a backward pass into parameters being two.
        bias: "none", or what it is biased by.
        differentiable_reward: whether it needs the reward's gradient.

    Raises:
        ValueError: if a number is not finite or is out of its range, or a text is empty.
    """

    estimator: str
    relative_variance: float
    relative_variance_error: float
    seconds: float
    peak_bytes: int
    batch: int
    bytes_per_sample: int
    calls: float
    bias: str = UNBIASED
    differentiable_reward: bool = False

    def __post_init__(self) -> None:
        for name in ("estimator", "bias"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got {getattr(self, name)!r}")
        for name in ("relative_variance", "relative_variance_error", "peak_bytes", "bytes_per_sample", "calls"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} of {self.estimator} must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds of {self.estimator} must be positive and finite, got {self.seconds}")
        _check_batch(self.batch)

    @property
    def unbiased(self) -> bool:
        return self.bias == UNBIASED

    @property
    def fixed_bytes(self) -> int:
        """Bytes that the batch does not change; never below zero, so that noise in the slope makes no promises."""
        return max(0, self.peak_bytes - self.batch * self.bytes_per_sample)

    def peak(self, batch: int) -> int:
        """Return the peak bytes of a batch, by `predicted_peak`."""
        return predicted_peak(self.fixed_bytes, self.bytes_per_sample, batch)

    def fits(self, limit_bytes: float) -> float:
        """Return the largest batch under the limit: 0 if no sample fits, infinity if further samples cost nothing."""
        free = limit_bytes - self.fixed_bytes
        if free < self.bytes_per_sample:
            return 0
        return free // self.bytes_per_sample if self.bytes_per_sample else math.inf


# --- memory --------------------------------------------------------------------------------------------------------


def predicted_peak(fixed_bytes: int, per_sample_bytes: int, batch: int) -> int:
    """Return fixed + batch * per sample, in bytes.

    Raises:
        ValueError: if a number of bytes is negative or batch < 1.
    """
    for name, value in (("fixed_bytes", fixed_bytes), ("per_sample_bytes", per_sample_bytes)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    _check_batch(batch)
    return fixed_bytes + batch * per_sample_bytes


def prediction_error(predicted: float, measured: float) -> float:
    """Return (predicted - measured) / measured: negative where more was needed than had been predicted.

    Raises:
        ValueError: if `measured` is not positive, as where the step is too small to be seen.
    """
    if not measured > 0:
        raise ValueError(f"measured must be > 0 bytes, got {measured}")
    return predicted / measured - 1


def prediction_text(predicted: float, measured: float) -> str:
    """State a prediction, its measurement and its error.

    >>> prediction_text(950 * 2**20, 1000 * 2**20)
    'predicted 950 MiB, measured 1000 MiB: 5.0 % too low'
    """
    error = 100 * prediction_error(predicted, measured)
    verdict = "exact to 0.05 %" if abs(error) < 0.05 else f"{abs(error):.1f} % too {'high' if error > 0 else 'low'}"
    return f"predicted {in_bytes(predicted)}, measured {in_bytes(measured)}: {verdict}"


def in_bytes(number: float) -> str:
    """Write a number of bytes in the unit that suits it.

    >>> in_bytes(1536), in_bytes(3 * 2**30), in_bytes(12)
    ('1.50 KiB', '3.00 GiB', '12 B')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{_digits(number / size)} {unit}"
    return f"{number:.0f} B"


# --- choosing ------------------------------------------------------------------------------------------------------


def work(measured: Measured) -> float:
    """Return relative variance x seconds per sample: seconds until a mean's relative squared error is one."""
    return measured.relative_variance * measured.seconds


def work_error(measured: Measured) -> float:
    """Return the standard error of the work; the seconds are taken to be exact."""
    return measured.relative_variance_error * measured.seconds


def tied(first: Measured, second: Measured) -> bool:
    """Whether the works of two estimators lie within two standard errors of their difference, taken as independent."""
    return abs(work(first) - work(second)) <= 2 * math.hypot(work_error(first), work_error(second))


@dataclass(frozen=True)
class Frontier:
    """Estimators sorted by work. `best`: unbiased, and no unbiased one is as good in memory and work and better in one;
    `dominated`: the other unbiased ones; `biased`: apart, since work says nothing of them."""

    best: tuple[Measured, ...]
    dominated: tuple[Measured, ...]
    biased: tuple[Measured, ...]


def pareto(measured: Sequence[Measured], batch: int = 1) -> Frontier:
    """Return the frontier of (peak bytes at `batch`, work), by the numbers as they are, errors left aside."""
    ordered = sorted(measured, key=lambda m: (work(m), m.peak(batch), m.estimator))
    unbiased = [m for m in ordered if m.unbiased]
    best = [m for m in unbiased if not any(dominates(other, m, batch) for other in unbiased)]
    return Frontier(
        tuple(best),
        tuple(m for m in unbiased if m not in best),
        tuple(m for m in ordered if not m.unbiased),
    )


def dominates(first: Measured, second: Measured, batch: int) -> bool:
    """Whether `first` needs no more memory at `batch` and no more work than `second`, and less of one of them."""
    mine, theirs = (first.peak(batch), work(first)), (second.peak(batch), work(second))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Advice:
    """What to run, and why.

    Attributes:
        estimator: name, or None if nothing fits.
        batch: samples to hold in memory at once, at most the batch that was asked for; 0 if nothing fits.
        passes: batches of that size that make up the one asked for, by accumulation of gradients.
        peak_bytes: predicted for `batch`.
        ties: names of the others that fit and whose work is not told apart from the least.
        without_limit: the estimator that would be recommended if memory did not matter.
        why: one sentence.
    """

    estimator: str | None
    batch: int
    passes: int
    peak_bytes: int
    ties: tuple[str, ...]
    without_limit: str | None
    why: str


def recommend(
    measured: Sequence[Measured],
    memory_limit_bytes: float | None,
    batch: int,
    differentiable_reward: bool = True,
) -> Advice:
    """Recommend the unbiased estimator with the least work of those that fit.

    An estimator fits if one sample does: a batch that does not fit whole is cut, which changes neither the estimate nor
    (to the accuracy of this plan) the seconds per sample. Among the undominated ones that fit, all whose work lies
    within two standard errors of the least are ties, and the one with the least memory at `batch` is taken.

    Args:
        memory_limit_bytes: of the device, None for no limit.
        batch: samples per update.
        differentiable_reward: False leaves out the estimators that need the reward's gradient.

    Raises:
        ValueError: if `measured` is empty or names an estimator twice, batch < 1, or the limit is not
            positive and finite.
    """
    _check(measured, memory_limit_bytes, batch)
    able = [m for m in measured if m.unbiased and (differentiable_reward or not m.differentiable_reward)]
    free, _ = _choose(able, batch)
    if memory_limit_bytes is None:
        fitting = able
    else:
        fitting = [m for m in able if m.fits(memory_limit_bytes) >= 1]
    chosen, ties = _choose(fitting, batch)
    without_limit = None if free is None else free.estimator
    if chosen is None:
        return Advice(None, 0, 0, 0, (), without_limit, _why_none(measured, able, memory_limit_bytes))
    size = batch if memory_limit_bytes is None else int(min(batch, chosen.fits(memory_limit_bytes)))
    return Advice(
        chosen.estimator,
        size,
        math.ceil(batch / size),
        chosen.peak(size),
        tuple(m.estimator for m in ties),
        without_limit,
        _why(chosen, ties, free, memory_limit_bytes, batch, size),
    )


def _choose(candidates: Sequence[Measured], batch: int) -> tuple[Measured | None, list[Measured]]:
    """Return the choice among unbiased estimators, and the others that tie with the least work."""
    best = pareto(candidates, batch).best
    if not best:
        return None, []
    chosen = min((m for m in best if tied(m, best[0])), key=lambda m: (m.peak(batch), work(m), m.estimator))
    ordered = sorted(candidates, key=lambda m: (work(m), m.estimator))
    return chosen, [m for m in ordered if tied(m, best[0]) and m.estimator != chosen.estimator]


def _why(
    chosen: Measured,
    ties: list[Measured],
    free: Measured | None,
    limit: float | None,
    batch: int,
    size: int,
) -> str:
    if ties:
        also = " and ".join(m.estimator for m in ties)
        reason = f"its work of {_with_error(chosen)} s is not told apart from that of {also} by two standard errors"
        least = all(chosen.peak(batch) <= m.peak(batch) for m in ties)
        reason += f", and it needs the least memory of {'them' if least else 'those that no other beats in both'}"
    else:
        under = "" if limit is None else f" that fit under {in_bytes(limit)}"
        reason = f"its work of {_with_error(chosen)} s is the least of the unbiased estimators{under}"
    cut = f", {size} sample{'s' * (size > 1)} at a time" if size < batch else ""
    rather = ""
    if free is not None and free.estimator != chosen.estimator:
        rather = f" (without the limit: {free.estimator}, {_with_error(free)} s)"
    return f"Take {chosen.estimator}{cut}: {reason}{rather}."


def _why_none(measured: Sequence[Measured], able: list[Measured], limit: float | None) -> str:
    if not able:
        biased = any(not m.unbiased for m in measured)
        return (
            "Nothing can be recommended: no estimator is unbiased"
            + (" and able to do without the reward's gradient" if any(m.unbiased for m in measured) else "")
            + (", and a biased one's work cannot be compared." if biased else ".")
        )
    least = min(able, key=lambda m: (m.peak(1), m.estimator))
    return (
        f"Nothing fits under {in_bytes(limit or 0)}: the unbiased estimator that needs least, {least.estimator}, takes "
        f"{in_bytes(least.peak(1))} for one sample."
    )


# --- showing -------------------------------------------------------------------------------------------------------


def table(measured: Sequence[Measured], batch: int = 1) -> list[tuple[str, ...]]:
    """Return one row of texts per estimator, in the order of `COLUMNS`, sorted by work; memory is that of `batch`."""
    frontier = pareto(measured, batch)
    ordered = sorted(measured, key=lambda m: (work(m), m.peak(batch), m.estimator))
    return [
        (
            m.estimator,
            m.bias,
            _plus_minus(m.relative_variance, m.relative_variance_error),
            _digits(m.calls),
            _digits(m.seconds),
            _with_error(m),
            in_bytes(m.peak(batch)),
            in_bytes(m.bytes_per_sample),
            "reward's gradient" if m.differentiable_reward else "reward",
            "biased" if not m.unbiased else "yes" if m in frontier.best else "no",
        )
        for m in ordered
    ]


def _with_error(measured: Measured) -> str:
    return _plus_minus(work(measured), work_error(measured))


def _plus_minus(value: float, error: float) -> str:
    """Write a value to the digits that its error leaves, and the error with two."""
    if not all(1e-4 <= number < 1e6 for number in (value, error)):
        return f"{_digits(value)} ± {_digits(error)}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


def _digits(value: float) -> str:
    """Write three significant digits and all digits before the point; with powers of ten if that gets too long."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _check(measured: Sequence[Measured], limit: float | None, batch: int) -> None:
    if not measured:
        raise ValueError("measured must hold at least one estimator, got none")
    names = [m.estimator for m in measured]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"measured must name each estimator once, got {twice[0]!r} more than once")
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"memory_limit_bytes must be positive and finite, or None, got {limit}")
    _check_batch(batch)


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
