"""The judges that checks are made of: exact comparison, exact inequality, sampled mean, sampled inequality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from claims.claim import Check, Context
from verdicts import exact, means
from verdicts.means import MeanResult
from verdicts.streams import Stream

Values = Callable[[], Any]  # () -> array-like (D,)
Sampler = Callable[[Stream], Callable[[int], np.ndarray]]  # stream -> (block -> (n, D))


@dataclass(frozen=True)
class Agreement:
    """estimate = reference up to rounding; the subject computes the estimate."""

    reference: Values
    tolerance: float

    def __call__(self, subject: Values, context: Context) -> MeanResult:
        estimate, reference = _vector(subject()), _vector(self.reference())
        return exact.agreement(estimate, reference, self.tolerance * max(1.0, float(np.abs(reference).max())))


@dataclass(frozen=True)
class Ordering:
    """larger >= smaller in every coordinate, up to rounding; the subject computes (larger, smaller)."""

    tolerance: float

    def __call__(self, subject: Callable[[], tuple[Any, Any]], context: Context) -> MeanResult:
        larger, smaller = subject()
        return exact.ordering(_vector(larger), _vector(smaller), self.tolerance)


@dataclass(frozen=True)
class SampledMean:
    """The mean of the subject's samples equals the reference within a margin declared beforehand."""

    reference: Values
    margin: float | Values
    kurtosis: float

    def __call__(self, subject: Sampler, context: Context) -> MeanResult:
        declared = self.margin() if callable(self.margin) else self.margin
        reference = _vector(self.reference())
        margin = np.broadcast_to(_vector(declared), reference.shape) * context.profile.margin_scale
        return means.equivalence(subject(context.stream), reference, margin, plan(context, self.kurtosis))


@dataclass(frozen=True)
class SampledAbove:
    """The mean of the subject's samples exceeds the bound in every coordinate."""

    bound: Values
    kurtosis: float

    def __call__(self, subject: Sampler, context: Context) -> MeanResult:
        return means.above(subject(context.stream), _vector(self.bound()), plan(context, self.kurtosis))


def equals(
    name: str,
    question: str,
    coordinates: Sequence[str],
    *,
    subject: Values,
    reference: Values,
    controls: Mapping[str, Values],
    printed: Values | None = None,
    tolerance: float = 1e-9,
    margin_from: str = "rounding of float64, relative to the largest entry",
) -> Check:
    """Exact check that `subject()` equals `reference()`; both are arrays with one entry per coordinate."""
    judge = Agreement(reference, tolerance)
    return Check(name, "exact", question, tuple(coordinates), judge, subject, controls, printed, margin_from)


def at_least(
    name: str,
    question: str,
    coordinates: Sequence[str],
    *,
    subject: Callable[[], tuple[Any, Any]],
    controls: Mapping[str, Callable[[], tuple[Any, Any]]],
    printed: Callable[[], tuple[Any, Any]] | None = None,
    tolerance: float = 1e-12,
) -> Check:
    """Exact check that, in every coordinate, the first of `subject()`'s two arrays is no smaller than the second."""
    margin_from = "an inequality: only rounding of float64 is allowed for"
    return Check(
        name, "exact", question, tuple(coordinates), Ordering(tolerance), subject, controls, printed, margin_from
    )


def has_mean(
    name: str,
    question: str,
    coordinates: Sequence[str],
    *,
    subject: Sampler,
    reference: Values,
    margin: float | Values,
    margin_from: str,
    kurtosis: float,
    controls: Mapping[str, Sampler],
    printed: Sampler | None = None,
) -> Check:
    """Statistical check that the samples' mean equals the reference within the margin."""
    judge = SampledMean(reference, margin, kurtosis)
    return Check(name, "statistical", question, tuple(coordinates), judge, subject, controls, printed, margin_from)


def exceeds(
    name: str,
    question: str,
    coordinates: Sequence[str],
    *,
    subject: Sampler,
    bound: Values,
    kurtosis: float,
    controls: Mapping[str, Sampler],
    printed: Sampler | None = None,
) -> Check:
    """Statistical check that the samples' mean lies above the bound in every coordinate."""
    judge = SampledAbove(bound, kurtosis)
    margin_from = "an inequality: no margin"
    return Check(name, "statistical", question, tuple(coordinates), judge, subject, controls, printed, margin_from)


def plan(context: Context, kurtosis: float) -> means.Plan:
    """Return how a sampled check reaches its verdict: with this context's error share and budget."""
    return means.Plan(alpha=context.alpha, kurtosis=kurtosis, max_samples=context.profile.max_samples)


def _vector(values: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(values, dtype=float)).ravel()
