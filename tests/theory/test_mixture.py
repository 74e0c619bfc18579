import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from theory.mixture import GaussianMixture

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 3)
levels = st.floats(0.01, 0.99)

LINE = GaussianMixture([0.2, 0.5, 0.3], [[-2.0], [0.5], [1.5]], [[[0.3]], [[1.0]], [[0.1]]])
AXIS = np.linspace(-25, 25, 20001)
STEP = 50 / 20000


def random_mixture(seed: int, dim: int) -> GaussianMixture:
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.2, 1, 3)
    factors = generator.uniform(-1, 1, (3, dim, dim))
    covs = factors @ np.swapaxes(factors, 1, 2) + 0.2 * np.eye(dim)
    return GaussianMixture(weights / weights.sum(), generator.uniform(-2, 2, (3, dim)), covs)


def points(seed: int, dim: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-3, 3, (4, dim))


@given(seeds, dims)
def test_log_density_is_that_of_the_components(seed: int, dim: int) -> None:
    mixture, x = random_mixture(seed, dim), points(seed + 1, dim)
    parts = zip(mixture.weights, mixture.means, mixture.covs, strict=True)
    density = sum(w * multivariate_normal(m, c).pdf(x) for w, m, c in parts)
    np.testing.assert_allclose(mixture.log_density(x), np.log(density), atol=1e-10)


@given(seeds, dims, levels)
def test_score_is_the_gradient_of_the_log_density(seed: int, dim: int, level: float) -> None:
    mixture, x = random_mixture(seed, dim), points(seed + 1, dim)
    noisy, h = mixture.noised(level), 1e-3

    def slope(i: int) -> np.ndarray:
        """Richardson's extrapolation of central differences, of order h^4."""
        e = np.eye(dim)[i]
        near, far = (
            (noisy.log_density(x + k * h * e) - noisy.log_density(x - k * h * e)) / (2 * k * h) for k in (1, 2)
        )
        return (4 * near - far) / 3

    expected = np.stack([slope(i) for i in range(dim)], axis=1)
    np.testing.assert_allclose(mixture.noised_score(x, level), expected, atol=1e-7, rtol=1e-7)


def test_score_far_from_every_component_does_not_underflow() -> None:
    np.testing.assert_allclose(LINE.score([[1e3]]), [[-(1e3 - 0.5) / 1.0]], rtol=1e-12)


def test_moments_equal_quadrature() -> None:
    density = np.exp(LINE.log_density(AXIS[:, None])) * STEP
    mean = np.sum(density * AXIS)
    assert density.sum() == pytest.approx(1, abs=1e-12)
    assert LINE.mean()[0] == pytest.approx(mean, abs=1e-12)
    assert LINE.cov()[0, 0] == pytest.approx(np.sum(density * (AXIS - mean) ** 2), abs=1e-12)


@given(seeds, dims)
def test_moments_are_those_of_the_weighted_components(seed: int, dim: int) -> None:
    mixture = random_mixture(seed, dim)
    second = sum(w * (c + np.outer(m, m)) for w, m, c in zip(mixture.weights, mixture.means, mixture.covs, strict=True))
    mean = mixture.mean()
    np.testing.assert_allclose(mixture.cov(), second - np.outer(mean, mean), atol=1e-12)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_noised_law_and_denoiser_equal_the_convolution(level: float) -> None:
    """Integrate p(x_0) N(x; sqrt(a) x_0, 1 - a) over x_0, and x_0 times it."""
    x = np.array([-1.7, 0.0, 0.9, 2.3])
    prior = np.exp(LINE.log_density(AXIS[:, None])) * STEP
    kernel = np.exp(-((x[:, None] - math.sqrt(level) * AXIS) ** 2) / (2 * (1 - level)))
    kernel /= math.sqrt(2 * math.pi * (1 - level))
    density = kernel @ prior
    np.testing.assert_allclose(np.exp(LINE.noised(level).log_density(x[:, None])), density, rtol=1e-11)
    denoised = (kernel @ (prior * AXIS)) / density
    np.testing.assert_allclose(LINE.posterior_mean(x[:, None], level)[:, 0], denoised, rtol=1e-10, atol=1e-11)


@given(seeds, dims, levels)
def test_denoiser_obeys_tweedie(seed: int, dim: int, level: float) -> None:
    mixture, x = random_mixture(seed, dim), points(seed + 1, dim)
    tweedie = (x + (1 - level) * mixture.noised_score(x, level)) / math.sqrt(level)
    np.testing.assert_allclose(mixture.posterior_mean(x, level), tweedie, atol=1e-11)


@given(seeds, dims, levels, levels)
def test_noising_twice_is_noising_once(seed: int, dim: int, first: float, second: float) -> None:
    mixture = random_mixture(seed, dim)
    twice, once = mixture.noised(first).noised(second), mixture.noised(first * second)
    np.testing.assert_allclose(twice.means, once.means, atol=1e-14)
    np.testing.assert_allclose(twice.covs, once.covs, atol=1e-14)


@given(seeds, dims)
def test_the_ends_of_the_noise_range(seed: int, dim: int) -> None:
    mixture, x = random_mixture(seed, dim), points(seed + 1, dim)
    np.testing.assert_allclose(mixture.noised(1.0).covs, mixture.covs, atol=0)
    np.testing.assert_allclose(mixture.posterior_mean(x, 1.0), x, atol=1e-11)
    np.testing.assert_allclose(mixture.noised_score(x, 0.0), -x, atol=1e-12)
    np.testing.assert_allclose(mixture.posterior_mean(x, 0.0), np.tile(mixture.mean(), (4, 1)), atol=1e-12)


def test_point_masses_have_a_score_once_noised() -> None:
    dots = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], np.zeros((2, 2, 2)))
    x = np.array([[0.4, -0.7]])
    denoised = np.tanh(math.sqrt(0.64) * 0.4 / 0.36)
    np.testing.assert_allclose(dots.posterior_mean(x, 0.64), [[denoised, 0.0]], atol=1e-14)
    with pytest.raises(ValueError, match="covs = .*: must be positive definite"):
        dots.score(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture([1.2, -0.2], [[0], [1]], [[[1]], [[1]]]), r"weights = .*: must be positive and sum"),
        (lambda: GaussianMixture([0.5, 0.5], [[0]], [[[1]]]), r"means, covs have shapes"),
        (lambda: GaussianMixture([1.0], [[0, 0]], [[[1]]]), r"means, covs have shapes \(1, 2\), \(1, 1, 1\)"),
        (lambda: GaussianMixture([0.5, 0.5], [[0], [1]], [[[1]], [[-1]]]), r"covs\[1\] = .*: must be positive semi"),
        (lambda: LINE.noised(1.1), r"alpha_bar = 1.1: must lie in \[0.0, 1.0\]"),
        (lambda: LINE.noised_score([[0.0]], math.nan), r"alpha_bar = nan: must lie in"),
        (lambda: LINE.score([[0.0, 1.0]]), r"x has shape \(1, 2\): must be \(n, 1\)"),
        (lambda: LINE.log_density([0.0]), r"x has shape \(1,\): must be non-empty with 2 axes"),
        (lambda: LINE.log_density([[math.inf]]), r"x = \[\[inf\]\]: must be finite"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
