"""Rewards of the control problem: derivatives by differences, and Lipschitz constants that are attained."""

import numpy as np
import pytest

from theory.control_rewards import Reward, Ridge, Sum

SMOOTH = ("log cosh", "sin", "tanh", "softplus", "identity")
REWARDS: list[Reward] = [Ridge(bend, -0.7, 1.3, 0.4, (0.6, -0.8)) for bend in SMOOTH]
REWARDS.append(Sum((REWARDS[0], REWARDS[2])))  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", REWARDS)
def test_the_gradient_is_the_derivative(reward: Reward) -> None:
    y = np.random.default_rng(0).normal(size=(50, 2))
    step = 1e-5
    for i, e in enumerate(np.eye(2)):
        difference = (reward(y + step * e) - reward(y - step * e)) / (2 * step)
        np.testing.assert_allclose(reward.gradient(y)[:, i], difference, atol=1e-9)


@pytest.mark.parametrize("bend", SMOOTH)
def test_the_lipschitz_constants_are_attained_and_not_exceeded(bend: str) -> None:
    reward = Ridge(bend, -0.7, 1.3, 0.4)
    y = np.linspace(-30, 30, 600_001)[:, None]
    slope = reward.gradient(y)[:, 0]
    assert np.abs(slope).max() == pytest.approx(reward.lipschitz, rel=1e-6)
    bending = np.abs(np.diff(slope)).max() / float(y[1, 0] - y[0, 0])
    assert bending == pytest.approx(reward.gradient_lipschitz, rel=1e-6, abs=1e-9)


def test_a_direction_is_a_unit_vector() -> None:
    short, long = Ridge("sin", direction=(0.3, 0.4)), Ridge("sin", direction=(3.0, 4.0))
    assert short([[1.0, 2.0]]) == pytest.approx(long([[1.0, 2.0]]))
    assert long([[1.0, 2.0]]) == pytest.approx(np.sin(2.2))


def test_a_kink_has_no_gradient_lipschitz_constant() -> None:
    assert Ridge("absolute").gradient_lipschitz == np.inf
    assert Ridge("absolute").lipschitz == 1.0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="bend = 'cosh': must be one of log cosh, sin"):
        Ridge("cosh")
    with pytest.raises(ValueError, match=r"direction = \(0.0, 0.0\): must not be zero"):
        Ridge("sin", direction=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"y has shape \(3, 1\): must be \(n, 2\)"):
        Ridge("sin", direction=(1.0, 0.0))(np.zeros((3, 1)))
