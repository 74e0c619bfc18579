"""Quadrature on a grid against closed forms in one dimension."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from theory import chains
from theory.chains import LinearGaussianChain, QuadraticReward
from theory.grid import Array, Mean, step_gradients

# x_{t-1} = (a_t + sum_i theta_i n_{t,i}) x_t + b_t theta + c_t + std_t eps_t with T = 3 and p = 2
A = np.array([0.8, 0.6, 0.9])
N = np.array([[0.3, -0.2], [0.1, 0.4], [-0.2, 0.1]])
B = np.array([[0.6, 0.2], [-0.3, 0.5], [0.7, 0.1]])
C = np.array([0.1, -0.2, 0.3])
STD = np.array([0.4, 0.6, 0.5])
THETA = np.array([0.4, -0.7])


def linear_means(slopes: Array) -> list[Mean]:
    def mean_of(t: int) -> Mean:
        def mean(x: Array) -> tuple[Array, Array]:
            return (A[t] + slopes[t] @ THETA) * x + B[t] @ THETA + C[t], x[:, None] * slopes[t] + B[t]

        return mean

    return [mean_of(t) for t in range(3)]


def on_grid(reward: Callable[[Array], Array], slopes: Array, half_width: float = 12.0, points: int = 801) -> Array:
    return step_gradients(linear_means(slopes), STD.tolist(), reward, half_width, points)


def test_quadratic_reward_on_a_bilinear_chain_is_the_exact_gradient() -> None:
    chain = LinearGaussianChain(
        A[:, None, None], B[:, None, :], C[:, None], STD, THETA, [0.0], [[1.0]], N=N[:, :, None, None]
    )
    exact = chains.step_gradients(chain, QuadraticReward(1.5, [0.6], [[-0.8]]))
    found = on_grid(lambda x: 1.5 + 0.6 * x - 0.4 * x**2, N)
    np.testing.assert_allclose(found, exact, atol=1e-11)
    assert np.abs(exact).min() > 1e-3  # nothing is compared that vanishes


def law_of_output() -> tuple[float, float, Array]:
    """Mean and standard deviation of x_0 of the chain without turning parameters, and d mean / d theta_t (T, p)."""
    mean, variance = 0.0, 1.0
    for t in (2, 1, 0):
        mean, variance = A[t] * mean + B[t] @ THETA + C[t], A[t] ** 2 * variance + STD[t] ** 2
    carried = np.array([1.0, A[0], A[0] * A[1]])
    return mean, math.sqrt(variance), carried[:, None] * B


@pytest.mark.parametrize("frequency", [0.5, 2.0, 4.0])
def test_sine_reward_on_an_additive_chain(frequency: float) -> None:
    """E sin(k x) = sin(k m) exp(-k^2 v / 2) for x ~ N(m, v)."""
    mean, std, slopes = law_of_output()
    rate = frequency * math.cos(frequency * mean) * math.exp(-((frequency * std) ** 2) / 2)
    found = on_grid(lambda x: np.sin(frequency * x), np.zeros((3, 2)))
    np.testing.assert_allclose(found, rate * slopes, atol=1e-12)


def test_indicator_reward_is_the_normal_density_with_an_error_of_second_order() -> None:
    """P(x_0 > c) = Phi((m - c) / s); the jump lies midway between two points, and halving the spacing quarters it."""
    mean, std, slopes = law_of_output()
    threshold = 0.35
    exact = norm.pdf(mean, threshold, std) * slopes

    def error(points_per_unit: int) -> float:
        # A jump at (n + 1/2) spacing: shift the reward's threshold to the middle of the cell that holds 0.35.
        spacing = threshold / (points_per_unit + 0.5)
        side = math.ceil(12 / spacing)
        found = on_grid(lambda x: (x > threshold).astype(float), np.zeros((3, 2)), side * spacing, 2 * side + 1)
        return float(np.abs(found - exact).max())

    errors = [error(n) for n in (8, 17, 35)]  # n + 1/2 = 8.5, 17.5, 35.5
    assert errors[-1] < 3e-6
    for coarse, fine, a, b in ((errors[0], errors[1], 8.5, 17.5), (errors[1], errors[2], 17.5, 35.5)):
        assert coarse / fine == pytest.approx((b / a) ** 2, rel=0.05)


def nonlinear(x: Array) -> tuple[Array, Array]:
    features = np.stack([np.ones_like(x), np.tanh(x)], 1)
    return 0.7 * x + features @ THETA, features


@pytest.mark.parametrize(("half_width", "points"), [(9.0, 1201), (14.0, 601), (11.3, 977)])
def test_smooth_nonlinear_chain_does_not_depend_on_the_grid(half_width: float, points: int) -> None:
    def found(width: float, count: int) -> Array:
        return step_gradients([nonlinear] * 3, STD.tolist(), lambda x: np.exp(-((x - 0.5) ** 2)), width, count)

    np.testing.assert_allclose(found(half_width, points), found(12.0, 1601), atol=1e-12)


def test_nonlinear_chain_agrees_with_differences_of_the_expected_reward() -> None:
    """One step's parameters moved at a time; the expectation by quadrature over all the noises."""
    nodes = np.linspace(-8, 8, 129)
    weights = norm.pdf(nodes) / norm.pdf(nodes).sum()

    def objective(thetas: Array) -> float:
        x, w = nodes, weights
        for t in (1, 0):
            mean = 0.7 * x + thetas[t, 0] + thetas[t, 1] * np.tanh(x)
            x, w = (mean[:, None] + STD[t] * nodes).ravel(), np.outer(w, weights).ravel()
        return float(w @ np.sin(1.3 * x))

    found = step_gradients([nonlinear] * 2, STD[:2].tolist(), lambda x: np.sin(1.3 * x), 12.0, 801)
    h, expected = 1e-4, np.empty((2, 2))
    for t, i in np.ndindex(2, 2):
        up, down = (np.tile(THETA, (2, 1)) for _ in range(2))
        up[t, i] += h
        down[t, i] -= h
        expected[t, i] = (objective(up) - objective(down)) / (2 * h)
    np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"means": [], "stds": []}, r"^stds has 0 entries: must be one per mean, 0, and at least one$"),
        ({"stds": [0.4]}, r"^stds has 1 entries: must be one per mean, 3"),
        ({"stds": [0.4, 0.0, 0.5]}, r"^stds = 0\.0: must lie in \(0\.0, inf\)$"),
        ({"stds": [0.4, -1.0, 0.5]}, r"^stds = -1\.0"),
        ({"stds": [0.4, math.nan, 0.5]}, r"^stds = nan"),
        ({"half_width": 0.0}, r"^half_width = 0\.0: must lie in \(0\.0, inf\)$"),
        ({"half_width": math.inf}, r"^half_width = inf"),
        ({"points": 2}, r"^points = 2: must be an integer >= 3$"),
        ({"points": 10.5}, r"^points = 10\.5: must be an integer >= 3$"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], text: str) -> None:
    arguments = {"means": linear_means(N), "stds": STD.tolist(), "reward": np.sin, "half_width": 9.0, "points": 101}
    with pytest.raises(ValueError, match=text):
        step_gradients(**(arguments | change))


def test_a_grid_too_coarse_for_a_step_is_refused() -> None:
    def shift(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x, np.ones((len(x), 1))

    with pytest.raises(ValueError, match="points = 41: the spacing 0.5 must not exceed half of the least std 0.5"):
        step_gradients([shift, shift], [2.0, 0.5], lambda x: x, 10.0, 41)
