"""The mixture sampler's score and steps against the theory's mixture."""

import numpy as np
import pytest
import torch

from theory import schedules
from theory.mixture import GaussianMixture
from toy.mixture_chain import MixtureChain

SCHEDULE = schedules.linear(7, 0.05, 0.4)
VARIANCES = np.array([0.09, 0.5, 0.02])
LAW = GaussianMixture([0.2, 0.5, 0.3], [[-1.0, 0.4], [0.8, -0.3], [0.1, 1.2]], VARIANCES[:, None, None] * np.eye(2))
CHAIN = MixtureChain.of(LAW, SCHEDULE)
POINTS = np.array([[0.0, 0.0], [1.5, -2.0], [-0.9, 0.5], [6.0, 5.0]])


@pytest.mark.parametrize("t", range(1, 8))
def test_score_is_that_of_the_noised_mixture(t: int) -> None:
    expected = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[t - 1]))
    np.testing.assert_allclose(CHAIN.score(torch.tensor(POINTS), t), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("t", [1, 4, 7])
def test_step_is_the_reverse_step_with_the_control_added_to_the_score(t: int) -> None:
    params = {
        "bias": torch.tensor([0.3, -0.1], dtype=torch.float64),
        "gain": torch.tensor([-0.4, 0.7], dtype=torch.float64),
    }
    beta = SCHEDULE.beta[t - 1]
    drive = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[t - 1]))
    drive = drive + np.array([0.3, -0.1]) + np.array([-0.4, 0.7]) * np.tanh(POINTS)
    expected = (POINTS + beta * drive) / np.sqrt(1 - beta)
    np.testing.assert_allclose(CHAIN.mean(params, torch.tensor(POINTS), t, None), expected, rtol=1e-13)
    assert CHAIN.std(t) == pytest.approx(np.sqrt(beta), rel=1e-15)


def test_one_gaussian_without_control_is_moved_by_a_known_affine_map() -> None:
    """For one Gaussian the score is linear, so that the step is a known affine map."""
    law = GaussianMixture([1.0], [[0.7, -0.2]], [0.3 * np.eye(2)])
    chain, t = MixtureChain.of(law, SCHEDULE), 3
    beta, level = SCHEDULE.beta[t - 1], SCHEDULE.alpha_bar[t - 1]
    score = -(POINTS - np.sqrt(level) * np.array([0.7, -0.2])) / (0.3 * level + 1 - level)
    mean = chain.mean(chain.parameters(), torch.tensor(POINTS), t, None)
    np.testing.assert_allclose(mean, (POINTS + beta * score) / np.sqrt(1 - beta), rtol=1e-13)


def test_untrained_control_is_zero_and_its_two_tensors_are_apart() -> None:
    params = CHAIN.parameters()
    params["bias"] += 1
    assert (CHAIN.steps, CHAIN.shape) == (7, (2,))
    assert not params["gain"].any()
    assert not CHAIN.parameters()["bias"].any()


@pytest.mark.parametrize("cov", [[[0.3, 0.0], [0.0, 0.4]], [[0.3, 0.1], [0.1, 0.3]]])
def test_anisotropic_components_are_refused(cov: list[list[float]]) -> None:
    law = GaussianMixture([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], [0.2 * np.eye(2), cov])
    with pytest.raises(ValueError, match=r"^covs = .* must be multiples of the identity") as fault:
        MixtureChain.of(law, SCHEDULE)
    assert "\n" not in str(fault.value)
