"""The control problem by splines and quadrature against printed digits, adaptive quadrature, Riccati and identities."""

import math
import warnings
from functools import cache

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from theory import control_bellman as cb
from theory.control import ControlSchedule
from theory.control_bellman import ControlProblem, NoContractionWarning
from theory.mixture import GaussianMixture

HALVES = [0.5, 0.5]


def log_cosh(y):
    return np.logaddexp(y[:, 0], -y[:, 0]) - math.log(2)


def two_modes(mean, var):
    return GaussianMixture(HALVES, [[-mean], [mean]], [[[var]], [[var]]])


def normal(mean, var):
    return GaussianMixture([1.0], [[mean]], [[[var]]])


R1 = ControlProblem.of_mixture(ControlSchedule.ddpm([0.8, 0.9], [0.5, 0.4]), two_modes(1.0, 0.5), log_cosh)
R3 = ControlProblem.of_mixture(
    ControlSchedule.ddpm([0.7, 0.8, 0.9], 0.3), normal(0.5, 0.25), lambda y: np.logaddexp(0, 2 * (y[:, 0] - 0.2)) / 2
)
AT = np.array([[-1.0], [0.3], [2.0]])
WINDOW = np.linspace(-8, 8, 401)[:, None]


def curled():
    """Two dimensions, scores that are no gradients: only then does it matter where a transpose stands."""

    def score(y):
        return np.stack([-0.8 * y[:, 0] + 0.9 * np.tanh(y[:, 1]), -0.5 * y[:, 1] - 0.3 * y[:, 0]], axis=1)

    def reward(y):
        return 0.5 * np.tanh(y[:, 0] - 0.5 * y[:, 1]) + 0.3 * np.sin(0.6 * y[:, 0] + y[:, 1])

    return ControlProblem(ControlSchedule.ddpm([0.8, 0.75], [0.4, 0.35]), [score, score], reward, dim=2)


CURLED = curled()
GRID_2D = {"half_width": 7.0, "points": 141}


@cache
def r1_optimum():
    return cb.optimum(R1)


@cache
def r3_optimum():
    return cb.optimum(R3)


@cache
def curled_optimum():
    return cb.optimum(CURLED, **GRID_2D)


AT_2D = np.array([[0.3, -0.2], [-1.0, 0.7], [1.5, 1.2]])


# --- printed digits, from an independent derivation ---


def digits(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(np.ravel(found), expected, rtol=0, atol=tolerance)


def test_optimum_of_the_two_mode_instance():
    step = r1_optimum().at(0, AT)
    digits(step.value, [0.7064384394, 0.2573260767, 1.3571041346])
    digits(step.gradient, [-0.6619344766, 0.5153651084, 0.6492388578])
    digits(step.control, [-0.9568677088, 0.8663419530, -0.3164183418])
    digits(step.control_jacobian, [-0.86748569, 1.80324708, -1.46863953], 6e-9)
    hessian, of_control = r1_optimum().second_derivatives(0, AT)
    digits(hessian, [-0.04351583, 0.99154691, 0.00870125], 6e-9)
    digits(of_control, [1.5408408, -7.3764987, -0.1644582], 6e-8)
    step = r1_optimum().at(1, AT)
    digits(step.control, [-1.7468758954, 1.1877926022, 0.3797448175])
    digits(step.value, [0.5566579674, 0.1163090302, 1.3544822257])
    digits([cb.contraction(r1_optimum(), t, 8.0) for t in (0, 1)], [0.39765432, 0.22894652], 6e-9)


@pytest.mark.parametrize(
    ("iterations", "value", "gradient", "control"),
    [
        (
            (0, 0),
            [0.5257164700, 0.1962783631, 1.1119861141],
            None,
            [0.4113850291, 0.0324385053, -1.8123018205],
        ),
        (
            (1, 1),
            [0.7052290498, 0.2537352352, 1.3569770619],
            [-0.6649160605, 0.5084878003, 0.6495192258],
            [-0.8397348054, 0.6100002847, -0.3484174581],
        ),
        (
            (2, 3),
            [0.7064349361, 0.2570867575, 1.3571041153],
            [-0.6619569323, 0.5157636654, 0.6492389482],
            [-0.9491940006, 0.7937135327, -0.3169683712],
        ),
        (
            (5, 5),
            [0.7064384394, 0.2573259735, 1.3571041346],
            None,
            [-0.9568657442, 0.8648376190, -0.3164183444],
        ),
    ],
)
def test_iterates_of_the_two_mode_instance(iterations, value, gradient, control):
    step = cb.iterates(R1, iterations).at(0, AT)
    digits(step.value, value)
    digits(step.control, control)
    if gradient is not None:
        digits(step.gradient, gradient)


def test_the_three_step_instance():
    step = r3_optimum().at(0, AT)
    digits(step.value, [0.5231403245, 0.8132580171, 1.2500710586])
    digits(step.gradient, [0.2009863468, 0.2417545271, 0.2682653510])
    digits(step.control, [3.0842949626, 1.1780150410, -1.4356131149])
    once, twice = (cb.iterates(R3, m).at(0, AT) for m in (1, 2))
    digits(once.value, [0.5200606491, 0.8109194405, 1.2492427776])
    digits(once.control, [2.9917322797, 1.1088359650, -1.4679176783])
    digits(twice.value, [0.5230911646, 0.8132365691, 1.2500681797])
    digits(twice.control, [3.0757897845, 1.1739645028, -1.4364671754])


# --- brute force ---


def smoothed_by_quad(function, z, sigma, breaks=()):
    def integrand(x):
        return function(x) * math.exp(-(((x - z) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))

    inner = sorted({min(max(b, z - 12 * sigma), z + 12 * sigma) for b in (*breaks, z)})
    ends = [z - 12 * sigma, *inner, z + 12 * sigma]
    return sum(quad(integrand, low, high, epsabs=1e-13)[0] for low, high in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize(
    ("reward", "kinks"),
    [
        (lambda x: np.tanh(3 * x), ()),
        (lambda x: np.abs(x) - 0.6 * np.maximum(x - 0.7, 0), (0.7, 0.0)),
        (lambda x: np.where(x > 0.4, 0.2 + 0.1 * x, 0.0), (0.4,)),  # a jump
    ],
)
def test_one_step_against_adaptive_quadrature_and_maximisation_over_the_control(reward, kinks):
    schedule = ControlSchedule([0.8], [0.5], [0.9])
    problem = ControlProblem.of_mixture(schedule, two_modes(1.5, 0.3), lambda y: reward(y[:, 0]), kinks)
    step = cb.optimum(problem).at(0, AT)
    for k, y in enumerate(AT[:, 0]):
        score = problem.scores[0](np.array([[y]]))[0, 0]

        def loss(u, y=y, score=score):
            # PI-FT, eq. (9): the step's mean (y + (1 - a) u) / sqrt(a) and Lemma 2.5's divergence
            mean = (y + 0.2 * u) / math.sqrt(0.8)
            return 0.9 * 0.2**2 * (u - score) ** 2 / (2 * 0.8 * 0.25) - smoothed_by_quad(reward, mean, 0.5, kinks)

        best = minimize_scalar(loss, bounds=(score - 6, score + 6), method="bounded", options={"xatol": 1e-9})
        assert step.value[k] == pytest.approx(-best.fun, abs=1e-10)
        assert step.control[k, 0] == pytest.approx(best.x, abs=2e-6)  # a maximum fixes its place to the root of 1e-13


def test_a_kink_that_is_not_listed_costs_digits():
    schedule = ControlSchedule([0.8], [0.5], [0.9])
    listed, unlisted = (
        cb.lookahead(ControlProblem(schedule, [np.zeros_like], log_cosh), 0, lambda y: np.abs(y[:, 0]), kinks).value(AT)
        for kinks in ([0.0], [])
    )
    exact = [smoothed_by_quad(abs, float(z), 0.5, (0.0,)) for z in AT[:, 0]]
    digits(listed, exact, 1e-12)
    assert 1e-7 < np.abs(unlisted - exact).max() < 1e-2


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_the_threshold_of_concavity_for_the_absolute_value(factor):
    # h'(0) = sqrt(2 / pi) / sigma, so that the threshold is sqrt(2 / pi) sigma: a Lipschitz reward is enough
    strength = factor * math.sqrt(2 / math.pi) * 0.5
    schedule = ControlSchedule([0.75], [0.5], [strength])
    problem = ControlProblem(schedule, [lambda y: -y], lambda y: np.abs(y[:, 0]), kinks=[0.0])
    if factor > 1:
        step = cb.optimum(problem).at(0, AT)
        pretrained = 0.75 * AT[:, 0] / math.sqrt(0.75)
        slopes = np.array([math.erf(z / math.sqrt(0.5)) for z in step.mean[:, 0]])
        digits(step.mean[:, 0] - 0.25 / strength * slopes, pretrained, 1e-12)
    else:
        with pytest.raises(ValueError, match=r"strength\[0\] = .* = 1\.001 at step 0 must be < 1"):
            cb.optimum(problem)


def test_refining_and_widening_the_grid_changes_nothing():
    schedule = ControlSchedule.ddpm([0.7, 0.8, 0.9], [0.9, 0.6, 0.4])
    problem = ControlProblem.of_mixture(schedule, two_modes(1.5, 0.3), lambda y: 0.5 * np.sin(1.3 * y[:, 0]))
    first, second = cb.optimum(problem), cb.optimum(problem, half_width=31.0, points=4001)
    for t in range(3):
        for found, expected in zip(first.at(t, AT), second.at(t, AT), strict=True):
            digits(found, np.ravel(expected), 1e-9)


@pytest.mark.parametrize("dim", [1, 2])
def test_linear_rewards_are_exact_up_to_the_corners_of_the_grid(dim):
    schedule = ControlSchedule.ddpm([0.8, 0.9], [1.0, 0.5])
    slope = np.array([1.0, -0.5])[:dim]
    problem = ControlProblem(schedule, [np.zeros_like] * 2, lambda y: y @ slope, dim)
    corners = 4.0 * np.array([[1.0, 1.0], [-1.0, 1.0], [0.5, -1.0]])[:, :dim]
    step = cb.optimum(problem, half_width=4.0, points=81).at(0, corners)
    gain = slope @ slope * (0.2 / 0.9 / 2 + 0.1 / 0.5 / 2)
    digits(step.value, corners @ slope / math.sqrt(0.72) + gain, 1e-9)  # splines round more at their ends
    digits(step.gradient, np.tile(slope, 3) / math.sqrt(0.72), 1e-9)


# --- linear-quadratic problems ---


def riccati(schedule, maps, shifts, curvature, slope):
    """V_t = -y'Py/2 + p'y + c for all t, for m_t(y) = maps[t] y + shifts[t]; with R and sigma^2 / b."""
    big, small, constant = curvature, slope, 0.0
    values = []
    for t in range(schedule.steps - 1, -1, -1):
        ratio = schedule.sigma[t] ** 2 / schedule.strength[t]
        shrink = np.linalg.inv(np.eye(len(big)) + ratio * big)
        kept = big @ shrink
        constant += ratio * small @ shrink @ small / 2 - schedule.sigma[t] ** 2 * np.trace(big) / 2
        constant += -shifts[t] @ kept @ shifts[t] / 2 + shifts[t] @ shrink.T @ small
        slope_of_mean = shrink.T @ small - kept @ shifts[t]
        big, small = maps[t].T @ kept @ maps[t], maps[t].T @ slope_of_mean
        values.append((big, small, constant, shrink, ratio))
    return values[::-1]


@pytest.mark.parametrize("dim", [1, 2])
def test_linear_quadratic_problems_follow_riccati(dim):
    mean, cov = np.array([0.5, -0.3])[:dim], np.array([[0.25, 0.15], [0.15, 0.4]])[:dim, :dim]
    curvature, slope = np.array([[1.2, -0.3], [-0.3, 0.7]])[:dim, :dim], np.array([0.7, -0.2])[:dim]
    alpha = [0.6, 0.7, 0.8, 0.9] if dim == 1 else [0.7, 0.8]
    schedule = ControlSchedule.ddpm(alpha, 0.8)
    problem = ControlProblem.of_mixture(
        schedule,
        GaussianMixture([1.0], [mean], [cov]),
        lambda y: -np.einsum("ni,ij,nj->n", y, curvature, y) / 2 + y @ slope,
    )
    maps, shifts = [], []
    for a, level in zip(schedule.alpha, schedule.alpha_bar, strict=True):
        precision = np.linalg.inv(level * cov + (1 - level) * np.eye(dim))
        maps.append((np.eye(dim) - (1 - a) * precision) / math.sqrt(a))
        shifts.append((1 - a) * precision @ mean * math.sqrt(level) / math.sqrt(a))
    values = riccati(schedule, maps, shifts, curvature, slope)
    if dim == 1:  # digits from an independent derivation
        digits([values[0][0][0, 0], values[0][1][0], values[0][2]], [0.0260856099, 0.0193982528, 0.0382542759], 1e-9)
    solution = cb.optimum(problem, half_width=None if dim == 1 else 10.0, points=None if dim == 1 else 141)
    points = AT_2D[:, :dim]
    for t, (big, small, constant, _, _) in enumerate(values):
        step = solution.at(t, points)
        digits(step.value, -np.einsum("ni,ij,nj->n", points, big, points) / 2 + points @ small + constant, 1e-9)
        digits(step.gradient, np.ravel(small - points @ big), 1e-8)
    _, after, (_, _, _, shrink, ratio) = values[0], values[1], values[0]
    expected = (points @ maps[0].T + shifts[0] + ratio * after[1]) @ shrink.T
    digits(solution.at(0, points).mean, expected.ravel(), 1e-8)


def test_a_product_problem_is_the_sum_of_its_factors():
    alpha, strength = [0.75, 0.85], [0.6, 0.5]
    schedule = ControlSchedule.ddpm(alpha, strength)
    first = ControlProblem.of_mixture(schedule, two_modes(1.0, 0.5), lambda y: 0.6 * log_cosh(y))
    second = ControlProblem.of_mixture(schedule, normal(0.3, 0.8), lambda y: 0.7 * np.tanh(y[:, 0]))
    both = ControlProblem(
        schedule,
        [lambda y, t=t: np.hstack([first.scores[t](y[:, :1]), second.scores[t](y[:, 1:])]) for t in range(2)],
        lambda y: first.reward(y[:, :1]) + second.reward(y[:, 1:]),
        dim=2,
    )
    for solve in (cb.optimum, lambda problem, **grid: cb.iterates(problem, [2, 1], [0.7, 1.0], **grid)):
        joint = solve(both, half_width=6.5, points=111).at(0, AT_2D)
        parts = [solve(p).at(0, AT_2D[:, k : k + 1]) for k, p in enumerate((first, second))]
        digits(joint.value, parts[0].value + parts[1].value, 1e-8)
        digits(joint.gradient, np.hstack([p.gradient for p in parts]).ravel(), 1e-8)
        digits(joint.control, np.hstack([p.control for p in parts]).ravel(), 1e-7)
        assert np.abs(joint.control_jacobian[:, 0, 1]).max() < 1e-6


# --- identities ---


def slope_of_value(solution, t, points):
    return cb.jacobian(lambda y: solution.at(t, y).value, points)


CASES = [pytest.param(R1, r1_optimum, AT, {}, id="1d"), pytest.param(CURLED, curled_optimum, AT_2D, GRID_2D, id="2d")]


@pytest.mark.parametrize(("problem", "solve", "points", "grid"), CASES)
def test_the_gradient_of_the_optimal_value_is_34(problem, solve, points, grid):
    optimum = solve()
    step, ahead = optimum.at(0, points), optimum.lookahead(0)
    a, eye = problem.schedule.alpha[0], np.eye(problem.dim)
    h = ahead.gradient(step.mean)

    def formula(slope):
        return np.einsum("nji,nj->ni", eye + (1 - a) * slope, h) / math.sqrt(a)

    measured = slope_of_value(optimum, 0, points)
    digits(formula(problem.score_jacobian(0, points)), measured.ravel(), 1e-8)
    digits(step.gradient, measured.ravel(), 1e-8)
    assert np.abs(formula(step.control_jacobian) - measured).max() > 0.02  # the optimal control in the score's place
    if problem.dim == 2:
        transposed = np.swapaxes(problem.score_jacobian(0, points), 1, 2)
        assert np.abs(formula(transposed) - measured).max() > 0.01
    digits(step.control, (problem.score(0, points) + problem.schedule.gain[0] * h).ravel(), 1e-10)  # (18)
    measured_slope = cb.jacobian(lambda y: optimum.at(0, y).control, points)
    digits(step.control_jacobian, measured_slope.ravel(), 1e-6 if problem.dim == 2 else 1e-9)


def test_the_hessian_of_the_optimal_value():
    step, ahead = r1_optimum().at(0, AT), r1_optimum().lookahead(0)
    a = R1.schedule.alpha[0]
    slope = R1.score_jacobian(0, AT)[:, 0, 0]
    second = cb.jacobian(lambda y: R1.score_jacobian(0, y), AT)[:, 0, 0, 0]
    h, bend = ahead.gradient(step.mean)[:, 0], ahead.hessian(step.mean)[:, 0, 0]
    expected = (1 - a) / math.sqrt(a) * second * h + (1 + (1 - a) * slope) ** 2 / a * bend / (1 - ahead.ratio * bend)
    digits(r1_optimum().second_derivatives(0, AT)[0], expected, 1e-8)


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize(("problem", "solve", "points", "grid"), CASES)
def test_the_gradient_of_an_iterate_is_55(problem, solve, points, grid, damping):
    solution = cb.iterates(problem, 1, damping, **grid)
    step, ahead = solution.at(0, points), solution.lookahead(0)
    a, b, sigma = problem.schedule.alpha[0], problem.schedule.strength[0], problem.schedule.sigma[0]
    score, slope = problem.score(0, points), problem.score_jacobian(0, points)
    h = ahead.gradient(step.mean)
    first = np.einsum("nji,nj->ni", np.eye(problem.dim) + (1 - a) * slope, h) / math.sqrt(a)
    undamped = score + problem.schedule.gain[0] * h - step.control
    second = b * (1 - a) ** 2 / (a * sigma**2) * np.einsum("nji,nj->ni", step.control_jacobian - slope, undamped)
    measured = slope_of_value(solution, 0, points)
    digits(first + second, measured.ravel(), 1e-8)
    digits(step.gradient, measured.ravel(), 1e-8)
    assert np.abs(first - measured).max() > 1e-3  # without the second term
    assert np.abs(first - second - measured).max() > 1e-3  # with its sign flipped


def identity_terms(problem, ahead, points, m):
    """Left side and the two terms of the right side of docs/pift.md, "Error identity", for V the lookahead's."""
    a, b, sigma = (
        float(x[ahead.t]) for x in (problem.schedule.alpha, problem.schedule.strength, problem.schedule.sigma)
    )
    star, steps = ahead.optimum(points), ahead.iterates(points, m + 1)
    error = steps[m].control - star.control
    theta, weights = np.polynomial.legendre.leggauss(24)
    between = [star.mean + (1 + x) / 2 * (steps[m].mean - star.mean) for x in theta]
    averaged = sum(w / 2 * ahead.hessian(z) for w, z in zip(weights, between, strict=True))
    scale = b * (1 - a) ** 2 / (a * sigma**2)
    moved = steps[m + 1].control_jacobian - steps[m].control_jacobian
    bent = (averaged - ahead.hessian(steps[m].mean)) @ (np.eye(problem.dim) / (1 - a) + steps[m].control_jacobian)
    return (
        steps[m].gradient - star.gradient,
        scale * np.einsum("nji,nj->ni", moved, error),
        sigma**2 / b * scale * np.einsum("nji,nj->ni", bent, error),
    )


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize(("problem", "solve", "points", "grid"), CASES)
def test_the_error_identity_and_that_neither_term_can_go(problem, solve, points, grid, m):
    left, moved, bent = identity_terms(problem, solve().lookahead(0), points, m)
    np.testing.assert_allclose(moved + bent, left, rtol=0, atol=1e-9)
    assert np.abs(moved - left).max() > 1e-7
    assert np.abs(bent - left).max() > 1e-7


# --- bounds and rates ---


def test_the_gradient_and_the_value_converge_at_twice_the_exponent():
    ahead = r1_optimum().lookahead(0)
    star, steps = ahead.optimum(WINDOW), ahead.iterates(WINDOW, 12)
    rho, ratio = cb.contraction(r1_optimum(), 0, 9.0), ahead.ratio
    largest = np.abs(r1_optimum().at(1, WINDOW).gradient).max()
    bend = np.abs(cb.jacobian(ahead.hessian, WINDOW)).max()
    slope = np.abs(ahead.pretrained_jacobian(WINDOW)).max()
    extra = ratio**2 * bend * largest / (1 - rho)
    found = [cb.step_errors(step, star) for step in steps]
    for m, error in enumerate(found):
        assert error.control <= rho**m * R1.schedule.gain[0] * largest * (1 + 1e-6)
        assert error.gradient <= slope * largest * rho ** (2 * m) * (rho + extra * (m / rho + 0.5))
        assert error.value <= (1 + rho) / 2 * ratio * largest**2 * rho ** (2 * m)
        assert (star.value - steps[m].value).min() > -1e-13
        if m >= 4:
            assert error.gradient > rho ** (3 * m) * slope * largest  # no third power
    assert found[0].control == pytest.approx(1.5428, abs=1e-4)
    assert found[4].gradient == pytest.approx(2.658e-5, rel=1e-3)
    rates = [(found[9][i] / found[6][i]) ** (1 / 3) for i in range(3)]
    assert rates[1] == pytest.approx(rates[0] ** 2, rel=0.12)
    assert rates[2] == pytest.approx(rates[0] ** 2, rel=0.05)


def test_the_bound_on_values_adds_up_over_time():
    for m in (0, 1, 3):
        iterated = cb.iterates(R3, m)
        bound = 0.0
        for t in (2, 1, 0):
            largest = 1.0 if t == 2 else np.abs(iterated.at(t + 1, WINDOW).gradient).max()
            rho, ratio = cb.contraction(iterated, t, 8.0), iterated.lookahead(t).ratio
            bound += (1 + rho) / 2 * ratio * largest**2 * rho ** (2 * m)
            gap = r3_optimum().at(t, WINDOW).value - iterated.at(t, WINDOW).value
            assert gap.min() > -1e-12
            assert gap.max() <= bound


def test_later_steps_need_about_half_of_the_iterations():
    even, halved, one = (
        cb.errors(cb.iterates(R1, m), r1_optimum(), 0, 8.0, 401).control for m in ((8, 8), (8, 4), (8, 1))
    )
    assert halved < 1.1 * even
    assert one > 5 * even


def test_observed_lipschitz_constants_of_a_one_step_problem():
    # V = |y| for one step and s = 0: H' = erf, so that all four constants are explicit at y = 0
    schedule = ControlSchedule([0.64], [0.5], [0.8])
    problem = ControlProblem(schedule, [np.zeros_like], lambda y: np.abs(y[:, 0]), kinks=[0.0])
    solution = cb.optimum(problem)
    bend = math.sqrt(2 / math.pi) / 0.5
    found = cb.lipschitz(solution, 0, 6.0)
    assert found.value == pytest.approx(1 / 0.8, abs=1e-9)
    assert found.gradient == pytest.approx(bend / 0.64 / (1 - 0.25 / 0.8 * bend), abs=1e-6)
    assert found.control == pytest.approx((1 / (1 - 0.25 / 0.8 * bend) - 1) / 0.36, abs=1e-6)
    second = cb.jacobian(lambda y: solution.at(0, y).control_jacobian, np.linspace(-1, 1, 41)[:, None])
    assert np.abs(second).max() <= found.control_gradient * (1 + 1e-3)


# --- the uncontracting and the refused ---


def test_a_concave_reward_that_breaks_the_iteration_and_the_damping_that_mends_it():
    # rho = sigma^2 P / b = 2: the Bellman problem is concave, the undamped iteration diverges, 2 / (2 + rho) halves
    schedule = ControlSchedule([0.8], [0.5], [0.25])
    problem = ControlProblem(schedule, [np.zeros_like], lambda y: -(y[:, 0] ** 2))
    optimum = cb.optimum(problem)
    with pytest.warns(NoContractionWarning, match=r"step 0: sigma\^2 sup\|\|grad h\|\| / strength = 2 must be < 1"):
        broken = cb.iterates(problem, 3)
    starts, after = (cb.errors(cb.iterates(problem, m, 0.5), optimum, 0, 1.0).control for m in (0, 20))
    assert cb.errors(broken, optimum, 0, 1.0).control == pytest.approx(8 * starts, rel=1e-6)
    assert after == pytest.approx(starts / 2**20, rel=1e-4)
    with pytest.warns(NoContractionWarning, match=r"inner factor with damping 0\.75 = 1\.25"):
        cb.iterates(problem, 3, 0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cb.iterates(problem, 0)  # nothing is iterated


LINEAR = ControlProblem(ControlSchedule.ddpm([0.8, 0.9], 1.0), [np.zeros_like] * 2, lambda y: y[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ControlProblem(LINEAR.schedule, [np.zeros_like], log_cosh), "scores has 1 entries: must have one"),
        (lambda: ControlProblem(LINEAR.schedule, LINEAR.scores, log_cosh, dim=3), "dim = 3: must be 1 or 2"),
        (lambda: ControlProblem(LINEAR.schedule, LINEAR.scores, log_cosh, 2, [0.0]), r"kinks = \[0.0\]: must be empty"),
        (lambda: cb.optimum(LINEAR, points=101), "points = 101: the spacing 0.4 must be at most half the sigma 0.316"),
        (lambda: cb.optimum(LINEAR, half_width=0.0), "half_width = 0.0"),
        (lambda: cb.optimum(LINEAR, points=3), "points = 3: must be an integer >= 16"),
        (lambda: cb.optimum(LINEAR).at(2, AT), r"t = 2: must be one of 0, ..., 1"),
        (lambda: cb.optimum(LINEAR).at(0, AT.T), r"y has shape \(1, 3\): must be \(n, 1\)"),
        (lambda: cb.iterates(LINEAR, [1]), "iterations has 1 entries: must have one for each of the 2 steps"),
        (lambda: cb.iterates(LINEAR, -1), "iterations = -1: must be an integer >= 0"),
        (lambda: cb.iterates(LINEAR, 1, 1.5), r"damping = 1.5: must lie in \(0.0, 1.0\]"),
        (lambda: cb.contraction(cb.optimum(LINEAR), 0, -1.0), "window = -1.0"),
        (
            lambda: cb.optimum(ControlProblem(LINEAR.schedule, LINEAR.scores, lambda y: y)),
            r"reward returned shape \(1601, 1\): must be \(1601,\)",
        ),
        (
            lambda: cb.optimum(
                ControlProblem(LINEAR.schedule, LINEAR.scores, lambda y: np.where(y[:, 0] > 9, np.inf, 0))
            ),
            "reward returned inf: must be finite",
        ),
        (
            lambda: cb.optimum(ControlProblem(LINEAR.schedule, [lambda y: y[:, 0]] * 2, log_cosh)),
            r"scores\[1\] returned shape \(1601,\): must be \(1601, 1\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
