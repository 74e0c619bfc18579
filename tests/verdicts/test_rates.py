"""Slopes of error curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from verdicts.rates import rate_verdict, slope
from verdicts.streams import Stream

STEPS = np.array([0.2, 0.1, 0.05, 0.02])


@given(st.floats(-3, 3), st.floats(0.01, 100), st.floats(0.01, 100))
def test_power_laws_have_their_exponent_as_slope(exponent, first, second):
    measured = slope(STEPS, np.array([[first], [second]]) * STEPS**exponent)
    assert measured.estimate == pytest.approx(exponent, abs=1e-9)
    assert measured.upper - measured.lower < 1e-9
    assert measured.replicates == pytest.approx((exponent, exponent), abs=1e-9)


def test_the_interval_covers_as_often_as_declared_and_no_more():
    """2000 fits to log-normal errors, of which Student's interval covers exactly 80 per cent in expectation."""
    generator = Stream(41).generator()
    noise = np.exp(0.3 * generator.standard_normal((2000, 4, len(STEPS))))
    fits = [slope(STEPS, 2 * STEPS**1.5 * errors, confidence=0.8) for errors in noise]
    covered = sum(fit.lower <= 1.5 <= fit.upper for fit in fits)
    assert binom.ppf(5e-7, 2000, 0.8) <= covered <= binom.isf(5e-7, 2000, 0.8)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.8, 1.2), "verified"),
        ((0.6, 1.2), "verified"),
        ((0.4, 1.2), "inconclusive"),
        ((0.8, 1.6), "inconclusive"),
        ((1.6, 1.7), "refuted"),
        ((1.9, 2.1), "refuted"),
        ((-0.3, 0.2), "refuted"),
        ((0.1, 2.9), "inconclusive"),
    ],
)
def test_verdicts_of_rate_one_against_two(interval, verdict):
    assert rate_verdict(interval, claimed=1, rival=2) == verdict


@pytest.mark.parametrize(
    ("x", "errors", "confidence", "text"),
    [
        ([1.0], [[1.0], [1.0]], 0.9, "x has shape"),
        ([1.0, 2.0], [[1.0, 2.0]], 0.9, "errors has shape"),
        ([1.0, 2.0], [[1.0], [1.0]], 0.9, "errors has shape"),
        ([1.0, 1.0], [[1.0, 2.0], [1.0, 3.0]], 0.9, "x holds only"),
        ([0.0, 1.0], [[1.0, 2.0], [1.0, 3.0]], 0.9, "x holds 0"),
        ([1.0, 2.0], [[1.0, 2.0], [1.0, float("nan")]], 0.9, "errors holds nan"),
        ([1.0, 2.0], [[1.0, 2.0], [1.0, 3.0]], 1.0, "confidence is"),
    ],
)
def test_bad_curves_are_named(x, errors, confidence, text):
    with pytest.raises(ValueError, match=text):
        slope(x, errors, confidence)


@pytest.mark.parametrize(
    ("interval", "rival", "text"),
    [((1.0, 0.9), 2, "interval is"), ((1.0, np.inf), 2, "interval is"), ((0, 1), 1, "rival")],
)
def test_bad_comparisons_are_named(interval, rival, text):
    with pytest.raises(ValueError, match=text):
        rate_verdict(interval, claimed=1, rival=rival)
