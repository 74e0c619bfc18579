"""theory.variance against quadrature, enumeration and the numbers of docs/variance.md."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import variance as v

FEW = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def covariance(weights, rows):
    centred = rows - weights @ rows
    return np.einsum("n,ni,nj->ij", weights, centred, centred)


def rademacher_rule(dimension):
    points = np.array(list(itertools.product((-1.0, 1.0), repeat=dimension)))
    return points, np.full(len(points), 2.0**-dimension)


class Waves:
    """R(x) = offset + sum_i a_i sin(w_i.x + phase_i), with its gradient and Hessian."""

    def __init__(self, rng, dimension, frequency=1.0, terms=3):
        self.offset = rng.normal()
        self.a = rng.normal(size=terms)
        # Bounded frequencies: 24 or 40 nodes then integrate squares of R to rounding.
        self.w = frequency * rng.uniform(-1, 1, size=(terms, dimension))
        self.phase = rng.uniform(0, 2 * math.pi, size=terms)

    def reward(self, x):
        return self.offset + np.sin(x @ self.w.T + self.phase) @ self.a

    def gradient(self, x):
        return (np.cos(x @ self.w.T + self.phase) * self.a) @ self.w

    def hessian(self, x):
        return -np.einsum("nk,k,ki,kj->nij", np.sin(x @ self.w.T + self.phase), self.a, self.w, self.w)

    def curvature_bound(self):
        """An upper bound of |Hessian|_F over all x."""
        return float(np.abs(self.a) @ np.sum(self.w**2, axis=1))


# --- the sine example --------------------------------------------------------------------------------------------


def sine_by_quadrature(k, theta, s, mu, nodes=60):
    points, weights = v.gaussian_rule(2, nodes)
    eps, xi = points.T
    own, perturbed = theta + s * eps, theta + s * eps + mu * xi
    rows = np.stack([k * np.cos(k * own), np.sin(k * own) * eps / s, np.sin(k * perturbed) * xi / mu], axis=1)
    return weights @ rows, np.diag(covariance(weights, rows))


@FEW
@given(st.floats(0.3, 2.2), st.floats(-3, 3), st.floats(0.2, 1.2), st.floats(0.1, 1.2))
def test_sine_moments_are_those_of_the_estimators(k, theta, s, mu):
    moments = v.sine_moments(k, theta, s, mu)
    means, variances = sine_by_quadrature(k, theta, s, mu)
    np.testing.assert_allclose(means, [moments.mean, moments.mean, moments.smoothed_mean], rtol=0, atol=1e-11)
    exact = [moments.first_order, moments.half_order, moments.zeroth_order]
    np.testing.assert_allclose(variances, exact, rtol=1e-9, atol=1e-11)


def test_proposition_42_as_printed_is_false():
    moments = v.sine_moments(k=3.0, theta=math.pi / 12, s=1.0, mu=0.6)
    _, variances = sine_by_quadrature(3.0, math.pi / 12, 1.0, 0.6)
    expected = [4.499444655881611, 0.499444655881610, 1.388867139450092]
    np.testing.assert_allclose([moments.first_order, moments.half_order, moments.zeroth_order], expected, rtol=1e-13)
    np.testing.assert_allclose(variances, expected, rtol=1e-10)
    assert moments.first_order > moments.zeroth_order > moments.half_order


def test_half_order_is_not_always_below_zeroth_order():
    moments = v.sine_moments(k=1.0, theta=math.pi / 4, s=0.5, mu=1.0)
    assert moments.half_order == pytest.approx(2 - math.exp(-0.25) / 2, rel=1e-14)
    assert moments.zeroth_order == pytest.approx(0.5 - math.exp(-1.25) / 2, rel=1e-14)
    assert moments.half_order > 4 * moments.zeroth_order


@pytest.mark.parametrize(
    ("cosine", "product"),
    [(1, 1.108986217137), (0.5, 1.060729906508), (0, 1), (-0.5, 0.926561956868), (-1, 0.851153431293)],
)
def test_first_half_crossover_values(cosine, product):
    assert v.first_half_crossover(cosine) == pytest.approx(product, abs=1e-12)


@FEW
@given(st.floats(-1, 1), st.floats(0.2, 3), st.floats(1e-3, 0.9))
def test_first_half_crossover_separates_the_two_orders(cosine, k, step):
    theta = math.acos(cosine) / (2 * k)
    s = v.first_half_crossover(cosine) / k
    at, below, above = (v.sine_moments(k, theta, scale * s, 1.0) for scale in (1, 1 - step, 1 + step))
    assert at.first_order == pytest.approx(at.half_order, rel=1e-9)
    assert below.first_order < below.half_order
    assert above.first_order > above.half_order


@pytest.mark.parametrize(("s", "mu"), [(0.5, 2.078039785938), (1, 1.174701094067), (2, 1.005879801318)])
def test_first_zeroth_crossover_values(s, mu):
    assert v.first_zeroth_crossover(1.0, s) == pytest.approx(mu, abs=1e-12)


@FEW
@given(st.floats(0.2, 3), st.floats(0.05, 3), st.floats(1e-3, 0.9))
def test_first_zeroth_crossover_separates_the_two_orders(k, s, step):
    theta, mu = math.pi / (4 * k), v.first_zeroth_crossover(k, s)
    at, below, above = (v.sine_moments(k, theta, s, scale * mu) for scale in (1, 1 - step, 1 + step))
    scale = k**2
    assert at.first_order == pytest.approx(at.zeroth_order, rel=1e-9, abs=1e-13 * scale)
    assert below.first_order < below.zeroth_order
    assert above.first_order > above.zeroth_order


# --- quadratic rewards -------------------------------------------------------------------------------------------


def test_loewner_gap_is_the_least_eigenvalue_of_the_difference():
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    small, difference = np.array([[2.0, 0.5], [0.5, 1.0]]), turn @ np.diag([-0.3, 4.0]) @ turn.T
    assert v.loewner_gap(small, small + difference) == pytest.approx(-0.3, abs=1e-14)
    assert v.loewner_gap(small + difference, small) == pytest.approx(-4.0, abs=1e-14)


def random_quadratic(rng, dimension):
    hessian = rng.normal(size=(dimension, dimension))
    return rng.normal(), rng.normal(size=dimension), hessian + hessian.T


def test_quadratic_covariances_by_quadrature():
    s, mu = 0.7, 0.4
    value, gradient, hessian = random_quadratic(np.random.default_rng(1), 2)
    points, weights = v.gaussian_rule(4, 5)
    eps, xi = points[:, :2], points[:, 2:]

    def reward(x):
        return value + x @ gradient + np.einsum("ni,ij,nj->n", x, hessian, x) / 2

    exact = v.quadratic_covariances(value, gradient, hessian, s, mu)
    estimates = {
        "first_order": gradient + s * eps @ hessian,
        "half_order": reward(s * eps)[:, None] * eps / s,
        "zeroth_order": reward(s * eps + mu * xi)[:, None] * xi / mu,
    }
    for name, rows in estimates.items():
        np.testing.assert_allclose(covariance(weights, rows), getattr(exact, name), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(weights @ rows, gradient, rtol=1e-12)


@FEW
@given(SEEDS, st.integers(1, 4), st.floats(0.05, 3), st.floats(0.05, 3))
def test_quadratic_first_order_is_below_both_in_loewner_order(seed, dimension, s, mu):
    value, gradient, hessian = random_quadratic(np.random.default_rng(seed), dimension)
    covs = v.quadratic_covariances(value, gradient, hessian, s, mu)
    # The proof leaves at least (|gradient|^2 + s^2 tr H^2 / 2) I between them.
    spare = gradient @ gradient + s**2 * np.sum(hessian**2) / 2
    for other in (covs.half_order, covs.zeroth_order):
        assert v.loewner_gap(covs.first_order, other) >= spare * (1 - 1e-9)
        assert v.loewner_gap(other, covs.first_order) < 0


@pytest.mark.parametrize("noise_rule", [v.gaussian_rule(4, 4), rademacher_rule(4)], ids=["gaussian", "rademacher"])
@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_rao_blackwell_on_a_two_step_chain(mu, noise_rule):
    """R quadratic in (theta_1, theta_2) given eps: E[ZO | eps] = FO, so Cov FO <= Cov ZO for every mu."""
    slopes = np.array([[[0.9, 0.2], [-0.1, 0.8]], [[0.7, -0.3], [0.4, 0.9]]])
    inputs = np.array([[[1.0, 0.5], [-0.3, 0.8]], [[0.4, -0.6], [0.7, 0.2]]])
    sigmas, theta = np.array([0.3, 0.5]), np.array([0.4, -0.7])
    linear, hessian = np.array([0.6, -0.4]), np.array([[-1.0, 0.3], [0.3, -0.5]])
    points, weights = v.gaussian_rule(4, 4)
    xi, masses = noise_rule

    def rollout(eps, thetas):
        x = thetas[1] @ inputs[1].T + sigmas[1] * eps[..., 2:]
        return x @ slopes[0].T + thetas[0] @ inputs[0].T + sigmas[0] * eps[..., :2]

    def reward(x, cubic=0.0):
        return 1.5 + x @ linear + np.sum((x @ hessian) * x, axis=-1) / 2 + cubic * x[..., 0] ** 3

    sensitivity = inputs[0] + slopes[0] @ inputs[1]
    first = (linear + rollout(points, [theta, theta]) @ hessian) @ sensitivity
    perturbed = rollout(points[:, None], [theta + mu * xi[:, :2], theta + mu * xi[:, 2:]])
    scores = (xi[:, :2] + xi[:, 2:]) / mu

    given_eps = np.einsum("m,nm,mi->ni", masses, reward(perturbed), scores)
    np.testing.assert_allclose(given_eps, first, rtol=1e-10, atol=1e-11)
    zeroth = np.einsum("n,m,nm,mi,mj->ij", weights, masses, reward(perturbed) ** 2, scores, scores)
    zeroth -= np.outer(weights @ first, weights @ first)
    assert v.loewner_gap(covariance(weights, first), zeroth) > 0.1

    # Control: a cubic term breaks the identity, by the smoothing bias.
    first += 0.5 * 3 * rollout(points, [theta, theta])[:, :1] ** 2 * sensitivity[0]
    given_eps = np.einsum("m,nm,mi->ni", masses, reward(perturbed, 0.5), scores)
    assert np.abs(given_eps - first).max() > 0.01


# --- the sufficient condition ------------------------------------------------------------------------------------


def test_covariances_agree_with_the_sine_example():
    k, theta, s, mu = 1.7, 0.4, 0.6, 0.8
    exact = v.sine_moments(k, theta, s, mu)

    def reward(x):
        return np.sin(k * x[:, 0])

    at = np.array([theta])
    first = v.first_order_covariance(lambda x: k * np.cos(k * x), at, s, nodes=60)
    half = v.half_order_covariance(reward, at, s, nodes=60)
    zeroth = v.zeroth_order_covariance(reward, at, s, mu, nodes=60)
    np.testing.assert_allclose([first[0, 0], half[0, 0]], [exact.first_order, exact.half_order], rtol=1e-11)
    np.testing.assert_allclose(zeroth[0, 0], exact.zeroth_order, rtol=1e-11)


def test_zeroth_order_covariance_equals_the_full_rule():
    waves, theta, s, mu = Waves(np.random.default_rng(2), 2, 0.8), np.array([0.3, -0.5]), 0.5, 0.7
    points, weights = v.gaussian_rule(4, 20)
    rows = waves.reward(theta + s * points[:, :2] + mu * points[:, 2:])[:, None] * points[:, 2:] / mu
    actual = v.zeroth_order_covariance(waves.reward, theta, s, mu)
    np.testing.assert_allclose(actual, covariance(weights, rows), rtol=1e-8)


@FEW
@given(SEEDS, st.integers(1, 2), st.floats(0.1, 0.7), st.floats(0.1, 0.7))
def test_bounds_hold_in_loewner_order(seed, dimension, s, mu):
    rng = np.random.default_rng(seed)
    waves, theta, nodes = Waves(rng, dimension), rng.normal(size=dimension), 24
    first = v.first_order_covariance(waves.gradient, theta, s, nodes)
    half = v.half_order_covariance(waves.reward, theta, s, nodes)
    zeroth = v.zeroth_order_covariance(waves.reward, theta, s, mu, nodes)
    rounding = 1e-12 * (np.trace(half) + np.trace(zeroth))
    assert v.loewner_gap(first, v.first_order_bound(waves.hessian, theta, s, nodes)) >= -rounding
    assert v.loewner_gap(v.half_order_bound(waves.reward, waves.hessian, theta, s, nodes), half) >= -rounding
    bound = v.zeroth_order_bound(waves.reward, waves.hessian, theta, s, mu, nodes)
    assert v.loewner_gap(bound, zeroth) >= -rounding


@pytest.mark.parametrize("dimension", [1, 2])
def test_sufficient_condition_implies_the_order(dimension):
    rng = np.random.default_rng(3)
    met, exceeded, nodes = 0, 0, 40
    for _ in range(300):
        waves, theta, s = Waves(rng, dimension, 1.5), rng.normal(size=dimension), rng.uniform(0.2, 1.2)
        first = np.trace(v.first_order_covariance(waves.gradient, theta, s, nodes))
        half = np.trace(v.half_order_covariance(waves.reward, theta, s, nodes))
        upper = v.first_order_bound(waves.hessian, theta, s, nodes)
        lower = v.half_order_bound(waves.reward, waves.hessian, theta, s, nodes)
        exceeded += first > half
        if v.sufficient_condition(upper, lower):
            met += 1
            assert first <= half
    # Neither side of the implication is empty.
    assert met > 50
    assert exceeded > 10


def test_sufficient_condition_without_the_factor_s_squared_is_refuted():
    k, s, offset, at = 0.5, 4.0, -0.8, np.array([math.pi])

    def reward(x):
        return offset + np.sin(k * x[:, 0])

    def hessian(x):
        return -(k**2) * np.sin(k * x)[:, :, None]

    first = v.first_order_covariance(lambda x: k * np.cos(k * x), at, s, 60)
    half = v.half_order_covariance(reward, at, s, 60)
    upper, lower = v.first_order_bound(hessian, at, s, 60), v.half_order_bound(reward, hessian, at, s, 60)
    assert first[0, 0] > half[0, 0]
    assert not v.sufficient_condition(upper, lower)
    # E H^2 in place of s^2 E H^2 would prove the false order.
    assert v.sufficient_condition(upper / s**2, lower)


@FEW
@given(SEEDS, st.integers(1, 2), st.floats(0.1, 0.8))
def test_simple_form_of_the_sufficient_condition(seed, dimension, s):
    rng = np.random.default_rng(seed)
    waves, theta = Waves(rng, dimension), rng.normal(size=dimension)
    points, weights = v.gaussian_rule(dimension, 24)
    offset = weights @ waves.reward(theta + s * points)
    # Put the mean exactly on the threshold 2 s^2 sup |H|_F / sqrt(d), on either side of zero.
    waves.offset += math.copysign(2 * s**2 * waves.curvature_bound() / math.sqrt(dimension), offset) - offset
    upper = v.first_order_bound(waves.hessian, theta, s, 24)
    assert v.sufficient_condition(upper, v.half_order_bound(waves.reward, waves.hessian, theta, s, 24))
    first = v.first_order_covariance(waves.gradient, theta, s, 24)
    half = v.half_order_covariance(waves.reward, theta, s, 24)
    assert np.trace(first) <= np.trace(half)


def test_zeroth_order_condition_holds_for_small_mu_only():
    k, theta, s = 3.0, math.pi / 12, 1.0
    at = np.array([theta])

    def reward(x):
        return np.sin(k * x[:, 0])

    def hessian(x):
        return -(k**2) * np.sin(k * x)[:, :, None]

    upper = v.first_order_bound(hessian, at, s, 60)
    decided = {
        mu: v.sufficient_condition(upper, v.zeroth_order_bound(reward, hessian, at, s, mu, 60)) for mu in (0.05, 0.6)
    }
    assert decided == {0.05: True, 0.6: False}
    assert v.sine_moments(k, theta, s, 0.05).first_order < v.sine_moments(k, theta, s, 0.05).zeroth_order
    # The bound's leading term is E R^2 / mu^2.
    lower = v.zeroth_order_bound(reward, hessian, at, s, 1e-3, 60)[0, 0]
    second_moment = (1 - math.exp(-2 * (k * s) ** 2) * math.cos(2 * k * theta)) / 2
    assert lower * 1e-6 == pytest.approx(second_moment, rel=1e-4)


# --- half-order blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "slope"),
    [(2, 0.414213562373), (3, 0.490984766568), (5, 0.582874087117), (10, 0.691700555311), (50, 0.858648030089)],
)
def test_half_order_threshold_values(h, slope):
    assert v.half_order_threshold(h) == pytest.approx(slope, abs=1e-12)
    assert v.half_order_ratio(slope - 1e-3, h) < 1 < v.half_order_ratio(slope + 1e-3, h)


@FEW
@given(st.floats(-0.9, 1.5), st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 2))
def test_ratio_is_that_of_the_score_moments(a, h, blocks, sigma):
    steps = h * blocks
    slopes, inputs, sigmas = np.full((steps, 1, 1), a), np.full((steps, 1, 1), 0.7), np.full(steps, sigma)
    blocked, plain = (v.block_score_moment(slopes, inputs, sigmas, length) for length in (h, 1))
    assert blocked / plain == pytest.approx(v.half_order_ratio(a, h), rel=1e-9, abs=1e-14)


def test_block_score_moment_is_the_second_moment_of_the_score():
    rng = np.random.default_rng(4)
    slopes, inputs = rng.normal(size=(5, 2, 2)), rng.normal(size=(5, 2, 3))
    sigmas = rng.uniform(0.3, 1.0, size=5)
    eps, weights = v.gaussian_rule(2, 3)
    total, reversed_total = 0.0, 0.0
    for block in ([0, 1], [2, 3], [4]):
        through, backwards = np.zeros((2, 3)), np.zeros((2, 3))
        for t in block:
            path = [slopes[k] for k in range(block[0], t)]
            through += np.linalg.multi_dot([np.eye(2), *path, inputs[t]])
            backwards += inputs[t] if not path else path[0].T @ inputs[t]
        total += weights @ np.sum((eps @ through / sigmas[block[0]]) ** 2, axis=1)
        reversed_total += weights @ np.sum((eps @ backwards / sigmas[block[0]]) ** 2, axis=1)
    actual = v.block_score_moment(slopes, inputs, sigmas, 2)
    assert actual == pytest.approx(total, rel=1e-12)
    assert abs(actual - reversed_total) > 0.1


# --- parameter noise ---------------------------------------------------------------------------------------------


@FEW
@given(
    st.integers(0, 7),
    st.floats(-1.5, 1.5),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.sampled_from(("gaussian", "rademacher")),
)
def test_smoothed_moment_by_quadrature(power, theta, mu, s, noise):
    eps, eps_weights = v.gaussian_rule(1, 8)
    xi, xi_weights = v.gaussian_rule(1, 8) if noise == "gaussian" else rademacher_rule(1)
    x = theta + mu * xi.T + s * eps
    actual = v.smoothed_moment(power, theta, mu, s, noise)
    derivative = power * x ** (power - 1) if power else np.zeros_like(x)
    scale = 1 + 4.0**power
    assert actual.value == pytest.approx(eps_weights @ x**power @ xi_weights, rel=1e-10, abs=1e-12 * scale)
    assert actual.derivative == pytest.approx(eps_weights @ derivative @ xi_weights, rel=1e-10, abs=1e-12 * scale)
    score = xi_weights * xi[:, 0] / mu
    assert actual.estimate == pytest.approx(eps_weights @ x**power @ score, rel=1e-10, abs=1e-11 * scale)


@FEW
@given(st.integers(0, 6), st.floats(-1.5, 1.5), st.floats(0, 1), st.floats(0, 1))
def test_gaussian_estimate_is_the_derivative_of_the_smoothed_objective(power, theta, mu, s):
    moment = v.smoothed_moment(power, theta, mu, s)
    assert moment.estimate == pytest.approx(moment.derivative, rel=1e-12, abs=1e-12)


@FEW
@given(st.integers(0, 6), st.floats(-1.5, 1.5), st.floats(0.05, 1))
def test_rademacher_estimate_is_the_derivative_under_uniform_smoothing(power, theta, mu):
    moment = v.smoothed_moment(power, theta, mu, 0.0, "rademacher")
    nodes, weights = np.polynomial.legendre.leggauss(8)
    derivative = power * (theta + mu * nodes) ** (power - 1) if power else np.zeros(8)
    assert moment.estimate == pytest.approx(weights @ derivative / 2, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("s", [0.0, 0.7])
def test_quartic_bias(s):
    theta, mu = 0.4, 0.25
    gradient = v.smoothed_moment(4, theta, 0.0, s).derivative
    assert gradient == pytest.approx(4 * theta**3 + 12 * theta * s**2, rel=1e-13)
    gaussian, rademacher = (v.smoothed_moment(4, theta, mu, s, noise) for noise in ("gaussian", "rademacher"))
    assert gaussian.estimate - gradient == pytest.approx(12 * theta * mu**2, rel=1e-12)
    assert rademacher.estimate - gradient == pytest.approx(4 * theta * mu**2, rel=1e-12)
    # The derivative of the Rademacher-smoothed objective is another number: SPSA does not follow it.
    assert rademacher.derivative - gradient == pytest.approx(12 * theta * mu**2, rel=1e-12)


def test_sine_smoothing_factor():
    k, theta, s, mu = 2.0, 0.3, 0.5, 0.25
    moments = v.sine_moments(k, theta, s, mu)
    assert moments.mean == pytest.approx(1.001182709991, abs=1e-12)
    assert moments.smoothed_mean == pytest.approx(0.883540640488, abs=1e-12)
    assert moments.smoothed_mean / moments.mean == pytest.approx(v.sine_smoothing_factor(k, mu), rel=1e-13)
    central = (math.sin(k * (theta + mu)) - math.sin(k * (theta - mu))) / (2 * mu)
    factor = v.sine_smoothing_factor(k, mu, "rademacher")
    assert central / (k * math.cos(k * theta)) == pytest.approx(factor, rel=1e-13)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_spsa_covariance(noise):
    gradient = np.array([1.0, -2.0, 0.5])
    xi, weights = v.gaussian_rule(3, 3) if noise == "gaussian" else rademacher_rule(3)
    rows = (xi @ gradient)[:, None] * xi
    actual = v.spsa_covariance(gradient, noise)
    np.testing.assert_allclose(weights @ rows, gradient, rtol=1e-12)
    np.testing.assert_allclose(actual, covariance(weights, rows), rtol=1e-12, atol=1e-12)
    sign = 1 if noise == "gaussian" else -1
    assert np.trace(actual) == pytest.approx((3 + sign) * gradient @ gradient, rel=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_self_included_baseline_shrinks_the_mean(n):
    # A three-point law of (reward, score) with E score = 0 and E reward * score = 0.9.
    law = [(0.5, 3.0, 1.0), (0.3, 1.0, -1.0), (0.2, 1.5, -1.0)]
    mean = 0.0
    for outcome in itertools.product(law, repeat=n):
        masses, rewards, scores = (np.array(column) for column in zip(*outcome, strict=True))
        mean += float(np.prod(masses) * np.mean((rewards - rewards.mean()) * scores))
    assert mean == pytest.approx(v.self_included_baseline_factor(n) * 0.9, abs=1e-13)


# --- random truncation -------------------------------------------------------------------------------------------


def uniform_keep(T):
    """P(K >= t) for K uniform on {0..T}, the released default range."""
    return v.inclusion_probabilities(np.full(T + 1, 1 / (T + 1)), T)


def test_inclusion_probabilities():
    law = [0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(v.inclusion_probabilities(law, 3), [0.9, 0.7, 0.4], rtol=1e-14)
    # A law that reaches beyond T, and one that ends before it.
    np.testing.assert_allclose(v.inclusion_probabilities(law, 2), [0.9, 0.7], rtol=1e-14)
    np.testing.assert_allclose(v.inclusion_probabilities(law, 5), [0.9, 0.7, 0.4, 0, 0], rtol=1e-14)
    np.testing.assert_allclose(uniform_keep(4), [0.8, 0.6, 0.4, 0.2], rtol=1e-14)


def random_chain(rng, steps=4):
    shapes = ((steps, 2, 2), (steps, 2, 2), (steps, 2, 3), (2,))
    return tuple(rng.normal(size=shape) for shape in shapes)


def masked_parts(direct, network, inputs, costate, mask):
    """What automatic differentiation returns for one pattern of detached network outputs."""
    parts = []
    for t, kept in enumerate(mask):
        parts.append(kept * inputs[t].T @ costate)
        costate = (direct[t] + kept * network[t]).T @ costate
    return np.array(parts)


def test_independent_truncation_is_the_mean_over_all_masks():
    direct, network, inputs, costate = random_chain(np.random.default_rng(5))
    keep = np.array([0.9, 0.6, 0.35, 0.2])
    mean = np.zeros((4, 3))
    for mask in itertools.product((0, 1), repeat=4):
        mass = np.prod(np.where(mask, keep, 1 - keep))
        mean += mass * masked_parts(direct, network, inputs, costate, mask)
    actual = v.independent_truncation_parts(direct, network, inputs, costate, keep)
    np.testing.assert_allclose(actual, mean, rtol=1e-12, atol=1e-13)


def test_one_draw_per_trajectory_has_the_inclusion_probabilities():
    direct, network, inputs, costate = random_chain(np.random.default_rng(6))
    law = [0.1, 0.2, 0.15, 0.25, 0.3]
    mean = sum(
        mass * masked_parts(direct, network, inputs, costate, [t < length for t in range(4)])
        for length, mass in enumerate(law)
    )
    full = masked_parts(direct, network, inputs, costate, [1] * 4)
    keep = v.inclusion_probabilities(law, 4)
    np.testing.assert_allclose(mean, keep[:, None] * full, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(v.truncated_mean(full, law), mean.sum(axis=0), rtol=1e-12)
    # Control: drawing anew at every step is something else, and so is dividing it by the inclusion probabilities.
    redrawn = v.independent_truncation_parts(direct, network, inputs, costate, keep)
    assert np.abs(redrawn - mean).max() > 0.1
    assert np.abs(redrawn / keep[:, None] - full).max() > 0.1
    # They do agree on step 1, which no later cut can touch.
    np.testing.assert_allclose(redrawn[0], mean[0], rtol=1e-13)


@FEW
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), min_size=1, max_size=8))
def test_shares_of_a_scalar_chain(steps):
    keep, fraction = np.array(steps).T
    shares = v.independent_truncation_shares(keep, fraction)
    slopes = np.linspace(0.5, 1.4, len(steps))[:, None, None]
    direct = fraction[:, None, None] * slopes
    inputs, costate = np.linspace(1, 2, len(steps))[:, None, None], np.array([0.7])
    actual = v.independent_truncation_parts(direct, slopes - direct, inputs, costate, keep)
    full = v.independent_truncation_parts(direct, slopes - direct, inputs, costate, np.ones(len(steps)))
    np.testing.assert_allclose(actual, shares[:, None] * full, rtol=1e-9, atol=1e-12)
    below, above = fraction.clip(max=1), fraction.clip(min=1)
    assert np.all(v.independent_truncation_shares(keep, below) <= keep * (1 + 1e-12))
    assert np.all(v.independent_truncation_shares(keep, above) >= keep * (1 - 1e-12))


def test_shares_when_the_latent_is_cut():
    keep = uniform_keep(6)
    np.testing.assert_allclose(v.independent_truncation_shares(keep, np.zeros(6)), np.cumprod(keep), rtol=1e-13)
    np.testing.assert_allclose(v.independent_truncation_shares(keep, np.ones(6)), keep, rtol=1e-13)


@pytest.mark.parametrize(
    ("variance", "trajectory", "redrawn", "cut", "largest"),
    [
        (1.0, 0.5885926848, 0.8451889302, 0.2125274200, 1.2004031727),
        (0.25, 0.7026502313, 0.9846000797, 0.3616375801, 1.8687047119),
    ],
)
def test_shares_of_a_ddim_chain(variance, trajectory, redrawn, cut, largest):
    """DDIM with eta = 1, 50 steps of the scaled-linear schedule, exact score of N(0, variance), a bias parameter."""
    alpha_bar_all = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    alpha_bar = alpha_bar_all[1::20]
    previous = np.concatenate([alpha_bar_all[:1], alpha_bar[:-1]])
    sigma2 = (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)
    direct = np.sqrt(previous / alpha_bar)
    scale = np.sqrt(1 - previous - sigma2) - direct * np.sqrt(1 - alpha_bar)
    slope = direct + scale * np.sqrt(1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar)
    parts = scale * np.concatenate([[1.0], np.cumprod(slope)[:-1]])
    keep = uniform_keep(50)
    shares = v.independent_truncation_shares(keep, direct / slope)
    cuts = v.independent_truncation_shares(keep, np.zeros(50))
    totals = [share @ parts / parts.sum() for share in (keep, shares, cuts)]
    np.testing.assert_allclose(totals, [trajectory, redrawn, cut], atol=1e-9)
    assert shares.max() == pytest.approx(largest, abs=1e-9)


# --- bad input ---------------------------------------------------------------------------------------------------

ONE = np.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: v.sine_moments(1.0, 0.0, 0.0, 1.0), "s = 0.0: must lie in"),
        (lambda: v.sine_moments(1.0, 0.0, 1.0, math.nan), "mu = nan: must lie in"),
        (lambda: v.first_half_crossover(1.5), "cosine = 1.5: must lie in"),
        (lambda: v.first_zeroth_crossover(-1.0, 1.0), "k = -1.0: must lie in"),
        (lambda: v.loewner_gap(np.eye(2), np.eye(3)), "cov_large has shape .3, 3.: must be .2, 2."),
        (lambda: v.loewner_gap(np.eye(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "cov_large = .*: must be a symmetric"),
        (lambda: v.quadratic_covariances(0.0, ONE, np.eye(1), 1.0, 0.0), "mu = 0.0: must lie in"),
        (lambda: v.gaussian_rule(0, 3), "dimension = 0: must be"),
        (lambda: v.gaussian_rule(1, 0), "nodes = 0: must be"),
        (lambda: v.first_order_covariance(np.cos, ONE, 0.0), "s = 0.0: must lie in"),
        (lambda: v.sufficient_condition(np.eye(1), np.eye(2)), "other_bound has shape .2, 2.: must be .1, 1."),
        (lambda: v.block_score_moment(np.ones((1, 1, 1)), np.ones((1, 1, 1)), 0 * ONE, 1), "sigmas = 0.0: must lie in"),
        (lambda: v.half_order_ratio(0.5, 0), "h = 0: must be"),
        (lambda: v.half_order_threshold(1), "h = 1: must be"),
        (lambda: v.smoothed_moment(-1, 0.0, 1.0, 1.0), "power = -1: must be"),
        (lambda: v.smoothed_moment(2, 0.0, -1.0, 1.0), "mu = -1.0: must lie in"),
        (lambda: v.sine_smoothing_factor(1.0, -1.0), "mu = -1.0: must lie in"),
        (lambda: v.spsa_covariance(ONE, "uniform"), "noise = 'uniform': must be 'gaussian' or 'rademacher'"),
        (lambda: v.self_included_baseline_factor(0), "n = 0: must be"),
        (lambda: v.inclusion_probabilities([0.5, 0.6], 2), "law = .*: must be non-negative and sum to one"),
        (lambda: v.inclusion_probabilities([1.0], 0), "T = 0: must be"),
        (lambda: v.independent_truncation_shares([0.5, 1.5], [1.0, 1.0]), "keep = .*: must hold 2 probabilities"),
        (lambda: v.independent_truncation_shares([0.5], [1.0, 1.0]), "direct_fraction has shape .2,.: must be .1,."),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
