"""Credit matrices: named constructors, row sums, laws, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms import credit
from algorithms.chain import ParameterNoise
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic, first_order, zeroth_order


def test_the_table_of_named_matrices():
    np.testing.assert_array_equal(credit.first_order(3).expected(), [[1, 0, 0, 0, 0]] * 3)
    np.testing.assert_array_equal(credit.truncated(3, 2).expected()[:, 0], [1, 1, 0])
    np.testing.assert_array_equal(credit.policy_gradient(3).expected()[:, 1:4], np.eye(3))
    np.testing.assert_array_equal(
        credit.half_order(5, 2).expected()[:, 1:6].argmax(1), [0, 0, 2, 2, 4], "blocks point at their smallest step"
    )
    np.testing.assert_array_equal(credit.zeroth_order(3).expected()[:, -1], [1, 1, 1])


@given(st.integers(1, 9), st.data())
def test_row_sums_tell_the_bias(steps, data):
    length = data.draw(st.integers(1, steps))
    for unbiased in (
        credit.first_order(steps),
        credit.half_order(steps, length),
        credit.policy_gradient(steps),
        credit.zeroth_order(steps),
    ):
        np.testing.assert_array_equal(unbiased.row_sums(), np.ones(steps))
    np.testing.assert_array_equal(credit.truncated(steps, length).row_sums(), np.arange(steps) < length)
    weights = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=steps, max_size=steps)))
    law = weights / weights.sum()
    law[-1] = 1 - law[:-1].sum()
    np.testing.assert_allclose(credit.random_truncation(law).row_sums(), law[::-1].cumsum()[::-1])
    np.testing.assert_allclose(credit.random_truncation(law, debiased=True).row_sums(), 1, rtol=1e-12)


@given(st.integers(1, 9), st.data())
def test_cost_is_the_number_of_live_costates(steps, data):
    length = data.draw(st.integers(1, steps))
    assert credit.first_order(steps).live_costates() == 1
    assert credit.half_order(steps, length).live_costates() == 1
    assert credit.zeroth_order(steps).live_costates() == 0
    full = np.ones((steps, steps + 2))
    full[:, 1:-1] *= np.tri(steps)
    assert Credit.of(full).live_costates() == steps + 1


def test_outcomes_are_drawn_with_their_probabilities():
    law = credit.random_truncation(np.array([0.2, 0.5, 0.3]))
    drawn = law.draw(40_000, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=3) / 40_000
    # 6 standard errors: a false alarm once in 5e8.
    assert (frequency - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 6 * 0.5 / 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Credit.of(np.zeros((3, 4))), r"shape \(m, T, T \+ 2\)"),
        (lambda: Credit.of(np.full((3, 5), np.nan)), "finite"),
        (lambda: Credit.of(np.ones((3, 5))), "row t = 1 credits the noise of step k = 2"),
        (lambda: Credit(np.zeros((2, 3, 5)), np.array([0.5, 0.4])), "sum 1"),
        (lambda: credit.truncated(3, 4), r"length must lie in 1..3, got 4"),
        (lambda: credit.half_order(3, 0), r"length must lie in 1..3, got 0"),
        (lambda: credit.first_order(0), "steps must be >= 1, got 0"),
        (lambda: credit.random_truncation(np.array([0.5, 0.4])), "probability vector"),
        (lambda: credit.random_truncation(np.array([1.0, 0.0]), debiased=True), "to be debiased"),
        (lambda: ParameterNoise(0.0), "must be > 0"),
        (lambda: ParameterNoise(1.0, "cauchy"), "'cauchy'"),
        (lambda: Estimator("x", credit.zeroth_order(2)), "parameter_noise must be given"),
        (lambda: antithetic(first_order(2), "parameters"), "no parameter noise"),
        (lambda: antithetic(antithetic(zeroth_order(2, 0.1), "parameters"), "parameters"), "already antithetic"),
        (lambda: antithetic(first_order(2), "rewards"), "got 'rewards'"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
