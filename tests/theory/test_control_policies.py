"""theory.control_policies against joint normal laws of the whole path, exact differences, quadrature and each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from theory import control_policies as cp
from theory.chains import QuadraticReward
from theory.control import ControlSchedule
from theory.gaussian import Gaussian, kl
from theory.mixture import GaussianMixture

SEEDS = st.integers(0, 2**32 - 1)
TWO_MODES = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.5]], [[0.5]]])
NORMAL = Gaussian.scalar(0.0, 1.0)


def scalar(steps):
    """alpha from 0.6 to 0.9, strength 0.8, data N(0.5, 0.25), reward 0.7 y - 0.6 y^2: LQ1 at four steps."""
    schedule = ControlSchedule.ddpm(np.linspace(0.6, 0.9, steps), 0.8)
    score = cp.gaussian_scores(schedule, Gaussian.scalar(0.5, 0.25))
    return cp.AffinePolicies(schedule, score, QuadraticReward(0.0, [0.7], [[-1.2]]), NORMAL)


def random_affine(rng, dim, steps, strength):
    root = rng.normal(size=(dim, dim))
    start = Gaussian(rng.normal(size=dim), root @ root.T + 0.1 * np.eye(dim))
    schedule = ControlSchedule(rng.uniform(0.5, 0.9, steps), rng.uniform(0.3, 0.8, steps), strength)
    curvature = rng.normal(size=(dim, dim))
    reward = QuadraticReward(0.3, rng.normal(size=dim), -curvature @ curvature.T)
    return cp.AffinePolicies(schedule, rng.normal(size=(steps, dim, dim + 1)), reward, start)


def two_modes(points=201, half_width=10.0):
    """alpha (0.8, 0.9), strengths (0.5, 0.4), data of two modes, reward log cosh."""
    schedule = ControlSchedule.ddpm([0.8, 0.9], [0.5, 0.4])
    return cp.GridPolicies(schedule, TWO_MODES, lambda y: np.log(np.cosh(y)), NORMAL, half_width, points)


GRID = two_modes()


def off_diagonal(policies, policy):
    sizes = cp.block_sizes(policies, cp.hessian(policies, policy))
    return float((sizes - np.diag(np.diag(sizes))).max())


# --- affine policies: the objective and its derivatives ----------------------------------------------------------


def path_law(policies, policy):
    """The joint law of (Y_0, ..., Y_T), every Y_t written as an affine map of (1, Y_0, W_0, ..., W_{T-1})."""
    steps, dim, _ = policies.shape
    maps = [np.hstack([np.zeros((dim, 1)), np.eye(dim), np.zeros((dim, steps * dim))])]
    for t in range(steps):
        a = policies.schedule.alpha[t]
        control = policy[t][:, :dim] @ maps[-1]
        control[:, 0] += policy[t][:, dim]
        following = (maps[-1] + (1 - a) * control) / math.sqrt(a)
        following[:, (t + 1) * dim + 1 : (t + 2) * dim + 1] += policies.schedule.sigma[t] * np.eye(dim)
        maps.append(following)
    stacked = np.vstack(maps)
    source = np.eye(steps * dim + dim)
    source[:dim, :dim] = policies.start.cov
    mean = stacked[:, 0] + stacked[:, 1 : dim + 1] @ policies.start.mean
    cov = stacked[:, 1:] @ source @ stacked[:, 1:].T
    return Gaussian(mean, (cov + cov.T) / 2)


def objective_by_paths(policies, policy):
    steps, dim, _ = policies.shape
    law = path_law(policies, policy)
    total = 0.0
    for t in range(steps):
        part = slice(t * dim, (t + 1) * dim)
        error = policy[t] - policies.score[t]
        gap = error[:, :dim] @ law.mean[part] + error[:, dim]
        square = gap @ gap + np.trace(error[:, :dim] @ law.cov[part, part] @ error[:, :dim].T)
        a, sigma = policies.schedule.alpha[t], policies.schedule.sigma[t]
        total -= policies.schedule.strength[t] * (1 - a) ** 2 / (2 * a * sigma**2) * square
    mean, second = law.mean[-dim:], law.cov[-dim:, -dim:] + np.outer(law.mean[-dim:], law.mean[-dim:])
    reward = policies.reward
    return total + float(reward.constant + reward.linear @ mean + np.sum(reward.quadratic * second) / 2)


def difference_hessian(function, centre, width=1.0):
    """Central differences; exact at any width for a function of degree two in every K_t, as J is here."""
    size = centre.size
    result = np.empty((size, size))
    units = width * np.eye(size).reshape(size, *centre.shape)
    here = function(centre)
    for i in range(size):
        result[i, i] = (function(centre + units[i]) - 2 * here + function(centre - units[i])) / width**2
        for j in range(i):
            mixed = [function(centre + p * units[i] + q * units[j]) * p * q for p in (1, -1) for q in (1, -1)]
            result[i, j] = result[j, i] = sum(mixed) / (4 * width**2)
    return result


@pytest.mark.parametrize(("dim", "steps"), [(1, 1), (1, 3), (2, 2), (3, 2)])
@given(SEEDS)
def test_objective_is_that_of_the_joint_law(dim, steps, seed):
    rng = np.random.default_rng(seed)
    policies = random_affine(rng, dim, steps, rng.uniform(0.3, 2.0, steps))
    policy = rng.normal(size=policies.shape)
    assert cp.objective(policies, policy) == pytest.approx(objective_by_paths(policies, policy), rel=1e-10, abs=1e-10)


def test_a_constant_strength_pays_for_the_divergence_of_the_paths():
    rng = np.random.default_rng(1)
    policies = random_affine(rng, 2, 3, 0.7)
    policy = policies.optimum()
    law, before = path_law(policies, policy), path_law(policies, policies.score)
    mean, cov = law.mean[-2:], law.cov[-2:, -2:]
    reward = policies.reward
    expected = reward.constant + reward.linear @ mean + np.sum(reward.quadratic * (cov + np.outer(mean, mean))) / 2
    assert cp.objective(policies, policy) == pytest.approx(float(expected) - 0.7 * kl(law, before), rel=1e-9)


@pytest.mark.parametrize(("dim", "steps"), [(1, 3), (2, 2)])
@given(SEEDS)
def test_derivatives_are_exact_differences_of_the_joint_law(dim, steps, seed):
    rng = np.random.default_rng(seed)
    policies = random_affine(rng, dim, steps, 0.8)
    policy = rng.normal(size=policies.shape)
    units = np.eye(policy.size).reshape(-1, *policy.shape)
    slopes = [(objective_by_paths(policies, policy + u) - objective_by_paths(policies, policy - u)) / 2 for u in units]
    scale = 1 + np.abs(slopes).max()
    np.testing.assert_allclose(cp.gradient(policies, policy).ravel(), slopes, atol=1e-9 * scale)
    found = cp.hessian(policies, policy)
    expected = difference_hessian(lambda k: objective_by_paths(policies, k), policy)
    np.testing.assert_allclose(found, expected, atol=1e-8 * (1 + np.abs(expected).max()))
    for t, block in enumerate(policies.curvature(policy)):
        part = slice(t * len(block), (t + 1) * len(block))
        np.testing.assert_allclose(-block, expected[part, part], atol=1e-8 * (1 + np.abs(expected).max()))


@given(SEEDS)
def test_the_optimum_is_stationary_and_every_regret_is_what_it_loses(seed):
    rng = np.random.default_rng(seed)
    policies = random_affine(rng, 2, 3, rng.uniform(0.3, 2.0, 3))
    best = policies.optimum()
    assert np.abs(cp.gradient(policies, best)).max() < 1e-9 * (1 + np.abs(policies.curvature(best)).max())
    policy = best + rng.normal(size=policies.shape)
    regret = policies.regret(policy)
    assert regret.min() >= 0
    lost = objective_by_paths(policies, best) - objective_by_paths(policies, policy)
    assert regret.sum() == pytest.approx(lost, rel=1e-8)


def test_scalar_instance_has_the_known_optimum():
    # from an independent derivation
    policies = scalar(4)
    slopes = [-1.3338597829, -1.7252160654, -2.5186356449, -3.9799331104]
    offsets = [0.3857481178, 0.6467062784, 1.1308597269, 1.9909657844]
    np.testing.assert_allclose(policies.optimum()[:, 0], np.column_stack([slopes, offsets]), atol=1e-10)
    assert cp.objective(policies, policies.optimum()) == pytest.approx(0.025211470907, abs=1e-12)


@given(SEEDS)
def test_affine_policies_are_concave_in_each_step_even_with_the_others_arbitrary(seed):
    # V^K <= V* orders the two quadratics, so that the bowl of Q^K is at least that of Q*, whatever the sign of Q
    rng = np.random.default_rng(seed)
    schedule = ControlSchedule.ddpm([0.7, 0.8, 0.9], 1.0)
    reward = QuadraticReward(0.0, [0.3], [[1.1]])
    score = cp.gaussian_scores(schedule, Gaussian.scalar(0.5, 0.25))
    policies = cp.AffinePolicies(schedule, score, reward, NORMAL)
    policy = 3 * rng.normal(size=policies.shape)
    assert np.linalg.eigvalsh(policies.curvature(policy)).min() > 0


def test_scores_are_those_of_the_mixture_module():
    schedule = ControlSchedule.ddpm([0.7, 0.9], 1.0)
    cov = [[1.0, 0.3], [0.3, 0.5]]
    points = np.array([[0.2, -1.0], [3.0, 0.4]])
    mixture = GaussianMixture([1.0], [[0.5, -0.2]], [cov])
    for score, level in zip(cp.gaussian_scores(schedule, Gaussian([0.5, -0.2], cov)), schedule.alpha_bar, strict=True):
        np.testing.assert_allclose(points @ score[:, :2].T + score[:, 2], mixture.noised_score(points, level))


# --- policies on the grid ----------------------------------------------------------------------------------------


def test_normal_data_and_a_quadratic_reward_give_affine_policies():
    schedule = ControlSchedule.ddpm([0.7, 0.8, 0.9], [0.6, 0.8, 0.7])
    data = GaussianMixture([1.0], [[0.5]], [[[0.25]]])
    start = Gaussian.scalar(0.3, 1.2)
    grid = cp.GridPolicies(schedule, data, lambda y: 0.7 * y - 0.6 * y**2, start, 12.0, 301)
    score = cp.gaussian_scores(schedule, Gaussian.scalar(0.5, 0.25))
    affine = cp.AffinePolicies(schedule, score, QuadraticReward(0.0, [0.7], [[-1.2]]), start)
    features = np.stack([score[:, 0], affine.optimum()[:, 0] - score[:, 0]], axis=1)  # (T, 2, 2), rows in (y, 1)
    policy = np.array([[[1.1, 0.3]], [[0.8, 1.4]], [[0.9, -0.5]]])
    there = np.einsum("tij,tjk->tik", policy, features)
    assert cp.objective(grid, policy) == pytest.approx(cp.objective(affine, there), abs=1e-11)
    slopes = np.einsum("tik,tjk->tij", cp.gradient(affine, there), features)
    np.testing.assert_allclose(cp.gradient(grid, policy), slopes, atol=1e-10)
    change = np.zeros((6, 6))
    for t in range(3):
        change[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = features[t]
    expected = change @ cp.hessian(affine, there) @ change.T
    np.testing.assert_allclose(cp.hessian(grid, policy), expected, atol=1e-10)
    np.testing.assert_allclose(grid.regret(policy), affine.regret(there), atol=1e-10)


def test_optimal_controls_of_two_modes():
    # from an independent derivation, and by adaptive quadrature and root finding
    grid = two_modes(401)
    at = [int(np.argmin(np.abs(grid.grid - y))) for y in (-1.0, 0.3, 2.0)]
    controls = grid.features.sum(axis=2)[:, at]
    np.testing.assert_allclose(controls[0], [-0.9568677088, 0.8663419530, -0.3164183418], atol=1e-9)
    np.testing.assert_allclose(controls[1], [-1.7468758954, 1.1877926022, 0.3797448175], atol=1e-9)
    schedule, sigma = grid.schedule, float(grid.schedule.sigma[1])

    def smoothed_slope(mean):
        def integrand(w):
            return math.tanh(mean + sigma * w) * math.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)

        return quad(integrand, -9, 9, epsabs=1e-12)[0]

    for index, y in zip(at, (-1.0, 0.3, 2.0), strict=True):
        score = float(TWO_MODES.noised_score([[y]], 0.9)[0, 0])
        mean = float(schedule.mean(1, y, score))
        root = brentq(lambda m, mean=mean: m - mean - sigma**2 / 0.4 * smoothed_slope(m), mean - 1, mean + 1)
        assert grid.features[1, index].sum() == pytest.approx(float(schedule.control(1, y, root)), abs=1e-8)


def five_points(function, width):
    return (8 * (function(width) - function(-width)) - (function(2 * width) - function(-2 * width))) / (12 * width)


@pytest.mark.parametrize(
    "policy", [[[[1.0, 1.0]], [[1.0, 1.0]]], [[[1.0, 0.0]], [[1.0, 0.0]]], [[[0.8, 2]], [[1.3, -1]]]]
)
def test_derivatives_on_the_grid_are_differences(policy):
    # fourth order: halving the width must divide the error by about sixteen, which bounds it
    centre = np.array(policy)
    units = np.eye(4).reshape(4, 2, 1, 2)
    found = cp.gradient(GRID, centre).ravel()
    for width in (0.04, 0.02):
        slopes = [five_points(lambda h, u=u: cp.objective(GRID, centre + h * u), width) for u in units]
        np.testing.assert_allclose(found, slopes, atol=2e-7 * (width / 0.02) ** 4)
    rows = [five_points(lambda h, u=u: cp.gradient(GRID, centre + h * u).ravel(), 0.01) for u in units]
    matrix = cp.hessian(GRID, centre)
    np.testing.assert_allclose(matrix, np.array(rows), atol=1e-7)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    for t, block in enumerate(GRID.curvature(centre)):
        part = slice(2 * t, 2 * t + 2)
        np.testing.assert_allclose(matrix[part, part], -block, atol=1e-12)


def test_the_grid_does_not_matter():
    policy = np.array([[[0.8, 2.0]], [[1.3, -1.0]]])
    fine = two_modes(401, 12.0)
    assert cp.objective(fine, policy) == pytest.approx(cp.objective(GRID, policy), abs=1e-8)
    np.testing.assert_allclose(cp.hessian(fine, policy), cp.hessian(GRID, policy), atol=1e-8)


@given(SEEDS)
def test_regret_on_the_grid(seed):
    policy = 1 + np.random.default_rng(seed).normal(size=(2, 1, 2))
    regret = GRID.regret(policy)
    assert regret.min() > 0
    assert regret.sum() == pytest.approx(cp.objective(GRID, GRID.optimum()) - cp.objective(GRID, policy), abs=1e-10)


# --- the gradient of a step depends on the earlier steps -----------------------------------------------------------


def test_the_gradient_in_the_last_step_moves_with_the_first():
    policies = scalar(2)
    before = policies.pretrained()
    after = before.copy()
    after[0, 0, 0] += 0.5
    first, second = cp.gradient(policies, before)[1, 0], cp.gradient(policies, after)[1, 0]
    # from an independent derivation; independence of K_0 would make them equal
    assert first[0] == pytest.approx(-0.0455100411, abs=1e-10)
    assert second[0] == pytest.approx(-0.0718319545, abs=1e-10)
    # by hand: grad_u Q_1 = 3/2 - 3/4 y, whatever K_0 is, but E y^2 grows from 1/2 to 17/4
    line = cp.line(2)
    before = line.pretrained()
    after = before.copy()
    after[0, 0, 0] += 1.0
    np.testing.assert_allclose(cp.gradient(line, before)[1, 0], [-3 / 8, 3 / 2], atol=1e-15)
    np.testing.assert_allclose(cp.gradient(line, after)[1, 0], [-51 / 16, 3 / 2], atol=1e-15)


@given(SEEDS)
def test_what_does_not_depend_on_the_earlier_steps(seed):
    """The bowl of Q_t and, among affine policies, the policy at which step t is stationary."""
    rng = np.random.default_rng(seed)
    policies = random_affine(rng, 1, 3, 1.0)
    policy = rng.normal(size=policies.shape)
    policy[1] = best_response(policies, policy, 1)
    scale = 1 + np.abs(policies.curvature(policy)[1]).max()
    assert np.abs(cp.gradient(policies, policy)[1]).max() < 1e-9 * scale
    policy[0] = rng.normal(size=(1, 2))
    scale = 1 + np.abs(policies.curvature(policy)[1]).max()
    assert np.abs(cp.gradient(policies, policy)[1]).max() < 1e-9 * scale


def best_response(policies, policy, t):
    """The stationary K_t given the others, by Newton's method; one step is exact for affine policies."""
    moved = np.array(policy)
    for _ in range(8):
        slope = cp.gradient(policies, moved)[t]
        moved[t] += np.linalg.solve(policies.curvature(moved)[t], slope.ravel()).reshape(slope.shape)
    return moved[t]


def test_with_a_later_step_not_optimal_the_best_response_depends_on_the_earlier():
    schedule = ControlSchedule.ddpm([0.7, 0.8, 0.9], 0.6)
    grid = cp.GridPolicies(schedule, TWO_MODES, lambda y: np.log(np.cosh(y)), NORMAL, 10.0, 151)
    responses = {}
    for later in (0.0, 1.0):
        for first in (0.0, 3.0):
            responses[later, first] = best_response(grid, [[[1.0, first]], [[1.0, 1.0]], [[1.0, later]]], 1)
    np.testing.assert_allclose(responses[1.0, 0.0], [[1, 1]], atol=1e-10)
    np.testing.assert_allclose(responses[1.0, 3.0], [[1, 1]], atol=1e-10)
    np.testing.assert_allclose(responses[0.0, 0.0], [[0.95708, 0.92307]], atol=1e-5)
    np.testing.assert_allclose(responses[0.0, 3.0], [[0.97535, 0.94004]], atol=1e-5)


# --- the Hessian is block-diagonal at the optimum ------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_block_diagonal_at_the_optimum_and_nowhere_else_affine(steps):
    policies = scalar(steps)
    assert off_diagonal(policies, policies.optimum()) < 1e-13
    assert off_diagonal(policies, policies.pretrained()) > 0.02  # refutes "block-diagonal at every policy"
    assert off_diagonal(policies, policies.optimum() + 0.1) > 1e-3


def test_block_diagonal_in_three_dimensions():
    policies = random_affine(np.random.default_rng(5), 3, 3, [0.5, 0.9, 0.7])
    size = np.abs(policies.curvature(policies.optimum())).max()
    assert off_diagonal(policies, policies.optimum()) < 1e-12 * size
    assert off_diagonal(policies, policies.pretrained()) > 1e-2


def test_off_diagonal_blocks_of_the_pretrained_policy():
    assert off_diagonal(scalar(4), scalar(4).pretrained()) == pytest.approx(0.036, abs=5e-4)  # independent derivation
    line = cp.line(2)
    expected = [[-9 / 8, 0], [9 / 4, -9 / 8]]  # d/dK_0 of (-3/4 E y^2 + 3/2 E y, -3/4 E y + 3/2), by hand
    np.testing.assert_allclose(cp.hessian(line, line.pretrained())[:2, 2:], expected, atol=1e-15)


def test_block_diagonal_at_the_optimum_and_nowhere_else_on_the_grid():
    assert off_diagonal(GRID, GRID.optimum()) < 1e-12
    assert off_diagonal(GRID, GRID.pretrained()) == pytest.approx(0.0248880537, abs=1e-9)


@pytest.mark.parametrize("policies", [scalar(3), random_affine(np.random.default_rng(3), 2, 3, 0.6), two_modes(161)])
def test_a_pair_of_steps_decouples_as_soon_as_the_later_ones_are_optimal(policies):
    steps, dim, features = policies.shape
    best, rng = policies.optimum(), np.random.default_rng(7)
    elsewhere = best + rng.normal(size=best.shape)
    for later in range(1, steps):
        policy = np.concatenate([elsewhere[:later], best[later:]])
        sizes = cp.block_sizes(policies, cp.hessian(policies, policy))
        assert sizes[:later, later:].max() < 1e-11 * sizes.max()
        policy = np.concatenate([best[:later], elsewhere[later:]])  # earlier ones optimal: no help
        sizes = cp.block_sizes(policies, cp.hessian(policies, policy))
        assert sizes[:later, later:].max() > 1e-3 * sizes.max()


def predicted_block(policies, value_bowls, t, *, divergence=True):
    """-grad_u^2 Q* (x) E phi phi' from the table of P_{t+1} and the joint law, one dimension."""
    a, sigma, strength = (x[t] for x in (policies.schedule.alpha, policies.schedule.sigma, policies.schedule.strength))
    law = path_law(policies, policies.optimum())
    mean, var = law.mean[t], law.cov[t, t]
    bowl = (1 - a) ** 2 / a * (value_bowls[t] + (strength / sigma**2 if divergence else 0.0))
    return bowl * np.array([[var + mean**2, mean], [mean, 1.0]])


def test_the_diagonal_blocks_are_the_predicted_ones():
    policies = scalar(4)
    bowls = [0.0695171072, 0.1948432095, 0.5556984821, 1.2]  # P_1, ..., P_4, from an independent derivation
    matrix = cp.hessian(policies, policies.optimum())
    for t in range(4):
        block = -matrix[2 * t : 2 * t + 2, 2 * t : 2 * t + 2]
        np.testing.assert_allclose(block, predicted_block(policies, bowls, t), atol=1e-9)
        wrong = predicted_block(policies, bowls, t, divergence=False)  # planted: the KL's curvature forgotten
        assert np.abs(block - wrong).max() > 0.5 * np.abs(block).max()


def test_on_the_grid_the_bowl_stays_inside_the_expectation():
    matrix = cp.hessian(GRID, GRID.optimum())
    schedule, features = GRID.schedule, GRID.features
    density = np.exp(-(GRID.grid**2) / 2)
    density /= density.sum()
    a, sigma, strength = schedule.alpha[0], schedule.sigma[0], schedule.strength[0]
    # V*_1 by the definition, its smoothed second derivative by Stein's identity
    last, first = (schedule.mean(t, GRID.grid, features[t].sum(axis=1)) for t in (1, 0))
    z = (GRID.grid[None, :] - last[:, None]) / schedule.sigma[1]
    weights = np.exp(-(z**2) / 2) * (GRID.grid[1] - GRID.grid[0]) / (schedule.sigma[1] * math.sqrt(2 * math.pi))
    value = weights @ np.log(np.cosh(GRID.grid)) - schedule.strength[1] * schedule.step_kl(
        1, features[1].sum(axis=1)[:, None], features[1, :, :1]
    )
    z = (GRID.grid[None, :] - first[:, None]) / sigma
    weights = np.exp(-(z**2) / 2) * (GRID.grid[1] - GRID.grid[0]) / (sigma * math.sqrt(2 * math.pi))
    bowl = (1 - a) ** 2 / a * (strength / sigma**2 - (weights * (z**2 - 1)) @ value / sigma**2)
    block = features[0].T @ (features[0] * (density * bowl)[:, None])
    np.testing.assert_allclose(-matrix[:2, :2], block, atol=1e-9)
    apart = (density @ bowl) * features[0].T @ (features[0] * density[:, None])  # planted: a product of means
    assert np.abs(-matrix[:2, :2] - apart).max() > 0.03 * np.abs(block).max()


# --- gradient ascent -----------------------------------------------------------------------------------------------


def safe_step(policies):
    return 0.8 / float(np.linalg.eigvalsh(policies.curvature(policies.optimum())).max())


@pytest.mark.parametrize(("steps", "rate"), [(2, 0.95075250), (3, 0.95413134), (4, 0.95708636), (5, 0.95893787)])
def test_gradient_ascent_has_the_predicted_rate_near_the_optimum(steps, rate):
    policies = scalar(steps)
    step = safe_step(policies)
    assert cp.local_rate(policies, step) == pytest.approx(rate, abs=5e-9)  # from an independent derivation
    path = cp.ascend(policies, policies.pretrained(), step, 201)
    distances = np.linalg.norm((path - policies.optimum()).reshape(202, -1), axis=1)
    assert distances[201] / distances[200] == pytest.approx(cp.local_rate(policies, step), abs=1e-9)
    # planted: the blocks without the KL's curvature predict another rate
    bowls = [
        np.linalg.eigvalsh(policies.curvature(policies.optimum())[t] - _kl_block(policies, t)) for t in range(steps)
    ]
    assert abs(np.abs(1 - step * np.concatenate(bowls)).max() - rate) > 0.01


def _kl_block(policies, t):
    a = policies.schedule.alpha[t]
    weight = policies.schedule.strength[t] * (1 - a) ** 2 / (a * policies.schedule.sigma[t] ** 2)
    return weight * policies.second_moments(policies.optimum())[t]


def test_on_the_grid_every_step_of_the_chain_converges_at_the_rate_of_its_own_block():
    step = safe_step(GRID)
    rates = np.abs(1 - step * np.linalg.eigvalsh(GRID.curvature(GRID.optimum()))).max(axis=1)
    assert cp.local_rate(GRID, step) == rates.max()
    assert abs(rates[0] - rates[1]) > 0.01
    path = cp.ascend(GRID, GRID.pretrained(), step, 161)
    increments = np.linalg.norm(np.diff(path, axis=0)[:, :, 0], axis=2)
    np.testing.assert_allclose((increments[160] / increments[100]) ** (1 / 60), rates, atol=1e-4)


def test_a_step_of_more_than_two_over_the_largest_curvature_does_not_converge():
    policies = scalar(2)
    step = 2.6 * safe_step(policies)  # 2.08 over the largest curvature
    assert cp.local_rate(policies, step) == pytest.approx(1.08)
    path = cp.ascend(policies, policies.optimum() + 1e-6, step, 60)
    distances = np.linalg.norm((path - policies.optimum()).reshape(61, -1), axis=1)
    assert distances[51] / distances[50] == pytest.approx(1.08, abs=1e-4)


@pytest.mark.parametrize(("steps", "shift"), [(2, 8.0), (4, 2.0)])
def test_the_same_step_diverges_from_further_away_and_a_quarter_of_it_converges(steps, shift):
    policies = scalar(steps)
    step, start = safe_step(policies), policies.pretrained() + shift
    path = cp.ascend(policies, start, step, 20)
    values = [cp.objective(policies, policy) for policy in path[:4]]
    assert values[1] < 50 * values[0] < 0
    assert values[3] < -1e20
    assert not np.isfinite(path[-1]).all()
    path = cp.ascend(policies, start, step / 4, 2000)
    values = [cp.objective(policies, policy) for policy in path[:200]]
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(path[-1], policies.optimum(), atol=1e-8)
    # a global linear rate of that start and step: the gap shrinks by a fixed factor from the first update on
    gaps = cp.objective(policies, policies.optimum()) - np.array(values)
    assert (gaps[1:] / gaps[:-1]).max() < 0.99


@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0])
def test_no_step_gives_a_linear_rate_from_every_start(step):
    # one update multiplies the distance by a factor that grows like its square
    policies = scalar(2)
    best = policies.optimum()
    factors = []
    for size in (1e3, 1e4):
        path = cp.ascend(policies, best + size, step, 1)
        factors.append(np.linalg.norm(path[1] - best) / np.linalg.norm(path[0] - best))
    assert factors[0] > 10
    assert factors[1] / factors[0] == pytest.approx(100, rel=0.1)


# --- no concavity --------------------------------------------------------------------------------------------------


def test_the_objective_is_not_jointly_concave():
    policies = scalar(2)
    largest = np.linalg.eigvalsh(cp.hessian(policies, policies.pretrained() + 8.0))[-1]
    assert largest == pytest.approx(2.789763208, abs=1e-9)
    ends = [policies.optimum() + np.array(shift).reshape(2, 1, 2) for shift in ([16, 0, 0, 0], [0, 0, 16, 0])]
    middle = cp.objective(policies, (ends[0] + ends[1]) / 2)
    assert middle < sum(cp.objective(policies, end) for end in ends) / 2


@given(SEEDS)
def test_no_affine_problem_of_two_steps_is_concave(seed):
    # the part of degree four, -(1 - a)^2/(2 a) tr(H_1 D_1 D_0 S_0 D_0' D_1'), is -x^2 w^2 on a plane
    rng = np.random.default_rng(seed)
    policies = random_affine(rng, 1, 2, 1.0)
    far = policies.optimum()
    far[:, 0, 0] += 1e3
    assert np.linalg.eigvalsh(cp.hessian(policies, far))[-1] > 0


def test_on_the_grid_a_bad_later_step_costs_the_concavity_in_an_earlier_one():
    policy = np.array([[[2.0, 2.0]], [[1.0, -12.0]]])
    grids = [two_modes(301), two_modes(301, 12.0)]
    for grid in grids:
        block = cp.hessian(grid, policy)[:2, :2]
        np.testing.assert_allclose(np.linalg.eigvalsh(block), [0.0073650552, 0.1706722935], atol=1e-7)
        assert np.linalg.eigvalsh(cp.hessian(grid, grid.optimum())).max() < 0


# --- bad input -----------------------------------------------------------------------------------------------------


def affine(score=(((-1.0, 0.0),),), quadratic=-1.0, strength=1.0, start=NORMAL):
    reward = QuadraticReward(0.0, [1.0], [[quadratic]])
    return cp.AffinePolicies(ControlSchedule.ddpm([0.5], strength), score, reward, start)


def grid(data=TWO_MODES, reward=np.cos, strength=1.0, start=NORMAL, half_width=8.0, points=101):
    return cp.GridPolicies(ControlSchedule.ddpm([0.8], strength), data, reward, start, half_width, points)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: affine(score=[[[-1.0]]]), r"score has shape \(1, 1, 1\): must be"),
        (lambda: affine(start=Gaussian([0.0, 0.0], np.eye(2))), r"score has shape \(1, 1, 2\): must be"),
        (lambda: affine(score=np.zeros((1, 2, 3)), start=Gaussian([0.0, 0.0], np.eye(2))), "reward has dimension 1"),
        (lambda: affine(quadratic=3.0), r"strength\[0\] = 1: must exceed 1.5"),
        (lambda: grid(data=GaussianMixture([1.0], [[0.0, 0.0]], [np.eye(2)])), "data, start have dimensions 2, 1"),
        (lambda: grid(start=Gaussian.scalar(0.0, 0.0)), r"start = N\(0, 0\): must have a density"),
        (lambda: grid(half_width=0.0), "half_width = 0.0"),
        (lambda: grid(points=2), "points = 2: must be an integer >= 3"),
        (lambda: grid(points=41), "points = 41: the spacing 0.4"),
        (lambda: grid(reward=lambda y: y[:-1]), r"reward has shape \(100,\)"),
        (lambda: grid(reward=lambda y: y + math.inf), "reward = .*: must be finite"),
        (lambda: grid(reward=lambda y: 3 * y**2), r"strength\[0\] = 1: must exceed 1.2, or"),
        (lambda: cp.objective(affine(), np.zeros((1, 2, 1))), r"policy has shape \(1, 2, 1\)"),
        (lambda: cp.gradient(affine(), [[[math.nan, 0.0]]]), "policy = .*: must be finite"),
        (lambda: cp.hessian(affine(), [0.0]), r"policy has shape \(1,\)"),
        (lambda: cp.block_sizes(affine(), np.eye(3)), r"matrix has shape \(3, 3\)"),
        (lambda: cp.local_rate(affine(), 0.0), "step = 0.0"),
        (lambda: cp.ascend(affine(), [[[0.0, 0.0]]], -1.0, 3), "step = -1.0"),
        (lambda: cp.ascend(affine(), [[[0.0, 0.0]]], 1.0, -3), "updates = -3"),
        (lambda: cp.line(0), "steps = 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
