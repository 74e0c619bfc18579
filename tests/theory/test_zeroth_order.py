"""Moments against Gauss-Hermite quadrature of the estimators themselves, which is exact on polynomials."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from theory import zeroth_order as zo

G = np.array([0.5, -1.0, 2.0])
H = np.array([[2.0, 0.3, -0.4], [0.3, 1.0, -0.2], [-0.4, -0.2, -0.7]])
# The reference numbers of the four-dimensional case are from an independent derivation.
G4 = np.array([0.5, -1.0, 2.0, 0.3])
H4 = np.array([[2.0, 0.3, 0.0, 0.1], [0.3, 1.0, -0.2, 0.0], [0.0, -0.2, 0.5, 0.4], [0.1, 0.0, 0.4, -1.0]])


def quadratic(z: np.ndarray) -> float:
    return 3.0 + G @ z + 0.5 * z @ H @ z


def by_quadrature(estimate: Callable[[np.ndarray], np.ndarray], dim: int, order: int = 5) -> zo.Moments:
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / math.sqrt(2.0 * math.pi)
    draws = [np.array([nodes[i] for i in c]) for c in product(range(order), repeat=dim)]
    masses = np.array([math.prod(weights[i] for i in c) for c in product(range(order), repeat=dim)])
    values = np.array([estimate(draw) for draw in draws])
    mean = masses @ values
    return zo.Moments(mean, (values.T * masses) @ values - np.outer(mean, mean))


def assert_equal(found: zo.Moments, expected: zo.Moments) -> None:
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-10)
    np.testing.assert_allclose(found.covariance, expected.covariance, atol=1e-9)


def test_central_moments_equal_quadrature_with_and_without_noise() -> None:
    nu, sigma = 0.4, 0.3

    def estimate(draw: np.ndarray) -> np.ndarray:
        v, noise = draw[:3], sigma * draw[3:]
        return (quadratic(nu * v) + noise[0] - quadratic(-nu * v) - noise[1]) / (2 * nu) * v

    assert_equal(zo.central_moments(G, nu, sigma**2), by_quadrature(estimate, 5, 3))
    exact = by_quadrature(lambda v: estimate(np.concatenate([v, [0.7, 0.7]])), 3)
    assert_equal(zo.central_moments(G, nu, sigma**2, noise="common"), exact)
    assert zo.central_moments(G, nu).second_moment == pytest.approx(5 * G @ G)


def test_forward_moments_equal_quadrature() -> None:
    nu, sigma = 0.4, 0.3

    def estimate(draw: np.ndarray) -> np.ndarray:
        v, noise = draw[:3], sigma * draw[3]
        return (quadratic(nu * v) + noise - quadratic(np.zeros(3))) / nu * v

    # One noise only in the quadrature (four axes): half of what two independent evaluations add.
    half = by_quadrature(estimate, 4)
    full = zo.forward_moments(G, H, nu, sigma**2)
    assert_equal(zo.Moments(full.mean, full.covariance - sigma**2 / nu**2 * np.eye(3)), half)
    curved = zo.forward_moments(G, H, nu).second_moment - zo.central_moments(G, nu).second_moment
    assert curved == pytest.approx(0.04 * 7 * (np.trace(H) ** 2 + 2 * np.trace(H @ H)))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_residual_moments_equal_quadrature_and_the_released_scale_halves_the_mean(factor: float) -> None:
    nu, g, h = 0.4, G[:2], H[:2, :2]

    def value(z: np.ndarray) -> float:
        return 3.0 + g @ z + 0.5 * z @ h @ z

    expected = by_quadrature(lambda d: factor / nu * (value(nu * d[:2]) - value(nu * d[2:])) * d[:2], 4)
    found = zo.residual_moments(g, h, nu, scale=factor / nu)
    assert_equal(found, expected)
    np.testing.assert_allclose(found.mean, factor * g)
    second = 6 * g @ g + nu**2 * 4 * np.trace(h @ h)
    assert found.second_moment == pytest.approx(factor**2 * second)
    noisy = zo.residual_moments(g, h, nu, factor / nu, 0.09)
    assert noisy.second_moment - found.second_moment == pytest.approx(factor**2 * 4 * 0.09 / nu**2)


def test_moments_equal_reference_numbers() -> None:
    assert zo.central_moments(G4, 0.5).second_moment == pytest.approx(32.04, abs=1e-12)
    assert zo.forward_moments(G4, H4, 0.5).second_moment == pytest.approx(42.015, abs=1e-12)
    assert zo.central_moments(G4, 0.01, 0.05**2).second_moment == pytest.approx(82.04, abs=1e-12)
    assert zo.central_moments(G4, 0.01, 0.05**2, "common").second_moment == pytest.approx(32.04, abs=1e-12)
    np.testing.assert_allclose(zo.cubic_moments(0.7, 0.3, 0.5), (0.714, 4.315038), rtol=1e-12)


@pytest.mark.parametrize("nu", [0.1, 0.5, 2.0])
def test_cubic_moments_equal_quadrature_and_attain_the_bound(nu: float) -> None:
    a, x = 0.7, 0.3
    expected = by_quadrature(lambda v: (a * (x + nu * v) ** 3 - a * (x - nu * v) ** 3) / (2 * nu) * v, 1, 9)
    mean, second = zo.cubic_moments(a, x, nu)
    np.testing.assert_allclose((mean, second), (expected.mean[0], expected.second_moment), rtol=1e-12)
    assert mean - 3 * a * x**2 == pytest.approx(zo.bias_bound_hessian(6 * a, nu, 1), rel=1e-12)


def test_the_kinked_parabola_attains_the_gradient_bound() -> None:
    """f = x|x|/2 at 0: the mean is E|v|^3 nu/2 = nu sqrt(2/pi); here by a Riemann sum over the estimates."""
    nu, v = 0.3, np.linspace(-12.0, 12.0, 200_001)
    density = np.exp(-0.5 * v**2) / math.sqrt(2 * math.pi)
    f = 0.5 * nu * v * np.abs(nu * v)
    mean = float(np.sum((f - f[::-1]) / (2 * nu) * v * density) * (v[1] - v[0]))
    assert mean == pytest.approx(nu * math.sqrt(2 / math.pi), rel=1e-8)
    assert mean == pytest.approx(zo.bias_bound_gradient(1.0, nu, 1), rel=1e-8)
    assert mean > 3.0 * zo.bias_bound_hessian(1.0, 0.1, 1)  # O(nu), not O(nu^2)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_bias_bounds_hold_on_a_cubic_and_lie_below_the_published_ones(n: int) -> None:
    nu = 0.2
    published = zo.nesterov_spokoiny_bounds(1.0, 1.0, nu, n)
    ours = zo.bias_bound_gradient(1.0, nu, n), zo.bias_bound_hessian(1.0, nu, n)
    assert ours[0] < published[0]
    assert ours[1] < published[1]
    assert ours[0] <= nu * math.sqrt(n)
    # f = x_1 |x|^2: the Hessian at x has norm at most 6|x|, and the bias at 0 is nu^2 (n + 2).
    bias = nu**2 * (n + 2)
    assert bias <= zo.bias_bound_hessian(6.0, nu, n) * (1 + 1e-12) <= 3.0 * bias
    if n <= 2:
        estimate = by_quadrature(lambda v: nu**2 * v[0] * (v @ v) * v, n)
        assert estimate.mean[0] == pytest.approx(bias)


def test_chi_mean_equals_quadrature() -> None:
    r = np.linspace(0.0, 14.0, 100_001)
    for n in (2, 3, 7):
        weight = r ** (n - 1) * np.exp(-0.5 * r**2)
        assert zo.bias_bound_gradient(1.0, 1.0, n) == pytest.approx(np.sum(r * weight) / np.sum(weight), rel=1e-7)


def test_the_frechet_floor_on_the_line_equals_simulation() -> None:
    draws = np.random.default_rng(3).standard_normal((40_000, 36))
    samples = draws.mean(1) ** 2 + (draws.std(1, ddof=1) - 1) ** 2
    error = 4 * samples.std() / 200
    assert abs(samples.mean() - zo.frechet_floor(36)) < error < 0.0014
    assert zo.frechet_floor(36, 4.0) == pytest.approx(4 * 0.0420106650, abs=4e-10)
    # Planted: the floor of the mean alone.
    assert abs(samples.mean() - 1 / 36) > 5 * error


def test_the_rank_bound_holds_for_every_sample_and_the_expected_bound_on_average() -> None:
    generator = np.random.default_rng(4)
    d, n = 64, 36
    eigenvalues = np.linspace(0.2, 3.0, d)
    distances = []
    for _ in range(200):
        draws = generator.standard_normal((n, d))
        roots = np.linalg.svd(draws - draws.mean(0), compute_uv=False)[: n - 1] / math.sqrt(n - 1)
        distances.append(np.sum(draws.mean(0) ** 2) + np.sum((1 - roots) ** 2) + d - n + 1)
    assert min(distances) > zo.frechet_rank_bound(np.ones(d), n) == 29.0
    assert np.mean(distances) > zo.frechet_expected_bound(d, n) > 29.0 + d / n
    assert abs(np.mean(distances) - 42.31) < 0.25
    assert zo.frechet_rank_bound(eigenvalues[::-1], n) == pytest.approx(np.sum(eigenvalues[:29]))
    assert zo.frechet_rank_bound(np.ones(8), 9) == 0.0
    # The bound is sharp: a fit that has C on its n - 1 leading directions and nothing elsewhere attains it.
    kept = np.where(np.arange(d) < 29, 0.0, eigenvalues)
    attained = np.sum((np.sqrt(kept) - np.sqrt(eigenvalues)) ** 2)
    assert attained == pytest.approx(zo.frechet_rank_bound(eigenvalues, n))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zo.central_moments(G, 0.0), r"nu = 0.0: must lie in \(0.0, inf\)"),
        (lambda: zo.central_moments(G, 0.1, -1.0), r"noise_variance = -1.0: must lie in"),
        (lambda: zo.central_moments(G, 0.1, 1.0, "shared"), r"noise = 'shared': must be 'independent' or 'common'"),
        (lambda: zo.forward_moments(G, np.eye(2), 0.1), r"hessian = .*: must be symmetric of shape \(3, 3\)"),
        (lambda: zo.forward_moments(G, np.triu(np.ones((3, 3))), 0.1), r"hessian = .*: must be symmetric"),
        (lambda: zo.residual_moments(G, H, 0.1, scale=0.0), r"scale = 0.0: must lie in"),
        (lambda: zo.bias_bound_gradient(-1.0, 0.1, 2), r"lipschitz = -1.0: must lie in"),
        (lambda: zo.bias_bound_hessian(1.0, 0.1, 0), r"n = 0: must be an integer >= 1"),
        (lambda: zo.frechet_floor(1), r"n = 1: must be an integer >= 2"),
        (lambda: zo.frechet_rank_bound([-1.0], 3), r"eigenvalues = \[-1.0\]: must be non-negative"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
