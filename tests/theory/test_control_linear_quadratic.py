"""theory.control_linear_quadratic against fractions, brute-force maximisation, enumeration of paths and tilted laws.

LQ1's numbers are from an independent derivation; everything else is recomputed here.
"""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from theory.control import ControlSchedule
from theory.control_linear_quadratic import (
    DivergenceWarning,
    LinearQuadratic,
    Solution,
    best_damping,
    contraction,
    curvature,
    evaluate,
    marginals,
    optimum,
    path_kl,
    path_law,
    policy_iteration,
    policy_iteration_in_closed_form,
    reward_tilted_law,
    state_law,
    tilt_gap,
    tilt_gap_leading,
    tilted_constants,
    tilted_path_law,
    value_of,
)
from theory.gaussian import Gaussian, kl, tilt
from theory.variance import gaussian_rule

SEEDS = st.integers(0, 2**32 - 1)
STANDARD = Gaussian.scalar(0.0, 1.0)
START = Gaussian([0.3, -0.2], [[1.1, 0.3], [0.3, 0.8]])


def lq1(strength=0.8):
    schedule = ControlSchedule.ddpm([0.6, 0.7, 0.8, 0.9], strength)
    return LinearQuadratic.of_gaussian(schedule, [0.5], [[0.25]], [[1.2]], [0.7])


def planar(strength=(0.9, 0.5, 0.6)):
    """Correlated data; the reward is concave along one direction and convex along another."""
    schedule = ControlSchedule([0.65, 0.8, 0.9], [0.5, 0.45, 0.35], strength)
    cov = [[0.6, 0.25], [0.25, 0.4]]
    return LinearQuadratic.of_gaussian(schedule, [0.4, -0.7], cov, [[1.1, 0.5], [0.5, -0.6]], [0.3, 0.8])


def one_step(strength):
    """alpha = 0.8, sigma^2 = 0.2, a score of zero, r = -y^2 / 2."""
    return LinearQuadratic(ControlSchedule.ddpm([0.8], strength), [[[0.0]]], [[0.0]], [[1.0]], [0.5])


def random_problem(seed, dim, steps, *, one_strength=False):
    """Any F, Q of either sign, and strengths that keep |x| below about one half."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(dim, dim))
    Q = half + half.T
    alpha, sigma = rng.uniform(0.5, 0.95, steps), rng.uniform(0.2, 0.5, steps)
    F, f = rng.normal(size=(steps, dim, dim)), rng.normal(size=(steps, dim))
    strength = 4.0 * max(1.0, np.abs(np.linalg.eigvalsh(Q)).max())
    while True:
        strengths = np.full(steps, strength) if one_strength else strength * rng.uniform(1.0, 2.0, steps)
        problem = LinearQuadratic(ControlSchedule(alpha, sigma, strengths), F, f, Q, rng.normal(size=dim))
        values = value_of(problem, F, f).P
        if np.abs(curvature(problem, values)).max() < 0.25:
            return problem
        strength *= 2.0


def parts(solution: Solution):
    return solution.K, solution.k, solution.P, solution.p, solution.c


def assert_same(found: Solution, expected: Solution, tolerance: float):
    for one, other in zip(parts(found), parts(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


# --- the problem -------------------------------------------------------------------------------------------------


def test_scores_of_gaussian_data_are_gradients_of_the_log_density():
    problem, step = planar(), 1e-5
    cov = np.array([[0.6, 0.25], [0.25, 0.4]])
    for t, level in enumerate((0.65 * 0.8 * 0.9, 0.8 * 0.9, 0.9)):
        law = multivariate_normal(np.sqrt(level) * np.array([0.4, -0.7]), level * cov + (1 - level) * np.eye(2))
        y = np.array([0.7, -1.1])
        slope = [(law.logpdf(y + step * e) - law.logpdf(y - step * e)) / (2 * step) for e in np.eye(2)]
        np.testing.assert_allclose(problem.F[t] @ y + problem.f[t], slope, atol=1e-8)


# --- the optimum -------------------------------------------------------------------------------------------------


def test_lq1_optimum():
    best = optimum(lq1())
    expected = {
        "P": [0.0260856099, 0.0695171072, 0.1948432095, 0.5556984821, 1.2],
        "p": [0.0193982528, 0.0449784398, 0.1178741279, 0.3270480112, 0.7],
        "c": [0.0382542759, 0.0448195299, 0.0529417139, 0.0479270646, 0.0],
        "K": [-1.3338597829, -1.7252160654, -2.5186356449, -3.9799331104],
        "k": [0.3857481178, 0.6467062784, 1.1308597269, 1.9909657844],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(best, name).ravel(), values, rtol=0, atol=6e-11)
    factors = [0.0347585536, 0.0730662036, 0.1389246205, 0.15]
    np.testing.assert_allclose(contraction(lq1(), best.P), factors, rtol=0, atol=6e-11)


def bellman(problem: LinearQuadratic, t: int, after: Solution, y: np.ndarray, control: np.ndarray) -> float:
    """The right-hand side of (9) at one control, the expectation by a product Gauss-Hermite rule."""
    schedule = problem.schedule
    points, weights = gaussian_rule(problem.dim, 4)
    values = after.value(t + 1, schedule.mean(t, y, control) + schedule.sigma[t] * points)
    score = problem.F[t] @ y + problem.f[t]
    return float(weights @ values - schedule.strength[t] * schedule.step_kl(t, control, score))


@pytest.mark.parametrize("problem", [lq1(), planar()], ids=["1-D", "2-D"])
def test_the_optimum_is_what_brute_force_maximisation_of_the_bellman_equation_finds(problem):
    best, rng = optimum(problem), np.random.default_rng(3)
    for t in range(problem.schedule.steps):
        y = rng.normal(size=problem.dim)
        found = minimize(lambda u, t=t, y=y: -bellman(problem, t, best, y, u), np.zeros(problem.dim), tol=1e-10)
        np.testing.assert_allclose(best.control(t, y), found.x, atol=2e-6)
        assert best.value(t, y) == pytest.approx(-found.fun, abs=1e-11)
        # planted: the constant of the exponential tilt, and a constant without the trace
        trace = 0.5 * problem.schedule.sigma[t] ** 2 * np.trace(best.P[t + 1])
        x = curvature(problem, best.P)[t]
        log_det = 0.5 * problem.schedule.strength[t] * np.log1p(x).sum()
        assert abs(best.value(t, y) + trace - log_det + found.fun) > 1e-4
        assert abs(best.value(t, y) + trace + found.fun) > 1e-4


def test_the_bellman_problem_must_be_concave():
    schedule = ControlSchedule.ddpm([0.7, 0.8], [0.5, 0.15])
    convex = LinearQuadratic(schedule, np.zeros((2, 2, 2)), np.zeros((2, 2)), np.diag([1.0, -0.75]), [0.0, 0.0])
    with pytest.raises(
        ValueError, match=r"strength\[1\] = 0.15: must exceed 0.15, sigma\^2 times the largest curvature"
    ):
        optimum(convex)
    with pytest.raises(ValueError, match=r"strength\[1\].*the Bellman problem of step 1 is not concave"):
        policy_iteration_in_closed_form(convex, 1)
    just = LinearQuadratic(schedule.with_strength([5e7, 0.1500001]), convex.F, convex.f, convex.Q, convex.q)
    assert optimum(just).P[1, 1, 1] < -1e5
    with pytest.raises(ValueError, match=r"strength\[0\] = 0.5.*value at 1, or the Bellman problem of step 0"):
        optimum(LinearQuadratic(schedule.with_strength([0.5, 0.16]), convex.F, convex.f, convex.Q, convex.q))


# --- Algorithm 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (1, [-1.3355072629, 0.3869732467, 0.0262301131, 0.0195057109, 0.0377817134]),
        (2, [-1.3338152013, 0.3857149652, 0.0260884464, 0.0194003621, 0.0382442464]),
        (3, [-1.3338615767, 0.3857494517, 0.0260856689, 0.0193982967, 0.0382540590]),
    ],
)
@pytest.mark.parametrize("algorithm", [policy_iteration, policy_iteration_in_closed_form])
def test_lq1_policy_iteration(algorithm, iterations, expected):
    found = algorithm(lq1(), iterations)
    np.testing.assert_allclose([part[0].item() for part in parts(found)], expected, rtol=0, atol=6e-11)


@pytest.mark.parametrize("algorithm", [policy_iteration, policy_iteration_in_closed_form])
def test_lq1_with_different_iterations_per_step(algorithm):
    assert algorithm(lq1(), [2, 1, 3, 2]).P[0, 0, 0] == pytest.approx(0.026097037115, abs=6e-13)


def test_the_two_computations_of_algorithm_1_agree_to_rounding():
    for iterations, damping in (([0, 0, 0], 1.0), ([2, 1, 3], 1.0), ([4, 7, 1], [0.7, 1.2, 0.9]), (30, 0.5)):
        literal = policy_iteration(planar(), iterations, damping)
        assert_same(literal, policy_iteration_in_closed_form(planar(), iterations, damping), 1e-13)
    assert_same(policy_iteration(planar(), 60), optimum(planar()), 1e-13)
    assert_same(policy_iteration(planar(), 0), value_of(planar(), planar().F, planar().f), 1e-15)


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.floats(0.3, 1.4))
@settings(max_examples=60)
def test_the_two_computations_agree_on_random_problems(seed, dim, steps, iterations, damping):
    problem = random_problem(seed, dim, steps)
    literal = policy_iteration(problem, iterations, damping)
    assert_same(literal, policy_iteration_in_closed_form(problem, iterations, damping), 1e-11)


# One dimension in fractions: alpha a square of a rational, so that its root is one.

ROOTS = [Fraction(3, 5), Fraction(4, 5), Fraction(9, 10)]
SIGMAS = [Fraction(1, 2), Fraction(3, 5), Fraction(2, 5)]
STRENGTHS = [Fraction(1, 2), Fraction(2, 3), Fraction(3, 4)]
SCORES = [(Fraction(-1, 3), Fraction(1, 7)), (Fraction(-3, 4), Fraction(2, 5)), (Fraction(1, 6), Fraction(-1, 2))]
REWARD = (Fraction(4, 5), Fraction(3, 7))
COUNTS = [2, 1, 3]


def rational_problem():
    schedule = ControlSchedule([float(r * r) for r in ROOTS], [float(s) for s in SIGMAS], [float(b) for b in STRENGTHS])
    F = [[[float(slope)]] for slope, _ in SCORES]
    return LinearQuadratic(schedule, F, [[float(f)] for _, f in SCORES], [[float(REWARD[0])]], [float(REWARD[1])])


def rational_algorithm(counts):
    """(K, k, P, p, c) of each step by iterating (35) and expanding (36), in fractions."""
    P, p, c, rows = *REWARD, Fraction(0), []
    for root, sigma, b, (F, f), m in reversed(list(zip(ROOTS, SIGMAS, STRENGTHS, SCORES, counts, strict=True))):
        a, K, k = root**2, F, f
        for _ in range(m):
            slope, shift = (1 + (1 - a) * K) / root, (1 - a) * k / root
            gain = root * sigma**2 / (b * (1 - a))
            K, k = F - gain * P * slope, f + gain * (p - P * shift)
        slope, shift = (1 + (1 - a) * K) / root, (1 - a) * k / root
        weight = b * (1 - a) ** 2 / (a * sigma**2)
        # -P (slope y + shift)^2 / 2 + p (slope y + shift) + c - P sigma^2 / 2 - weight (U - s)^2 / 2, by powers of y
        P, p, c = (
            P * slope**2 + weight * (K - F) ** 2,
            slope * (p - P * shift) - weight * (K - F) * (k - f),
            c + p * shift - P * (shift**2 + sigma**2) / 2 - weight * (k - f) ** 2 / 2,
        )
        rows.insert(0, (K, k, P, p, c))
    return rows


def rational_P(counts, residual):
    """Phi^2 P R (1 - residual(N, m)), backwards: the closed form if the residual is N^(2m + 1)."""
    P = REWARD[0]
    for root, sigma, b, (F, _), m in reversed(list(zip(ROOTS, SIGMAS, STRENGTHS, SCORES, counts, strict=True))):
        epsilon, Phi = sigma**2 / b, (1 + (1 - root**2) * F) / root
        P = Phi**2 * P / (1 + epsilon * P) * (1 - residual(-epsilon * P, m))
    return P


def test_the_closed_form_holds_in_fractions_with_the_exponent_2m_plus_1_and_no_other():
    exact = rational_algorithm(COUNTS)[0][2]
    assert rational_P(COUNTS, lambda N, m: N ** (2 * m + 1)) == exact
    for wrong in (lambda N, m: N ** (2 * m), lambda N, m: N ** (m + 1), lambda N, m: (-N) ** (2 * m + 1)):
        assert abs(rational_P(COUNTS, wrong) - exact) > Fraction(1, 10**5)


@pytest.mark.parametrize("algorithm", [policy_iteration, policy_iteration_in_closed_form])
def test_both_computations_equal_the_fractions(algorithm):
    found = algorithm(rational_problem(), COUNTS)
    for t, row in enumerate(rational_algorithm(COUNTS)):
        for part, exact in zip(parts(found), row, strict=True):
            assert part[t].item() == pytest.approx(float(exact), rel=1e-13, abs=1e-15)


# --- contraction, divergence, damping ----------------------------------------------------------------------------


def test_every_iteration_multiplies_the_error_by_minus_the_curvature():
    problem = planar()
    last, best = 2, optimum(problem)  # the last step sees the exact value function, r
    N = -(0.35**2 / 0.6) * problem.Q
    errors = [policy_iteration(problem, m).K[last] - best.K[last] for m in range(4)]
    for before, after in itertools.pairwise(errors):
        np.testing.assert_allclose(after, N @ before, rtol=0, atol=1e-14)
        assert np.abs(after + N @ before).max() > 1e-4  # planted: without the alternation
    assert contraction(problem, best.P)[last] == pytest.approx(np.abs(np.linalg.eigvals(N)).max(), rel=1e-13)


def test_iterates_may_be_steeper_than_the_optimal_control():
    problem = one_step(0.4)
    slopes = [policy_iteration(problem, m).K.item() for m in range(4)]
    np.testing.assert_allclose(slopes, [0.0, -2.5, -1.25, -1.875], atol=1e-14)
    assert optimum(problem).K.item() == pytest.approx(-5 / 3, rel=1e-14)


def test_undamped_iteration_diverges_though_the_problem_is_concave_and_damped_converges():
    problem = one_step(0.1)  # x = 0.2 / 0.1 = 2
    best = optimum(problem)
    with pytest.warns(DivergenceWarning) as caught:
        diverged = policy_iteration(problem, 39)
    message = str(caught[0].message)
    assert caught[0].filename == __file__
    for phrase in ("step 0", "rho = sigma^2 max|eig P| / strength = 2", "without damping diverges", "= 0.5 converges"):
        assert phrase in message
    start = abs(best.K.item())
    assert abs(diverged.K.item() - best.K.item()) == pytest.approx(2.0**39 * start, rel=1e-12)
    damped = policy_iteration(problem, 39, 0.5)
    assert abs(damped.K.item() - best.K.item()) == pytest.approx(0.5**39 * start, abs=1e-14)
    assert diverged.c[0] < damped.c[0]
    assert_same(policy_iteration(problem, 1, best_damping(problem, best.P)), best, 1e-14)  # Newton's method


def test_warnings_say_when_damping_is_the_culprit_or_no_help():
    with pytest.warns(DivergenceWarning, match=r"= 1, .*without damping does not converge"):
        policy_iteration(LinearQuadratic(ControlSchedule([0.8], [0.5], 0.25), [[[0]]], [[0]], [[1]], [0]), 1)
    with pytest.warns(DivergenceWarning, match=r"factor 1.1 >= 1: policy iteration with damping 1.4 diverges"):
        policy_iteration(one_step(0.4), 1, 1.4)
    convex = LinearQuadratic(ControlSchedule.ddpm([0.8], 0.1), [[[0.0]]], [[0.0]], [[-1.0]], [0.0])
    with pytest.warns(DivergenceWarning, match="no damping converges, the Bellman problem is not concave"):
        policy_iteration(convex, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_iteration(convex, 0)  # nothing is iterated
        policy_iteration(one_step(0.2), 1, 0.9)
    with pytest.raises(ValueError, match="no damping|not concave"):
        best_damping(convex, optimum(one_step(0.1)).P * -1.0)


def test_the_best_damping_is_the_best():
    problem = planar(0.2)
    values = optimum(planar()).P * np.array([3.0, 2.0, 1.0, 0.5])[:, None, None]  # any values will do
    x, best = curvature(problem, values), best_damping(problem, values)
    least = contraction(problem, values, best)
    np.testing.assert_allclose(least, (x[:, -1] - x[:, 0]) / (2 + x[:, -1] + x[:, 0]), rtol=1e-12)
    assert (least < 1).all()
    for damping in np.linspace(0.05, 2.0, 79):
        assert (contraction(problem, values, damping) >= least - 1e-12).all()
    rho = np.abs(x).max(axis=1)
    # 2 / (2 + rho) always contracts in a concave problem, and is the best for 0 <= x <= rho
    assert (contraction(problem, values, 2 / (2 + rho)) < 1).all()
    assert (contraction(problem, values, 2 / (2 + rho)) > least + 1e-3).any()


def test_a_larger_strength_contracts_faster_if_the_reward_is_concave_or_convex():
    rng = np.random.default_rng(5)
    for sign in (1.0, -1.0):
        for _ in range(20):
            problem = random_problem(int(rng.integers(2**32)), 2, 3)
            root = rng.normal(size=(2, 2))
            base = 20.0 * problem.schedule.strength * max(1.0, np.abs(root @ root.T).max())
            factors = []
            for scale in (1.0, 1.3, 4.0):
                schedule = problem.schedule.with_strength(scale * base)
                definite = LinearQuadratic(schedule, problem.F, problem.f, sign * root @ root.T, problem.q)
                factors.append(contraction(definite, optimum(definite).P))
            assert (factors[0] > factors[1]).all()
            assert (factors[1] > factors[2]).all()


def test_a_larger_strength_may_turn_convergence_into_divergence_if_the_reward_is_a_saddle():
    def saddle(strength):
        schedule, line = ControlSchedule.ddpm([0.1, 0.98], strength), np.array([0.6, 0.8])
        return LinearQuadratic.of_gaussian(schedule, [0, 0], np.outer(line, line), np.diag([20.0, -5.0]), [1.0, 1.0])

    weak, strong = saddle(0.5), saddle(1.0)
    np.testing.assert_allclose(contraction(weak, optimum(weak).P), [0.0, 0.8], atol=1e-12)
    np.testing.assert_allclose(contraction(strong, optimum(strong).P), [1.4, 0.4], atol=1e-12)
    assert_same(policy_iteration(weak, [5, 90]), optimum(weak), 1e-7)
    with pytest.warns(DivergenceWarning, match="step 0: rho"):
        diverged = policy_iteration(strong, 90)
    assert np.abs(diverged.K[0] - optimum(strong).K[0]).max() > 1e11


# --- any affine policy -------------------------------------------------------------------------------------------


def enumerated(problem, K, k, start, law_K, law_k):
    """E r and E KL_t along the law of the controls law_K y + law_k, by a product of three-point rules: exact here."""
    schedule, d = problem.schedule, problem.dim
    points, weights = gaussian_rule(d * (schedule.steps + 1), 3)
    noise = points.reshape(len(weights), schedule.steps + 1, d)
    y, divergences = start.mean + noise[:, 0] @ np.linalg.cholesky(start.cov).T, []
    for t in range(schedule.steps):
        control, score = y @ K[t].T + k[t], y @ problem.F[t].T + problem.f[t]
        divergences.append(weights @ schedule.step_kl(t, control, score))
        y = schedule.mean(t, y, y @ law_K[t].T + law_k[t]) + schedule.sigma[t] * noise[:, t + 1]
    reward = weights @ (y @ problem.q - 0.5 * np.sum(y @ problem.Q * y, axis=1))
    return reward, np.array(divergences)


def perturbed(problem, size=0.2):
    rng, best = np.random.default_rng(11), optimum(problem)
    return best.K + size * rng.normal(size=best.K.shape), best.k + size * rng.normal(size=best.k.shape)


def test_evaluation_against_enumeration_of_paths():
    problem = planar()
    K, k = perturbed(problem)
    found = evaluate(problem, K, k, START)
    reward, divergences = enumerated(problem, K, k, START, K, k)
    _, pretrained = enumerated(problem, K, k, START, problem.F, problem.f)
    assert found.reward == pytest.approx(reward, rel=1e-12)
    np.testing.assert_allclose(found.step_kl, divergences, rtol=1e-12)
    np.testing.assert_allclose(found.step_kl_pretrained, pretrained, rtol=1e-12)
    objective = reward - np.array([0.9, 0.5, 0.6]) @ divergences
    assert found.objective == pytest.approx(objective, rel=1e-12)


def expected_value(solution: Solution, start: Gaussian) -> float:
    second = start.cov + np.outer(start.mean, start.mean)
    return float(solution.c[0] + solution.p[0] @ start.mean - 0.5 * np.sum(solution.P[0] * second))


def test_the_objective_is_the_mean_of_the_first_value():
    assert evaluate(lq1(), optimum(lq1()).K, optimum(lq1()).k, STANDARD).objective == pytest.approx(
        0.025211470907, abs=6e-13
    )
    problem = planar()
    for K, k in ((problem.F, problem.f), perturbed(problem), (optimum(problem).K, optimum(problem).k)):
        found = evaluate(problem, K, k, START).objective
        assert found == pytest.approx(expected_value(value_of(problem, K, k), START), abs=1e-13)
    best = optimum(problem)
    assert found == pytest.approx(expected_value(best, START), abs=1e-13)
    # planted: the tilt's constant, or none
    x, strength = curvature(problem, best.P), problem.schedule.strength
    traces = 0.5 * strength @ x.sum(axis=1)
    assert abs(expected_value(best, START) + traces - 0.5 * strength @ np.log1p(x).sum(axis=1) - found) > 1e-3
    assert abs(expected_value(best, START) + traces - found) > 1e-3


def test_no_other_affine_policy_is_better():
    problem, best, rng = planar(), optimum(planar()), np.random.default_rng(0)
    highest = evaluate(problem, best.K, best.k, START).objective
    for _ in range(50):
        K, k = rng.normal(size=best.K.shape), rng.normal(size=best.k.shape)
        for size in (1e-4, 1e-2, 1.0):
            near = [evaluate(problem, best.K + s * K, best.k + s * k, START).objective for s in (size, -size)]
            assert max(near) < highest
            if size == 1e-4:
                assert abs(near[0] - near[1]) / (2 * size) < 1e-4  # the gradient vanishes; of order size^2


@pytest.mark.parametrize(("problem", "start"), [(lq1(), STANDARD), (planar(), START)], ids=["1-D", "2-D"])
def test_the_divergences_of_the_steps_add_up_to_that_of_the_paths(problem, start):
    K, k = optimum(problem).K, optimum(problem).k
    found = evaluate(problem, K, k, start)
    joint = path_kl(problem, K, k, start)
    assert joint == pytest.approx(found.step_kl.sum(), abs=1e-13)
    assert abs(joint - found.step_kl_pretrained.sum()) > 1e-3  # planted: the pre-trained expectation
    reverse = kl(path_law(problem, problem.F, problem.f, start), path_law(problem, K, k, start))
    assert reverse == pytest.approx(found.step_kl_pretrained.sum(), abs=1e-13)
    elsewhere = Gaussian(start.mean + 0.3, 1.7 * start.cov)
    moved = path_kl(problem, K, k, start, elsewhere)
    assert moved == pytest.approx(kl(start, elsewhere) + found.step_kl.sum(), abs=1e-13)
    assert moved - found.step_kl.sum() > 0.05  # planted: the initial laws forgotten


def test_lq1_divergences():
    best = optimum(lq1())
    found = evaluate(lq1(), best.K, best.k, STANDARD)
    assert found.step_kl.sum() == pytest.approx(0.030623776923, abs=6e-13)
    assert found.step_kl_pretrained.sum() == pytest.approx(0.035412, abs=6e-7)


def test_path_law_and_marginals_agree():
    problem = planar()
    K, k = perturbed(problem)
    path = path_law(problem, K, k, START)
    for t, law in enumerate(marginals(problem, K, k, START)):
        np.testing.assert_allclose(state_law(path, t, 2).mean, law.mean, atol=1e-14)
        np.testing.assert_allclose(state_law(path, t, 2).cov, law.cov, atol=1e-14)


# --- the exponential tilt ----------------------------------------------------------------------------------------


def test_the_tilted_value_is_the_log_normaliser_of_the_pretrained_terminal_law():
    problem, y = planar(0.7), np.array([0.4, -1.3])
    best, constants = optimum(problem), tilted_constants(problem)
    terminal = marginals(problem, problem.F, problem.f, Gaussian(y, np.zeros((2, 2))))[-1]
    exact = 0.7 * tilt(terminal, problem.q / 0.7, problem.Q / 0.7)[1]
    found = best.value(0, y) - best.c[0] + constants[0]
    assert found == pytest.approx(exact, abs=1e-13)
    assert abs(best.value(0, y) - exact) > 1e-3  # planted: the constant of the optimum


@pytest.mark.parametrize(("problem", "start"), [(lq1(), STANDARD), (planar(0.7), START)], ids=["1-D", "2-D"])
def test_the_gap_of_the_tilt_is_a_divergence_of_paths(problem, start):
    best, strength = optimum(problem), float(problem.schedule.strength[0])
    gap = tilt_gap(problem)
    assert (gap > 0).all()
    np.testing.assert_allclose(np.cumsum(gap[::-1])[::-1], (tilted_constants(problem) - best.c)[:-1], atol=1e-13)
    divergence = kl(path_law(problem, best.K, best.k, start), tilted_path_law(problem, start))
    assert strength * divergence == pytest.approx(gap.sum(), abs=1e-13)
    assert abs(divergence - gap.sum()) > 1e-3  # planted: the gap without beta
    # of any policy, not only of the optimum
    K, k = perturbed(problem)
    lost = expected_value(best, start) - best.c[0] + tilted_constants(problem)[0]
    lost -= evaluate(problem, K, k, start).objective
    divergence = kl(path_law(problem, K, k, start), tilted_path_law(problem, start))
    assert lost == pytest.approx(strength * divergence, rel=1e-12)


def test_lq1_tilt():
    assert tilt_gap(lq1()).sum() == pytest.approx(0.008885861695, abs=6e-13)
    constants = [0.0471401376, 0.0534692173, 0.0605729844, 0.0520222876, 0.0]
    np.testing.assert_allclose(tilted_constants(lq1()), constants, rtol=0, atol=6e-11)
    # docs/pift.md tabulates the three sample laws
    best = optimum(lq1())
    optimal = marginals(lq1(), best.K, best.k, STANDARD)[-1]
    tilted, aim = state_law(tilted_path_law(lq1(), STANDARD), -1, 1), reward_tilted_law(lq1(), STANDARD)
    moments = [(law.mean.item(), law.cov.item()) for law in (optimal, tilted, aim)]
    expected = [(0.492416916, 0.249161162), (0.492416916, 0.223207831), (0.495287817, 0.222735836)]
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-9)


def test_the_leading_term_of_the_gap():
    ratios = [(tilt_gap(planar(b)) / tilt_gap_leading(planar(b))).ravel() for b in (10.0, 100.0, 1000.0)]
    for near, nearer in itertools.pairwise(ratios):
        np.testing.assert_allclose((near - 1) / (nearer - 1), 10.0, rtol=0.2)  # first order in 1 / beta
    np.testing.assert_allclose(ratios[-1], 1.0, atol=1e-3)  # refutes 1 / (2 beta) in place of 1 / (4 beta)
    best = optimum(planar(10.0))
    by_hand = [s**4 * np.trace(P @ P) / 40 for s, P in zip((0.5, 0.45, 0.35), best.P[1:], strict=True)]
    np.testing.assert_allclose(tilt_gap_leading(planar(10.0)), by_hand, rtol=1e-12)


@pytest.mark.parametrize(("problem", "start"), [(lq1(), STANDARD), (planar(0.7), START)], ids=["1-D", "2-D"])
def test_only_a_tilted_start_leads_to_the_tilted_sample_law(problem, start):
    best, strength = optimum(problem), float(problem.schedule.strength[0])
    aim = reward_tilted_law(problem, start)
    tilted_start = tilt(start, best.p[0] / strength, best.P[0] / strength)[0]
    reached = state_law(tilted_path_law(problem, tilted_start), -1, problem.dim)
    assert kl(reached, aim) == pytest.approx(0.0, abs=1e-14)
    np.testing.assert_allclose(reached.mean, aim.mean, atol=1e-13)
    from_start = state_law(tilted_path_law(problem, start), -1, problem.dim)
    optimal = marginals(problem, best.K, best.k, start)[-1]
    assert kl(from_start, aim) > 1e-5
    assert kl(optimal, aim) > 2 * kl(from_start, aim)
    np.testing.assert_allclose(optimal.mean, from_start.mean, atol=1e-13)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: tilted_constants(p),
        lambda p: tilt_gap(p),
        lambda p: tilt_gap_leading(p),
        lambda p: tilted_path_law(p, START),
        lambda p: reward_tilted_law(p, START),
    ],
)
def test_a_tilt_needs_one_strength(call):
    with pytest.raises(ValueError, match=r"strength = \[0.9, 0.5, 0.6\]: must be the same at all steps"):
        call(planar())


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearQuadratic(lq1().schedule, [[[0.0]]], [[0.0]], [[1.0]], [0.0]), r"F has shape \(1, 1, 1\): must"),
        (lambda: LinearQuadratic(lq1().schedule, lq1().F, [[0.0]], [[1.0]], [0.0]), r"f has shape \(1, 1\): must be"),
        (lambda: LinearQuadratic(lq1().schedule, lq1().F, lq1().f, np.eye(2), [0.0]), r"Q has shape \(2, 2\): must be"),
        (lambda: LinearQuadratic(planar().schedule, planar().F, planar().f, [[1, 2], [0, 1]], [0, 0]), "symmetric"),
        (
            lambda: LinearQuadratic.of_gaussian(lq1().schedule, [0], [[-1]], [[1]], [0]),
            "cov = .*positive semi-definite",
        ),
        (lambda: policy_iteration(lq1(), [1, 2]), "iterations has 2 entries: must have one for each of the 4"),
        (lambda: policy_iteration(lq1(), -1), r"iterations\[0\] = -1: must be an integer >= 0"),
        (lambda: policy_iteration(lq1(), 1, 0.0), r"damping\[0\] = 0.0: must be positive"),
        (lambda: contraction(lq1(), np.eye(1)), "P has shape|shape"),
        (lambda: evaluate(lq1(), lq1().F[:2], lq1().f, STANDARD), r"K has shape \(2, 1, 1\): must be \(4, 1, 1\)"),
        (lambda: evaluate(lq1(), lq1().F, lq1().f[:, 0], STANDARD), "k has shape"),
        (lambda: path_law(lq1(), lq1().F, lq1().f, START), "start has dimension 2: must be 1"),
        (lambda: state_law(START, 0, 3), "t = 0, dim = 3: must name a state of a path with 2 coordinates"),
        (lambda: state_law(START, 2, 1), "t = 2, dim = 1: must name a state"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore::theory.control_linear_quadratic.DivergenceWarning")
def test_values_beyond_the_float_range_are_refused():
    with pytest.raises(ValueError, match=r"the values of step 0 exceed the float range"):
        policy_iteration(one_step(0.001), 500)
    assert math.isfinite(policy_iteration(one_step(0.001), 10).c[0])
