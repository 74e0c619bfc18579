import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import multivariate_normal, ortho_group

from theory.gaussian import Gaussian, affine, condition, entropy, kl, tilt, w2_squared

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 4)


def random_law(seed: int, dim: int) -> Gaussian:
    generator = np.random.default_rng(seed)
    factor = generator.uniform(-1, 1, (dim, dim))
    return Gaussian(generator.uniform(-2, 2, dim), factor @ factor.T + 0.1 * np.eye(dim))


def random_bijection(seed: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with singular values in [1/2, 2] and an offset."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.normal(size=(dim, dim)))[0] for _ in range(2))
    return left * generator.uniform(0.5, 2, dim) @ right, generator.uniform(-1, 1, dim)


@given(seeds, dims)
def test_kl_equals_the_textbook_formula_and_vanishes_on_itself(seed: int, dim: int) -> None:
    p, q = random_law(seed, dim), random_law(seed + 1, dim)
    inverse = np.linalg.inv(q.cov)
    shift = p.mean - q.mean
    log_ratio = np.linalg.slogdet(q.cov)[1] - np.linalg.slogdet(p.cov)[1]
    expected = 0.5 * (np.trace(inverse @ p.cov) - dim + shift @ inverse @ shift + log_ratio)
    assert kl(p, q) == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert kl(p, q) > 0
    assert kl(p, p) == 0


@given(seeds, dims)
def test_kl_is_invariant_under_an_affine_bijection(seed: int, dim: int) -> None:
    p, q = random_law(seed, dim), random_law(seed + 1, dim)
    matrix, offset = random_bijection(seed + 2, dim)
    assert kl(affine(p, matrix, offset), affine(q, matrix, offset)) == pytest.approx(kl(p, q), rel=1e-10)


@given(seeds, st.integers(2, 4))
def test_kl_and_entropy_obey_the_chain_rule(seed: int, dim: int) -> None:
    """KL(joint) = KL(marginal) + E KL(conditional); for Gaussians the last is a KL of averaged quadratics."""
    p, q = random_law(seed, dim), random_law(seed + 1, dim)
    marginal_p, marginal_q = (affine(law, np.eye(dim)[:1], [0.0]) for law in (p, q))
    # The conditional KL is quadratic in the observed value, so three nodes of Gauss-Hermite average it exactly.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    values = marginal_p.mean[0] + math.sqrt(marginal_p.cov[0, 0]) * nodes
    conditional = [kl(condition(p, [0], [v]), condition(q, [0], [v])) for v in values]
    average = float(np.dot(weights, conditional) / weights.sum())
    assert kl(marginal_p, marginal_q) + average == pytest.approx(kl(p, q), rel=1e-9)
    assert entropy(marginal_p) + entropy(condition(p, [0], [1.7])) == pytest.approx(entropy(p), abs=1e-10)


@given(seeds, st.integers(2, 4))
def test_kl_does_not_grow_under_a_channel(seed: int, dim: int) -> None:
    p, q = random_law(seed, dim), random_law(seed + 1, dim)
    generator = np.random.default_rng(seed + 2)
    matrix = generator.uniform(-1, 1, (dim - 1, dim))
    noise = 0.1 * np.eye(dim - 1)
    assert kl(affine(p, matrix, noise[0], noise), affine(q, matrix, noise[0], noise)) <= kl(p, q) * (1 + 1e-12)


def test_kl_keeps_its_relative_accuracy_for_close_laws() -> None:
    x = 1e-6
    p = Gaussian.diagonal([0.3, -2.0], [2.0 * (1 + x), 5.0])
    expected = 0.5 * (x**2 / 2 - x**3 / 3)
    assert kl(p, Gaussian.diagonal([0.3, -2.0], [2.0, 5.0])) == pytest.approx(expected, rel=1e-3)


def test_kl_of_degenerate_laws() -> None:
    line = Gaussian([1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    wider = Gaussian([1.0, 2.0], [[3.0, 6.0], [6.0, 12.0]])
    moved_along = Gaussian([2.0, 4.0], [[1.0, 2.0], [2.0, 4.0]])
    moved_off = Gaussian([1.0, 2.1], line.cov)
    full = Gaussian([0.0, 0.0], np.eye(2))
    point = Gaussian([1.0, 2.0], np.zeros((2, 2)))
    assert kl(line, full) == kl(full, line) == kl(line, moved_off) == kl(point, line) == math.inf
    assert kl(line, point) == kl(point, Gaussian([1.0, 2.5], np.zeros((2, 2)))) == math.inf
    assert kl(point, point) == 0
    assert kl(line, line) == pytest.approx(0, abs=1e-15)
    assert kl(line, wider) == pytest.approx(0.5 * (1 / 3 - 1 + math.log(3)), rel=1e-12)
    assert kl(moved_along, line) == pytest.approx(0.5, rel=1e-12)


@given(seeds, dims)
def test_w2_equals_the_bures_formula(seed: int, dim: int) -> None:
    p, q = random_law(seed, dim), random_law(seed + 1, dim)
    root = sqrtm(q.cov)
    cross = np.trace(np.real(sqrtm(root @ p.cov @ root)))
    expected = np.sum((p.mean - q.mean) ** 2) + np.trace(p.cov) + np.trace(q.cov) - 2 * cross
    assert w2_squared(p, q) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert w2_squared(q, p) == pytest.approx(w2_squared(p, q), rel=1e-12)
    assert w2_squared(p, p) == pytest.approx(0, abs=1e-24)


@given(seeds, dims)
def test_w2_obeys_the_triangle_inequality(seed: int, dim: int) -> None:
    p, q, r = (random_law(seed + k, dim) for k in range(3))
    legs = math.sqrt(w2_squared(p, q)) + math.sqrt(w2_squared(q, r))
    assert math.sqrt(w2_squared(p, r)) <= legs * (1 + 1e-12)


@given(seeds, dims)
def test_w2_of_a_symmetric_positive_map_is_its_transport_cost(seed: int, dim: int) -> None:
    """A symmetric positive definite map is the gradient of a convex function, hence optimal (Brenier)."""
    p, transport = random_law(seed, dim), random_law(seed + 1, dim).cov
    excess = transport - np.eye(dim)
    image = affine(p, transport, -transport @ p.mean + p.mean + 1.0)
    assert w2_squared(p, image) == pytest.approx(dim + np.trace(excess @ p.cov @ excess), rel=1e-9)


def test_w2_keeps_its_relative_accuracy_for_close_and_degenerate_laws() -> None:
    near = Gaussian.diagonal([1.0, 0.0], [(1 + 1e-8) ** 2, 4.0])
    assert w2_squared(near, Gaussian.diagonal([1.0, 0.0], [1.0, 4.0])) == pytest.approx(1e-16, rel=1e-6)
    assert w2_squared(Gaussian.scalar(2.0, 0.0), Gaussian.scalar(-1.0, 0.0)) == 9


@given(seeds, dims)
def test_entropy_shifts_by_the_log_determinant(seed: int, dim: int) -> None:
    p = random_law(seed, dim)
    matrix, offset = random_bijection(seed + 1, dim)
    expected = entropy(p) + np.linalg.slogdet(matrix)[1]
    assert entropy(affine(p, matrix, offset)) == pytest.approx(expected, abs=1e-10)
    assert entropy(p) == pytest.approx(float(multivariate_normal(p.mean, p.cov).entropy()), abs=1e-10)


def test_entropy_of_a_degenerate_law() -> None:
    assert entropy(Gaussian([0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]])) == -math.inf


@given(seeds, st.integers(2, 4))
def test_conditioning_divides_the_densities(seed: int, dim: int) -> None:
    p = random_law(seed, dim)
    x = np.random.default_rng(seed + 1).uniform(-1, 1, dim)
    observed = [dim - 1, 0][: dim - 1]
    free = [i for i in range(dim) if i not in observed]
    law = condition(p, observed, x[observed])
    joint = multivariate_normal(p.mean, p.cov).logpdf(x)
    marginal = multivariate_normal(p.mean[observed], p.cov[np.ix_(observed, observed)]).logpdf(x[observed])
    assert multivariate_normal(law.mean, law.cov).logpdf(x[free]) == pytest.approx(joint - marginal, abs=1e-9)


@given(seeds, dims)
def test_tilting_multiplies_the_density(seed: int, dim: int) -> None:
    """tilted(x) = p(x) exp(b.x - x'Bx/2 - log Z) at any x, which checks the mean, the covariance and log Z at once."""
    p = random_law(seed, dim)
    generator = np.random.default_rng(seed + 1)
    b, x = generator.uniform(-1, 1, (2, dim))
    factor = generator.uniform(-1, 1, (dim, dim))
    # Concave and convex directions, the latter weak enough to be normalisable.
    quadratic = factor @ factor.T - 0.9 * np.eye(dim) / np.linalg.eigvalsh(p.cov)[-1]
    law, log_normaliser = tilt(p, b, quadratic)
    exponent = b @ x - 0.5 * x @ quadratic @ x
    expected = multivariate_normal(p.mean, p.cov).logpdf(x) + exponent - log_normaliser
    assert multivariate_normal(law.mean, law.cov).logpdf(x) == pytest.approx(expected, abs=1e-8)


def test_tilt_equals_quadrature() -> None:
    p = Gaussian([0.4, -0.3], [[1.0, 0.6], [0.6, 0.8]])
    b, quadratic = np.array([0.7, -1.1]), np.array([[0.5, 0.9], [0.9, -0.2]])
    law, log_normaliser = tilt(p, b, quadratic)
    axis = np.linspace(-14, 14, 1401)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    exponent = points @ b - 0.5 * np.einsum("...i,ij,...j->...", points, quadratic, points)
    density = np.exp(multivariate_normal(p.mean, p.cov).logpdf(points) + exponent) * (axis[1] - axis[0]) ** 2
    total = density.sum()
    mean = np.einsum("ab,abi->i", density, points) / total
    cov = np.einsum("ab,abi,abj->ij", density, points - mean, points - mean) / total
    assert log_normaliser == pytest.approx(math.log(total), abs=1e-11)
    np.testing.assert_allclose(law.mean, mean, atol=1e-10)
    np.testing.assert_allclose(law.cov, cov, atol=1e-10)


def test_tilt_of_a_degenerate_law_stays_on_its_support() -> None:
    line = Gaussian([1.0, 0.0], [[1.0, 2.0], [2.0, 4.0]])
    law, log_normaliser = tilt(line, [0.3, -0.2], [[0.5, 0.0], [0.0, 1.0]])
    # Along (1, 0) + (1, 2) u, u ~ N(0, 1): exponent 0.05 - 0.6 u - 4.5 u^2/2 on the line.
    along, expected = tilt(Gaussian.scalar(0.0, 1.0), [0.3 - 0.4 - 0.5], [[0.5 + 4.0]])
    image = affine(along, [[1.0], [2.0]], [1.0, 0.0])
    np.testing.assert_allclose(law.mean, image.mean, atol=1e-12)
    np.testing.assert_allclose(law.cov, image.cov, atol=1e-12)
    assert log_normaliser == pytest.approx(expected + 0.3 - 0.25, abs=1e-12)


def test_the_arrays_of_a_law_cannot_be_changed() -> None:
    law = Gaussian([0.0, 1.0], np.diag([1.0, 2.0]))
    with pytest.raises(ValueError, match="read-only"):
        law.cov[0, 0] = -1.0
    with pytest.raises(ValueError, match="read-only"):
        law.mean[0] = 1.0


def test_rotated_covariances_are_accepted_at_every_scale() -> None:
    rotation = ortho_group.rvs(6, random_state=np.random.default_rng(1))
    for scale in (1e-12, 1.0, 1e12):
        variances = scale * np.array([0, 0, 1, 2, 3, 4.0])
        law = Gaussian(np.zeros(6), rotation @ np.diag(variances) @ rotation.T)
        np.testing.assert_allclose(np.linalg.eigvalsh(law.cov), variances, atol=1e-14 * scale)


TWO = Gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian.scalar(0.0, -1.0), r"variances = \[-1.0\]: must be non-negative"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), r"cov = .*: must be positive semi-definite"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.4, 1.0]]), r"cov = .*: must be symmetric"),
        (lambda: Gaussian([0.0, 0.0], [[1.0]]), r"cov has shape \(1, 1\): must be \(2, 2\)"),
        (lambda: Gaussian([[0.0]], [[1.0]]), r"mean has shape \(1, 1\): must be non-empty with 1 axes"),
        (lambda: Gaussian([math.nan], [[1.0]]), r"mean = \[nan\]: must be finite"),
        (lambda: Gaussian(["a"], [[1.0]]), r"mean = \['a'\]: must be an array of real numbers"),
        (lambda: Gaussian([1j], [[1.0]]), r"mean = \[1j\]: must be an array of real numbers"),
        (lambda: kl(TWO, Gaussian.scalar(0, 1)), r"q has dimension 1: must be that of p, 2"),
        (lambda: w2_squared(TWO, Gaussian.scalar(0, 1)), r"q has dimension 1: must be that of p, 2"),
        (lambda: affine(TWO, [[1.0]], [0.0]), r"matrix has shape \(1, 1\): must be \(1, 2\)"),
        (lambda: affine(TWO, np.eye(2), [0.0, 0.0], -np.eye(2)), r"noise_cov = .*: must be positive semi-definite"),
        (lambda: condition(TWO, [0, 1], [0.0, 0.0]), r"observed = \[0, 1\]: must be distinct indices in 0..1"),
        (lambda: condition(TWO, [2], [0.0]), r"observed = \[2\]: must be distinct indices"),
        (lambda: condition(TWO, [0], [0.0, 1.0]), r"values has 2 entries"),
        (lambda: condition(Gaussian.diagonal([0, 0], [0, 1]), [0], [0.0]), r"observed = \[0\]: the covariance"),
        (lambda: tilt(TWO, [0.0, 0.0], -0.4 * np.eye(2)), r"quadratic = .*: must leave .* positive definite"),
        (lambda: tilt(TWO, [0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), r"quadratic = .*: must be symmetric"),
        (lambda: tilt(TWO, [0.0], np.eye(2)), r"linear, quadratic have shapes \(1,\), \(2, 2\)"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
