"""The controlled system of PI-FT: conversions, the step's KL by quadrature, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.control import ControlSchedule, per_step
from theory.gaussian import Gaussian, kl

SCHEDULE = ControlSchedule([0.6, 0.7, 0.8], [0.5, 0.3, 0.2], [1.0, 2.0, 0.5])


@given(st.integers(0, 2), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_control_and_its_mean_are_one(t: int, values: list[float]) -> None:
    y, u = np.array(values[:2]), np.array(values[1:])
    np.testing.assert_allclose(SCHEDULE.control(t, y, SCHEDULE.mean(t, y, u)), u, atol=1e-12)


def test_the_mean_is_ddpms() -> None:
    """Ho et al. 2020, eq. 11: (y - (1 - a) / sqrt(1 - alpha_bar) eps) / sqrt(a), eps = -sqrt(1 - alpha_bar) score."""
    y, score, alpha_bar = 0.7, -0.4, 0.8
    eps = -np.sqrt(1 - alpha_bar) * score
    wanted = (y - 0.2 / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(0.8)
    assert SCHEDULE.mean(2, y, score) == pytest.approx(wanted)


@pytest.mark.parametrize("t", range(3))
def test_the_steps_kl_is_that_of_its_two_laws(t: int) -> None:
    y, control, score = np.array([0.3, -1.0]), np.array([1.0, 0.5]), np.array([-0.2, 2.0])
    cov = SCHEDULE.sigma[t] ** 2 * np.eye(2)
    wanted = kl(Gaussian(SCHEDULE.mean(t, y, control), cov), Gaussian(SCHEDULE.mean(t, y, score), cov))
    assert SCHEDULE.step_kl(t, control, score) == pytest.approx(wanted, rel=1e-12)
    many = SCHEDULE.step_kl(t, np.stack([control, score]), score)
    np.testing.assert_allclose(many, [wanted, 0.0], rtol=1e-12)


def test_the_steps_kl_has_the_value_of_an_independent_derivation() -> None:
    """a = 0.8, sigma^2 = 0.2, the score of 1/2 N(+-1, 1/2) noised to alpha_bar = 0.72, y = 0.4, control 1.3."""
    spread, mean = 0.72 * 0.5 + 0.28, np.sqrt(0.72)
    score = (-0.4 + mean * np.tanh(0.4 * mean / spread)) / spread
    schedule = ControlSchedule.ddpm([0.8, 0.9], [0.5, 0.4])
    assert schedule.step_kl(0, [1.3], [score]) == pytest.approx(0.2051633718, abs=5e-11)


def test_noise_levels_are_products_of_what_follows() -> None:
    np.testing.assert_allclose(SCHEDULE.alpha_bar, [0.336, 0.56, 0.8])


def test_the_gain_turns_a_slope_into_a_control() -> None:
    """M* = m + sigma^2 / beta h and U* = s + g h are the same statement."""
    y, score, h = 0.3, -0.7, 1.9
    for t in range(3):
        mean = SCHEDULE.mean(t, y, score) + SCHEDULE.sigma[t] ** 2 / SCHEDULE.strength[t] * h
        assert SCHEDULE.control(t, y, mean) == pytest.approx(score + SCHEDULE.gain[t] * h)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([0.8, 1.0], [0.1, 0.1], 1.0), r"alpha\[1\] = 1.0: must lie in \(0, 1\)"),
        (([0.8, 0.9], [0.1], 1.0), "sigma has 1 entries: must have one for each of the 2 of alpha"),
        (([0.8, 0.9], [0.1, 0.2], [1.0, 1.0, 1.0]), "strength has 3 entries: must have one for each of the 2 of alpha"),
        (([0.8, 0.9], [0.1, 0.0], 1.0), r"sigma\[1\] = 0.0: must be positive"),
        (([0.8, 0.9], [0.1, 0.2], -1.0), r"strength\[0\] = -1.0: must be positive"),
        (([0.8, 0.9], [0.1, 0.2], float("inf")), "strength = .*: must be finite"),
    ],
)
def test_bad_schedules_are_refused_by_name(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ControlSchedule(*arguments)


def test_a_schedule_may_be_regularised_otherwise() -> None:
    other = SCHEDULE.with_strength(3.0)
    np.testing.assert_array_equal(other.strength, 3.0)
    np.testing.assert_array_equal(other.sigma, SCHEDULE.sigma)


def test_zero_may_be_allowed() -> None:
    np.testing.assert_array_equal(per_step("margin", 0.0, 2, positive=False), 0.0)
    with pytest.raises(ValueError, match=r"margin\[0\] = -1.0: must be non-negative"):
        per_step("margin", -1.0, 2, positive=False)
