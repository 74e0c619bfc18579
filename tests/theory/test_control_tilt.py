"""theory.control_tilt against Riccati recursions, brute force, other policies and an independently derived table."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from theory import control_tilt as ct
from theory.control import ControlSchedule
from theory.mixture import GaussianMixture

MODES = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.3]], [[0.3]]])
BELL = GaussianMixture([1.0], [[0.5]], [[[0.25]]])


def log_cosh(y):
    return np.logaddexp(y, -y) - math.log(2.0)


def normal(y):
    return np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)


def problem(reward, steps, *, strength=1.0, horizon=1.0, data=MODES, half_width=8.0, points=401):
    schedule = ct.continuous_schedule(horizon, steps, strength)
    return ct.LineProblem(schedule, ct.mixture_score(schedule, data), reward, half_width, points)


_SOLVED = {}


def solved(reward, steps, strength=1.0):
    key = reward, steps, strength
    if key not in _SOLVED:
        _SOLVED[key] = ct.solve(problem(reward, steps, strength=strength))
    return _SOLVED[key]


# --- the linear-quadratic case in closed form --------------------------------------------------------------------

LQ = ControlSchedule.ddpm([0.6, 0.7, 0.8, 0.9], 0.8)
CURVATURE, SLOPE = 1.2, 0.7  # r = -1.2 y^2 / 2 + 0.7 y


def lq_solution():
    if "lq" not in _SOLVED:
        reward = lambda y: -CURVATURE * y**2 / 2 + SLOPE * y  # noqa: E731
        _SOLVED["lq"] = ct.solve(ct.LineProblem(LQ, ct.mixture_score(LQ, BELL), reward, half_width=9.0, points=721))
    return _SOLVED["lq"]


def riccati():
    """For t = T-1..0: slope and offset of M*_t, x_t = sigma^2 P_{t+1} / b, and (P, p, c of V*, c of the tilt) of t."""
    p2, p1, c_mean, c_tilt = CURVATURE, SLOPE, 0.0, 0.0
    rows = []
    for t in reversed(range(4)):
        bar = np.prod(LQ.alpha[t:])
        var, centre = bar * 0.25 + 1 - bar, math.sqrt(bar) * 0.5
        a, s2, b = LQ.alpha[t], LQ.sigma[t] ** 2, 0.8
        phi, offset = (1 - (1 - a) / var) / math.sqrt(a), (1 - a) * centre / var / math.sqrt(a)
        x = s2 * p2 / b
        slope, shift = phi / (1 + x), (offset + s2 * p1 / b) / (1 + x)  # M* = m + s2 (p1 - p2 M*) / b
        # -p2 M^2/2 + p1 M - b (M - m)^2 / (2 s2) at M*, expanded in y
        away, away0 = slope - phi, shift - offset
        new2 = p2 * slope**2 + b * away**2 / s2
        new1 = -p2 * slope * shift + p1 * slope - b * away * away0 / s2
        constant = -p2 * shift**2 / 2 + p1 * shift - b * away0**2 / (2 * s2)
        c_mean += constant - s2 * p2 / 2
        c_tilt += constant - b / 2 * math.log1p(x)
        p2, p1 = new2, new1
        rows.append((phi, offset, slope, shift, x, p2, p1, c_mean, c_tilt))
    return rows


def test_linear_quadratic_values_and_means():
    y = np.array([-1.3, 0.0, 0.4, 2.0])
    for t, (_, _, slope, shift, _, p2, p1, c_mean, c_tilt) in zip((3, 2, 1, 0), riccati(), strict=True):
        value, mean = ct.optimal_at(lq_solution(), y, t)
        np.testing.assert_allclose(mean, slope * y + shift, rtol=0, atol=1e-11)
        np.testing.assert_allclose(value, -p2 * y**2 / 2 + p1 * y + c_mean, rtol=0, atol=1e-11)
        np.testing.assert_allclose(ct.tilt_at(lq_solution(), y, t), -p2 * y**2 / 2 + p1 * y + c_tilt, atol=1e-11)


@pytest.mark.parametrize("y", [-1.3, 0.4])
def test_linear_quadratic_gap(y):
    x = np.array([row[4] for row in riccati()])
    exact = 0.8 * np.sum(x - np.log1p(x)) / 2
    assert exact == pytest.approx(0.008885861695, abs=5e-13)  # from an independent derivation
    assert ct.gap(lq_solution(), y) == pytest.approx(exact, rel=1e-9)
    assert 0.8 * ct.path_kl(lq_solution(), y) == pytest.approx(exact, rel=1e-9)
    assert ct.leading_gap(lq_solution(), y) == pytest.approx(0.8 * np.sum(x**2) / 4, rel=1e-9)
    assert ct.gap_bounds(lq_solution(), y) == pytest.approx((exact, exact), rel=1e-9)
    np.testing.assert_allclose(ct.contraction(lq_solution(), 4.0), x[::-1], rtol=1e-9)
    # KL in the other direction
    assert 0.8 * np.sum(np.log1p(x) - x / (1 + x)) / 2 != pytest.approx(exact, rel=0.05)


def test_linear_quadratic_laws_are_the_gaussian_ones():
    pre, con, til = (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)
    for t, (phi, offset, slope, shift, x, *_) in enumerate(reversed(riccati())):
        s2 = LQ.sigma[t] ** 2
        pre = phi * pre[0] + offset, phi**2 * pre[1] + s2
        con = slope * con[0] + shift, slope**2 * con[1] + s2
        til = slope * til[0] + shift, slope**2 * til[1] + s2 / (1 + x)  # the same means, a narrower kernel
    precision = 1 / pre[1] + CURVATURE / 0.8
    target = (pre[0] / pre[1] + SLOPE / 0.8) / precision, 1 / precision
    found = ct.terminal_laws(lq_solution(), normal)
    y = lq_solution().problem.grid
    for density, (mean, var) in zip(
        (found.pretrained, found.controlled, found.tilted, found.target), (pre, con, til, target), strict=True
    ):
        np.testing.assert_allclose(density, normal((y - mean) / math.sqrt(var)) / math.sqrt(var), rtol=0, atol=1e-11)
    assert ct.total_variation(lq_solution().problem, found.controlled, found.tilted) > 0.01


# --- values by brute force ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [log_cosh, np.sin], ids=["log cosh", "sin"])
def test_values_of_two_steps_by_adaptive_quadrature(reward):
    task = problem(reward, 2, strength=0.6, horizon=0.5)
    sigma, b, y = 0.5, 0.6, 0.4

    def expected(f, mean):
        return quad(lambda w: f(mean + sigma * w) * normal(w), -9, 9, epsabs=1e-10, epsrel=1e-10, limit=100)[0]

    def mean(t, z):
        return float(task.mean(t, np.array([z]))[0])

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # inside, where only 1e-9 is asked
    weights = weights / math.sqrt(2 * math.pi)

    def last_value(z):
        m = mean(1, z)
        loss = lambda move: b * move**2 / (2 * sigma**2) - weights @ reward(m + move + sigma * nodes)  # noqa: E731
        return -minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}).fun

    z_grid = np.linspace(-5.5, 6.0, 461)
    inner = np.array([last_value(z) for z in z_grid])
    m = mean(0, y)

    def first_loss(move):
        z = (z_grid - m - move) / sigma
        return b * move**2 / (2 * sigma**2) - (normal(z) @ inner) * (z_grid[1] - z_grid[0]) / sigma

    best = minimize_scalar(first_loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9})
    value, found = ct.optimal_at(ct.solve(task), [y])
    assert value[0] == pytest.approx(-best.fun, abs=1e-8)
    assert found[0] == pytest.approx(m + best.x, abs=1e-6)

    partition = expected(lambda z: expected(lambda x: float(np.exp(reward(x) / b)), mean(1, z)), mean(0, y))
    assert ct.tilt_at(ct.solve(task), [y])[0] == pytest.approx(b * math.log(partition), abs=1e-9)


def test_small_strength_neither_overflows_nor_loses_the_tail():
    slope, b = 5.0, 0.02  # exp(r / b) reaches e^2500 on the grid, and the tilt moves the last step by 25
    task = problem(lambda y: slope * y, 4, strength=b, horizon=0.4, data=BELL)
    y = np.array([0.4])
    exact, gradient, position = 0.0, slope, np.array([0.0])
    for t in reversed(range(4)):  # affine scores keep the value affine: gradient y + exact
        at_zero, at_one = task.mean(t, position)[0], task.mean(t, position + 1)[0]
        exact += gradient * at_zero + 0.1 * gradient**2 / (2 * b)
        gradient *= at_one - at_zero
    solution = ct.solve(task)
    assert ct.tilt_at(solution, y)[0] == pytest.approx(gradient * 0.4 + exact, rel=1e-10)
    assert ct.optimal_at(solution, y)[0][0] == pytest.approx(gradient * 0.4 + exact, rel=1e-10)


# --- the gap is b KL(P* || P_tilt) -------------------------------------------------------------------------------


def step_kernel(task, t, means):
    sigma = task.schedule.sigma[t]
    return normal((task.grid - means[:, None]) / sigma) * task.spacing / sigma


@pytest.mark.parametrize("push", [0.0, 0.7, -0.4])
def test_every_policy_of_means_loses_b_times_its_divergence_from_the_tilt(push):
    task = problem(np.sin, 6, strength=0.5)
    solution = ct.solve(task)
    y, b = task.grid, 0.5
    inner = np.abs(y) <= 4
    value, divergence = np.sin(y), np.zeros_like(y)
    for t in reversed(range(6)):
        m, var = task.mean(t, y), task.schedule.sigma[t] ** 2
        means = m + push * var * np.cos(y + t)  # no optimum
        kernel = step_kernel(task, t, means)
        value = kernel @ value - b * (means - m) ** 2 / (2 * var)
        log_ratio = ((y - m[:, None]) ** 2 - (y - means[:, None]) ** 2) / (2 * var)
        log_ratio -= (solution.tilt[t + 1] - solution.tilt[t][:, None]) / b
        divergence = np.sum(kernel * log_ratio, axis=1) + kernel @ divergence
    lost = (solution.tilt[0] - value)[inner]
    np.testing.assert_allclose(lost, b * divergence[inner], rtol=0, atol=1e-7)
    assert (lost >= (solution.tilt[0] - solution.optimal[0])[inner]).all()
    assert np.abs(lost - divergence[inner]).max() > 0.01  # b forgotten


@pytest.mark.parametrize("reward", [log_cosh, np.sin], ids=["log cosh", "sin"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("y", [-1.5, 0.4])
def test_gap_is_the_divergence_of_the_paths(reward, strength, y):
    solution = solved(reward, 16, strength)
    gap = ct.gap(solution, y)
    assert gap > 1e-4
    assert strength * ct.path_kl(solution, y) == pytest.approx(gap, rel=1e-8)
    low, high = ct.gap_bounds(solution, y)
    assert low < gap < high
    assert high / low < 1.03
    task = solution.problem
    curvature = np.abs(np.diff(solution.optimal[1:], 2, axis=1)).max(axis=1) / task.spacing**2
    rho = task.schedule.sigma**2 * curvature / strength
    assert rho.max() < 1
    assert gap <= strength * np.sum(rho**2 / (1 - rho)) / 2
    if strength != 1.0:
        assert ct.path_kl(solution, y) != pytest.approx(gap, rel=0.5)


def affine(y):
    return 0.8 * y - 0.3


@pytest.mark.parametrize(
    ("reward", "data", "steps", "zero"),
    [
        (affine, BELL, 4, True),  # every V affine
        (affine, MODES, 1, True),  # V_0 is not affine, but no step has it ahead
        (affine, MODES, 2, False),  # V_1 is not affine
        (lambda y: 0 * y + 1.0, MODES, 4, True),
        (log_cosh, BELL, 1, False),
    ],
    ids=["affine/normal", "affine/mixture, T=1", "affine/mixture, T=2", "constant", "log cosh"],
)
def test_gap_vanishes_only_if_every_later_value_is_affine(reward, data, steps, zero):
    solution = ct.solve(problem(reward, steps, strength=0.7, horizon=steps / 8, data=data))
    if zero:
        assert abs(ct.gap(solution, 0.4)) < 1e-12
        assert abs(ct.path_kl(solution, 0.4)) < 1e-12
    else:
        assert ct.gap(solution, 0.4) > 1e-6


@pytest.mark.parametrize("reward", [log_cosh, np.sin], ids=["log cosh", "sin"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_leading_term(reward, strength):
    runs = [solved(reward, steps, strength) for steps in (16, 32, 64)]
    excess = np.array([ct.gap(run, 0.4) / ct.leading_gap(run, 0.4) - 1 for run in runs])
    assert (np.abs(excess) < np.array([0.16, 0.08, 0.04]) / strength).all()  # the rest is one order of dt smaller
    wrong = np.array([ct.gap(run, 0.4) / (2 * ct.leading_gap(run, 0.4)) - 1 for run in runs])  # 1 / (2 b)
    assert (np.abs(wrong) > 0.3).all()


# strength 1, rate 1, data as MODES, Y_0 ~ N(0, 1), values at 0.4; from an independent derivation
TABLE = [
    (log_cosh, 8, 0.4755926013, 0.4815918716, 0.04799, 1.149, 0.0638, 0.0148),
    (log_cosh, 32, 0.4782227666, 0.4795719193, 0.04317, 1.046, 0.0616, 0.0155),
    (log_cosh, 128, 0.4789360962, 0.4792660087, 0.04223, 1.0125, 0.0611, 0.0157),
    (np.sin, 32, 0.4595286066, 0.4623864335, 0.09145, 1.031, 0.2164, 0.1040),
]


@pytest.mark.parametrize("row", TABLE, ids=["log cosh, 8", "log cosh, 32", "log cosh, 128", "sin, 32"])
def test_table_from_an_independent_derivation(row):
    reward, steps, optimal, tilt, scaled_gap, ratio, scaled_distance, error = row
    solution = solved(reward, steps)
    assert ct.optimal_at(solution, [0.4])[0][0] == pytest.approx(optimal, abs=6e-11)
    assert ct.tilt_at(solution, [0.4])[0] == pytest.approx(tilt, abs=6e-11)
    assert ct.gap(solution, 0.4) * steps == pytest.approx(scaled_gap, abs=6e-6)
    assert ct.gap(solution, 0.4) / ct.leading_gap(solution, 0.4) == pytest.approx(ratio, abs=6e-4)
    laws = ct.terminal_laws(solution, normal)
    distance = ct.total_variation(solution.problem, laws.controlled, laws.tilted)
    assert distance * steps == pytest.approx(scaled_distance, abs=6e-5)
    assert ct.total_variation(solution.problem, laws.tilted, laws.target) == pytest.approx(error, abs=6e-5)


# --- laws --------------------------------------------------------------------------------------------------------


def test_tilted_chain_of_an_affine_problem_is_the_controlled_chain():
    # the tilt moves a step by more than 4 of its standard deviations
    solution = ct.solve(problem(lambda y: 0.7 * y, 4, strength=0.05, horizon=0.4, data=BELL))
    laws = ct.terminal_laws(solution, normal)
    np.testing.assert_allclose(laws.tilted, laws.controlled, rtol=0, atol=1e-11)
    assert ct.total_variation(solution.problem, laws.tilted, laws.pretrained) > 0.9
    assert laws.tilted.sum() * solution.problem.spacing == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("reward", [log_cosh, np.sin], ids=["log cosh", "sin"])
def test_terminal_law_is_the_tilt_of_the_data_only_from_a_tilted_start(reward):
    errors = []
    for steps in (8, 16, 32):
        solution = solved(reward, steps)
        task = solution.problem
        right = ct.terminal_laws(solution, normal, tilt_start=True)
        assert ct.total_variation(task, right.tilted, right.target) < 1e-10
        wrong = ct.terminal_laws(solution, normal)
        errors.append(ct.total_variation(task, wrong.tilted, wrong.target))
        start = normal(task.grid) * np.exp(solution.tilt[0])
        start /= start.sum() * task.spacing
        assert errors[-1] <= ct.total_variation(task, normal(task.grid), start)  # a channel brings laws closer
    assert min(errors) > 0.01
    assert errors == sorted(errors)  # refinement does not help, here it hurts


def test_terminal_error_vanishes_with_the_memory_of_the_start():
    errors = []
    for horizon in (1.0, 2.0, 4.0):
        solution = ct.solve(problem(np.sin, round(16 * horizon), horizon=horizon))
        laws = ct.terminal_laws(solution, normal)
        errors.append(ct.total_variation(solution.problem, laws.tilted, laws.target))
    assert errors[0] > 2.5 * errors[1] > 2.5**2 * errors[2]


@pytest.mark.parametrize("reward", [log_cosh, np.sin], ids=["log cosh", "sin"])
def test_distance_of_the_controlled_law_is_of_order_dt(reward):
    scaled = []
    for steps in (8, 16, 32, 64):
        solution = solved(reward, steps)
        laws = ct.terminal_laws(solution, normal)
        scaled.append(steps * ct.total_variation(solution.problem, laws.controlled, laws.tilted))
    assert max(scaled) / min(scaled) < 1.2  # the square root of Pinsker's bound would give 2.8
    assert all(steps * math.sqrt(ct.path_kl(solved(reward, steps), 0.4) / 2) > scaled[0] for steps in (8, 64))


# --- no lower bound on the strength survives refinement ----------------------------------------------------------


def test_contraction_is_of_order_dt_for_a_fixed_strength():
    largest = []
    for steps in (8, 16, 32, 64, 128):
        solution = solved(log_cosh, steps, 0.2)
        task = solution.problem
        rho = ct.contraction(solution, 6.0)
        lipschitz = np.abs(np.diff(solution.optimal[1:], axis=1)).max(axis=1) / task.spacing
        bound = math.sqrt(2 / math.pi) * task.schedule.sigma * lipschitz / 0.2
        assert (rho <= bound * (1 + 1e-3)).all()
        assert bound.max() < 1.5 * math.sqrt(8 / steps)
        largest.append(rho.max())
    # From an independent derivation, but for the first: 4.84 there, which `bound` (1.41 at most) excludes.
    assert largest == pytest.approx([0.98745, 0.606, 0.347, 0.191, 0.101], abs=6e-4)
    scaled = np.array(largest) * [8, 16, 32, 64, 128]
    assert (np.diff(scaled) > 0).all()
    assert (np.diff(scaled, 2) < 0).all()  # rho / dt settles


def test_at_a_fixed_step_a_small_strength_is_lost_and_refinement_regains_it():
    rho = [ct.contraction(ct.solve(problem(log_cosh, n, strength=0.1))) for n in (8, 64)]
    assert rho[0].max() > 1.0 > rho[1].max()


def test_tilt_is_regular_for_every_strength():
    for strength in (1.0, 0.2):
        for steps in (8, 32):
            solution = solved(log_cosh, steps, strength)
            task, grid, h = solution.problem, solution.problem.grid, solution.problem.spacing
            spread, bend = 1.0, 0.0  # of the flow from step t to T: sup |J| and sup |dJ|
            for t in reversed(range(steps)):
                m = task.mean(t, grid)
                first, second = np.abs(np.diff(m)).max() / h, np.abs(np.diff(m, 2)).max() / h**2
                bend, spread = bend * first**2 + spread * second, spread * first
                bound = spread**2 + bend + spread**2 / strength  # L1 = L0 = 1
                assert np.abs(np.diff(solution.tilt[t], 2)).max() / h**2 <= bound * (1 + 1e-3)


# --- the continuous limit ----------------------------------------------------------------------------------------


def test_values_approach_the_hamilton_jacobi_bellman_equation():
    residuals, controls = [], []
    for steps in (16, 32, 64):
        solution = solved(np.sin, steps, 0.5)
        task, t = solution.problem, steps // 2
        y, inner = task.grid, np.abs(task.grid) <= 2.5
        score = task.score(t, y)
        for values in (solution.tilt, solution.optimal):
            slope = np.gradient(values[t], y)
            bend = np.gradient(slope, y)
            linear = (values[t + 1] - values[t]) * steps + (y / 2 + score) * slope + bend / 2
            residuals.append(np.abs(linear + slope**2 / (2 * 0.5))[inner].max())
            wrong = np.abs(linear + slope**2 / 0.5)[inner].max()  # 1 / b instead of 1 / (2 b)
            assert wrong > 5 * residuals[-1]
        controls.append(np.abs(task.schedule.control(t, y, solution.means[t]) - score - slope / 0.5)[inner].max())
    for errors in (residuals[::2], residuals[1::2], controls):
        assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ct.continuous_schedule(1.0, 2, 1.0, rate=2.0), "rate dt = 1.0: must lie in"),
        (lambda: ct.continuous_schedule(0.0, 2, 1.0), "horizon = 0.0"),
        (lambda: ct.continuous_schedule(1.0, 0, 1.0), "steps = 0"),
        (lambda: ct.continuous_schedule(1.0, 4, -1.0), "strength = -1.0"),
        (lambda: ct.mixture_score(LQ, GaussianMixture([1.0], [[0.0, 0.0]], [np.eye(2)])), "data has dimension 2"),
        (lambda: ct.LineProblem(LQ.with_strength([1, 1, 1, 2]), lambda t, y: y, np.sin), "must be the same for all"),
        (lambda: ct.LineProblem(LQ, lambda t, y: y, np.sin, half_width=0.0), "half_width = 0.0"),
        (lambda: ct.LineProblem(LQ, lambda t, y: y, np.sin, points=2), "points = 2"),
        (lambda: ct.LineProblem(LQ, lambda t, y: y, np.sin, points=101), "points = 101: the spacing 0.2 must"),
        (lambda: ct.tilt_at(lq_solution(), [0.0], 4), "t = 4: must be at most 3"),
        (lambda: ct.optimal_at(lq_solution(), [0.0], -1), "t = -1"),
        (lambda: ct.path_kl(lq_solution(), math.nan), "y = "),
        (lambda: ct.contraction(lq_solution(), 9.5), "window = 9.5"),
        (lambda: ct.terminal_laws(lq_solution(), lambda y: 2 * normal(y)), "initial has least value .* and mass 2"),
        (lambda: ct.terminal_laws(lq_solution(), lambda y: y * 0 - 1), "initial has least value -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
