"""theory.ipm against quadrature, brute force, difference quotients and numbers from an independent derivation."""

import functools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf
from scipy.stats import norm, wasserstein_distance

from theory import ipm
from theory.chains import LinearGaussianChain
from theory.gaussian import Gaussian
from theory.instances import additive_instance, bilinear_instance
from verdicts.streams import Stream

COV = np.array([[0.5, 0.2], [0.2, 0.8]])
OTHER = np.array([[1.3, -0.4], [-0.4, 0.6]])
L2, L1, W1, MMD, TV = (
    ipm.LinearCritics("l2"),
    ipm.LinearCritics("l1"),
    ipm.LipschitzCritics(),
    ipm.KernelCritics(0.7),
    ipm.BoundedCritics(),
)
ALL = [L2, L1, W1, MMD, TV]


def line(mean, std):
    return Gaussian.scalar(mean, std**2)


def density(law, x):
    return norm.pdf(x, law.mean[0], math.sqrt(law.cov[0, 0]))


@functools.cache
def hermite(order):
    return np.polynomial.hermite_e.hermegauss(order)


def average(function, law, order=80):
    """E f by a tensor Gauss-Hermite rule."""
    nodes, weights = hermite(order)
    grid = np.stack(np.meshgrid(*[nodes] * law.dim, indexing="ij"), -1).reshape(-1, law.dim)
    mass = np.stack(np.meshgrid(*[weights / weights.sum()] * law.dim, indexing="ij"), -1).reshape(-1, law.dim)
    return mass.prod(1) @ function(law.mean + grid @ np.linalg.cholesky(law.cov).T)


# --- distances ---------------------------------------------------------------------------------------------------

LINE_PAIRS = [
    (line(0.3, 0.5), line(1.1, 0.5)),
    (line(0.3, 0.5), line(1.1, 1.4)),
    (line(-0.7, 1.2), line(0.4, 0.3)),
    (line(0.2, 1.0), line(0.2, 0.6)),
    (line(0.9, 1.0), line(0.2, 1.001)),
]


@pytest.mark.parametrize(("p", "q"), LINE_PAIRS)
def test_w1_is_the_area_between_the_distribution_functions(p, q):
    def height(x):
        return abs(norm.cdf(x, p.mean[0], p.cov[0, 0] ** 0.5) - norm.cdf(x, q.mean[0], q.cov[0, 0] ** 0.5))

    grid = np.linspace(-12.0, 12.0, 25)
    area = sum(quad(height, a, b, epsabs=1e-13, limit=200)[0] for a, b in zip(grid[:-1], grid[1:], strict=True))
    assert W1.distance(p, q) == pytest.approx(area, abs=1e-9)


def test_w1_of_point_masses_and_of_a_translate_in_the_plane():
    assert W1.distance(Gaussian.scalar(2.0, 0.0), Gaussian.scalar(-1.0, 0.0)) == 3.0
    assert W1.distance(Gaussian.scalar(0.0, 0.0), line(0.0, 2.0)) == pytest.approx(
        2 * math.sqrt(2 / math.pi), rel=1e-14
    )
    assert W1.distance(Gaussian([3.0, 4.0], COV), Gaussian([0.0, 0.0], COV)) == 5.0


@pytest.mark.parametrize(("p", "q"), LINE_PAIRS)
def test_tv_is_the_integral_of_the_difference(p, q):
    grid = np.linspace(-12.0, 12.0, 25)
    parts = [
        quad(lambda x: abs(density(p, x) - density(q, x)), a, b, epsabs=1e-13, limit=400)[0]
        for a, b in zip(grid[:-1], grid[1:], strict=True)
    ]
    assert TV.distance(p, q) == pytest.approx(sum(parts), abs=1e-9)


def test_tv_in_the_plane():
    p, q = Gaussian([0.6, -0.3], COV), Gaussian([-0.2, 0.4], COV)
    x = np.linspace(-8.0, 8.0, 801)
    points = np.stack(np.meshgrid(x, x, indexing="ij"), -1)

    def pdf(law):
        shift = points - law.mean
        quadratic = np.einsum("...i,ij,...j", shift, np.linalg.inv(law.cov), shift)
        return np.exp(-quadratic / 2) / (2 * math.pi * math.sqrt(np.linalg.det(law.cov)))

    assert TV.distance(p, q) == pytest.approx(np.abs(pdf(p) - pdf(q)).sum() * (x[1] - x[0]) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("p", "q"),
    [*LINE_PAIRS[:4], (Gaussian([0.6, -0.3], COV), Gaussian([-0.2, 0.4], OTHER))],
)
def test_mmd_is_the_norm_of_the_embedding(p, q):
    def kernel_mean(a, b):
        def inner(x):
            return np.array([average(lambda y, x=x: np.exp(-((x - y) ** 2).sum(-1) / (2 * 1.1**2)), b, 24) for x in x])

        return average(inner, a, 24)

    square = kernel_mean(p, p) + kernel_mean(q, q) - 2 * kernel_mean(p, q)
    assert ipm.KernelCritics(1.1).distance(p, q) ** 2 == pytest.approx(square, abs=2e-7)


def test_mmd_with_equal_covariances_keeps_its_relative_accuracy():
    tiny = MMD.distance(line(1e-9, 0.5), line(0.0, 0.5))
    assert tiny == pytest.approx(MMD.lipschitz([[0.25]]) * 1e-9, rel=1e-12)


@pytest.mark.parametrize("std", [1.0, 1.5])
def test_laws_that_do_not_meet(std):
    far, here = line(1e4, 1.0), line(0.0, std)
    norms = [(1 + 2 * s**2 / 0.7**2) ** -0.5 for s in (1.0, std)]
    assert MMD.distance(far, here) == pytest.approx(math.sqrt(sum(norms)), rel=1e-13)
    assert TV.distance(far, here) == 2.0
    assert ipm.gradient(TV, far, here)[0] == ipm.gradient(MMD, far, here)[0] == [0.0]


def test_reference_values():
    """Numbers from an independent derivation."""
    assert MMD.distance(line(0.3, 0.5), line(1.1, 0.5)) == pytest.approx(0.6233939630895, abs=1e-13)
    assert MMD.lipschitz([[0.25]]) == pytest.approx(0.8429903906143472, rel=1e-14)
    assert TV.distance(line(1.0, 1.0), line(0.0, 1.0)) == pytest.approx(0.7658498451, abs=1e-10)
    assert TV.lipschitz([[1.0]]) == pytest.approx(0.7978845608, abs=1e-10)
    slope = ipm.gradient(L2, Gaussian([1.0, 0.5], np.eye(2)), Gaussian([-0.3, 0.2], np.eye(2)))[0]
    assert slope == pytest.approx([0.9743911957, 0.2248595067], abs=1e-10)


def test_w1_against_samples_of_quantiles():
    levels = (np.arange(20000) + 0.5) / 20000
    p, q = norm.ppf(levels, 0.3, 0.5), norm.ppf(levels, 1.1, 1.4)
    assert W1.distance(line(0.3, 0.5), line(1.1, 1.4)) == pytest.approx(wasserstein_distance(p, q), abs=2e-4)


# --- witnesses ---------------------------------------------------------------------------------------------------

PLANE = (Gaussian([0.6, -0.3], COV), Gaussian([-0.2, 0.4], COV))
CASES = [
    *[(critics, *LINE_PAIRS[i]) for critics in ALL for i in range(3)],
    *[(critics, *PLANE) for critics in ALL],
    *[(critics, PLANE[0], Gaussian([-0.2, 0.4], OTHER)) for critics in (L2, L1, MMD)],
]


@pytest.mark.parametrize(("critics", "p", "q"), CASES)
def test_the_witness_attains_the_supremum(critics, p, q):
    assert ipm.gap(critics.witness(p, q), p, q) == pytest.approx(critics.distance(p, q), abs=1e-12)
    assert critics.distance(q, p) == pytest.approx(critics.distance(p, q), abs=1e-13)


@pytest.mark.parametrize(("p", "q"), LINE_PAIRS)
def test_the_witnesses_are_admissible(p, q):
    x = np.linspace(-6.0, 6.0, 2001)[:, None]
    rates = np.diff(W1.witness(p, q)(x)) / 0.006
    assert np.abs(rates).max() <= 1 + 1e-9
    f = TV.witness(p, q)(x)
    assert np.abs(f).max() <= 1
    gap = np.asarray(density(p, x[:, 0]) - density(q, x[:, 0]))
    away = np.abs(gap) > 1e-9
    assert (f[away] == np.sign(gap[away])).all()
    # f(x) = (mu_p - mu_q)(x) / Phi has norm 1: <f, f> = g(f) / Phi, and f is the embedding, point by point
    kernel = lambda law, y: average(lambda z: np.exp(-((z[:, 0] - y) ** 2) / (2 * 0.7**2)), law)  # noqa: E731
    expected = [(kernel(p, y) - kernel(q, y)) / MMD.distance(p, q) for y in (-1.0, 0.2, 1.7)]
    assert MMD.witness(p, q)([[-1.0], [0.2], [1.7]]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("critics", ALL)
def test_no_admissible_critic_beats_the_distance(critics, d):
    rng = Stream(6).child("admissible").child(str(d)).generator()
    p, q = (line(0.3, 0.5), line(0.6, 0.9)) if d == 1 else PLANE

    def sampled_gap(f):  # an expectation that shares nothing with theory.ipm
        return average(f, p, 150 if d == 1 else 40) - average(f, q, 150 if d == 1 else 40)

    def random_gap():
        a = rng.normal(size=d)
        if critics in (L2, L1):
            return sampled_gap(lambda x: x @ a / np.linalg.norm(a, 2 if critics == L2 else 1))
        if critics == W1:  # the largest or smallest of two linear critics, a piecewise linear one
            b, c = rng.normal(size=d), rng.normal()
            sign = rng.choice([-1, 1])
            return sampled_gap(lambda x: sign * np.maximum(x @ a / np.linalg.norm(a), x @ b / np.linalg.norm(b) + c))
        if critics == TV and d == 2:
            c = rng.normal()
            return sampled_gap(lambda x: np.tanh(2 * (x @ a + c)))
        if critics == TV:  # 1 or -1 in an interval, the opposite outside
            ends = np.sort(rng.normal(size=2))
            mass, other = (np.diff(norm.cdf(ends, r.mean[0], r.cov[0, 0] ** 0.5)).item() for r in (p, q))
            return 2.0 * abs(mass - other)
        points = 1.5 * rng.normal(size=(12, d))  # the best of the span of k(., y_i)
        kernel = lambda x, y: np.exp(-((x - y) ** 2).sum(-1) / (2 * 0.7**2))  # noqa: E731
        means = np.array([sampled_gap(lambda x, y=y: kernel(x, y)) for y in points])
        gram = np.array([kernel(points, y) for y in points]) + 1e-10 * np.eye(12)
        return math.sqrt(means @ np.linalg.solve(gram, means))

    best = max(random_gap() for _ in range(20 if critics == MMD else 500))
    slack = 5e-3 if critics == W1 else 1e-6  # kinks cost the test's quadrature some digits
    assert 0.75 * critics.distance(p, q) < best <= critics.distance(p, q) + slack


def kink_witnesses():
    p1, p2 = line(0.4, 0.6), PLANE[0]
    return [(critics.witness(p, p, side), p) for critics in ALL for p, side in ((p1, [1.0]), (p2, [0.3, -1.0]))]


WITNESSES = [(critics.witness(p, q), p) for critics, p, q in CASES] + kink_witnesses()


@pytest.mark.parametrize("case", range(len(WITNESSES)))
def test_expectations_and_their_derivatives(case):
    critic, p = WITNESSES[case]
    law = Gaussian(p.mean + 0.17, 1.3 * p.cov)
    exact = critic.expect(law)
    jumps = (np.abs(critic(np.arange(3.0 * p.dim).reshape(3, p.dim))) == 1.0).all()
    if p.dim == 1 and not jumps:
        edges = np.linspace(-16.0, 16.0, 65)
        f = lambda x: critic([[x]]).item() * density(law, x)  # noqa: E731
        value = sum(quad(f, a, b, epsabs=1e-12, limit=100)[0] for a, b in zip(edges[:-1], edges[1:], strict=True))
        assert exact.value == pytest.approx(value, abs=1e-9)
    else:  # the midpoint rule in whitened coordinates; a jump costs a cell
        n = 2000 if p.dim == 1 else 900
        z = (np.arange(n) + 0.5) / n * 16.0 - 8.0
        grid = np.stack(np.meshgrid(*[z] * p.dim, indexing="ij"), -1).reshape(-1, p.dim)
        mass = np.exp(-(grid**2).sum(1) / 2)
        values = critic(law.mean + grid @ np.linalg.cholesky(law.cov).T)
        assert exact.value == pytest.approx(mass @ values / mass.sum(), abs=4e-3 if jumps else 1e-8)
    h = 1e-4
    for i in range(p.dim):
        up, down = (critic.expect(Gaussian(law.mean + s * h * np.eye(p.dim)[i], law.cov)) for s in (1, -1))
        assert (up.value - down.value) / (2 * h) == pytest.approx(exact.mean_slope[i], abs=3e-7)
        # twice the derivative in the covariance is the Hessian in the mean
        assert (up.mean_slope - down.mean_slope) / (2 * h) == pytest.approx(2 * exact.cov_slope[i], abs=3e-7)
    push = np.diag(np.arange(1.0, p.dim + 1)) + 0.5 * (np.ones((p.dim, p.dim)) - np.eye(p.dim))
    up, down = (critic.expect(Gaussian(law.mean, law.cov + s * h * push)).value for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx((exact.cov_slope * push).sum(), abs=3e-7)


# --- the envelope ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("critics", "p", "q"), CASES)
def test_the_gradient_is_that_of_the_frozen_witness(critics, p, q):
    h = 1e-5
    slope, cov_slope = ipm.gradient(critics, p, q)
    for i, e in enumerate(np.eye(p.dim)):
        up, down = (critics.distance(Gaussian(p.mean + s * h * e, p.cov), q) for s in (1, -1))
        assert slope[i] == pytest.approx((up - down) / (2 * h), abs=1e-8)
    if p.dim == 1 or critics not in (W1, TV):  # those have no closed form for other covariances
        push = np.eye(p.dim) + 0.3 * (np.ones((p.dim, p.dim)) - np.eye(p.dim))
        up, down = (critics.distance(Gaussian(p.mean, p.cov + s * h * push), q) for s in (1, -1))
        assert (cov_slope * push).sum() == pytest.approx((up - down) / (2 * h), abs=2e-7)


def test_a_witness_that_follows_the_mean_is_no_frozen_one():
    """d/dm of E_p f_m, without the term -E_q f_m that makes the second part of SFT-PG's eq. (17) vanish."""
    p, q, h = line(1.0, 1.0), line(0.0, 0.6), 1e-5
    followed = [W1.witness(line(m, 1.0), q).expect(line(m, 1.0)).value for m in (1.0 + h, 1.0 - h)]
    assert abs((followed[0] - followed[1]) / (2 * h) - ipm.gradient(W1, p, q)[0][0]) > 0.1


def test_frozen_critic_of_a_point_mass_is_not_differentiable_though_w1_is():
    p, q, h = Gaussian.scalar(0.3, 0.0), line(0.0, 1.0), 1e-5
    up, down = (W1.distance(Gaussian.scalar(0.3 + s * h, 0.0), q) for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(erf(0.3 / math.sqrt(2)), abs=1e-9)
    frozen = W1.witness(p, q)
    assert frozen([[0.2], [0.3], [0.4]]) == pytest.approx([-0.1, 0.0, -0.1], abs=1e-14)
    with pytest.raises(ValueError, match="point mass at 0.3"):
        ipm.gradient(W1, p, q)


# --- kinks -------------------------------------------------------------------------------------------------------


def quotients(critics, p, q, v, h=1e-6):
    at = critics.distance(p, q)
    up, down = (critics.distance(Gaussian(p.mean + s * h * np.asarray(v), p.cov), q) for s in (1, -1))
    return (at - down) / h, (up - at) / h


@pytest.mark.parametrize("critics", ALL)
@pytest.mark.parametrize("v", [[1.0], [0.3, -1.0], [1.0, 1.0]])
def test_at_p_equal_q_the_slopes_are_opposite(critics, v):
    p = line(0.4, 0.6) if len(v) == 1 else PLANE[0]
    left, right = ipm.one_sided_slopes(critics, p, p, v)
    assert right > 0.3
    assert left == pytest.approx(-right, rel=1e-12)
    assert (left, right) == pytest.approx(quotients(critics, p, p, v), abs=1e-6)
    with pytest.raises(ValueError, match="towards = None"):
        ipm.gradient(critics, p, p)


def test_slopes_at_the_kink_in_closed_form():
    p = line(0.4, 0.5)
    slopes = [ipm.one_sided_slopes(critics, p, p, [1.0])[1] for critics in (L2, L1, W1, MMD, TV)]
    assert slopes == pytest.approx([1, 1, 1, 0.8429903906143472, math.sqrt(2 / math.pi) / 0.5], rel=1e-14)


@pytest.mark.parametrize(("critics", "p", "q"), CASES)
def test_away_from_kinks_the_slopes_agree(critics, p, q):
    v = np.array([0.7, -0.4])[: p.dim]
    left, right = ipm.one_sided_slopes(critics, p, q, v)
    assert left == right == pytest.approx(ipm.gradient(critics, p, q)[0] @ v, abs=1e-14)
    assert ipm.one_sided_slopes(critics, p, q, 0 * v) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("v", "slopes"), [([-1.0, 1.0], (-1.0, 1.0)), ([2.0, 1.0], (1.0, 2.0)), ([1.0, 1.0], (1.0, 1.0))]
)
def test_a_tie_away_from_p_equal_q(v, slopes):
    p, q = Gaussian([1.3, 0.7], COV), Gaussian([0.3, -0.3], COV)  # m_p - m_q = (1, 1) up to rounding
    assert ipm.one_sided_slopes(L1, p, q, v) == slopes
    assert quotients(L1, p, q, v) == pytest.approx(slopes, abs=1e-8)
    with pytest.raises(ValueError, match="kink"):
        ipm.gradient(L1, p, q)


def test_a_tie_of_opposite_signs():
    p, q, v = Gaussian([1.0, -1.0], COV), Gaussian([0.0, 0.0], COV), [1.0, 1.0]
    assert ipm.one_sided_slopes(L1, p, q, v) == (-1.0, 1.0)
    assert quotients(L1, p, q, v) == pytest.approx((-1.0, 1.0), abs=1e-8)


@pytest.mark.parametrize("critics", [W1, MMD, TV])
def test_equal_means_and_different_variances_are_no_kink(critics):
    assert ipm.one_sided_slopes(critics, line(0.2, 1.0), line(0.2, 0.6), [1.0]) == pytest.approx((0, 0), abs=1e-14)


# --- Theorem 4.2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critics", ALL)
def test_lipschitz_constant_is_the_least_uniform_one(critics):
    rng = Stream(6).child("lipschitz").generator()
    for cov in (COV, OTHER):
        bound = critics.lipschitz(cov)
        best = 0.0
        for _ in range(400):
            m, step = rng.normal(size=2), rng.normal(size=2) * 10.0 ** rng.uniform(-4, 1)
            rate = critics.distance(Gaussian(m + step, cov), Gaussian(m, cov)) / np.linalg.norm(step)
            assert rate <= bound * (1 + 1e-9)
            best = max(best, rate)
        assert best > 0.99 * bound


def random_triples(d, n=150):
    rng = Stream(6).child("surrogate").child(str(d)).generator()
    cov = COV if d == 2 else np.array([[0.49]])
    for _ in range(n):
        scale = 10.0 ** rng.uniform(-2, 0.5)
        yield Gaussian(scale * rng.normal(size=d), cov), Gaussian(np.zeros(d), cov), scale * rng.normal(size=d)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("critics", ALL)
def test_surrogate_bounds_but_never_decreases(critics, d):
    least_rate = math.inf
    for p, q, mean in random_triples(d):
        moved = Gaussian(mean, p.cov)
        upper, before, after = ipm.surrogate(critics, p, q, mean), critics.distance(p, q), critics.distance(moved, q)
        step = critics.lipschitz(p.cov) * np.linalg.norm(mean - p.mean)
        assert after <= upper + 1e-12
        assert upper - before >= step - 1e-12
        # and it is no better than the triangle inequality, which needs no critic
        assert upper >= before + critics.distance(p, moved) - 1e-12
        least_rate = min(least_rate, (upper - before) / step)
    if d == 1:
        assert least_rate < 1.001  # the 1 cannot be improved


@pytest.mark.parametrize("critics", [L2, L1, W1, TV, MMD])
def test_the_constant_two_is_sharp(critics):
    """p just right of q and a step to the left: in the limit at p = q the true distance *is* the bound, 2 d - d."""
    q = line(0.0, 1.0)
    for p, towards in ((line(1e-6, 1.0), None), (q, [1.0])):
        truth = critics.distance(line(-1e-3, 1.0), q)
        assert ipm.surrogate(critics, p, q, [-1e-3], towards=towards) == pytest.approx(truth, rel=3e-3)
        assert ipm.surrogate(critics, p, q, [-1e-3], constant=1.9, towards=towards) < 0.95 * truth


def test_without_the_symmetry_of_the_critics_the_step_from_line_2_to_3_fails_but_not_the_bound():
    """A = {0, -x}: the integral of (p_theta - p_theta') (f_theta - f_theta') against 2 Phi_A(p_theta, p_theta')."""
    phi = lambda p, q: max(0.0, -(p - q))  # noqa: E731
    theta, moved, mu = 1.0, -0.5, 0.0
    slope, slope_moved = 0.0, -1.0  # the maximisers for the means theta and moved
    integral = (theta - moved) * (slope - slope_moved)
    assert integral == 1.5 > 2 * phi(theta, moved) == 0.0
    assert phi(moved, mu) <= slope * (moved - mu) + 2 * 1.0 * abs(moved - theta)


def test_no_constant_serves_all_variances_for_bounded_critics():
    constants = [TV.lipschitz([[std**2]]) for std in (1.0, 1e-2, 1e-4)]
    assert constants == pytest.approx([constants[0], 100 * constants[0], 1e4 * constants[0]], rel=1e-12)
    assert TV.distance(line(1e-3, 1e-4), line(0.0, 1e-4)) > 1.99


# --- the Hilbert-space replacement -------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("critics", [MMD, L2])
def test_pythagoras_in_the_hilbert_space(critics, d):
    wrong = 0.0
    for p, q, mean in random_triples(d):
        moved = Gaussian(mean, 1.2 * p.cov)  # any laws: nothing here needs a location family
        truth = critics.distance(moved, q)
        g = ipm.gap(critics.witness(p, q), moved, q)
        perpendicular = ipm.perpendicular_squared(critics, p, q, moved)
        assert truth**2 == pytest.approx(g**2 + perpendicular, abs=1e-13)
        wrong = max(wrong, abs(g**2 + critics.distance(moved, p) ** 2 - truth**2))
        assert truth <= ipm.hilbert_surrogate(critics, p, q, moved) + 1e-12
    assert wrong > 0.1  # the whole distance instead of its perpendicular part


@pytest.mark.parametrize("h", [1e-1, 1e-2, 1e-3])
def test_hilbert_surrogate_is_tight_to_second_order(h):
    p, q = Gaussian([1.0, 0.2], COV), Gaussian([0.0, 0.0], COV)
    moved = Gaussian(p.mean + h * np.array([-1.0, 0.5]), COV)
    excess = ipm.hilbert_surrogate(MMD, p, q, moved) - MMD.distance(moved, q)
    assert 0 <= excess <= h**4
    assert ipm.hilbert_surrogate(MMD, p, q, moved) < MMD.distance(p, q) - 0.1 * h  # the step is certified
    assert ipm.perpendicular_squared(MMD, p, q, moved) <= (MMD.lipschitz(COV) * 1.25**0.5 * h) ** 2


def test_reference_certificate():
    """theta = 1, theta' = 0.8, mu = 0: eq. (19) certifies nothing, the replacement does (an independent derivation)."""
    p, q, moved = line(1.0, 0.5), line(0.0, 0.5), line(0.8, 0.5)
    assert MMD.distance(p, q) == pytest.approx(0.7469481457, abs=1e-10)
    assert MMD.distance(moved, q) == pytest.approx(0.6233939631, abs=1e-10)
    assert ipm.surrogate(MMD, p, q, [0.8]) == pytest.approx(0.9519720677, abs=1e-10)
    assert ipm.hilbert_surrogate(MMD, p, q, moved) == pytest.approx(0.6234543679, abs=1e-10)


# --- along a chain -----------------------------------------------------------------------------------------------


def complex_law(chain, theta):
    """Mean and covariance of x_0 for complex theta."""
    mean, cov = chain.mean_T.astype(complex), chain.cov_T.astype(complex)
    for t in reversed(range(chain.steps)):
        matrix = chain.A[t] + (0 if chain.N is None else sum(x * n for x, n in zip(theta, chain.N[t], strict=True)))
        mean = matrix @ mean + chain.B[t] @ theta + chain.c[t]
        cov = matrix @ cov @ matrix.T + chain.std[t] ** 2 * np.eye(chain.dim)
    return mean, cov


def complex_mmd(width, mean, cov, q):
    def kernel(c, delta):
        total = np.eye(len(delta)) + c / width**2
        return np.linalg.det(total) ** -0.5 * np.exp(-delta @ np.linalg.solve(total, delta) / (2 * width**2))

    zero = 0 * mean
    return (kernel(2 * cov, zero) + kernel(2 * q.cov, zero) - 2 * kernel(cov + q.cov, mean - q.mean)) ** 0.5


def complex_w1(mean, cov, q):
    delta, spread = mean[0] - q.mean[0], cov[0, 0] ** 0.5 - q.cov[0, 0] ** 0.5
    ratio = delta / spread
    return delta * erf(ratio / 2**0.5) + spread * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2)


def complex_tv(mean, q):
    delta = mean - q.mean
    return 2 * erf((delta @ np.linalg.solve(q.cov, delta) / 8) ** 0.5)


def complex_step(function, chain):
    h = 1e-30
    return [function(*complex_law(chain, chain.theta + 1j * h * e)).imag / h for e in np.eye(chain.parameters)]


def line_chain(bilinear):
    noise = [[[[0.3]], [[0.0]]], [[[-0.2]], [[0.5]]], [[[0.0]], [[0.1]]]] if bilinear else None
    A, B, c = [[[0.9]], [[0.7]], [[1.1]]], [[[1.0, 0.2]], [[0.4, -0.6]], [[-0.5, 0.9]]], [[0.1], [0.0], [-0.2]]
    return LinearGaussianChain(A, B, c, [0.3, 0.5, 0.4], [0.4, 0.7], [0.2], [[1.0]], noise)


PLANE_CHAINS = [additive_instance()[0], bilinear_instance()[0]]


@pytest.mark.parametrize("chain", PLANE_CHAINS, ids=["additive", "bilinear"])
def test_chain_gradient_in_the_plane(chain):
    target = Gaussian(np.arange(1.0, chain.dim + 1) / 4, np.eye(chain.dim) * 0.8)
    law = ipm.terminal_law(chain)
    expected = complex_step(lambda m, c: complex_mmd(1.3, m, c, target), chain)
    assert ipm.chain_gradient(chain, ipm.KernelCritics(1.3), target) == pytest.approx(expected, abs=1e-12)
    expected = complex_step(lambda m, c: ((m - target.mean) @ (m - target.mean)) ** 0.5, chain)
    assert ipm.chain_gradient(chain, L2, target) == pytest.approx(expected, abs=1e-12)
    if chain.additive:
        near = Gaussian(law.mean - 0.3, law.cov)
        expected = complex_step(lambda m, c: complex_tv(m, near), chain)
        assert ipm.chain_gradient(chain, TV, near) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bilinear", [False, True])
def test_chain_gradient_on_the_line(bilinear):
    chain, target = line_chain(bilinear), line(0.1, 0.4)
    expected = complex_step(lambda m, c: complex_w1(m, c, target), chain)
    got = ipm.chain_gradient(chain, W1, target)
    assert got == pytest.approx(expected, abs=1e-12)
    if bilinear:  # the covariance moves as well: forgetting it is found
        frozen = ipm.gradient(W1, ipm.terminal_law(chain), target)[0]
        mean_only = complex_step(lambda m, c: frozen @ m, chain)
        assert np.abs(got - mean_only).max() > 0.05


@pytest.mark.parametrize("critics", ALL)
def test_chain_slopes_at_the_target(critics):
    chain, v, h = additive_instance()[0], np.array([0.6, -1.0]), 1e-6
    law = ipm.terminal_law(chain)
    left, right = ipm.chain_one_sided_slopes(chain, critics, law, v)
    moved = Gaussian(np.real(complex_law(chain, chain.theta + h * v)[0]), law.cov)
    assert right == pytest.approx(critics.distance(moved, law) / h, rel=1e-5)
    assert left == pytest.approx(-right, rel=1e-12)
    with pytest.raises(ValueError, match="kink"):
        ipm.chain_gradient(chain, critics, law)


# --- bad input ---------------------------------------------------------------------------------------------------

WIDE = Gaussian([0.0, 0.0], OTHER)
FLAT = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ipm.LinearCritics("l3"), "norm = 'l3': must be 'l2' or 'l1'"),  # type: ignore[arg-type]
        (lambda: ipm.KernelCritics(0.0), "width = 0.0: must lie in"),
        (lambda: W1.distance(line(0.0, 1.0), WIDE), "q has dimension 2"),
        (lambda: W1.distance(PLANE[0], WIDE), "different covariances: W1 must have equal ones"),
        (lambda: TV.distance(PLANE[0], WIDE), "different covariances: total variation"),
        (lambda: TV.distance(FLAT, FLAT), "must be positive definite"),
        (lambda: TV.distance(line(0.0, 1.0), line(0.0, 0.0)), "cov = 0: must be positive"),
        (lambda: TV.lipschitz(FLAT.cov), "must be positive definite"),
        (lambda: MMD.lipschitz([1.0]), "cov has shape"),
        (lambda: TV.witness(*PLANE).expect(Gaussian([0.0, 0.0], np.zeros((2, 2)))), "critic with a jump"),
        (lambda: W1.witness(PLANE[0], PLANE[0], [0.0, 0.0]), "towards = .*must not be zero"),
        (lambda: W1.witness(PLANE[0], PLANE[0], [1.0]), "towards has shape"),
        (lambda: ipm.one_sided_slopes(MMD, *PLANE, [1.0]), "direction has shape"),
        (lambda: ipm.surrogate(MMD, *PLANE, [1.0]), "mean has shape"),
        (lambda: ipm.hilbert_surrogate(L1, *PLANE, WIDE), "must be the unit ball of a Hilbert space"),
        (lambda: ipm.hilbert_surrogate(MMD, WIDE, WIDE, WIDE), "kink"),
        (lambda: MMD.witness(*PLANE)([1.0]), "points has shape"),
        (lambda: ipm.chain_one_sided_slopes(line_chain(True), W1, line(0.0, 1.0), [1.0, 0.0]), "must be additive"),
        (lambda: ipm.chain_one_sided_slopes(line_chain(False), W1, line(0.0, 1.0), [1.0]), "direction has shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
