"""Exact statements about a proportion from independent trials."""

from __future__ import annotations

from typing import Literal

from scipy.stats import beta

Verdict = Literal["verified", "refuted", "inconclusive"]


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval (lower, upper) of a success probability.

    Each limit alone fails with probability at most (1 - confidence) / 2, for every probability and every `trials`.

    Raises:
        ValueError: unless 0 <= successes <= trials, trials >= 1 and 0 < confidence < 1.
    Source: Clopper and Pearson (1934), The use of confidence or fiducial limits, Biometrika 26.

    >>> lower, upper = clopper_pearson(0, 100)
    >>> lower, round(upper, 4)
    (0.0, 0.0362)
    """
    if trials < 1:
        raise ValueError(f"trials is {trials!r}, must be at least 1")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes is {successes!r}, must lie in [0, trials] = [0, {trials}]")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, must lie in (0, 1)")
    tail = (1 - confidence) / 2
    lower = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    upper = float(beta.isf(tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return lower, upper


def proportion_below(successes: int, trials: int, bound: float, confidence: float = 0.95) -> Verdict:
    """Judge the statement "the success probability is at most `bound`" from independent trials.

    Verified if the Clopper-Pearson interval ends at or below the bound, refuted if it begins above it.

    Raises:
        ValueError: unless 0 <= bound <= 1, and as `clopper_pearson`.

    >>> proportion_below(3, 1000, 0.05), proportion_below(90, 1000, 0.05), proportion_below(50, 1000, 0.05)
    ('verified', 'refuted', 'inconclusive')
    """
    if not 0 <= bound <= 1:
        raise ValueError(f"bound is {bound!r}, must lie in [0, 1]")
    lower, upper = clopper_pearson(successes, trials, confidence)
    if upper <= bound:
        return "verified"
    return "refuted" if lower > bound else "inconclusive"
