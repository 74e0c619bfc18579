"""Reference numbers marked "independent derivation" were computed before, and apart from, this code."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy.integrate import dblquad, quad

from theory import chains, ddpm, shortcut
from theory.chains import LinearGaussianChain, QuadraticReward
from theory.credit_polynomial import rollout
from theory.gaussian import Gaussian, affine, condition, w2_squared
from theory.instances import additive_instance
from theory.polynomials import expectation, moments
from theory.schedules import NoiseSchedule, ddim_grid

SQUARE = QuadraticReward(0.0, [0.0], [[2.0]])
DATA = (0.5, 0.09)  # mean and variance


def exact(value) -> Any:
    return np.frompyfunc(Fraction, 1, 1)(np.array(value, dtype=object))


def rational_chain(steps: int) -> tuple[LinearGaussianChain, QuadraticReward]:
    F = Fraction
    slopes = exact([[["3/4"]], [["-2/3"]], [["5/4"]]][:steps])
    inputs = exact([[["1", "-1/2"]], [["1/3", "2"]], [["-1", "3/2"]]][:steps])
    chain = LinearGaussianChain(
        slopes,
        inputs,
        exact([["1/5"], ["0"], ["-1/4"]][:steps]),
        exact(["1/2", "3/4", "2/3"][:steps]),
        exact(["1/2", "-1/3"]),
        exact(["2/7"]),
        exact([["9/4"]]),
    )
    return chain, QuadraticReward(exact(F(-1, 2)), exact(["1/3"]), exact([["2"]]))


def rational_copy(chain: LinearGaussianChain, critic: QuadraticReward):
    arrays = (chain.A, chain.B, chain.c, chain.std, chain.theta, chain.mean_T, chain.cov_T)
    parts = (critic.constant[()], critic.linear, critic.quadratic)
    return LinearGaussianChain(*(exact(row) for row in arrays)), QuadraticReward(*(exact(part) for part in parts))


def as_polynomials(chain: LinearGaussianChain, critic: QuadraticReward):
    """f, the scores s_t (T, p) and the states x_{t+1} (T, d) as polynomials in the noises, by the engine of credit."""
    T, d = chain.steps, chain.dim
    options = {"mu": 0, "noise": "gaussian", "shared_noise": False, "penalty": None, "limit": 10**6}
    roll = rollout(chain, critic, noisy=[False] * T, **options)
    symbols = roll.variables.all()
    # The covariance is 9/4 on the line and the identity in the plane.
    root = exact([["3/2"]]) if d == 1 else exact(np.eye(d))
    state = [sum((root[i, j] * symbols[j] for j in range(d)), chain.mean_T[i] + 0 * symbols[0]) for i in range(d)]
    scores: list[Any] = [None] * T
    inputs: list[Any] = [None] * T
    for t in reversed(range(T)):
        inputs[t] = state
        eps = symbols[d * (t + 1) : d * (t + 2)]
        offset = chain.B[t] @ chain.theta + chain.c[t]
        scores[t] = [
            sum(chain.B[t][i, k] * eps[i] for i in range(d)) * (1 / chain.std[t]) for k in range(chain.parameters)
        ]
        state = [
            sum((chain.A[t][i, j] * state[j] for j in range(d)), chain.std[t] * eps[i] + offset[i]) for i in range(d)
        ]
    return roll.reward, scores, inputs


def at(f: QuadraticReward, x):
    half = Fraction(1, 2) if f.linear.dtype == object else 0.5
    value = f.constant[()] + 0 * x[0]
    for i, a in enumerate(x):
        value = value + f.linear[i] * a
        for j, b in enumerate(x):
            value = value + half * f.quadratic[i, j] * a * b
    return value


def brute_variance(chain, critic, baselines):
    f, scores, inputs = as_polynomials(chain, critic)
    total = []
    for k in range(chain.parameters):
        terms = [(f - (at(b, x) if b else 0)) * s[k] for b, s, x in zip(baselines, scores, inputs, strict=True)]
        total.append(sum(terms[1:], terms[0]))
    return sum(row[k] for k, row in enumerate(moments(total)[1]))


def naive_baselines(chain, critic):
    """E[f |s_t|^2 | x] / E|s_t|^2: what one gets by treating every step alone."""
    gains = [np.eye(chain.dim)]
    for matrix in chain.A[:-1]:
        gains.append(gains[-1] @ matrix)
    found = []
    for t, v in enumerate(shortcut.value_functions(chain, critic)):
        into = gains[t] @ chain.B[t]
        bend = np.trace(into.T @ critic.quadratic @ into) / shortcut.score_moments(chain)[t]
        found.append(QuadraticReward(v.constant + bend, v.linear, v.quadratic))
    return found


PROBLEMS = {"T=1": rational_chain(1), "T=2": rational_chain(2), "T=3": rational_chain(3), "LG1": additive_instance()}
PROBLEMS["LG1 exact"] = rational_copy(*additive_instance())
problems = pytest.mark.parametrize("name", list(PROBLEMS))


# The policy-gradient form


@problems
def test_the_sum_of_scores_is_the_gradient_of_every_step(name):
    chain, critic = PROBLEMS[name]
    found = shortcut.score_gradient(chain, critic)
    adjoint = chains.step_gradients(chain, critic)
    f, scores, _ = as_polynomials(chain, critic)
    brute = [[expectation(f * s) for s in row] for row in scores]
    if chain.exact:
        assert (found == adjoint).all()
        assert (found == np.array(brute)).all()
    np.testing.assert_allclose(found.astype(float), adjoint.astype(float), rtol=1e-12)
    np.testing.assert_allclose(found.astype(float), np.array(brute, dtype=float), rtol=1e-12)


def test_the_log_of_a_sum_is_not_the_gradient():
    chain = shortcut.two_step_example()
    # Direct sum over a grid of (eps_0, eps_1) of f's conditional mean times grad log(p_0 + p_1); x_2 by hand.
    e = np.linspace(-12, 12, 1201)
    e0, e1 = np.meshgrid(e, e, indexing="ij")
    weight = np.exp(-0.5 * (e0**2 + e1**2))
    weight /= weight.sum()
    critic = (0.8 + 0.8 * e1 + 0.5 * e0) ** 2 + 1.0
    p0, p1 = np.exp(-0.5 * e0**2) / 0.5, np.exp(-0.5 * e1**2) / 0.8
    direct = float(np.sum(weight * critic * (p0 * e0 / 0.5 + p1 * e1 / 0.8) / (p0 + p1)))
    summed = float(np.sum(weight * critic * (e0 / 0.5 + e1 / 0.8)))
    printed = shortcut.log_sum_gradient(chain, SQUARE)[0]
    assert printed == pytest.approx(direct, abs=1e-12)
    assert printed == pytest.approx(1.05375399718, abs=5e-12)  # independent derivation
    assert summed == pytest.approx(3.2, abs=1e-12)
    assert shortcut.score_gradient(chain, SQUARE).sum() == pytest.approx(3.2, abs=1e-14)


def test_the_factors_in_two_dimensions_are_integrals_over_the_unit_square():
    # In d = 2 exp(-|eps|^2/2) is uniform on (0, 1), so that w and |eps|^2 are functions of two uniforms.
    ratio = (0.8 / 0.5) ** 2
    integral, _ = dblquad(lambda u, v: ratio * u / (ratio * u + v) * -math.log(u), 0, 1, 0, 1, epsabs=1e-11)
    factors = shortcut.log_sum_factors([0.5, 0.8], 2)
    assert factors[0] == pytest.approx(integral, abs=1e-9)
    assert 0 < factors[1] < factors[0] - 0.1 < 0.9


@pytest.mark.parametrize("dim", [1, 2, 5, 40])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_equal_noise_gives_equal_factors_below_one_over_the_steps(steps, dim):
    factors = shortcut.log_sum_factors([0.3] * steps, dim)
    np.testing.assert_allclose(factors, factors[0], rtol=1e-12)
    # w_t and |eps_t|^2 are negatively correlated, and E w_t = 1/T.
    assert 0 < factors[0] < 1 / steps
    np.testing.assert_allclose(shortcut.log_sum_factors([3.0] * steps, dim), factors, rtol=1e-12)


@pytest.mark.parametrize(("dim", "std"), [(3, [0.4, 0.7, 0.5]), (60, [0.5, 0.52, 0.49])])
def test_three_steps_with_different_noise_against_sampling(dim, std):
    widths = np.array(std)
    square = np.random.default_rng(7).chisquare(dim, (400_000, 3))
    density = np.exp(0.5 * (dim - square)) * (0.5 / widths) ** dim
    rows = density / density.sum(axis=1, keepdims=True) * square / dim
    error = rows.std(axis=0) / math.sqrt(len(rows))
    found = shortcut.log_sum_factors(widths, dim)
    assert (error < 0.003).all()
    assert (np.abs(rows.mean(axis=0) - found) < 5 * error).all()


def test_the_narrowest_step_takes_all_in_many_dimensions():
    np.testing.assert_allclose(shortcut.log_sum_factors([0.5, 5.0], 400), [1.0, 0.0], atol=1e-12)


def test_a_single_step_has_no_sum_to_take_the_log_of():
    assert shortcut.log_sum_factors([0.7], 3).tolist() == [1.0]


def test_the_second_term_of_eq_17_vanishes_only_with_the_target():
    theta, target = np.array([1.0, 0.5, -0.2]), np.array([-0.3, 0.2, 0.4])
    terms = shortcut.envelope_terms(theta, target)

    def critic(point):
        return (point - target) / np.linalg.norm(point - target)

    steps = 1e-6 * np.eye(3)
    phi = [(np.linalg.norm(theta + h - target) - np.linalg.norm(theta - h - target)) / 2e-6 for h in steps]
    moved_p = [(critic(theta + h) - critic(theta - h)) @ theta / 2e-6 for h in steps]
    moved_g = [(critic(theta + h) - critic(theta - h)) @ (theta - target) / 2e-6 for h in steps]
    np.testing.assert_allclose(terms.gradient, phi, atol=1e-8)
    np.testing.assert_allclose(terms.printed, moved_p, atol=1e-8)
    np.testing.assert_allclose(terms.with_target, moved_g, atol=1e-8)
    np.testing.assert_allclose(terms.with_target, 0, atol=1e-15)
    assert np.linalg.norm(terms.frozen_critic + terms.printed - terms.gradient) > 0.1
    plane = shortcut.envelope_terms([1.0, 0.5], [-0.3, 0.2])  # independent derivation
    np.testing.assert_allclose(plane.frozen_critic, [0.9743911957, 0.2248595067], atol=5e-11)
    np.testing.assert_allclose(plane.printed, [-0.0442139479, 0.1915937744], atol=5e-11)


# Baselines


@problems
def test_variances_against_polynomials(name):
    chain, critic = PROBLEMS[name]
    rules = {
        "none": None,
        "value": shortcut.value_functions(chain, critic),
        "optimal": shortcut.optimal_baselines(chain, critic),
        "constants": shortcut.constant_baselines(chain, shortcut.optimal_constants(chain, critic)),
    }
    found = {}
    for rule, baselines in rules.items():
        found[rule] = shortcut.estimator_variance(chain, critic, baselines)
        brute = brute_variance(chain, critic, [None] * chain.steps if baselines is None else baselines)
        assert found[rule] == brute if chain.exact else found[rule] == pytest.approx(brute, rel=1e-11)
    assert found["optimal"] < min(found["none"], found["value"], found["constants"])
    assert found["constants"] < found["none"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stationarity_against_every_monomial(steps):
    """Moving b_t along x^k changes the variance by -2 E[x^k <(sum of the estimator), s_t>], which must vanish."""
    chain, critic = rational_chain(steps)
    f, scores, inputs = as_polynomials(chain, critic)
    p = chain.parameters

    def slopes(baselines):
        rows = list(zip(baselines, scores, inputs, strict=True))
        parts = [[(f - at(b, x)) * s[k] for b, s, x in rows] for k in range(p)]
        whole = [sum(part[1:], part[0]) for part in parts]
        for (s, x), power in itertools.product(zip(scores, inputs, strict=True), range(4)):
            direction = 1 + 0 * x[0]
            for _ in range(power):
                direction = direction * x[0]
            yield sum(expectation(direction * s[k] * whole[k]) for k in range(p))

    assert all(slope == 0 for slope in slopes(shortcut.optimal_baselines(chain, critic)))
    assert any(slope != 0 for slope in slopes(shortcut.value_functions(chain, critic)))
    if steps > 1:
        assert any(slope != 0 for slope in slopes(naive_baselines(chain, critic)))


def test_a_per_step_optimum_is_not_optimal():
    chain, critic = additive_instance()
    best = shortcut.estimator_variance(chain, critic, shortcut.optimal_baselines(chain, critic))
    assert shortcut.estimator_variance(chain, critic, naive_baselines(chain, critic)) > 1.001 * best


def test_moving_the_optimum_costs_its_square():
    chain, critic = additive_instance()
    best = shortcut.optimal_baselines(chain, critic)
    moved = [QuadraticReward(b.constant + 0.3, b.linear, b.quadratic) for b in best]
    extra = shortcut.estimator_variance(chain, critic, moved) - shortcut.estimator_variance(chain, critic, best)
    assert extra == pytest.approx(0.09 * sum(shortcut.score_moments(chain)), rel=1e-10)


@pytest.mark.parametrize(("constant", "none", "value", "optimal"), [(0.0, 15.0, 10.0, 6.0), (-2.0, 7.0, 10.0, 6.0)])
def test_the_value_function_can_be_worse_than_nothing(constant, none, value, optimal):
    chain, critic = shortcut.one_step_example(1), QuadraticReward(constant, [0.0], [[2.0]])
    rules = [None, shortcut.value_functions(chain, critic), shortcut.optimal_baselines(chain, critic)]
    assert [float(shortcut.estimator_variance(chain, critic, b)) for b in rules] == [none, value, optimal]


@pytest.mark.parametrize("d", [1, 2, 7])
def test_the_loss_of_the_value_function_in_d_dimensions(d):
    chain, critic = shortcut.one_step_example(d), QuadraticReward(0.0, np.zeros(d), 2 * np.eye(d))
    value = shortcut.estimator_variance(chain, critic, shortcut.value_functions(chain, critic))
    best = shortcut.estimator_variance(chain, critic, shortcut.optimal_baselines(chain, critic))
    assert (float(value), float(best)) == pytest.approx((2 * d * d + 8 * d, 2 * d * d + 4 * d), rel=1e-13)
    assert value / best == pytest.approx((d + 4) / (d + 2), rel=1e-13)


def test_the_table_with_a_random_input():
    """x_0 = 3/4 x_1 + theta + eps/2 at theta = 1/2 with x_1 standard normal; independent derivation."""
    chain = LinearGaussianChain(
        exact([[["3/4"]]]),
        exact([[["1"]]]),
        exact([["0"]]),
        exact(["1/2"]),
        exact(["1/2"]),
        exact(["0"]),
        exact([["1"]]),
    )
    critic = QuadraticReward(exact(0), exact(["0"]), exact([["2"]]))
    rules = [
        None,
        shortcut.constant_baselines(chain, [chains.objective(chain, critic)]),
        shortcut.constant_baselines(chain, shortcut.optimal_constants(chain, critic)),
        shortcut.value_functions(chain, critic),
        shortcut.optimal_baselines(chain, critic),
    ]
    found = [shortcut.estimator_variance(chain, critic, baselines) for baselines in rules]
    assert found == [Fraction(*row) for row in ((1587, 64), (513, 32), (481, 32), (45, 4), (41, 4))]


@pytest.mark.parametrize("width", [1.0, 0.5, 0.1, 0.01])
def test_narrow_critics_by_quadrature(width):
    def moment(power, times):
        def density(e):
            return e**power * math.exp(-0.5 * e * e * (1 + times / width**2)) / math.sqrt(2 * math.pi)

        return 2 * quad(density, 0, 30 * width / math.sqrt(times), epsabs=1e-15, epsrel=1e-12)[0]

    value, weighted, square = moment(0, 1), moment(2, 1), moment(2, 2)
    expected = [square - 2 * b * weighted + b * b for b in (0.0, value, weighted)]
    np.testing.assert_allclose(shortcut.bump_variances(width), expected, rtol=1e-9)


def test_narrow_critics_lose_without_bound():
    ratios = [shortcut.bump_variances(w).value / shortcut.bump_variances(w).optimal for w in (1.0, 0.5, 0.1, 0.01)]
    np.testing.assert_allclose(ratios, [2.8532, 5.4082, 28.735, 283.78], rtol=2e-5)  # independent derivation
    assert shortcut.bump_variances(1.0).value == pytest.approx(shortcut.bump_variances(1.0).none, rel=1e-14)


def test_narrow_critics_in_two_dimensions():
    # E f^k |eps|^2m with |eps|^2/2 exponential: integrals over one half-line.
    r = 0.3**-2
    value, weighted, square = (
        quad(lambda y, k=k, m=m: (2 * y) ** m * math.exp(-y * (1 + k * r)), 0, math.inf, epsabs=1e-14)[0]
        for k, m in ((1, 0), (1, 1), (2, 1))
    )
    expected = [square, square - 2 * value * weighted + 2 * value**2, square - weighted**2 / 2]
    np.testing.assert_allclose(shortcut.bump_variances(0.3, 2), expected, rtol=1e-9)


# The regulariser


def brute_supremum(correlations, shift, strength, ratio, degree=24):
    """Maximise over polynomials: E Var(f | y) by conditional means computed node by node, no eigenfunctions used."""
    z, w = np.polynomial.hermite_e.hermegauss(80)
    w = w / w.sum()
    scale = np.array([math.sqrt(math.factorial(k)) for k in range(1, degree + 1)])

    def basis(x):
        return np.polynomial.hermite_e.hermevander(x, degree)[..., 1:] / scale

    own = basis(z)
    penalty = np.zeros((degree, degree))
    for rho in correlations:
        given = np.einsum("j,ijk->ik", w, basis(rho * z[:, None] + math.sqrt(1 - rho**2) * z))
        penalty += own.T @ (w[:, None] * own) - given.T @ (w[:, None] * given)
    gap = w @ own - w @ basis(shift + math.sqrt(ratio) * z)
    return float(gap @ np.linalg.solve(penalty, gap)) / (4 * strength)


@pytest.mark.parametrize("ratio", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("correlations", [[0.0], [0.6], [0.9, -0.5, 0.1]])
def test_the_sampled_regulariser_against_a_maximisation(correlations, ratio):
    found = shortcut.sampled_regulariser_supremum(correlations, 0.5, 0.1, ratio)
    assert found == pytest.approx(brute_supremum(correlations, 0.5, 0.1, ratio), rel=1e-8)


def test_independent_inputs_give_chi_squared():
    limit = shortcut.sampled_regulariser_supremum([0.0], 0.5, 0.1)
    assert limit == pytest.approx(0.7100635417, abs=5e-11)  # independent derivation
    assert limit == pytest.approx(math.expm1(0.25) / 0.4, rel=1e-14)
    ten = shortcut.sampled_regulariser_supremum([0.0] * 10, 0.5, 0.1)
    assert ten == pytest.approx(limit / 10, rel=1e-14)
    # The assumption matters: at the inputs of a real chain the supremum is far larger, and bounded by chi-squared.
    rho = np.array([0.99, 0.95, 0.9])
    dependent = shortcut.sampled_regulariser_supremum(rho, 0.5, 0.1)
    chi = shortcut.chi_squared(0.5)
    assert 5 * chi / (4 * 0.1 * 3) < dependent <= chi / (4 * 0.1 * np.sum(1 - rho**2))


@pytest.mark.parametrize(("shift", "ratio"), [(0.5, 1.0), (-1.2, 0.3), (2.0, 1.6), (0.0, 1.9)])
def test_chi_squared_by_quadrature(shift, ratio):
    def integrand(x):
        return math.exp(-((x - shift) ** 2) / ratio + 0.5 * x * x) / (ratio * math.sqrt(2 * math.pi))

    centre = shift / (1 - ratio / 2)  # where q^2/p has its peak
    width = 14 / math.sqrt(2 / ratio - 1)
    expected = quad(integrand, centre - width, centre + width, epsabs=0, epsrel=1e-11, limit=400)[0] - 1
    assert shortcut.chi_squared(shift, ratio) == pytest.approx(expected, rel=1e-9)
    series = shortcut.sampled_regulariser_supremum([0.0], shift, 0.25, ratio)
    assert series == pytest.approx(expected, rel=1e-9)


def test_heavy_targets_have_no_finite_supremum():
    assert shortcut.chi_squared(0.1, 2.0) == math.inf
    assert shortcut.sampled_regulariser_supremum([0.5], 0.1, 0.1, 2.5) == math.inf


def test_the_printed_regulariser_regularises_nothing():
    rho = shortcut.input_correlations(shortcut.two_step_example())
    np.testing.assert_allclose(rho**2, [1.64 / 1.89, 1.0 / 1.89], rtol=1e-14)
    slopes = 10.0 ** np.arange(1, 9)
    printed = [shortcut.linear_critic_objective(rho, 0.5, 0.1, a, sampled=False) for a in slopes]
    sampled = [shortcut.linear_critic_objective(rho, 0.5, 0.1, a, sampled=True) for a in np.linspace(0, 40, 4001)]
    np.testing.assert_allclose(printed, 0.5 * slopes)
    assert max(sampled) == pytest.approx(0.25 / (0.4 * np.sum(1 - rho**2)), rel=1e-5)
    assert max(sampled) < shortcut.sampled_regulariser_supremum(rho, 0.5, 0.1)


# The Wasserstein bound


def brute_w2(mean, variance, schedule, noise):
    """W2(p_t, q_t) by pushing laws through the steps; the exact reverse law by conditioning, no formula of ddpm."""
    data = [Gaussian.scalar(mean, variance)]
    joints = []
    for beta in schedule.beta:
        pair = affine(data[-1], [[1.0], [math.sqrt(1 - beta)]], [0.0, 0.0], np.diag([0.0, beta]))
        joints.append(pair)
        data.append(Gaussian(pair.mean[1:], pair.cov[1:, 1:]))
    law = Gaussian.scalar(0.0, 1.0)
    distances = [math.sqrt(w2_squared(law, data[-1]))]
    for t in reversed(range(schedule.steps)):
        at_zero, at_one = condition(joints[t], [1], [0.0]), condition(joints[t], [1], [1.0])
        chosen = at_zero.cov if noise is None else [[noise[t]]]
        law = affine(law, [[at_one.mean[0] - at_zero.mean[0]]], at_zero.mean, chosen)
        distances.insert(0, math.sqrt(w2_squared(law, data[t])))
    return np.array(distances)


SCHEDULES = {
    "short": NoiseSchedule([0.1, 0.3, 0.05, 0.6]),
    "released": shortcut.released_schedule(10),
    "rough": NoiseSchedule([0.5, 0.01, 0.9]),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(("mean", "variance"), [DATA, (0.0, 4.0), (-2.0, 1.0), (1.0, 0.0)])
def test_distances_along_the_reverse_chain(name, mean, variance):
    schedule = SCHEDULES[name]
    noises: dict[ddpm.Variance, Any] = {
        "optimal": None,
        "beta": schedule.beta,
        "posterior": schedule.posterior_variance,
    }
    for choice, noise in noises.items():
        found = shortcut.reverse_w2(mean, variance, schedule, choice)
        np.testing.assert_allclose(found, brute_w2(mean, variance, schedule, noise), rtol=1e-9, atol=1e-13)
        if noise is not None:
            np.testing.assert_array_equal(shortcut.reverse_w2(mean, variance, schedule, noise), found)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(("mean", "variance"), [DATA, (0.0, 4.0), (-2.0, 1.0), (1.0, 0.0)])
def test_every_exact_kernel_contracts(name, mean, variance):
    schedule = SCHEDULES[name]
    slopes = ddpm.ancestral_steps([variance], schedule)[0][:, 0]
    distances = shortcut.reverse_w2(mean, variance, schedule)
    assert shortcut.contraction(variance, schedule) == pytest.approx(np.prod(slopes), rel=1e-13)
    assert (distances[:-1] <= slopes * distances[1:] * (1 + 1e-13)).all()
    bound = shortcut.contraction(variance, schedule) * distances[-1]
    if variance == 1.0:  # only the means differ: sharp
        assert distances[0] == pytest.approx(bound, rel=1e-13)
    elif variance > 0:
        assert distances[0] < bound * (1 - 1e-6)


@pytest.mark.parametrize(
    ("T", "level", "gain", "distance", "bound"),  # independent derivation
    [
        (10, 0.9509783649, 0.6520058768, 0.4929007980, 0.5210218167),
        (100, 0.6049539768, 0.1557334216, 0.0642611681, 0.0793854476),
        (1000, 0.0065650679, 0.0073360869, 0.000297204095, 0.0002980128112),
    ],
)
def test_the_released_schedule(T, level, gain, distance, bound):
    schedule = shortcut.released_schedule(T)
    assert schedule.alpha_bar[-1] == pytest.approx(level, abs=1e-10)
    assert shortcut.contraction(DATA[1], schedule) == pytest.approx(gain, abs=1e-10)
    distances = shortcut.reverse_w2(*DATA, schedule)
    assert distances[0] == pytest.approx(distance, abs=1e-10)
    assert shortcut.contraction(DATA[1], schedule) * distances[-1] == pytest.approx(bound, abs=1e-10)


@pytest.mark.parametrize(("choice", "distance"), [("beta", 0.000671413), ("posterior", 0.001251268677)])
def test_the_usual_noises_break_the_bound_without_its_first_term(choice, distance):
    schedule = shortcut.released_schedule(1000)
    distances = shortcut.reverse_w2(*DATA, schedule, choice)
    bare = shortcut.contraction(DATA[1], schedule) * distances[-1]
    slopes = ddpm.ancestral_steps([DATA[1]], schedule)[0][:, 0]
    mended = shortcut.noise_error_bound(slopes, shortcut.noise_deviations(DATA[1], schedule, choice), distances[-1])
    assert distances[0] == pytest.approx(distance, rel=1e-6)  # independent derivation
    assert bare < 0.0003 < distances[0] < mended


@pytest.mark.parametrize("seed", range(20))
def test_bounds_with_wrong_means_and_wrong_noise(seed):
    generator = np.random.default_rng(seed)
    T = int(generator.integers(1, 7))
    schedule = NoiseSchedule(generator.uniform(0.01, 0.7, T))
    mean, variance = generator.uniform(-2, 2), generator.uniform(0.05, 4)
    true_slopes, true_noise = (row[:, 0] for row in ddpm.ancestral_steps([variance], schedule, "optimal"))
    levels = np.concatenate([[1.0], schedule.alpha_bar])
    q_means, q_vars = np.sqrt(levels) * mean, levels * variance + 1 - levels
    slopes, shifts = true_slopes * generator.uniform(0.6, 1.4, T), generator.uniform(-0.3, 0.3, T)
    m, v = 0.0, 1.0
    for t in reversed(range(T)):  # sampler: x -> q_mean + slope (x - q_mean) + shift, exact noise
        m, v = q_means[t] + slopes[t] * (m - q_means[t + 1]) + shifts[t], slopes[t] ** 2 * v + true_noise[t]
    start = shortcut.reverse_w2(mean, variance, schedule)[-1]
    errors = np.sqrt(shifts**2 + (slopes - true_slopes) ** 2 * q_vars[1:])
    distance = math.hypot(m - mean, math.sqrt(v) - math.sqrt(variance))
    assert distance <= shortcut.mean_error_bound(slopes, errors, start) * (1 + 1e-12)
    for choice in ("beta", "posterior"):
        deviations = shortcut.noise_deviations(variance, schedule, choice)
        found = shortcut.reverse_w2(mean, variance, schedule, choice)[0]
        assert found <= shortcut.noise_error_bound(true_slopes, deviations, start) * (1 + 1e-12)


def test_the_mean_error_bound_is_sharp_and_needs_its_slopes():
    schedule, shifts = NoiseSchedule([0.2, 0.4, 0.3]), np.array([0.1, 0.3, 0.2])
    slopes = ddpm.ancestral_steps([1.0], schedule)[0][:, 0]
    gap = -math.sqrt(schedule.alpha_bar[-1]) * -2.0  # the sampler's mean minus the data's, data N(-2, 1)
    for t in reversed(range(3)):
        gap = slopes[t] * gap + shifts[t]
    start = shortcut.reverse_w2(-2.0, 1.0, schedule)[-1]
    assert shortcut.mean_error_bound(slopes, shifts, start) == pytest.approx(gap, rel=1e-14)
    assert shortcut.mean_error_bound(slopes, 0 * shifts, start) < gap
    assert shortcut.mean_error_bound(slopes[::-1], shifts, start) != pytest.approx(gap, rel=1e-3)


def test_the_noise_error_bound_unfolds_step_by_step():
    slopes, deviations, distance = [0.5, 0.8, 1.3], [0.1, 0.4, 0.2], 0.7
    for slope, deviation in zip(slopes[::-1], deviations[::-1], strict=True):
        distance = math.hypot(slope * distance, deviation)
    assert shortcut.noise_error_bound(slopes, deviations, 0.7) == pytest.approx(distance, rel=1e-14)


# The optimal reverse variance


def test_the_optimal_variance_is_the_mean_conditional_variance():
    schedule, spread = SCHEDULES["short"], np.array([0.09, 4.0, 1.0])
    found = shortcut.analytic_variance(spread, schedule)
    exact_variance = np.zeros((4, 3))
    for i, v in enumerate(spread):
        law = Gaussian.scalar(0.0, v)
        for t, beta in enumerate(schedule.beta):
            pair = affine(law, [[1.0], [math.sqrt(1 - beta)]], [0.0, 0.0], np.diag([0.0, beta]))
            exact_variance[t, i] = condition(pair, [1], [0.0]).cov[0, 0]
            law = Gaussian(pair.mean[1:], pair.cov[1:, 1:])
    np.testing.assert_allclose(found, exact_variance.mean(axis=1), rtol=1e-12)

    def cost(c):  # KL of the exact step to one with variance c, summed over the eigenvectors
        ratio = exact_variance / c[:, None]
        return np.sum(ratio - 1 - np.log(ratio), axis=1)

    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (cost(found) < cost(factor * found)).all()


@pytest.mark.parametrize("T", [10, 100])
def test_beta_tilde_and_beta_bracket_the_optimum_for_small_data(T):
    schedule = shortcut.released_schedule(T)
    small, large = shortcut.analytic_variance([0.09], schedule), shortcut.analytic_variance([4.0], schedule)
    assert (schedule.posterior_variance < small).all()
    assert (small < schedule.beta).all()
    assert (large > schedule.beta).all()
    np.testing.assert_allclose(shortcut.analytic_variance([1.0], schedule), schedule.beta, rtol=1e-10)


@pytest.mark.parametrize(
    ("T", "expected"),
    [(10, (0.494128250, 0.486137183, 0.492900798)), (100, (0.065272485, 0.062403699, 0.064261168))],
)
def test_the_optimal_noise_does_not_mend_a_short_schedule(T, expected):
    """With the released schedule p_T is not q_T, and the least W2 of the three belongs to beta-tilde."""
    schedule = shortcut.released_schedule(T)
    errors = shortcut.sampler_w2(Gaussian.scalar(*DATA), schedule)
    assert list(errors) == ["beta", "posterior", "optimal"]
    for (name, error), value in zip(errors.items(), expected, strict=True):
        assert error == pytest.approx(value, abs=1e-9)
        assert error == pytest.approx(shortcut.reverse_w2(*DATA, schedule, name)[0], rel=1e-9)
    assert errors["posterior"] < errors["optimal"] < errors["beta"]


@pytest.mark.parametrize("S", [10, 100])
def test_the_optimal_noise_makes_sub_sampling_free_for_gaussian_data(S):
    full = shortcut.released_schedule(1000)
    short = NoiseSchedule.from_alpha_bar(full.alpha_bar[ddim_grid(1000, S)])
    errors = shortcut.sampler_w2(Gaussian.scalar(*DATA), short)
    assert errors["optimal"] == pytest.approx(shortcut.reverse_w2(*DATA, full)[0], rel=1e-8)
    assert min(errors["beta"], errors["posterior"]) > 20 * errors["optimal"]


# Refusals


def chain_with(**changes):
    given = {
        "A": [[[1.0]]],
        "B": [[[1.0]]],
        "c": [[0.0]],
        "std": [1.0],
        "theta": [0.0],
        "mean_T": [0.0],
        "cov_T": [[1.0]],
    }
    return LinearGaussianChain(**{**given, **changes})


UNKNOWN: Any = "gamma"
REFUSED = {
    "bilinear": (lambda: shortcut.score_gradient(chain_with(N=[[[[1.0]]]]), SQUARE), "chain.N is not zero"),
    "no noise": (lambda: shortcut.value_functions(chain_with(std=[0.0]), SQUARE), "std = "),
    "critic": (lambda: shortcut.score_gradient(chain_with(), QuadraticReward(0.0, [0.0] * 2, np.eye(2))), "linear"),
    "no score": (lambda: shortcut.optimal_baselines(chain_with(B=[[[0.0]]]), SQUARE), "B\\[0\\] is zero"),
    "count": (lambda: shortcut.estimator_variance(chain_with(), SQUARE, [SQUARE] * 2), "baselines has 2 entries"),
    "std": (lambda: shortcut.log_sum_factors([1.0, 0.0], 1), "std = "),
    "dim": (lambda: shortcut.log_sum_factors([1.0, 1.0], 0), "dim = 0"),
    "kink": (lambda: shortcut.envelope_terms([1.0], [1.0]), "must differ from mean"),
    "shapes": (lambda: shortcut.envelope_terms([1.0], [1.0, 2.0]), "target has shape"),
    "width": (lambda: shortcut.bump_variances(0.0), "width = 0.0"),
    "plane": (lambda: shortcut.input_correlations(additive_instance()[0]), "chain has dimension 2"),
    "far": (lambda: shortcut.chi_squared(40.0), "shift = 40.0"),
    "ratio": (lambda: shortcut.chi_squared(0.0, 0.0), "ratio = 0.0"),
    "one": (lambda: shortcut.sampled_regulariser_supremum([1.0], 0.5, 0.1), "correlations = "),
    "strength": (lambda: shortcut.sampled_regulariser_supremum([0.0], 0.5, 0.0), "strength = 0.0"),
    "line": (lambda: shortcut.linear_critic_objective([1.5], 0.5, 0.1, 1.0, sampled=True), "correlations = "),
    "T": (lambda: shortcut.released_schedule(0), "T = 0"),
    "variance": (lambda: shortcut.contraction(-1.0, SCHEDULES["short"]), "variance = -1.0"),
    "choice": (lambda: shortcut.reverse_w2(0.0, 1.0, SCHEDULES["short"], UNKNOWN), "variance = 'gamma'"),
    "noise": (lambda: shortcut.reverse_w2(0.0, 1.0, SCHEDULES["short"], np.ones(3)), "choice has shape"),
    "slopes": (lambda: shortcut.mean_error_bound([1.0], [1.0, 2.0], 0.0), "slopes, errors"),
    "start": (lambda: shortcut.noise_error_bound([1.0], [1.0], -1.0), "start = -1.0"),
    "spread": (lambda: shortcut.analytic_variance([-1.0], SCHEDULES["short"]), "variances = "),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
