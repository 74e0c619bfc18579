"""Clopper-Pearson limits against the binomial law that defines them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from verdicts.proportions import clopper_pearson, proportion_below


@given(st.data(), st.integers(1, 300), st.floats(0.01, 0.999999))
def test_each_limit_leaves_half_the_error_to_its_tail(data, trials, confidence):
    successes = data.draw(st.integers(0, trials))
    lower, upper = clopper_pearson(successes, trials, confidence)
    tail = (1 - confidence) / 2
    assert 0 <= lower <= successes / trials <= upper <= 1
    if successes > 0:
        assert binom.sf(successes - 1, trials, lower) == pytest.approx(tail, rel=1e-6)
    else:
        assert lower == 0
    if successes < trials:
        assert binom.cdf(successes, trials, upper) == pytest.approx(tail, rel=1e-6)
    else:
        assert upper == 1


@given(st.integers(1, 60), st.floats(0.001, 0.999), st.floats(0.5, 0.99))
def test_the_verdict_errs_no_more_often_than_declared(trials, truth, confidence):
    """Summed over all outcomes, for a bound on either side of the truth."""
    outcomes = list(enumerate(binom.pmf(np.arange(trials + 1), trials, truth)))
    refuted = sum(p for k, p in outcomes if proportion_below(k, trials, truth, confidence) == "refuted")
    verified = sum(p for k, p in outcomes if proportion_below(k, trials, 0.999 * truth, confidence) == "verified")
    assert refuted <= (1 - confidence) / 2 + 1e-9
    assert verified <= (1 - confidence) / 2 + 1e-9


@pytest.mark.parametrize(
    ("successes", "trials", "bound", "confidence", "text"),
    [
        (0, 0, 0.1, 0.9, "trials is"),
        (-1, 5, 0.1, 0.9, "successes is"),
        (6, 5, 0.1, 0.9, "successes is"),
        (1, 5, 1.1, 0.9, "bound is"),
        (1, 5, 0.1, 1.0, "confidence is"),
    ],
)
def test_bad_input_is_named(successes, trials, bound, confidence, text):
    with pytest.raises(ValueError, match=text):
        proportion_below(successes, trials, bound, confidence)
