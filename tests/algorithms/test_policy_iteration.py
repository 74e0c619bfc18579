"""Policy iteration on a grid: against adaptive quadrature, Riccati recursions and Gauss-Hermite sums written here."""

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

from algorithms.chain import Noise, rollout
from algorithms.objective import KLToReference
from algorithms.policy_iteration import (
    Grid,
    NotContracting,
    PolicyIteration,
    Smoothed,
    Unresolved,
    evaluate,
    policy_chain,
)


@dataclass(frozen=True)
class Chain:
    """Means A_t x + a_t + gain tanh(x), start mean 0.3 and standard deviation 0.8."""

    slope: list  # (T, d, d)
    offset: list  # (T, d)
    stds: list  # (T,)

    @property
    def steps(self):
        return len(self.stds)

    @property
    def shape(self):
        return (len(self.offset[0]),)

    def initial(self, noise):
        return 0.3 + 0.8 * noise

    def mean(self, params, x, t, condition):
        slope, offset = (torch.tensor(v[t - 1], dtype=torch.float64) for v in (self.slope, self.offset))
        return x @ (slope + params["turn"]).T + offset + params["gain"] * torch.tanh(x)

    def std(self, t):
        return self.stds[t - 1]


@dataclass(frozen=True)
class Reward:
    function: object
    differentiable: bool = field(default=True)

    def __call__(self, x0, condition):
        return self.function(x0)


def parameters(dimension, gain=0.0, turn=0.0):
    return {
        "turn": torch.full((dimension, dimension), turn, dtype=torch.float64),
        "gain": torch.tensor(gain, dtype=torch.float64),
    }


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


ONE = Chain([[[0.9]], [[0.8]], [[1.05]]], [[0.1], [0.0], [-0.2]], [0.3, 0.5, 0.4])
TWO = Chain(
    [[[0.9, 0.2], [-0.1, 0.8]], [[0.7, -0.3], [0.25, 0.9]], [[0.95, 0.1], [0.0, 0.85]]],
    [[0.1, -0.2], [0.0, 0.3], [0.2, 0.1]],
    [0.45, 0.6, 0.5],
)
STRENGTHS = (0.9, 1.4, 0.7)
TANH = Reward(lambda x: torch.tanh(1.2 * x[:, 0] - 0.4))
LINE = Grid(-7, 7, 141, window=(-2.0, 2.0))


# --- Gaussian sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.134, 0.18, 0.19, 0.3, 1.1])  # below and above where the Gaussian is split in two
def test_smoothing_a_wave_shrinks_it_by_its_characteristic_function(std):
    grid = Grid([-4, -3], [4, 3], [81, 73])
    k, padding = torch.tensor([1.3, -0.7], dtype=torch.float64), Smoothed.padding(grid, std)
    shape = [n + 2 * p for n, p in zip(grid.points, padding, strict=True)]
    smoothed = Smoothed.of(grid, std, 1000 + torch.sin(grid.nodes(padding) @ k).reshape(shape))
    z = torch.tensor([[0.0, 0.0], [0.234, -1.77], [3.99, 2.9], [-4.0, 1.0]], dtype=torch.float64)
    shrunk = math.exp(-0.5 * std**2 * float(k @ k))
    value, gradient = smoothed(z)
    torch.testing.assert_close(value, 1000 + shrunk * torch.sin(z @ k), rtol=0, atol=5e-13)
    torch.testing.assert_close(gradient, shrunk * torch.cos(z @ k)[:, None] * k, rtol=0, atol=2e-12)
    crest = shrunk * torch.sin(grid.nodes()[grid.inside(grid.nodes())] @ k).max().item()
    assert smoothed.bounds[0] == pytest.approx(-crest * float(k @ k), rel=1e-9)


def test_beyond_the_grid_the_tangent_continues():
    smoothed = Smoothed.of(Grid(-4, 4, 81), 0.2, torch.sin(Grid(-4, 4, 81).nodes(Smoothed.padding(LINE, 0.2))[:, 0]))
    value, gradient = smoothed(column(4.0, 4.5, 7.0))
    torch.testing.assert_close(value, value[0] + gradient[0] * torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64))
    assert (gradient == gradient[0]).all()


# --- one step, against adaptive quadrature -----------------------------------------------------------------------


def test_one_step_is_what_adaptive_quadrature_finds():
    chain, gain, b, eta = Chain([[[0.7]]], [[0.1]], [0.4]), 0.5, 0.6, 0.8

    def reward(x):
        return np.tanh(1.2 * x - 0.4)

    def expect(f, z):
        density = lambda w: f(w) * math.exp(-0.5 * w * w) / math.sqrt(2 * math.pi)  # noqa: E731
        return integrate.quad(density, -9, 9, epsabs=1e-13, epsrel=1e-13, limit=400)[0]

    def iterate(x, iterations):
        reference = mean = 0.7 * x + 0.1 + gain * math.tanh(x)
        for _ in range(iterations):
            slope = expect(lambda w, at=mean: 1.2 / np.cosh(1.2 * (at + 0.4 * w) - 0.4) ** 2, mean)
            mean = (1 - eta) * mean + eta * (reference + 0.16 / b * slope)
        return mean, expect(lambda w: reward(mean + 0.4 * w), mean) - b * (mean - reference) ** 2 / 0.32

    def negative(mean, x):
        reference = 0.7 * x + 0.1 + gain * math.tanh(x)
        return b * (mean - reference) ** 2 / 0.32 - expect(lambda w: reward(mean + 0.4 * w), mean)

    points = [-2.3, 0.17, 1.5]
    problem = PolicyIteration(chain, parameters(1, gain), TANH, b, LINE, damping=eta)
    for iterations in (0, 1, 3):
        found = problem.solve(iterations)
        means, values = zip(*(iterate(x, iterations) for x in points), strict=True)
        np.testing.assert_allclose(found.mean(1, column(*points))[:, 0], means, atol=1e-12)
        np.testing.assert_allclose(found.value(1, column(*points)), values, atol=1e-12)
    best = [-optimize.minimize_scalar(negative, (-1.0, 1.0), args=(x,), tol=1e-10).fun for x in points]
    np.testing.assert_allclose(problem.solve(60).value(1, column(*points)), best, atol=1e-11)


# --- affine means and quadratic rewards, against Riccati recursions ----------------------------------------------


def quadratic(chain, strengths, reward, iterations, eta):
    """(constant, linear, quadratic, slope, offset) of V_t and of M_t, t = 1..T, after the given iterations.

    V = constant + linear . x + x' quadratic x / 2 and M = slope x + offset; infinitely many iterations solve for M.
    """
    constant, linear, matrix = reward
    found = []
    for t in range(1, chain.steps + 1):
        A, a, var, b = (
            np.array(chain.slope[t - 1]),
            np.array(chain.offset[t - 1]),
            chain.stds[t - 1] ** 2,
            strengths[t - 1],
        )
        if math.isinf(iterations):
            inverse = np.linalg.inv(np.eye(len(a)) - var / b * matrix)
            K, k = inverse @ A, inverse @ (a + var / b * linear)
        else:
            K, k = A, a
            for _ in range(iterations):
                K = (1 - eta) * K + eta * (A + var / b * matrix @ K)
                k = (1 - eta) * k + eta * (a + var / b * (matrix @ k + linear))
        gap, shift, price = K - A, k - a, b / var
        constant = constant + linear @ k + k @ matrix @ k / 2 + var * np.trace(matrix) / 2 - price * shift @ shift / 2
        linear = K.T @ (linear + matrix @ k) - price * gap.T @ shift
        matrix = K.T @ matrix @ K - price * gap.T @ gap
        found.append((constant, linear, matrix, K, k))
    return found


REWARDS = {
    1: (0.3, np.array([0.5]), np.array([[-0.8]])),
    2: (0.3, np.array([0.5, -0.4]), np.array([[-0.9, 0.3], [0.3, -0.5]])),
}
CASES = {
    1: (ONE, Grid(-12, 12, 301, window=(-2.0, 2.0))),
    2: (TWO, Grid([-8] * 2, [8] * 2, [49] * 2, ([-1.5] * 2, [1.5] * 2))),
}


def torch_reward(constant, linear, matrix):
    low, high = torch.tensor(linear), torch.tensor(matrix)
    return Reward(lambda x: constant + x @ low + 0.5 * ((x @ high) * x).sum(1))


def points_of(dimension):
    return torch.cartesian_prod(*[torch.linspace(-1.4, 1.5, 6, dtype=torch.float64)] * dimension).reshape(-1, dimension)


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize(("iterations", "eta"), [(0, 1.0), (1, 1.0), (3, 0.7), (math.inf, 1.0)])
def test_affine_chains_follow_the_riccati_recursion(dimension, iterations, eta):
    (chain, grid), reward = CASES[dimension], REWARDS[dimension]
    exact = quadratic(chain, STRENGTHS, reward, iterations, eta)
    problem = PolicyIteration(chain, parameters(dimension), torch_reward(*reward), STRENGTHS, grid, damping=eta)
    found = problem.solve_to(1e-13) if math.isinf(iterations) else problem.solve(iterations)
    x = points_of(dimension)
    for t, (constant, linear, matrix, K, k) in enumerate(exact, 1):
        y = x.numpy()
        np.testing.assert_allclose(found.mean(t, x), y @ K.T + k, atol=1e-10)
        value = constant + y @ linear + np.einsum("ni,ij,nj->n", y, matrix, y) / 2
        np.testing.assert_allclose(found.value(t, x), value, atol=1e-10)
        np.testing.assert_allclose(found.gradient(t, x), linear + y @ matrix, atol=1e-10)
        before = reward[2] if t == 1 else exact[t - 2][2]
        scaled = chain.stds[t - 1] ** 2 / STRENGTHS[t - 1] * np.linalg.eigvalsh(before)
        np.testing.assert_allclose(found.curvature(t), scaled[[0, -1]], atol=1e-9)
        assert found.contraction(t) == pytest.approx(np.abs(scaled).max(), abs=1e-9)
    # and the expected value over the start, mean 0.3 and variance 0.64 in each direction
    constant, linear, matrix, *_ = exact[-1]
    start = np.full(dimension, 0.3)
    expected = constant + linear @ start + start @ matrix @ start / 2 + 0.32 * np.trace(matrix)
    assert found.objective() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dimension", [1, 2])
def test_affine_values_are_exact_up_to_the_ends_of_the_grid_and_beyond(dimension):
    reward = (0.3, np.array([0.5, -0.4])[:dimension], np.zeros((dimension, dimension)))
    chain, grid = CASES[dimension][0], Grid([-4] * dimension, [4] * dimension, [37] * dimension)
    found = PolicyIteration(chain, parameters(dimension), torch_reward(*reward), STRENGTHS, grid).solve(1)
    x = 3 * points_of(dimension)
    for t, (constant, linear, _, K, k) in enumerate(quadratic(chain, STRENGTHS, reward, 1, 1.0), 1):
        np.testing.assert_allclose(found.value(t, x), constant + x.numpy() @ linear, atol=1e-12)
        np.testing.assert_allclose(found.mean(t, x), x.numpy() @ K.T + k, atol=1e-12)


def test_strengths_in_the_papers_order_would_be_found_out():
    chain, grid = CASES[1]
    found = PolicyIteration(chain, parameters(1), torch_reward(*REWARDS[1]), STRENGTHS[::-1], grid).solve(5)
    constant, linear, *_ = quadratic(chain, STRENGTHS, REWARDS[1], 5, 1.0)[-1]
    assert abs(float(found.value(3, column(0.0))) - constant) > 1e-3


@pytest.mark.parametrize("dimension", [1, 2])
def test_a_policy_given_as_parameters_is_evaluated_exactly(dimension):
    """The chain's `turn` makes another linear policy, whose value is a plain recursion."""
    (chain, grid), reward = CASES[dimension], REWARDS[dimension]
    found = evaluate(
        chain, parameters(dimension, turn=-0.15), torch_reward(*reward), STRENGTHS, parameters(dimension), grid
    )
    constant, linear, matrix = reward
    x = points_of(dimension)
    best = PolicyIteration(chain, parameters(dimension), torch_reward(*reward), STRENGTHS, grid).solve(40)
    for t in range(1, 4):
        gap, k, var = np.full((dimension, dimension), -0.15), np.array(chain.offset[t - 1]), chain.stds[t - 1] ** 2
        K = np.array(chain.slope[t - 1]) + gap
        constant = constant + linear @ k + k @ matrix @ k / 2 + var * np.trace(matrix) / 2
        linear = K.T @ (linear + matrix @ k)
        matrix = K.T @ matrix @ K - STRENGTHS[t - 1] / var * gap.T @ gap
        y = x.numpy()
        value = constant + y @ linear + np.einsum("ni,ij,nj->n", y, matrix, y) / 2
        np.testing.assert_allclose(found.value(t, x), value, atol=1e-10)
        assert (best.value(t, x) - found.value(t, x) > 1e-4).all()


# --- nonlinear chains, against Gauss-Hermite sums ----------------------------------------------------------------

NODES, WEIGHTS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(100))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def hermite(chain, params, policy, strengths, t, x, iterations):
    """(V_t, M_t) at x (n, 1), asking for V_{t-1} at the nodes around every mean, and so on down to the reward."""
    if t == 0:
        return TANH(x, None), None
    std, b, reference = chain.std(t), strengths[t - 1], chain.mean(params, x, t, None)

    def around(mean):
        below = (mean + std * NODES).reshape(-1, 1)
        return hermite(chain, params, policy, strengths, t - 1, below, iterations)[0].reshape(len(x), -1)

    mean = reference if policy is None else chain.mean(policy, x, t, None)
    for _ in range(iterations):
        mean = reference + std**2 / b * (around(mean) @ (WEIGHTS * NODES) / std)[:, None]
    return around(mean) @ WEIGHTS - b * (mean - reference)[:, 0] ** 2 / (2 * std**2), mean


TWO_STEPS = Chain(ONE.slope[:2], ONE.offset[:2], ONE.stds[:2])


def test_iterates_agree_with_gauss_hermite():
    params, x = parameters(1, gain=0.3), column(-1.7, 0.2, 1.3)
    found = PolicyIteration(TWO_STEPS, params, TANH, STRENGTHS[:2], LINE).solve(3)
    for t in (1, 2):
        value, mean = hermite(TWO_STEPS, params, None, STRENGTHS, t, x, 3)
        torch.testing.assert_close(found.value(t, x), value, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.mean(t, x), mean, rtol=0, atol=1e-11)


def test_evaluation_agrees_with_gauss_hermite():
    reference, params, x = parameters(1, gain=0.3), parameters(1, gain=-0.2, turn=0.1), column(-1.7, 0.2, 1.3)
    found = evaluate(TWO_STEPS, params, TANH, STRENGTHS[:2], reference, LINE)
    value, mean = hermite(TWO_STEPS, reference, params, STRENGTHS, 2, x, 0)
    torch.testing.assert_close(found.value(2, x), value, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.mean(2, x), mean, rtol=0, atol=1e-15)


WAVE = Reward(lambda x: torch.sin(x[:, 0] - 0.6 * x[:, 1]) + torch.tanh(x[:, 1]))
PLANE = Grid([-7, -6.5], [7, 6.5], [47, 45], window=([-1.2, -1.0], [1.2, 1.0]))


def test_gradients_are_the_slopes_of_the_values_in_two_dimensions():
    found = PolicyIteration(TWO, parameters(2, gain=0.2), WAVE, 2.0, PLANE).solve(2)
    x, step = points_of(2)[::7] * 0.8, 1e-4
    for t in range(4):
        slopes = []
        for e in torch.eye(2, dtype=torch.float64) * step:
            slopes.append((found.value(t, x + e) - found.value(t, x - e)) / (2 * step))
        torch.testing.assert_close(found.gradient(t, x), torch.stack(slopes, 1), rtol=0, atol=1e-7)


def test_grids_agree_and_values_at_nodes_are_the_values_there():
    arguments = TWO, parameters(2, gain=0.2), WAVE, 2.0
    coarse, wide = (
        PolicyIteration(*arguments, grid).solve(6)
        for grid in (PLANE, Grid([-8.5, -8], [8.5, 8], [71, 67], window=PLANE.window))
    )
    x = points_of(2) * 0.7
    for t in (1, 3):
        torch.testing.assert_close(coarse.value(t, x), wide.value(t, x), rtol=0, atol=1e-9)
        torch.testing.assert_close(coarse.mean(t, x), wide.mean(t, x), rtol=0, atol=1e-9)
        torch.testing.assert_close(coarse.node_values[t], coarse.value(t, coarse.nodes), rtol=0, atol=1e-14)
        torch.testing.assert_close(coarse.node_means[t - 1], coarse.mean(t, coarse.nodes), rtol=0, atol=1e-14)


# --- how the iteration converges ---------------------------------------------------------------------------------

STILL = Chain([[[1.0]]], [[0.0]], [1.0])
BOWL = Reward(lambda x: -(x[:, 0] ** 2))  # std^2 grad h / strength = -2 at strength 1


def test_undamped_iteration_diverges_at_rho_2_and_says_so():
    problem = PolicyIteration(STILL, parameters(1), BOWL, 1.0, Grid(-60, 60, 241, window=(-1.0, 1.0)))
    with pytest.warns(NotContracting, match=r"step t = 1: .* = 2 in the window.*\n?.*damping <= 2 / \(2 \+ 2\) = 0.5"):
        found = problem.solve(5)
    np.testing.assert_allclose(np.divide(found.history[0][1:], found.history[0][:-1]), 2, rtol=1e-9)
    assert found.contraction(1) == pytest.approx(2)


@pytest.mark.parametrize("damping", ["adaptive", 0.5])
def test_damping_makes_it_converge_by_a_half(damping):
    found = PolicyIteration(STILL, parameters(1), BOWL, 1.0, Grid(-20, 20, 161), damping=damping).solve_to(1e-12)
    assert found.damping == pytest.approx((0.5,))
    moved = np.array(found.history[0][:20])
    np.testing.assert_allclose(moved[1:] / moved[:-1], 0.5, rtol=1e-3)
    x = column(-3.0, 0.5)
    torch.testing.assert_close(found.mean(1, x), x / 3, rtol=0, atol=1e-12)


def test_adaptive_damping_leaves_a_contracting_convex_problem_undamped():
    arguments = STILL, parameters(1), Reward(lambda x: 0.2 * x[:, 0] ** 2), 1.0, Grid(-20, 20, 161)
    assert PolicyIteration(*arguments, damping="adaptive").solve(1).damping[0] == pytest.approx(1.0)


def test_movements_shrink_by_the_contraction_and_values_rise():
    # the supremum is taken over nodes, and misses the true one by the square of the spacing
    arguments = ONE, parameters(1, gain=0.3), TANH, 0.35, LINE.finer().finer()
    solutions = [PolicyIteration(*arguments).solve(m) for m in (0, 1, 2, 4, 40)]
    best = solutions[-1]
    for t in range(1, 4):
        moved = np.array(best.history[t - 1])
        moved = moved[moved > 1e-11]
        assert len(moved) > 3
        assert (moved[1:] <= best.contraction(t) * moved[:-1] * (1 + 1e-4)).all()
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    values = torch.stack([s.value(3, x) for s in solutions])
    assert (values.diff(dim=0) > 0).all()


def test_iterations_are_those_of_their_step_and_progress_is_told():
    told = []
    found = PolicyIteration(ONE, parameters(1), TANH, 1.0, LINE).solve(
        (3, 0, 5), lambda t, moved: told.append((t, moved))
    )
    assert found.iterations == (3, 0, 5)
    assert told == list(enumerate(found.history, 1))
    torch.testing.assert_close(found.mean(2, LINE.nodes()), ONE.mean(parameters(1), LINE.nodes(), 2, None))


# --- the policy as a chain ---------------------------------------------------------------------------------------


def test_rollouts_of_the_policy_earn_its_objective():
    params, n = parameters(1, gain=0.3), 20000
    found = PolicyIteration(ONE, params, TANH, 0.5, LINE).solve(4)
    generator = torch.Generator().manual_seed(5)
    noise = Noise(
        torch.randn(n, 1, generator=generator, dtype=torch.float64),
        torch.randn(3, n, 1, generator=generator, dtype=torch.float64),
        torch.zeros(n, dtype=torch.long),
    )
    price = KLToReference(0.5, params)
    run = rollout(policy_chain(found), {}, noise, cost=lambda mean, x, t: price(ONE, mean, x, t, None))
    earned = TANH(run.latents[0], None) - run.costs.sum(0)
    assert abs(float(earned.mean()) - found.objective()) < 4 * float(earned.std()) / math.sqrt(n)
    reference = evaluate(ONE, params, TANH, 0.5, params, LINE).objective()
    assert found.objective() - reference > 20 * float(earned.std()) / math.sqrt(n)


# --- bad input ---------------------------------------------------------------------------------------------------


def problem(chain=ONE, reward=TANH, strength=1.0, grid=LINE, **others):
    return PolicyIteration(chain, parameters(chain.shape[0]), reward, strength, grid, **others)


FLAT = Chain(ONE.slope, ONE.offset, [0.3, 0.0, 0.4])
DEEP = Chain([np.eye(3).tolist()], [[0.0] * 3], [1.0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: problem(strength=(1.0, 2.0)), "strength has 2 entries: must have one for each of the chain's 3 steps"),
        (lambda: problem(strength=(1.0, 0.0, 2.0)), "strength of step t = 2 is 0: must be positive"),
        (lambda: problem(strength=math.nan), "strength of step t = 1 is nan: must be positive"),
        (lambda: problem(chain=FLAT), "std of step t = 2 is 0: must be positive"),
        (lambda: problem(chain=DEEP), r"chain has latents of shape \(3,\): must be \(1,\) or \(2,\)"),
        (lambda: problem(chain=TWO), "grid has 1 dimensions: must have the 2 of the chain"),
        (lambda: problem(grid=Grid(-7, 7, 50)), r"spacing 0.2857 on axis 0: must be <= 0.75 std = 0.225 of step t = 1"),
        (lambda: problem(grid=Grid(-1, 1, 41)), "grid spans 2 on axis 0: must span >= .* of step t = 1"),
        (lambda: problem(damping=0.0), r"damping = 0.0: must lie in \(0, 1\] or be 'adaptive'"),
        (lambda: problem(damping="none"), "damping = 'none': must lie"),
        (lambda: problem().solve((1, 2)), "iterations has 2 entries: must have one for each of the chain's 3 steps"),
        (lambda: problem().solve(-1), r"iterations = \[-1, -1, -1\]: must be >= 0"),
        (lambda: problem().solve_to(0.0), "tolerance = 0: must be > 0"),
        (lambda: problem(reward=Reward(lambda x: x[:, 0].log())).solve(1), "reward at x = .* is nan: must be finite"),
        (
            lambda: problem(strength=0.1, reward=Reward(lambda x: 0.6 * x[:, 0] ** 2)).solve(1),
            r"step t = 1 is 0.1: std\^2 lambda_max\(grad h\) / strength = 1.08 in the window, must be < 1",
        ),
        (lambda: problem().solve(1).value(4, column(0.0)), r"t = 4: must lie in 0\.\.3"),
        (lambda: problem().solve(1).mean(0, column(0.0)), r"t = 0: must lie in 1\.\.3"),
        (lambda: problem().solve(1).value(1, torch.zeros(3)), r"x has shape \(3,\): must be \(n, 1\)"),
        (lambda: Grid(1, 1, 5), "lower = 1: must be finite and less than upper = 1"),
        (lambda: Grid([0], [1, 2], [5]), "lower, upper, points have 1, 2, 1 entries"),
        (lambda: Grid([0] * 3, [1] * 3, [5] * 3), "lower has 3 entries: the grid must have 1 or 2 dimensions"),
        (lambda: Grid(0, 1, 2), "points = 2: must be >= 3"),
        (lambda: Grid(0, 1, 5, window=(0.5, 2.0)), "window = .*: must lie within the grid"),
        (lambda: Grid(0, 1, 5, window=(0.1, 0.2)), "window = .*: must hold a node"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_concavity_matters_in_the_window_only():
    """exp(-x^2 / 2) is concave in the middle and convex beyond 1."""
    bump, small = Reward(lambda x: torch.exp(-0.5 * x[:, 0] ** 2)), Chain([[[1.0]]], [[0.0]], [0.3])
    narrow, wide = (Grid(-4, 4, 161, window=(-w, w)) for w in (0.5, 2.0))
    found = problem(small, bump, 0.03, narrow, damping="adaptive").solve_to(1e-9, most=60)
    assert found.curvature(1)[1] < 0
    with pytest.raises(ValueError, match="the one-step problem is not concave"):
        problem(small, bump, 0.03, wide, damping="adaptive").solve(3)


def test_tolerance_out_of_reach_is_told():
    with pytest.raises(RuntimeError, match="step t = 1: means still move by .* after 3 iterations"):
        problem().solve_to(1e-12, most=3)


def test_kinks_are_told_and_smooth_rewards_are_not():
    kink = Reward(lambda x: -x[:, 0].abs())
    with pytest.warns(Unresolved, match=r"V_0 \(the reward\) ripples by 0.0\d+ from node to node"):
        rough = problem(reward=kink, strength=4.0).solve(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smooth = problem(strength=4.0).solve(1)
    assert rough.ripple(0) > 1e4 * smooth.ripple(0)
    assert rough.ripple(1) < 1e-5
    assert LINE.finer().spacing[0] == LINE.spacing[0] / 2


def test_the_average_over_the_start_is_refined_until_it_stands():
    """A steep reward and little noise make V_T rough in the initial noise: 73 nodes are not enough."""
    steep, bare = Reward(lambda x: torch.tanh(5 * x[:, 0])), parameters(1)
    sharp = Chain([[[1.0]]], [[0.0]], [0.1])
    found = evaluate(sharp, bare, steep, 0.5, bare, Grid(-8, 8, 401))
    noise = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)[:, None]
    weight = torch.exp(-0.5 * noise[:, 0] ** 2)
    expected = float((weight * found.value(1, sharp.initial(noise))).sum() / weight.sum())
    assert abs(found.objective() - expected) < 1e-9
    assert abs(found._objective(72) - expected) > 1e-7
    with pytest.raises(RuntimeError, match="the average over the initial noise still moves by"):
        found.objective(tolerance=-1.0)
