"""The verifier verified: how often a check errs, counted on heavy-tailed laws whose mean is known exactly.

The laws are score-function gradient estimates of tiny problems, reward(x) eps / s at x = theta + s eps, and Student's
t. Each has two coordinates with different parameters, and its exact mean, deviation and kurtosis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.stats import norm

from verdicts.means import Plan, Sample, equivalence
from verdicts.proportions import Verdict, clopper_pearson
from verdicts.streams import Stream

Array = NDArray[np.float64]
Check = Callable[[Stream], Verdict]

FREEDOM = 9  # of Student's t: its eighth moment, which the kurtosis estimate's spread needs, is the last one to exist
THRESHOLD = 2.0  # of the rare-event reward


@dataclass(frozen=True)
class Law:
    """A law on R^2: `mean`, standard `deviation` and the largest `kurtosis` of a coordinate, all exact.

    `draw(generator, n)` returns n independent rows (n, 2).
    """

    name: str
    mean: tuple[float, float]
    deviation: tuple[float, float]
    kurtosis: float
    draw: Callable[[np.random.Generator, int], Array]

    def sampler(self, stream: Stream, rows: int = 1024) -> Sample:
        """Return block index -> `rows` rows, each block from its own child of `stream`."""
        return lambda block: self.draw(stream.child(block).generator(), rows)


@dataclass(frozen=True)
class OperatingRate:
    """Verdict counts of independent repetitions of one check."""

    verified: int
    refuted: int
    inconclusive: int

    @property
    def trials(self) -> int:
        """The number of repetitions."""
        return self.verified + self.refuted + self.inconclusive

    def interval(self, verdict: Verdict, confidence: float = 0.95) -> tuple[float, float]:
        """Return the Clopper-Pearson interval of the probability of `verdict`."""
        return clopper_pearson(getattr(self, verdict), self.trials, confidence)


def operating_rate(check: Check, trials: int, stream: Stream) -> OperatingRate:
    """Run `check` on `trials` independent children of `stream` and count its verdicts.

    Raises:
        ValueError: if trials < 1.

    >>> operating_rate(lambda stream: "verified" if stream.integer() % 2 else "refuted", 8, Stream(1)).trials
    8
    """
    if trials < 1:
        raise ValueError(f"trials is {trials!r}, must be at least 1")
    counts = Counter(check(stream.child(trial)) for trial in range(trials))
    return OperatingRate(counts["verified"], counts["refuted"], counts["inconclusive"])


def mean_check(law: Law, alpha: float, margin: float, bias: float = 0.0, max_samples: int = 100_000) -> Check:
    """Return the check "the mean of `law` is its mean, off by a planted bias", for `operating_rate`.

    `margin` and `bias` are in standard deviations of each coordinate; the bias is planted in the first one only. At
    bias 0 every refutation is a false alarm; at |bias| > margin every verification is, and refutations are the power.
    A margin too small to be reached makes the check read to the end, so that refutations count the runs in which any
    look missed the mean.
    """
    deviation = np.array(law.deviation)
    reference = np.array(law.mean) - np.array([bias, 0.0]) * deviation
    plan = Plan(alpha=alpha, kurtosis=law.kurtosis, max_samples=max_samples)
    return lambda stream: equivalence(law.sampler(stream), reference, margin * deviation, plan).verdict


def heavy_tailed_laws() -> tuple[Law, ...]:
    """Return the test laws: cubic polynomial, log-normal, rare-event and Student tails.

    >>> [(law.name, round(law.kurtosis, 1)) for law in heavy_tailed_laws()]
    [('quadratic reward', 47.0), ('exponential reward', 17.0), ('rare event', 509.8), ('Student t', 4.2)]
    """
    settings = ((0.5, 1.0), (-0.3, 0.8))  # (theta, s) of the two coordinates
    rewards: tuple[tuple[str, Callable[[Array], Array], Callable[[float, float], list[float]]], ...] = (
        ("quadratic reward", _quadratic, _quadratic_moments),
        ("exponential reward", _exponential, _exponential_moments),
        ("rare event", _rare, _rare_moments),
    )
    laws = [
        _law(name, [moments(*setting) for setting in settings], partial(_score_estimate, reward, np.array(settings)))
        for name, reward, moments in rewards
    ]
    return (*laws, _law("Student t", [_student_moments()] * 2, _student))


def _score_estimate(reward: Callable[[Array], Array], settings: Array, generator: np.random.Generator, n: int) -> Array:
    theta, s = settings.T[:, :, None]
    # Coordinates first: rows of two make NumPy's inner loops two long.
    eps = np.ascontiguousarray(generator.standard_normal((n, len(settings))).T)
    return (reward(theta + s * eps) * eps / s).T


def _student(generator: np.random.Generator, n: int) -> Array:
    return generator.standard_t(FREEDOM, size=(n, 2))


def _quadratic(x: Array) -> Array:
    return (x - 1) ** 2


def _exponential(x: Array) -> Array:
    return np.exp(0.4 * x)


def _rare(x: Array) -> Array:
    return (x > THRESHOLD).astype(float)


def _quadratic_moments(theta: float, s: float) -> list[float]:
    """Return E[(reward eps / s)^k], k = 1..4; seven nodes integrate degree 12 exactly."""
    eps, weights = hermegauss(7)
    estimate = _quadratic(theta + s * eps) * eps / s
    return [float(weights @ estimate**k / weights.sum()) for k in range(1, 5)]


def _exponential_moments(theta: float, s: float) -> list[float]:
    """Use E[exp(t eps) eps^k] = exp(t^2 / 2) E[(eps + t)^k]."""
    moments = []
    for k in range(1, 5):
        t = 0.4 * k * s
        shifted = (t, 1 + t**2, 3 * t + t**3, 3 + 6 * t**2 + t**4)[k - 1]
        moments.append(math.exp(0.4 * k * theta + t**2 / 2) * shifted / s**k)
    return moments


def _rare_moments(theta: float, s: float) -> list[float]:
    """Use the moments of a normal tail, E[eps^k; eps > z], by parts."""
    z = (THRESHOLD - theta) / s
    density, tail = float(norm.pdf(z)), float(norm.sf(z))
    tails = (density, z * density + tail, (z**2 + 2) * density, (z**3 + 3 * z) * density + 3 * tail)
    return [moment / s**k for k, moment in enumerate(tails, start=1)]


def _student_moments() -> list[float]:
    variance = FREEDOM / (FREEDOM - 2)
    return [0.0, variance, 0.0, (3 + 6 / (FREEDOM - 4)) * variance**2]


def _law(name: str, moments: Sequence[list[float]], draw: Callable[[np.random.Generator, int], Array]) -> Law:
    """Build a law from the raw moments 1..4 of its two coordinates."""
    first, second, third, fourth = np.array(moments).T
    variance = second - first**2
    kurtosis = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2
    return Law(name, tuple(first.tolist()), tuple(np.sqrt(variance).tolist()), float(kurtosis.max()), draw)
