"""Mixtures under quadratic rewards, against plain quadrature on a grid of the plane."""

import dataclasses

import numpy as np
import pytest

from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture
from theory.mixture_tilt import MixtureRewardTuning
from theory.reward_tuning import Quadratic, RewardTuning

UPPER, LOWER = Quadratic([0.8, 0.3], [[1.0, 0.2], [0.2, 0.7]]), Quadratic([1.5, -0.2], [[0.2, 0.0], [0.0, -0.1]])
MEANS = [[-1.5, 0.0], [0.6, 1.2], [1.6, -1.0]]
COVS = [[[0.15, 0.0], [0.0, 0.15]], [[0.2, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.25]]]
DATA = GaussianMixture([0.5, 0.3, 0.2], MEANS, COVS)
CASE = MixtureRewardTuning(DATA, UPPER, LOWER)
AXIS = np.linspace(-7, 9, 401)
GRID = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)
AT = [(0.6, None), (1.7, None), (0.6, 3.0), (1.7, 100.0)]


def reward(of: Quadratic) -> np.ndarray:
    return GRID @ of.linear - 0.5 * np.einsum("ni,ij,nj->n", GRID, of.quadratic, GRID)


R1, R2 = reward(UPPER), reward(LOWER)
P = np.exp(DATA.log_density(GRID))
P /= P.sum()


def tilted(strength: float, gamma: float | None) -> np.ndarray:
    exponent = (R2 + (0.0 if gamma is None else R1 / gamma)) / strength
    weights = P * np.exp(exponent - exponent.max())
    return weights / weights.sum()


@pytest.mark.parametrize(("strength", "gamma"), AT)
def test_cumulants_and_divergence_are_those_of_the_grid(strength, gamma):
    q = tilted(strength, gamma)
    d1, d2 = R1 - q @ R1, R2 - q @ R2
    expected = [q @ R1, q @ d1**2, q @ (d1 * d2), q @ (d1**2 * d2)]
    np.testing.assert_allclose(CASE.cumulants(strength, gamma), expected, rtol=1e-9, atol=1e-9)
    kept = q > 0
    forward = np.sum(q[kept] * np.log(q[kept] / P[kept]))
    assert CASE.divergence(strength, gamma) == pytest.approx(forward, rel=1e-9)
    reverse = np.sum(P[kept] * np.log(P[kept] / q[kept]))
    assert abs(forward - reverse) > 1e-2  # the grid can tell the directions apart


@pytest.mark.parametrize(("strength", "gamma"), AT)
def test_tilt_is_the_mixture_of_that_density(strength, gamma):
    law, q = CASE.tilted(strength, gamma), tilted(strength, gamma)
    density = np.exp(law.log_density(GRID)) * (AXIS[1] - AXIS[0]) ** 2
    np.testing.assert_allclose(density, q, atol=1e-12)
    assert np.abs(law.weights - DATA.weights).max() > 0.05


@pytest.mark.parametrize(("strength", "gamma"), AT)
def test_partition_function_and_sample_size(strength, gamma):
    exponent = (R2 + (0.0 if gamma is None else R1 / gamma)) / strength
    first, second = P @ np.exp(exponent), P @ np.exp(2 * exponent)
    assert CASE.log_partition(strength, gamma) == pytest.approx(np.log(first), abs=1e-10)
    assert CASE.effective_sample_size(strength, gamma) == pytest.approx(first**2 / second, rel=1e-9)


def test_base_reward():
    assert CASE.data_reward() == pytest.approx(P @ R1, abs=1e-10)


@pytest.mark.parametrize("strength", [0.8, 2.5])
def test_slopes_are_derivatives_of_values(strength):
    h = 1e-4

    def slope(value):
        return (8 * (value(strength + h) - value(strength - h)) - value(strength + 2 * h) + value(strength - 2 * h)) / (
            12 * h
        )

    assert CASE.slope(strength) == pytest.approx(slope(CASE.value), abs=1e-9)
    assert CASE.penalty_slope(strength, 5.0) == pytest.approx(slope(lambda s: CASE.penalty_value(s, 5.0)), abs=1e-9)


def test_bias_law_uses_the_third_cumulant():
    gamma, strength = 1e4, 1.0
    found = gamma * (CASE.penalty_slope(strength, gamma) - CASE.slope(strength))
    assert found == pytest.approx(CASE.bias_limit(strength), abs=3e-3)
    third = CASE.cumulants(strength).third / (2 * strength**3)
    assert abs(third) > 10 * 3e-3  # leaving it out would show


def test_one_component_is_the_gaussian_case():
    data = Gaussian(MEANS[1], COVS[1])
    single = MixtureRewardTuning(GaussianMixture([1.0], [MEANS[1]], [COVS[1]]), UPPER, LOWER)
    alone = RewardTuning(data, UPPER, LOWER)
    for gamma in (None, 4.0):
        np.testing.assert_allclose(single.cumulants(0.9, gamma), alone.cumulants(0.9, gamma), rtol=1e-12)
        assert single.divergence(0.9, gamma) == pytest.approx(alone.divergence(0.9, gamma), rel=1e-10)


def test_domain_is_that_of_the_widest_component():
    bounds = [part.domain() for part in CASE.components]
    assert CASE.domain() == max(bounds) > min(bounds) > 0
    edge = CASE.domain()
    assert np.isfinite(CASE.log_partition(1.001 * edge))
    assert CASE.log_moment(2.0, 1.5 * edge) == np.inf  # the weights' variance, up to twice the bound
    with pytest.raises(ValueError, match="must exceed"):
        CASE.value(0.999 * edge)


def test_bad_input():
    with pytest.raises(ValueError, match="upper has dimension 1: must be that of data, 2"):
        MixtureRewardTuning(DATA, Quadratic([1.0]), LOWER)
    with pytest.raises(ValueError, match="strength"):
        CASE.cumulants(0.0)
    with pytest.raises(ValueError, match="gamma"):
        dataclasses.replace(CASE).divergence(1.0, -1.0)
