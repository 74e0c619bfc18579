"""Reference numbers marked "independent derivation" were computed before, and apart from, this code."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq

from theory import langevin
from theory.gaussian import Gaussian, affine, kl
from theory.langevin import MeanProblem, PrecisionProblem, RateConstants
from verdicts.streams import Stream

MEAN = MeanProblem(1.5, 1.0, 2.0)
PRECISION = PrecisionProblem(1.5)
ORDERS: list[langevin.Order] = ["printed", "released"]
A = np.array([[2.0, 0.6, -0.3], [0.6, 1.1, 0.2], [-0.3, 0.2, 0.7]])
MU = np.array([0.5, -1.0, 2.0])
BOTH: Any = "both"


# --- the chain alone ----------------------------------------------------------------------------------------------


def by_steps(start: Gaussian, gamma: float, steps: int, noise: float = 2.0) -> Gaussian:
    for _ in range(steps):
        start = affine(start, np.eye(3) - gamma * A, gamma * A @ MU, noise * gamma * np.eye(3))
    return start


@pytest.mark.parametrize("steps", [0, 1, 7, 60])
def test_the_law_is_that_of_repeated_steps(steps):
    start = Gaussian([1.0, 0.0, -2.0], np.diag([0.0, 2.0, 0.5]) + 0.1)
    closed, direct = langevin.law(A, MU, start, 0.7, steps), by_steps(start, 0.7, steps)
    np.testing.assert_allclose(closed.mean, direct.mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(closed.cov, direct.cov, rtol=0, atol=1e-13)
    if steps:
        assert abs(by_steps(start, 0.7, steps, noise=1.0).cov - closed.cov).max() > 0.1


def test_the_invariant_law_solves_the_lyapunov_equation():
    gamma = 0.7
    cov = langevin.invariant(A, MU, gamma).cov
    step = np.eye(3) - gamma * A
    np.testing.assert_allclose(cov, solve_discrete_lyapunov(step, 2 * gamma * np.eye(3)), rtol=1e-12)
    assert abs(cov - np.linalg.inv(A)).max() > 0.1  # the target's own covariance is no fixed point


def test_the_divergence_is_that_of_the_two_gaussians():
    for gamma in (0.01, 0.3, 0.7):
        target = Gaussian(MU, np.linalg.inv(A))
        assert langevin.divergence(A, gamma) == pytest.approx(kl(langevin.invariant(A, MU, gamma), target), rel=1e-10)
        other = kl(target, langevin.invariant(A, MU, gamma))
        assert gamma < 0.1 or abs(langevin.divergence(A, gamma) / other - 1) > 0.1


@pytest.mark.parametrize("s", [0.0199, 0.0201, 0.6])
def test_the_divergence_by_quadrature(s):
    a = 1.7
    width = math.sqrt(1 / (1 - s))

    def integrand(z: float) -> float:
        x = width * z
        return math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (-(z**2) / 2 - math.log(width) + x**2 / 2)

    value = quad(integrand, -14, 14, epsabs=1e-15, epsrel=1e-13, limit=200)[0]
    assert langevin.divergence([[a]], 2 * s / a) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("s", [1e-3, 1e-6, 1e-9])
def test_the_leading_term_and_small_steps_keep_their_digits(s):
    matrix = np.diag([1.0, 0.5])
    ratio = langevin.divergence(matrix, 2 * s) / langevin.leading_divergence(matrix, 2 * s)
    # s^2/2 + 2 s^3/3 + 3 s^4/4 for the eigenvalues 1 and 1/2
    parts = [((s * a) ** 2 / 4, (s * a) ** 3 / 3, 3 * (s * a) ** 4 / 8) for a in (1.0, 0.5)]
    assert ratio == pytest.approx(np.sum(parts) / sum(part[0] for part in parts), rel=10 * s**3 + 1e-14)
    assert langevin.leading_divergence(matrix, 2 * s) == pytest.approx(5 / 16 * s**2, rel=1e-14)


@pytest.mark.parametrize(
    ("gamma", "variance", "divergence"), [(0.1, 0.7207207207, 0.0015597698), (0.5, 1.0666666667, 0.0649981854)]
)
def test_the_chain_against_an_independent_derivation(gamma, variance, divergence):
    assert langevin.invariant([[1.5]], [0.0], gamma).cov[0, 0] == pytest.approx(variance, abs=1e-10)
    assert langevin.divergence([[1.5]], gamma) == pytest.approx(divergence, abs=1e-10)


def test_the_stable_step_is_where_the_chain_stops_forgetting():
    bound = langevin.stable_step(A)
    radius = [abs(np.linalg.eigvals(np.eye(3) - share * bound * A)).max() for share in (0.999, 1.001)]
    assert radius[0] < 1 < radius[1]
    langevin.invariant(A, MU, 0.999 * bound)
    with pytest.raises(ValueError, match=rf"gamma = .*must lie in .*\(0, {bound:.6g}\)"):
        langevin.law(A, MU, Gaussian(MU, np.eye(3)), 1.001 * bound, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: langevin.stable_step([[1.0, 0.0], [0.0, 0.0]]), "positive definite"),
        (lambda: langevin.stable_step([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: langevin.divergence([[1.0]], 0.0), r"gamma = 0.0: must lie in \(0, 2\), 2 / 1 being"),
        (lambda: langevin.divergence([[1.0]], math.nan), "gamma = nan"),
        (lambda: langevin.invariant([[1.0]], [0.0, 1.0], 0.1), "mean has shape"),
        (lambda: langevin.law([[1.0]], [0.0], Gaussian.scalar(0.0, 1.0), 0.1, -1), "steps = -1"),
        (lambda: langevin.law([[1.0]], [0.0], Gaussian([0.0, 0.0], np.eye(2)), 0.1, 1), "start has dimension 2"),
        (lambda: MeanProblem(0.0, 1.0, 0.0), "a = 0.0"),
        (lambda: PrecisionProblem(-1.0), "c = -1.0"),
        (
            lambda: langevin.run_mean(MEAN, (0, 1, 0), 4 / 3, 0.1, 2),
            r"gamma = 1.3333.*in \(0, 1.33333\), 2 / 1.5 being",
        ),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), [0.1, 1.4], 0.1, 2), "gamma = 1.4"),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), [0.1, 0.2], 0.1, 3), r"gamma has shape \(2,\)"),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), 0.1, -0.1, 3), "epsilon = -0.1"),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), 0.1, math.inf, 3), "epsilon = inf"),
        (lambda: langevin.run_mean(MEAN, (0, -1, 0), 0.1, 0.1, 3), "variance = -1.0"),
        (lambda: langevin.run_mean(MEAN, (0, 1, math.nan), 0.1, 0.1, 3), "start = .*must be finite"),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), 0.1, 0.1, 3, order=BOTH), "order = 'both'"),
        (lambda: langevin.run_mean(MEAN, (0, 1, 0), 1.3, 100.0, 2000), r"gamma\[\d+\] = 1.3: the loop diverges"),
        (lambda: langevin.run_precision(PRECISION, (1, 1), -0.3, 0.3, 2), r"gamma = -0.3: must lie in \(0, inf\)"),
        (lambda: langevin.run_precision(PRECISION, (1, 1), 0.3, 0.3, 2000), r"gamma\[\d+\] = 0.3: the loop diverges"),
        (lambda: langevin.precision_fixed_point(PRECISION, 0.25), r"gamma = 0.25: must lie in \(0.0, 0.25\)"),
        (lambda: langevin.flow_mean(MEAN, (0, 1, 0), 0.1, [1.0, 1.0]), "times = .*increasing"),
        (lambda: langevin.flow_mean(MEAN, (0, 1, 0), lambda t: 1 - t, [2.0]), "epsilon = .*must lie in"),
        (lambda: langevin.rate_bound(RateConstants(1, 1, 1, 1, 0), 0.71), "epsilon = 0.71: must lie in"),
        (lambda: langevin.simple_rate_bound(RateConstants(1, 1, 1, 1, 0), 0.59), "epsilon = 0.59: must lie in"),
        (lambda: langevin.rate_bound(RateConstants(1, 1, 1, -1, 0), 0.1), "gap = -1.0"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --- Algorithm 1 from nothing but V and R ---------------------------------------------------------------------------

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def mean_potential(x, theta):
    return MEAN.a * (x - theta) ** 2 / 2


def mean_reward(x):
    return -MEAN.r * (x - MEAN.c) ** 2 / 2


def precision_potential(x, theta):
    return np.exp(theta) * x**2 / 2


def precision_reward(x):
    return -((x**2 - PRECISION.c) ** 2) / 2


def slope(function, at):
    """The derivative by a complex step: exact to rounding for these potentials."""
    return np.imag(function(at + 1e-30j)) / 1e-30


def covariance_gradient(potential, reward, m, v, theta):
    x = m + math.sqrt(v) * NODES
    force, pay = slope(lambda t: potential(x, t), theta + 0j * x), reward(x)
    return WEIGHTS @ (force * pay) - (WEIGHTS @ force) * (WEIGHTS @ pay)


def by_quadrature(potential, reward, start, gammas, epsilons, order):
    m, v, theta = start
    path = [start]
    for gamma, epsilon in zip(gammas, epsilons, strict=True):
        x = m + math.sqrt(v) * NODES
        moved = (x - gamma * slope(lambda y, theta=theta: potential(y, theta), x))[:, None]
        moved = moved + math.sqrt(2 * gamma) * NODES
        weights = WEIGHTS[:, None] * WEIGHTS
        new_m = (weights * moved).sum()
        new_v = (weights * (moved - new_m) ** 2).sum()
        seen = (m, v) if order == "printed" else (new_m, new_v)
        theta = theta - gamma * epsilon * covariance_gradient(potential, reward, *seen, theta)
        m, v = new_m, new_v
        path.append((m, v, theta))
    return np.array(path).T


GAMMAS = 0.1 * np.arange(1, 31) ** -0.3
EPSILONS = 0.9 * np.arange(1, 31) ** -0.5


@pytest.mark.parametrize("order", ORDERS)
def test_the_mean_recursion_is_algorithm_1(order):
    start = (0.0, 1.0, -1.0)
    path = langevin.run_mean(MEAN, start, GAMMAS, EPSILONS, 30, order=order)
    brute = by_quadrature(mean_potential, mean_reward, start, GAMMAS, EPSILONS, order)
    np.testing.assert_allclose(path, brute, rtol=0, atol=1e-12)
    other = langevin.run_mean(MEAN, start, GAMMAS, EPSILONS, 30, order=ORDERS[order == "printed"])
    assert abs(other.theta - brute[2]).max() > 1e-2


@pytest.mark.parametrize("order", ORDERS)
def test_the_precision_recursion_is_algorithm_1(order):
    start = (0.0, 1.3, 0.4)
    path = langevin.run_precision(PRECISION, start[1:], GAMMAS, EPSILONS, 30, order=order)
    brute = by_quadrature(precision_potential, precision_reward, start, GAMMAS, EPSILONS, order)
    np.testing.assert_allclose(path, brute, rtol=0, atol=1e-12)
    other = langevin.run_precision(PRECISION, start[1:], GAMMAS, EPSILONS, 30, order=ORDERS[order == "printed"])
    assert abs(other.theta - brute[2]).max() > 1e-2


@pytest.mark.parametrize("theta", [-0.7, 0.1, 1.2])
def test_objectives_and_gradients(theta):
    def mean_objective(t):
        return -WEIGHTS @ mean_reward(t + NODES / math.sqrt(MEAN.a))

    def precision_objective(t):
        return -WEIGHTS @ precision_reward(NODES * np.exp(-t / 2))

    assert MEAN.objective(theta) == pytest.approx(mean_objective(theta), rel=1e-12)
    assert MEAN.gradient(theta) == pytest.approx(slope(mean_objective, theta), rel=1e-12)
    assert PRECISION.objective(theta) == pytest.approx(precision_objective(theta), rel=1e-12)
    assert PRECISION.gradient(theta) == pytest.approx(slope(precision_objective, theta), rel=1e-12)
    # and at the Gibbs law the implicit gradient is the gradient
    assert MEAN.implicit_gradient(theta, 1 / MEAN.a) == pytest.approx(float(MEAN.gradient(theta)), rel=1e-12)
    assert PRECISION.implicit_gradient(math.exp(-theta), theta) == pytest.approx(
        float(PRECISION.gradient(theta)), rel=1e-12
    )


@pytest.mark.parametrize(
    ("order", "k", "mean", "variance", "theta"),
    [
        ("printed", 1, -0.15, 0.9225, -0.94),
        ("printed", 2, -0.2685, 0.86650625, -0.88049875),
        ("printed", 10, -0.530937261152, 0.731545454627, -0.420349898015),
        ("printed", 200, 1.98042293263, 0.720720720721, 1.98384197016),
        ("released", 2, -0.2685748125, 0.86650625, -0.881526722391),
        ("released", 10, -0.532952288961, 0.731545454627, -0.424614181041),
    ],
)
def test_the_mean_recursion_against_an_independent_derivation(order, k, mean, variance, theta):
    path = langevin.run_mean(MEAN, (0.0, 1.0, -1.0), 0.1, 0.2, k, order=order)
    assert [row[k] for row in path] == pytest.approx([mean, variance, theta], rel=0, abs=1e-11)


def test_the_precision_recursion_against_an_independent_derivation():
    path = langevin.run_precision(PRECISION, (1.0, 1.0), 0.2, 0.3, 2000)
    for k, variance, theta in ((1, 0.608249512574, 1.24464536456), (10, 0.446226439211, 1.21358390359)):
        assert (path.variance[k], path.theta[k]) == pytest.approx((variance, theta), rel=0, abs=1e-11)
    assert (path.variance[-1], path.theta[-1]) == pytest.approx((0.5, 1.01665431172), rel=0, abs=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_particles_follow_the_recursion(order):
    generator = Stream(7).child("langevin particles").child(order).generator()
    count, gamma, epsilon, updates = 200_000, 0.1, 0.2, 10
    x, theta = generator.standard_normal(count), -10.0  # far away: the mean moves fast, and the order matters
    for _ in range(updates):
        moved = x - gamma * MEAN.a * (x - theta) + math.sqrt(2 * gamma) * generator.standard_normal(count)
        seen = x if order == "printed" else moved
        theta -= gamma * epsilon * np.cov(mean_reward(seen), -MEAN.a * (seen - theta))[0, 1]
        x = moved
    exact = langevin.run_mean(MEAN, (0.0, 1.0, -10.0), gamma, epsilon, updates, order=order)
    other = langevin.run_mean(MEAN, (0.0, 1.0, -10.0), gamma, epsilon, updates, order=ORDERS[order == "printed"])
    # One gradient has a standard deviation below 1.5 sqrt(2) |m - c| v / sqrt(count) < 0.05 (|m - c| < 10, v <= 1, the
    # cubic term adds little), so that ten steps move theta by less than 0.01, even if fully correlated: 0.04 is more
    # than four deviations, and less than a third of the distance between the two orders.
    assert abs(theta - exact.theta[-1]) < 0.04
    assert abs(x.mean() - exact.mean[-1]) < 0.02  # deviation 0.002
    assert abs(x.var() - exact.variance[-1]) < 0.02  # deviation 0.0024
    assert abs(exact.theta[-1] - other.theta[-1]) > 0.13


# --- stability, fixed points ----------------------------------------------------------------------------------------


def radius(matrix):
    return abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrix_moves_the_loop_at_the_stationary_variance(order):
    variance = langevin.invariant([[MEAN.a]], [0.0], 0.3).cov[0, 0]
    path = langevin.run_mean(MEAN, (0.7, variance, -0.4), 0.3, 0.5, 12, order=order)
    matrix = langevin.mean_matrix(MEAN, 0.3, 0.5, order=order)
    errors = np.stack([path.mean, path.theta]) - MEAN.c
    np.testing.assert_allclose(matrix @ errors[:, :-1], errors[:, 1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("a", [0.4, 1.5, 6.0])
def test_the_stable_step_of_the_loop(order, epsilon, a):
    problem = MeanProblem(a, 1.3, 2.0)
    bound = langevin.mean_stable_step(problem, epsilon, order=order)
    assert bound < langevin.stable_step([[a]])
    for share in np.linspace(0.03, 1.19, 60):  # 1 is not among them
        gamma = share * bound
        if gamma < 2 / a:
            assert (radius(langevin.mean_matrix(problem, gamma, epsilon, order=order)) < 1) == (share < 1)


@pytest.mark.parametrize("order", ORDERS)
def test_the_loop_itself_converges_below_and_diverges_above(order):
    bound = langevin.mean_stable_step(MEAN, 2.0, order=order)
    inside = langevin.run_mean(MEAN, (0.0, 3.0, -1.0), 0.97 * bound, 2.0, 4000, order=order)
    outside = langevin.run_mean(MEAN, (0.0, 3.0, -1.0), 1.03 * bound, 2.0, 1000, order=order)
    assert abs(inside.theta[-1] - MEAN.c) < 1e-9  # and no bias is left, for any step
    assert abs(outside.theta[-20:]).max() > 1e3
    # At the target's own variance the printed bound would be 1 / (epsilon r) = 0.5, which diverges.
    assert order == "released" or radius(langevin.mean_matrix(MEAN, 0.499, 2.0)) > 1


@pytest.mark.parametrize("order", ORDERS)
def test_oscillation_is_a_pair_of_complex_eigenvalues(order):
    seen = set()
    for gamma in np.linspace(0.01, 1.3, 40):
        for epsilon in np.geomspace(0.02, 20, 41):
            matrix = langevin.mean_matrix(MEAN, gamma, epsilon, order=order)
            discriminant = np.trace(matrix) ** 2 - 4 * np.linalg.det(matrix)
            if abs(discriminant) > 1e-9:
                seen.add(discriminant < 0)
                assert langevin.mean_oscillates(MEAN, gamma, epsilon, order=order) == (discriminant < 0)
    assert seen == {True, False}


@pytest.mark.parametrize("gamma", [0.01, 0.05, 0.1, 0.2, 0.24])
@pytest.mark.parametrize("order", ORDERS)
def test_the_limit_of_the_precision_loop(gamma, order):
    point = langevin.precision_fixed_point(PRECISION, gamma)
    path = langevin.run_precision(PRECISION, (point.variance, point.theta), gamma, 0.3, 1, order=order)
    assert (path.variance[1], path.theta[1]) == pytest.approx((point.variance, point.theta), rel=1e-13)
    assert float(PRECISION.gradient(point.theta)) == pytest.approx(PRECISION.c * gamma / 2, rel=1e-11)
    assert point.gradient == pytest.approx(PRECISION.c * gamma / 2, rel=1e-15)
    far = langevin.run_precision(PRECISION, (1.0, 0.0), gamma, 0.3, 20_000, order=order)
    assert far.theta[-1] == pytest.approx(point.theta, abs=1e-9)
    # the unbiased optimum is not where it settles
    assert abs(point.theta - math.log(3 / PRECISION.c)) > gamma / 2


@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.2])
def test_the_limiting_gradient_against_an_independent_derivation(gamma):
    expected = {0.05: 0.0375, 0.1: 0.075, 0.2: 0.15}[gamma]
    assert langevin.precision_fixed_point(PRECISION, gamma).gradient == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_the_other_root_has_the_same_gradient_and_repels(order):
    gamma = 0.2
    root = math.log((1 + math.sqrt(1 - 6 * gamma / PRECISION.c)) / gamma)
    at_root = langevin.run_precision(PRECISION, (PRECISION.c / 3, root), gamma, 0.3, 1, order=order)
    assert at_root.theta[1] == pytest.approx(root, abs=1e-14)
    assert float(PRECISION.gradient(root)) == pytest.approx(PRECISION.c * gamma / 2, rel=1e-12)
    below = langevin.run_precision(PRECISION, (PRECISION.c / 3, root - 1e-6), gamma, 0.3, 3000, order=order)
    assert below.theta[-1] == pytest.approx(langevin.precision_fixed_point(PRECISION, gamma).theta, abs=1e-9)


def test_beyond_the_domain_theta_only_grows():
    for gamma in (0.2501, 0.27):
        path = langevin.run_precision(PRECISION, (0.01, 1.0), gamma, 0.05, 60)
        assert (np.diff(path.theta[1:]) > 0).all()
        assert path.variance[1:].min() >= 2 * gamma
    inside = langevin.run_precision(PRECISION, (0.01, 1.0), 0.24, 0.05, 600)
    assert (np.diff(inside.theta[1:]) < 0).any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gamma", [0.02, 0.1, 0.2, 0.24])
def test_the_precision_matrix_and_its_stability(order, gamma):
    point = langevin.precision_fixed_point(PRECISION, gamma)
    bound = langevin.precision_stable_epsilon(PRECISION, gamma, order=order)

    def after(log_v, theta, epsilon):
        start = (math.exp(log_v), theta)
        path = langevin.run_precision(PRECISION, start, gamma, epsilon, 1, order=order)
        return np.array([math.log(path.variance[1]), path.theta[1]])

    h = 1e-5
    base = (math.log(point.variance), point.theta)
    for share in (0.1, 0.99, 1.01):
        matrix = langevin.precision_matrix(PRECISION, gamma, share * bound, order=order)
        numeric = np.stack(
            [
                (after(base[0] + h, base[1], share * bound) - after(base[0] - h, base[1], share * bound)) / (2 * h),
                (after(base[0], base[1] + h, share * bound) - after(base[0], base[1] - h, share * bound)) / (2 * h),
            ],
            axis=1,
        )
        np.testing.assert_allclose(matrix, numeric, rtol=1e-6, atol=1e-6 * max(1.0, abs(matrix).max()))
        assert (radius(matrix) < 1) == (share < 1)


# --- continuous time and rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1 / MEAN.a, 0.0, 2.0])
def test_the_flow_by_the_solver_by_exponentials_and_as_the_limit_of_small_steps(variance):
    times, start = [0.0, 0.7, 3.0], (0.5, variance, -1.0)
    flow = langevin.flow_mean(MEAN, start, 0.4, times)
    solved = langevin.flow_mean(MEAN, start, lambda t: 0.4, times)
    np.testing.assert_allclose(flow, solved, rtol=0, atol=1e-10)
    gaps = []
    for updates in (3000, 6000):
        path = langevin.run_mean(MEAN, start, 3.0 / updates, 0.4, updates)
        integral = langevin.running_squared_gradient(MEAN, path.theta[:-1])[-1] * 3.0
        ends = [path.mean[-1], path.variance[-1], path.theta[-1], integral]
        gaps.append(np.array(ends) - [row[-1] for row in flow])
    assert abs(gaps[1]).max() < 5e-3
    np.testing.assert_allclose(2 * gaps[1] - gaps[0], 0.0, atol=5e-6)  # first order in the step


def test_the_total_is_the_integral_to_infinity():
    for epsilon in (0.05, 0.4, 3.0):
        flow = langevin.flow_mean(MEAN, (0.5, 1 / MEAN.a, -1.0), epsilon, [2000.0])
        assert flow.squared_gradient[0] == pytest.approx(langevin.flow_total(MEAN, 0.5, -1.0, epsilon), rel=1e-9)


@pytest.mark.parametrize(("m", "theta"), [(0.3, -1.0), (4.0, 1.0), (2.0, 2.5)])
def test_the_constants_of_the_mean_problem_are_attained(m, theta):
    constants = langevin.mean_rate_constants(MEAN, m, theta)
    law, target = Gaussian.scalar(m, 1 / MEAN.a), Gaussian.scalar(theta, 1 / MEAN.a)
    u = math.sqrt(kl(law, target))
    fisher = (MEAN.a * (m - theta)) ** 2
    assert constants.u0 == pytest.approx(u, rel=1e-12)
    assert u**2 == pytest.approx(fisher / (2 * constants.mu), rel=1e-12)
    assert MEAN.a * abs(m - theta) == pytest.approx(math.sqrt(2) * constants.C * u, rel=1e-12)
    lag = MEAN.implicit_gradient(m, 1 / MEAN.a) - float(MEAN.gradient(theta))
    assert abs(lag) == pytest.approx(constants.K * u, rel=1e-12)
    assert constants.gap == pytest.approx(float(MEAN.objective(theta) - MEAN.objective(MEAN.c)), rel=1e-12)


def test_no_constant_k_holds_off_the_stationary_variance():
    """The third assumption fails: the same divergence, a lag that grows with the distance to the optimum."""
    ratios = []
    for theta in (10.0, 100.0, 1000.0):
        u = math.sqrt(kl(Gaussian.scalar(theta, 1.0), Gaussian.scalar(theta, 1 / MEAN.a)))
        ratios.append(abs(MEAN.implicit_gradient(theta, 1.0) - float(MEAN.gradient(theta))) / u)
    assert ratios[1] > 9 * ratios[0]
    assert ratios[2] > 9 * ratios[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_hold_on_exact_flows(seed):
    generator = Stream(11).child("rate bound").child(str(seed)).generator()
    for _ in range(200):
        a, r, share = generator.uniform(0.2, 5), generator.uniform(0.05, 5), generator.uniform(0.01, 0.99)
        problem = MeanProblem(a, r, 0.0)
        m, theta = generator.uniform(-3, 3, size=2)
        constants = langevin.mean_rate_constants(problem, m, theta)
        limit = a / (2 * r)  # mu / (sqrt(2) C K)
        total = langevin.flow_total(problem, m, theta, share * limit)
        assert total <= langevin.rate_bound(constants, share * limit)
        simple = limit * 2 / (1 + math.sqrt(2))
        total = langevin.flow_total(problem, m, theta, share * simple)
        assert total <= langevin.rate_bound(constants, share * simple) * (1 + 1e-12)
        assert langevin.rate_bound(constants, share * simple) <= langevin.simple_rate_bound(constants, share * simple)


def test_the_bound_is_sharp_for_small_epsilon_and_needs_the_lag():
    constants = langevin.mean_rate_constants(MEAN, -1.0, -1.0)
    for epsilon in (1e-2, 1e-4, 1e-6):
        exact, bound = langevin.flow_total(MEAN, -1.0, -1.0, epsilon), langevin.rate_bound(constants, epsilon)
        assert 1 < bound / exact < 1 + 2 * epsilon
        assert langevin.simple_rate_bound(constants, epsilon) / exact > 1.99
    # Without the divergence at the start, the bound is false.
    late = langevin.mean_rate_constants(MEAN, 8.0, -1.0)
    assert langevin.flow_total(MEAN, 8.0, -1.0, 0.1) > langevin.rate_bound(late._replace(u0=0.0), 0.1)
    # With a quarter of K it is false as well.
    assert langevin.flow_total(MEAN, 8.0, -1.0, 0.1) > langevin.rate_bound(late._replace(K=late.K / 4), 0.1)


def test_decreasing_epsilon_costs_half_the_rate_in_the_worst_case():
    """Over the curvatures r with gap 1: T^-1/2 for epsilon = min(1, t^-1/2), 1/T for a constant epsilon."""
    times = np.array([30.0, 300.0])
    worst = {"decreasing": np.zeros(2), "constant": np.zeros(2)}
    for r in np.geomspace(0.005, 1.0, 12):
        problem, start = MeanProblem(1.0, r, 0.0), math.sqrt(2 / r)
        for name, epsilon in (("decreasing", lambda t: min(1.0, max(t, 1e-9) ** -0.5)), ("constant", 0.2)):
            flow = langevin.flow_mean(problem, (start, 1.0, start), epsilon, times)
            worst[name] = np.maximum(worst[name], flow.squared_gradient / times)
    slopes = {name: math.log10(value[1] / value[0]) for name, value in worst.items()}
    assert -0.6 < slopes["decreasing"] < -0.45
    assert -1.03 < slopes["constant"] < -0.9  # the integral is near gap / epsilon = 5 at both times


def test_running_averages_of_the_two_loops():
    path = langevin.run_mean(MEAN, (0.0, 1.0, -1.0), 0.1, 0.2, 10_000)
    average = langevin.running_squared_gradient(MEAN, path.theta[:-1])
    assert average[9999] / average[999] == pytest.approx(0.1, rel=1e-6)  # the sum has converged: slope -1
    path = langevin.run_precision(PRECISION, (1.0, 1.0), 0.1, 0.2, 100_000)
    average = langevin.running_squared_gradient(PRECISION, path.theta[:-1])
    # "Independent derivation": the floor (c gamma / 2)^2 = .005625 at a constant step
    assert average[-1] == pytest.approx(0.005625, rel=5e-3)
    assert float(PRECISION.gradient(path.theta[-1])) ** 2 == pytest.approx(0.005625, rel=1e-9)


def test_the_leftover_gradient_follows_a_decreasing_step():
    updates = 100_000
    gammas = 0.1 * np.arange(1, updates + 1) ** (-1 / 3)
    path = langevin.run_precision(PRECISION, (1.0, 1.0), gammas, 1.0, updates)
    assert float(PRECISION.gradient(path.theta[-1])) == pytest.approx(PRECISION.c * gammas[-1] / 2, rel=5e-3)


@pytest.mark.parametrize("r", [0.5, 1.5])
def test_steps_of_which_the_sum_grows_like_a_logarithm_give_no_power(r):
    """gamma_k epsilon_k = 0.3 / k: theta - c decays like k^(-0.3 r), as slowly as one likes for a small r."""
    root = np.arange(1, 50_001) ** -0.5
    path = langevin.run_mean(MeanProblem(1.0, r, 0.0), (1.0, 1.0, 1.0), 0.3 * root, root, 50_000)
    slope = math.log(path.theta[50_000] / path.theta[5_000]) / math.log(10)
    assert slope == pytest.approx(-0.3 * r, rel=0.02)


def test_the_bound_is_the_largest_norm_that_the_two_inequalities_allow():
    mu, C, K, gap, u0, epsilon = 1.3, 0.7, 0.9, 2.0, 1.7, 0.4
    rate = mu - C * K * epsilon / math.sqrt(2)

    def slack(norm: float) -> float:
        lag = u0 * math.sqrt(quad(lambda t: math.exp(-2 * rate * t), 0, np.inf)[0]) + C * epsilon * norm / (
            math.sqrt(2) * rate
        )
        return gap / epsilon + K * norm * lag - norm**2

    largest = brentq(slack, 1.0, 100.0, xtol=1e-13)
    assert langevin.rate_bound(RateConstants(mu, C, K, gap, u0), epsilon) == pytest.approx(largest**2, rel=1e-9)
