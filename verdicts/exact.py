"""Verdicts on numbers that are computed without sampling, in the shape of the statistical ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verdicts.means import MeanResult

Array = NDArray[np.float64]


def agreement(estimate: ArrayLike, reference: ArrayLike, tolerance: ArrayLike) -> MeanResult:
    """Judge whether |estimate - reference| <= tolerance in every coordinate.

    `estimate` of any shape is flattened to (D,); `reference` has its shape or is one number, `tolerance` likewise.
    Verified if it holds, refuted otherwise; a difference that is not a number refutes. `lower` and `upper` both are
    the difference, `samples` is 0.

    Raises:
        ValueError: on other shapes, an empty estimate, or a tolerance that is negative or not finite.

    >>> agreement([1.0, 2.0], [1.0, 2.0 + 1e-13], 1e-12).verdict, agreement([1.0], [float("nan")], 1e-12).verdict
    ('verified', 'refuted')
    """
    estimate, reference, tolerance = _flatten(estimate, reference, tolerance)
    difference = _difference(estimate, reference)
    return _result(estimate, reference, difference, tolerance, np.abs(difference))


def ordering(estimate: ArrayLike, reference: ArrayLike, tolerance: ArrayLike) -> MeanResult:
    """Judge whether estimate >= reference - tolerance in every coordinate; else as `agreement`.

    >>> ordering([1.0, 3.0], [1.0, 2.0], 1e-12).verdict, ordering([1.0, 1.0], [1.0, 2.0], 1e-12).verdict
    ('verified', 'refuted')
    """
    estimate, reference, tolerance = _flatten(estimate, reference, tolerance)
    difference = _difference(estimate, reference)
    return _result(estimate, reference, difference, tolerance, -difference)


def _flatten(estimate: ArrayLike, reference: ArrayLike, tolerance: ArrayLike) -> tuple[Array, Array, Array]:
    values = np.asarray(estimate, dtype=float)
    if not values.size:
        raise ValueError(f"estimate has shape {values.shape}, must not be empty")
    others = []
    for name, other in (("reference", reference), ("tolerance", tolerance)):
        array = np.asarray(other, dtype=float)
        if array.shape not in ((), values.shape):
            raise ValueError(f"{name} has shape {array.shape}, must be one number or {values.shape} as estimate")
        others.append(np.broadcast_to(array, values.shape).ravel())
    if not np.all(np.isfinite(others[1]) & (others[1] >= 0)):
        raise ValueError(f"tolerance is {tolerance!r}, must be finite and not negative")
    return values.ravel(), others[0], others[1]


def _difference(estimate: Array, reference: Array) -> Array:
    with np.errstate(invalid="ignore"):  # infinity minus infinity is nan, which refutes
        return estimate - reference


def _result(estimate: Array, reference: Array, difference: Array, tolerance: Array, fault: Array) -> MeanResult:
    """`fault` (D,) must not exceed `tolerance`; the coordinate with the largest excess decides."""
    excess = np.where(np.isnan(fault), np.inf, fault - tolerance)
    return MeanResult(
        verdict="verified" if np.all(fault <= tolerance) else "refuted",
        estimate=estimate,
        reference=reference,
        lower=difference,
        upper=difference,
        margin=tolerance,
        samples=0,
        looks=(),
        coordinate=int(np.argmax(excess)),
        measured_kurtosis=np.full(len(estimate), np.nan),
    )
