"""Rates of convergence: the slope of log error against log step size, with an interval from repetitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from verdicts.proportions import Verdict


@dataclass(frozen=True)
class Slope:
    """A slope with its confidence interval and the slopes of the single replicates."""

    estimate: float
    lower: float
    upper: float
    replicates: tuple[float, ...]


def slope(x: ArrayLike, errors: ArrayLike, confidence: float = 0.95) -> Slope:
    """Return the least-squares slope of log(errors) against log(x).

    `x` has shape (m,): step sizes or iteration counts; `errors` has shape (r, m): one row per independent replicate.
    Each replicate gives one slope; the interval is Student's for their mean, exact if the slopes are normal. Identical
    rows (an error computed without sampling) give an interval of width zero.

    Raises:
        ValueError: if shapes do not match, r < 2, m < 2, a value is not positive and finite, all x are equal, or
            confidence is outside (0, 1).

    >>> h = np.array([0.1, 0.05, 0.025])
    >>> round(slope(h, np.stack([3 * h**2, 5 * h**2])).estimate, 12)
    2.0
    """
    x, errors = np.asarray(x, dtype=float), np.asarray(errors, dtype=float)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"x has shape {x.shape}, must be (m,) with m >= 2")
    if errors.ndim != 2 or errors.shape[0] < 2 or errors.shape[1] != x.size:
        raise ValueError(f"errors has shape {errors.shape}, must be (r, {x.size}) with r >= 2")
    for name, values in (("x", x), ("errors", errors)):
        valid = np.isfinite(values) & (values > 0)
        if not np.all(valid):
            raise ValueError(f"{name} holds {values[~valid][0]}, must be positive and finite")
    if np.ptp(x) == 0:
        raise ValueError(f"x holds only {x[0]}, must hold two different values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, must lie in (0, 1)")
    centred = np.log(x) - np.log(x).mean()
    slopes = np.log(errors) @ centred / (centred @ centred)
    replicates = len(slopes)
    half = student.isf((1 - confidence) / 2, replicates - 1) * slopes.std(ddof=1) / np.sqrt(replicates)
    centre = float(slopes.mean())
    return Slope(centre, float(centre - half), float(centre + half), tuple(slopes.tolist()))


def rate_verdict(interval: tuple[float, float], claimed: float, rival: float) -> Verdict:
    """Judge the claimed rate against a rival one by an interval of the slope.

    The slope counts as the claimed one within half the distance to the rival: verified if the whole interval does,
    refuted if none of it does, inconclusive otherwise. A measured slope never equals the asymptotic one (the error has
    higher-order terms), hence the band.

    Raises:
        ValueError: if claimed equals rival, or the interval is not an ordered pair of finite numbers.

    >>> rate_verdict((0.9, 1.1), claimed=1, rival=2), rate_verdict((1.9, 2.1), 1, 2), rate_verdict((1.2, 1.8), 1, 2)
    ('verified', 'refuted', 'inconclusive')
    """
    lower, upper = interval
    if not (np.isfinite(lower) and np.isfinite(upper) and lower <= upper):
        raise ValueError(f"interval is {interval!r}, must be an ordered pair of finite numbers")
    if claimed == rival:
        raise ValueError(f"rival is {rival!r}, must differ from claimed")
    band = abs(claimed - rival) / 2
    if claimed - band < lower and upper < claimed + band:
        return "verified"
    return "refuted" if upper <= claimed - band or lower >= claimed + band else "inconclusive"
