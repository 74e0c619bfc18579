"""The torch twin against the exact chain: its steps, its law, and the mean of what the estimators make of it."""

import numpy as np
import pytest
import torch

from algorithms.chain import Noise, rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, first_order, half_order, truncated
from theory import chains, instances
from theory.chains import LinearGaussianChain, QuadraticReward
from theory.credit import credit_moments
from toy.experiments import gradients
from toy.linear_gaussian import LinearGaussian, Problem, Quadratic
from verdicts.means import Plan, equivalence, gaussian_polynomial_kurtosis
from verdicts.streams import Stream

INSTANCES = {"additive": instances.additive_instance, "bilinear": instances.bilinear_instance}


@pytest.fixture(params=INSTANCES, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem.of(INSTANCES[request.param]())


def exact_mean(chain: LinearGaussianChain, x: np.ndarray, t: int) -> np.ndarray:
    """Mean of step t at one point, written out."""
    matrix = chain.A[t - 1]
    for i in range(chain.parameters):
        matrix = matrix + (0 if chain.N is None else chain.theta[i] * chain.N[t - 1, i])
    return matrix @ x + chain.B[t - 1] @ chain.theta + chain.c[t - 1]


def test_step_means_and_standard_deviations_are_those_of_the_exact_chain(problem: Problem) -> None:
    chain, x = problem.exact_chain, np.array([[0.3, -1.2], [2.0, 0.7], [-0.4, 0.0]])
    assert (problem.chain.steps, problem.chain.shape) == (chain.steps, (chain.dim,))
    for t in range(1, chain.steps + 1):
        mean = problem.chain.mean(problem.params, torch.tensor(x), t, None)
        np.testing.assert_allclose(mean, [exact_mean(chain, row, t) for row in x], rtol=1e-14, atol=1e-14)
        assert problem.chain.std(t) == chain.std[t - 1]


def affine_map(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """x_0 as a function of all standard normal noise: its value at zero (d,), and its matrix (d, (T + 1) d)."""
    steps, d = problem.chain.steps, problem.chain.shape[0]
    points = torch.cat([torch.zeros(1, (steps + 1) * d), torch.eye((steps + 1) * d)]).double()
    parts = points.reshape(-1, steps + 1, d).transpose(0, 1)
    noise = Noise(parts[0], parts[1:], torch.zeros(len(points), dtype=torch.long))
    x0 = rollout(problem.chain, problem.params, noise).latents[0].numpy()
    return x0[0], (x0[1:] - x0[0]).T


def test_law_of_the_output_is_the_exact_one(problem: Problem) -> None:
    mean, matrix = affine_map(problem)
    second = matrix @ matrix.T + np.outer(mean, mean)
    zero, basis = np.zeros((2, 2)), np.eye(2)
    for i in range(2):
        linear = QuadraticReward(0.0, basis[i], zero)
        assert mean[i] == pytest.approx(chains.objective(problem.exact_chain, linear), abs=1e-13)
        for j in range(2):
            product = QuadraticReward(0.0, [0.0, 0.0], np.outer(basis[i], basis[j]) + np.outer(basis[j], basis[i]))
            assert second[i, j] == pytest.approx(chains.objective(problem.exact_chain, product), abs=1e-13)


@pytest.mark.parametrize("cov", [[[1.0, 0.3], [0.3, 0.6]], [[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_start_has_the_given_mean_and_covariance_even_a_singular_one(cov: list[list[float]]) -> None:
    chain = LinearGaussianChain([np.eye(2)], [np.ones((2, 1))], [[0, 0]], [1.0], [0.5], [0.4, -0.3], cov)
    x = LinearGaussian.of(chain).initial(torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()).numpy()
    root = (x[1:] - x[0]).T
    np.testing.assert_allclose(x[0], [0.4, -0.3])
    np.testing.assert_allclose(root @ root.T, cov, atol=1e-14)


def test_chain_without_turning_parameters_has_none() -> None:
    chain, _ = instances.additive_instance()
    assert chain.N is None
    assert not LinearGaussian.of(chain).turn.any()


def test_reward_is_the_quadratic_form() -> None:
    reward = Quadratic.of(QuadraticReward(1.5, [0.6, -0.4], [[-1.0, 0.3], [0.3, -0.5]]))
    x = torch.tensor([[2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    # 1.5 + (1.2 + 0.4) + (-1 * 4 + 2 * 0.3 * 2 * -1 - 0.5) / 2
    np.testing.assert_allclose(reward(x, None), [1.5 + 1.6 - 2.85, 1.5], rtol=1e-14)


MIXED = Estimator("mixed", Credit.of(np.array([[0.7, 0.3, 0, 0, 0], [-0.6, 1.1, 0.5, 0, 0], [0.2, -0.4, 0.5, 0.7, 0]])))
PLAN = Plan(alpha=1e-6, kurtosis=gaussian_polynomial_kurtosis(4), max_samples=1 << 19)


@pytest.mark.parametrize("estimator", [first_order(3), truncated(3, 2), half_order(3, 2), MIXED], ids=lambda e: e.name)
def test_samples_have_the_exact_mean_of_their_credit_matrix(estimator: Estimator) -> None:
    """False alarms have probability 1e-6 at most, by the confidence sequence of the verdicts."""
    problem = Problem.of(instances.bilinear_instance())
    exact = credit_moments(problem.exact_chain, problem.exact_reward, estimator.credit.outcomes).mean
    sample = gradients(problem.chain, problem.params, problem.objective, estimator)
    stream = Stream(0).child("tests", "linear-gaussian", estimator.name)
    assert equivalence(sample(stream), exact, 0.1, PLAN).verdict == "verified"
    wrong = exact + np.array([0.15, 0.0])
    assert equivalence(sample(stream), wrong, 0.1, PLAN).verdict == "refuted"
