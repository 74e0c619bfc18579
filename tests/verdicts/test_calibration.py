"""The laws are what they say, the checks err no more often than declared, and counting would notice if they did."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from scipy.stats import t as student

from verdicts.calibration import OperatingRate, heavy_tailed_laws, mean_check, operating_rate
from verdicts.proportions import clopper_pearson, proportion_below
from verdicts.streams import Stream

ALPHA = 0.05
CONFIDENCE = 1 - 2e-6  # each one-sided limit fails with probability 1e-6
LAWS = heavy_tailed_laws()
NAMES = [law.name for law in LAWS]

REWARDS = {
    "quadratic reward": lambda x: (x - 1) ** 2,
    "exponential reward": lambda x: math.exp(0.4 * x),
    "rare event": lambda x: float(x > 2),
}


@pytest.mark.parametrize("law", LAWS, ids=NAMES)
def test_moments_by_numerical_integration(law):
    kurtoses = []
    for coordinate, (theta, s) in enumerate(((0.5, 1.0), (-0.3, 0.8))):

        def raw(power, centre, theta=theta, s=s):
            if law.name == "Student t":
                return quad(lambda x: (x - centre) ** power * student.pdf(x, 9), -np.inf, np.inf)[0]
            reward = REWARDS[law.name]
            jump = (2 - theta) / s
            ends = [-14.0, jump, 14.0]
            value = lambda e: (reward(theta + s * e) * e / s - centre) ** power * norm.pdf(e)  # noqa: E731
            return sum(quad(value, a, b, limit=200)[0] for a, b in zip(ends, ends[1:], strict=False))

        mean = raw(1, 0.0)
        variance = raw(2, mean)
        assert law.mean[coordinate] == pytest.approx(mean, abs=1e-8)
        assert law.deviation[coordinate] == pytest.approx(math.sqrt(variance), rel=1e-7)
        kurtoses.append(raw(4, mean) / variance**2)
    assert law.kurtosis == pytest.approx(max(kurtoses), rel=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=NAMES)
def test_draws_have_the_stated_mean_and_deviation(law):
    n = 200_000
    rows = law.draw(Stream(1).child(law.name).generator(), n)
    # Markov on E(mean error)^4 <= (kurtosis / n + 3) Var^2 / n^2, with 5e-7 for each coordinate.
    allowed = (2e6 * (law.kurtosis / n + 3)) ** 0.25 / math.sqrt(n)
    assert np.all(np.abs(rows.mean(axis=0) - law.mean) <= allowed * np.array(law.deviation))


@pytest.mark.parametrize("law", LAWS, ids=NAMES)
def test_a_true_mean_is_seldom_refuted_and_mostly_verified(law):
    rate = operating_rate(mean_check(law, ALPHA, margin=0.15), 500, Stream(21).child(law.name))
    assert proportion_below(rate.refuted, rate.trials, ALPHA, CONFIDENCE) != "refuted"
    assert rate.interval("verified", CONFIDENCE)[0] > 0.8


@pytest.mark.parametrize("law", LAWS, ids=NAMES)
def test_no_look_of_a_long_run_misses_the_mean(law):
    """A margin out of reach makes every run read to its end, so that a refutation is a look that missed."""
    check = mean_check(law, ALPHA, margin=1e-9, max_samples=60_000)
    rate = operating_rate(check, 60, Stream(22).child(law.name))
    assert rate.verified == 0
    assert proportion_below(rate.refuted, rate.trials, ALPHA, CONFIDENCE) != "refuted"


@pytest.mark.parametrize("bias", [-0.3, 0.3])
@pytest.mark.parametrize("law", LAWS, ids=NAMES)
def test_a_planted_bias_is_refuted(law, bias):
    rate = operating_rate(mean_check(law, ALPHA, margin=0.15, bias=bias), 100, Stream(23).child(law.name))
    assert rate.interval("refuted", CONFIDENCE)[0] > 0.8
    assert proportion_below(rate.verified, rate.trials, ALPHA, CONFIDENCE) != "refuted"


def test_counting_notices_a_check_that_peeks():
    """Repeated 95 per cent intervals of the central limit theorem refute a true mean far too often."""
    law = LAWS[0]

    def peeking(stream):
        rows = law.draw(stream.generator(), 4000) - law.mean
        for n in range(100, 4001, 100):
            error = rows[:n].std(axis=0) / math.sqrt(n)
            if np.any(np.abs(rows[:n].mean(axis=0)) > 1.96 * error):
                return "refuted"
        return "verified"

    rate = operating_rate(peeking, 200, Stream(24))
    assert proportion_below(rate.refuted, rate.trials, ALPHA, CONFIDENCE) == "refuted"


def test_rates_count_every_verdict_and_give_its_interval():
    rate = operating_rate(lambda stream: ("verified", "refuted", "inconclusive")[stream.path[-1] % 3], 8, Stream(1))
    assert rate == OperatingRate(verified=3, refuted=3, inconclusive=2)
    assert rate.trials == 8
    assert rate.interval("inconclusive", 0.9) == clopper_pearson(2, 8, 0.9)


def test_trials_are_needed():
    with pytest.raises(ValueError, match="trials is 0"):
        operating_rate(lambda stream: "verified", 0, Stream(1))
