"""Data sets and rewards: shapes, reproducibility, and values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from toy.data import DATA
from toy.rewards import Bump, Indicator, Kink, Power, Sine

X = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize("name", DATA)
def test_clouds_are_reproducible_and_of_moderate_size(name: str) -> None:
    cloud = DATA[name](500, np.random.default_rng(1))
    assert cloud.shape == (500, 2)
    np.testing.assert_array_equal(cloud, DATA[name](500, np.random.default_rng(1)))
    assert not np.isin(cloud, DATA[name](500, np.random.default_rng(2))).any()
    assert 0.5 < np.abs(cloud).max() < 2.5
    assert (cloud.std(0) > 0.2).all()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (Sine(2.0), [math.sin(1) + math.sin(-2), math.sin(4) + math.sin(0.5)]),
        (Power(3), [0.125 - 1, 8 + 1 / 64]),
        (Kink(0.5), [-1.5, -1.75]),
        (Bump(0.5, 2.0), [math.exp(-2.25 / 8), math.exp(-(2.25 + 0.0625) / 8)]),
        (Indicator(0.5), [0.0, 1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reward_values(reward: object, expected: list[float]) -> None:
    np.testing.assert_allclose(reward(X, None), expected, rtol=1e-15)


def test_only_the_step_is_not_differentiable() -> None:
    rewards = [Sine(1.0), Power(2), Kink(0.0), Bump(0.0, 1.0), Indicator(0.0)]
    assert [r.differentiable for r in rewards] == [True, True, True, True, False]
