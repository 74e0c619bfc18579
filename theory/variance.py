"""Bias and variance of the gradient estimators, in closed form or by quadrature, on cases small enough to be exact.

Notation: one step of the chain is x = theta + s * eps, eps ~ N(0, I); parameter noise is theta + mu * xi. FO is the
pathwise (first-order) estimator, HO the score of the chain's own noise (half-order), ZO the one-sided score of the
parameter noise (zeroth-order), g_t the part of the gradient that belongs to step t of the chain t = T..1. Where an
array runs over steps, index 0 is step t = 1. Variances of vectors are traces of covariances. The statements of RLR
(Propositions 4.1 and 4.2, section 4.2) are proved, corrected or refuted in docs/variance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from theory import checked

Array = npt.NDArray[np.float64]
Field = Callable[[Array], Array]
"""A function of n points at once: (n, d) to (n,) for a reward, (n, d) for its gradient, (n, d, d) for its Hessian."""
Noise = Literal["gaussian", "rademacher"]


def _positive(name: str, value: float) -> None:
    checked.scalar(name, value, 0.0, math.inf, closed="()")


def _not_negative(name: str, value: float) -> None:
    checked.scalar(name, value, 0.0, math.inf, closed="[)")


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    return brentq(excess, low, high, xtol=1e-15, rtol=1e-15)


# --- the sine example --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SineMoments:
    """Means and variances of the three estimators for R = sin(k x), T = 1."""

    mean: float  # of FO and of HO: the gradient of E R
    smoothed_mean: float  # of ZO: the gradient of the smoothed E R
    first_order: float
    half_order: float
    zeroth_order: float


def sine_moments(k: float, theta: float, s: float, mu: float) -> SineMoments:
    """Exact means and variances of FO, HO and ZO for x = theta + s eps and R = sin(k x).

    Raises ValueError unless k, s and mu are positive. Derived in docs/variance.md, "The sine example".

    >>> moments = sine_moments(k=3.0, theta=math.pi / 12, s=1.0, mu=0.6)
    >>> round(moments.first_order, 9), round(moments.zeroth_order, 9)
    (4.499444656, 1.388867139)
    """
    _positive("k", k)
    _positive("s", s)
    _positive("mu", mu)
    sampling, parameter = (k * s) ** 2, (k * mu) ** 2
    cosine = math.cos(2 * k * theta)
    mean = k * math.exp(-sampling / 2) * math.cos(k * theta)
    smoothed_mean = mean * math.exp(-parameter / 2)
    first = k**2 * (1 + cosine * math.exp(-2 * sampling)) / 2
    half = (1 - cosine * (1 - 4 * sampling) * math.exp(-2 * sampling)) / (2 * s**2)
    zeroth = (1 - cosine * (1 - 4 * parameter) * math.exp(-2 * (sampling + parameter))) / (2 * mu**2)
    return SineMoments(mean, smoothed_mean, first - mean**2, half - mean**2, zeroth - smoothed_mean**2)


def first_half_crossover(cosine: float) -> float:
    """The value of k s at which Var FO = Var HO in the sine example, for c = cos(2 k theta); FO is smaller below it.

    Raises ValueError unless -1 <= c <= 1. The root is unique: docs/variance.md, "The sine example".

    >>> [round(first_half_crossover(c), 9) for c in (1.0, 0.0, -1.0)]
    [1.108986217, 1.0, 0.851153431]
    """
    checked.scalar("cosine", cosine, -1.0, 1.0)

    def excess(product: float) -> float:
        return (product - 1) + cosine * (1 - 3 * product) * math.exp(-2 * product)

    # (k s)^2 lies in (1/2, 2) for every c, by the monotone form of the equation.
    return math.sqrt(_root(excess, 0.5, 2.0))


def first_zeroth_crossover(k: float, s: float) -> float:
    """The mu at which Var FO = Var ZO in the sine example with cos(2 k theta) = 0; FO is smaller below it.

    Raises ValueError unless k and s are positive. The root is unique: docs/variance.md, "The sine example".

    >>> round(first_zeroth_crossover(1.0, 0.5), 9)
    2.078039786
    """
    _positive("k", k)
    _positive("s", s)
    damping = math.exp(-((k * s) ** 2))
    undamped = -math.expm1(-((k * s) ** 2))

    def excess(product: float) -> float:
        return product * (undamped + damping * math.exp(-product)) - 1

    return math.sqrt(_root(excess, 0.5, 2 / undamped)) / k


# --- when the first-order estimator is the smaller one -----------------------------------------------------------


def loewner_gap(cov_small: Array, cov_large: Array) -> float:
    """Smallest eigenvalue of cov_large - cov_small, (d, d) each: non-negative iff cov_small <= cov_large.

    Raises ValueError unless both are symmetric and of one shape.

    >>> loewner_gap(np.diag([1.0, 2.0]), np.diag([4.0, 2.5]))
    0.5
    """
    if cov_small.shape != cov_large.shape:
        raise ValueError(f"cov_large has shape {cov_large.shape}: must be {cov_small.shape}, that of cov_small")
    for name, cov in (("cov_small", cov_small), ("cov_large", cov_large)):
        if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or not np.allclose(cov, cov.T, rtol=1e-10, atol=1e-12):
            raise ValueError(f"{name} = {cov.tolist()}: must be a symmetric matrix")
    difference = cov_large - cov_small
    return float(np.linalg.eigvalsh((difference + difference.T) / 2)[0])


@dataclass(frozen=True)
class QuadraticCovariances:
    """Covariances (d, d) of the three estimators for a quadratic reward, T = 1."""

    first_order: Array
    half_order: Array
    zeroth_order: Array


def quadratic_covariances(value: float, gradient: Array, hessian: Array, s: float, mu: float) -> QuadraticCovariances:
    """Exact covariances for x = theta + s eps and R - baseline = value + gradient.v + v.hessian v / 2, v = x - theta.

    gradient is (d,), hessian (d, d) symmetric. FO is below both others in Loewner order, whatever the baseline.
    Raises ValueError unless s and mu are positive. Derived in docs/variance.md, "Quadratic rewards".

    >>> covs = quadratic_covariances(0.5, np.array([1.0, -2.0]), np.array([[1.0, 0.3], [0.3, -2.0]]), 0.7, 0.4)
    >>> loewner_gap(covs.first_order, covs.half_order) > 0 and loewner_gap(covs.first_order, covs.zeroth_order) > 0
    True
    """
    _positive("s", s)
    _positive("mu", mu)
    identity = np.eye(gradient.size)
    square = hessian @ hessian

    def score_covariance(total: float, own: float) -> Array:
        """Covariance of (R - baseline) z / own, z the part of variance own^2 of noise whose variance is `total`."""
        mean = value + total * np.trace(hessian) / 2
        second_moment = mean**2 + total * gradient @ gradient + total**2 * np.trace(square) / 2
        return (
            second_moment / own**2 * identity + np.outer(gradient, gradient) + 2 * total * square + 2 * mean * hessian
        )

    return QuadraticCovariances(s**2 * square, score_covariance(s**2, s), score_covariance(s**2 + mu**2, mu))


def gaussian_rule(dimension: int, nodes: int) -> tuple[Array, Array]:
    """Tensor Gauss-Hermite rule of N(0, I): points (nodes^d, d) and weights (nodes^d,) that sum to one.

    Exact for polynomials of degree 2 nodes - 1 in each coordinate. Raises ValueError unless both are at least 1.

    >>> points, weights = gaussian_rule(2, 3)
    >>> round(float(weights @ (points[:, 0] ** 4 * points[:, 1] ** 2)), 12)
    3.0
    """
    checked.count("dimension", dimension, 1)
    checked.count("nodes", nodes, 1)
    roots, masses = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack(np.meshgrid(*[roots] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)
    weights = np.stack(np.meshgrid(*[masses / masses.sum()] * dimension, indexing="ij"), axis=-1)
    return points, weights.reshape(-1, dimension).prod(axis=1)


def _second_moment(weights: Array, rows: Array) -> Array:
    return np.einsum("n,ni,nj->ij", weights, rows, rows)


def first_order_covariance(gradient: Field, theta: Array, s: float, nodes: int = 40) -> Array:
    """Covariance (d, d) of FO = grad R(theta + s eps), theta (d,), by quadrature; ValueError unless s > 0.

    >>> first_order_covariance(lambda x: 2 * x, np.array([1.0]), s=0.5).round(12)
    array([[1.]])
    """
    _positive("s", s)
    points, weights = gaussian_rule(theta.size, nodes)
    rows = gradient(theta + s * points)
    return _second_moment(weights, rows - weights @ rows)


def half_order_covariance(reward: Field, theta: Array, s: float, nodes: int = 40) -> Array:
    """Covariance (d, d) of HO = R(theta + s eps) eps / s, theta (d,), by quadrature; ValueError unless s > 0.

    >>> half_order_covariance(lambda x: x[:, 0] ** 2, np.array([1.0]), s=0.5).round(12)
    array([[21.75]])
    """
    _positive("s", s)
    points, weights = gaussian_rule(theta.size, nodes)
    rows = reward(theta + s * points)[:, None] * points / s
    return _second_moment(weights, rows - weights @ rows)


def zeroth_order_covariance(reward: Field, theta: Array, s: float, mu: float, nodes: int = 40) -> Array:
    """Covariance (d, d) of ZO = R(theta + s eps + mu xi) xi / mu, by quadrature; ValueError unless s, mu > 0.

    Given the total noise tau z = s eps + mu xi, xi is N(mu z / tau, (s / tau)^2 I), so d dimensions are enough.

    >>> zeroth_order_covariance(lambda x: x[:, 0] ** 2, np.array([1.0]), s=0.5, mu=0.5).round(12)
    array([[33.]])
    """
    _positive("s", s)
    _positive("mu", mu)
    tau = math.hypot(s, mu)
    points, weights = gaussian_rule(theta.size, nodes)
    rewards = reward(theta + tau * points)
    mean = (weights * rewards) @ points / tau
    within = (s / mu) ** 2 * (weights @ rewards**2) * np.eye(theta.size)
    return (within + _second_moment(weights, rewards[:, None] * points)) / tau**2 - np.outer(mean, mean)


def first_order_bound(hessian: Field, theta: Array, s: float, nodes: int = 40) -> Array:
    """Poincare: the matrix s^2 E H(x)^2, (d, d), which is at least Cov FO in Loewner order; ValueError unless s > 0.

    Derived in docs/variance.md, "A sufficient condition".

    >>> first_order_bound(lambda x: np.full((len(x), 1, 1), 2.0), np.array([1.0]), s=0.5).round(12)
    array([[1.]])
    """
    _positive("s", s)
    points, weights = gaussian_rule(theta.size, nodes)
    curvature = hessian(theta + s * points)
    return s**2 * np.einsum("n,nij,njk->ik", weights, curvature, curvature)


def half_order_bound(reward: Field, hessian: Field, theta: Array, s: float, nodes: int = 40) -> Array:
    """Bessel: the matrix (E R I + s^2 E H)^2 / s^2, (d, d), which is at most Cov HO; ValueError unless s > 0.

    Derived in docs/variance.md, "A sufficient condition".

    >>> curvature = lambda x: np.full((len(x), 1, 1), 2.0)
    >>> half_order_bound(lambda x: x[:, 0] ** 2, curvature, np.array([1.0]), s=0.5).round(12)
    array([[12.25]])
    """
    _positive("s", s)
    points, weights = gaussian_rule(theta.size, nodes)
    x = theta + s * points
    root = weights @ reward(x) * np.eye(theta.size) + s**2 * np.tensordot(weights, hessian(x), axes=1)
    return root @ root / s**2


def zeroth_order_bound(reward: Field, hessian: Field, theta: Array, s: float, mu: float, nodes: int = 40) -> Array:
    """Conditional Bessel: E (R_mu I + mu^2 H_mu)^2 / mu^2, (d, d), at most Cov ZO; ValueError unless s, mu > 0.

    R_mu and H_mu are the means over xi of R and of its Hessian at theta + s eps + mu xi, given eps. Grows like
    E R^2 / mu^2 as mu falls. Derived in docs/variance.md, "A sufficient condition".

    >>> curvature = lambda x: np.full((len(x), 1, 1), 2.0)
    >>> zeroth_order_bound(lambda x: x[:, 0] ** 2, curvature, np.array([1.0]), s=0.5, mu=0.5).round(12)
    array([[20.5]])
    """
    _positive("s", s)
    _positive("mu", mu)
    points, weights = gaussian_rule(theta.size, nodes)
    x = theta + s * points
    # One inner node at a time: the full product rule would hold nodes^(2 d) Hessians at once.
    roots = np.zeros((len(points), theta.size, theta.size))
    for point, weight in zip(points, weights, strict=True):
        shifted = x + mu * point
        roots += weight * (reward(shifted)[:, None, None] * np.eye(theta.size) + mu**2 * hessian(shifted))
    return np.einsum("n,nij,njk->ik", weights, roots, roots) / mu**2


def sufficient_condition(first_bound: Array, other_bound: Array) -> bool:
    """Whether the bounds prove Var FO <= Var of the other estimator: trace(first_bound) <= trace(other_bound).

    first_bound from `first_order_bound`, other_bound from `half_order_bound` or `zeroth_order_bound`, (d, d) each.
    For the Loewner order use `loewner_gap(first_bound, other_bound) >= 0` instead.

    >>> sufficient_condition(np.array([[1.0]]), np.array([[12.25]]))
    True
    """
    if first_bound.shape != other_bound.shape:
        raise ValueError(f"other_bound has shape {other_bound.shape}: must be {first_bound.shape}, that of first_bound")
    return bool(np.trace(first_bound) <= np.trace(other_bound))


# --- half-order blocks -------------------------------------------------------------------------------------------


def block_score_moment(slopes: Array, inputs: Array, sigmas: Array, h: int) -> float:
    """E |score|^2 of half-order blocks of h steps in the chain x_{t-1} = A_t x_t + B_t theta + sigma_t eps.

    slopes A is (T, d, d), inputs B (T, d, p), sigmas (T,). Block {j..j+h-1} uses the noise of step j; the last block
    may be shorter. h = 1 is the per-step score (REINFORCE). Raises ValueError unless 1 <= h and all sigmas are
    positive. Derived in docs/variance.md, "Half-order blocks".

    >>> slopes, inputs = np.ones((4, 1, 1)), np.ones((4, 1, 1))
    >>> [block_score_moment(slopes, inputs, np.ones(4), h) for h in (1, 2, 4)]
    [4.0, 8.0, 16.0]
    """
    checked.count("h", h, 1)
    for sigma in sigmas:
        _positive("sigmas", float(sigma))
    steps = len(sigmas)
    total = 0.0
    for first in range(0, steps, h):
        sensitivity = np.zeros_like(inputs[0])
        for t in reversed(range(first, min(first + h, steps))):
            # Horner's rule: everything above step t passes through A_t once more.
            sensitivity = inputs[t] + slopes[t] @ sensitivity
        total += float(np.sum(sensitivity**2)) / float(sigmas[first]) ** 2
    return total


def half_order_ratio(a: float, h: int) -> float:
    """E |score|^2 of half-order blocks of h steps over that of the per-step scores, scalar chain of slope a.

    Equals (1 + a + ... + a^(h-1))^2 / h when h divides T; h itself at a = 1. Raises ValueError unless h >= 1.

    >>> half_order_ratio(1.0, 5)
    5.0
    """
    checked.count("h", h, 1)
    return float(np.sum(a ** np.arange(h))) ** 2 / h


def half_order_threshold(h: int) -> float:
    """The slope a in (0, 1) at which `half_order_ratio` is one: longer blocks pay only below it.

    Raises ValueError unless h >= 2. Derived in docs/variance.md, "Half-order blocks".

    >>> round(half_order_threshold(2), 10)
    0.4142135624
    """
    checked.count("h", h, 2)
    return _root(lambda a: half_order_ratio(a, h) - 1, 0.0, 1.0)


# --- parameter noise: smoothing bias and SPSA --------------------------------------------------------------------


def _noise_moment(noise: Noise, order: int) -> float:
    if order % 2:
        return 0.0
    return 1.0 if noise == "rademacher" else float(math.prod(range(1, order, 2)))


def _check_noise(noise: str) -> None:
    if noise not in ("gaussian", "rademacher"):
        raise ValueError(f"noise = {noise!r}: must be 'gaussian' or 'rademacher'")


@dataclass(frozen=True)
class SmoothedMoment:
    """Smoothed objective J_mu = E (theta + mu xi + s eps)^n, its derivative, and the mean of the ZO estimator."""

    value: float
    derivative: float
    estimate: float  # E[R xi] / mu; equals the derivative for Gaussian xi only


def smoothed_moment(power: int, theta: float, mu: float, s: float, noise: Noise = "gaussian") -> SmoothedMoment:
    """Exact effect of parameter noise mu xi on R = x^power, x = theta + mu xi + s eps, eps Gaussian.

    The bias of ZO is `estimate` minus `smoothed_moment(power, theta, 0, s).derivative`. One- and two-sided ZO have
    the same mean. Raises ValueError unless power >= 0, mu >= 0 and s >= 0. Derived in docs/variance.md, "Smoothing".

    >>> smoothed_moment(4, 0.5, 0.25, 0.0).estimate - 4 * 0.5**3  # 12 theta mu^2
    0.375
    >>> smoothed_moment(4, 0.5, 0.25, 0.0, "rademacher").estimate - 4 * 0.5**3  # 4 theta mu^2
    0.125
    """
    checked.count("power", power, 0)
    _check_noise(noise)
    _not_negative("mu", mu)
    _not_negative("s", s)

    def expectation(degree: int, xi_order: int) -> float:
        """E (theta + mu xi + s eps)^degree xi^xi_order / mu^xi_order."""
        total = 0.0
        for i in range(xi_order, degree + 1):
            for j in range(degree - i + 1):
                ways = math.comb(degree, i) * math.comb(degree - i, j)
                moments = _noise_moment(noise, i + xi_order) * _noise_moment("gaussian", j)
                total += ways * moments * theta ** (degree - i - j) * mu ** (i - xi_order) * s**j
        return total

    derivative = power * expectation(power - 1, 0) if power else 0.0
    return SmoothedMoment(expectation(power, 0), derivative, expectation(power, 1))


def sine_smoothing_factor(k: float, mu: float, noise: Noise = "gaussian") -> float:
    """Factor by which the mean of ZO falls short of the gradient when R = sin(k x): the bias is (factor - 1) gradient.

    exp(-k^2 mu^2 / 2) for Gaussian xi, sin(k mu) / (k mu) for Rademacher xi. Raises ValueError unless mu >= 0.

    >>> round(sine_smoothing_factor(2.0, 0.25), 10)
    0.8824969026
    """
    _check_noise(noise)
    _not_negative("mu", mu)
    return math.exp(-((k * mu) ** 2) / 2) if noise == "gaussian" else float(np.sinc(k * mu / math.pi))


def spsa_covariance(gradient: Array, noise: Noise) -> Array:
    """Covariance (p, p) of the two-sided estimate (gradient.xi) xi of the gradient (p,) of a linear function.

    Trace (p + 1) |gradient|^2 for Gaussian, (p - 1) |gradient|^2 for Rademacher xi; independent of mu.

    >>> spsa_covariance(np.array([1.0, 2.0]), "rademacher")
    array([[4., 2.],
           [2., 1.]])
    """
    _check_noise(noise)
    covariance = gradient @ gradient * np.eye(gradient.size) + np.outer(gradient, gradient)
    return covariance if noise == "gaussian" else covariance - 2 * np.diag(gradient**2)


def self_included_baseline_factor(n: int) -> float:
    """Factor 1 - 1/n by which a batch mean that includes the sample itself shrinks a score estimator's mean.

    n is the batch size; ValueError unless n >= 1. Derived in docs/variance.md, "Self-included baseline".

    >>> self_included_baseline_factor(4)
    0.75
    """
    checked.count("n", n, 1)
    return 1 - 1 / n


# --- random truncation of back-propagation -----------------------------------------------------------------------


def inclusion_probabilities(law: Sequence[float] | Array, T: int) -> Array:
    """P(K >= t) for t = 1..T, shape (T,), from law[k] = P(K = k), k = 0, 1, ...

    Raises ValueError unless the law is non-negative and sums to one, and T >= 1.

    >>> inclusion_probabilities([0.25, 0.25, 0.5], 3)
    array([0.75, 0.5 , 0.  ])
    """
    checked.count("T", T, 1)
    masses = np.asarray(law, dtype=np.float64)
    if masses.ndim != 1 or not np.all(masses >= 0) or not math.isclose(float(masses.sum()), 1.0, abs_tol=1e-12):
        raise ValueError(f"law = {masses.tolist()}: must be non-negative and sum to one")
    padded = np.zeros(max(T + 1, masses.size))
    padded[: masses.size] = masses
    return np.cumsum(padded[::-1])[::-1][1 : T + 1]


def truncated_mean(parts: Array, law: Sequence[float] | Array) -> Array:
    """Mean (p,) of back-propagation truncated to the last K steps, K ~ law drawn once per trajectory.

    parts are the per-step gradients g_t, (T, p); the mean is the sum of P(K >= t) g_t. A fixed K is a point mass.

    >>> truncated_mean(np.array([[1.0], [10.0], [100.0]]), [0.0, 0.0, 1.0])
    array([11.])
    """
    return inclusion_probabilities(law, len(parts)) @ parts


def independent_truncation_parts(
    direct: Array, network: Array, inputs: Array, costate: Array, keep: Sequence[float] | Array
) -> Array:
    """Mean per-step gradients (T, p) when every step draws afresh whether its network output is detached.

    Step t of the chain is x_{t-1} = direct_t x_t + f_t(x_t, theta) + noise, where f_t is the (scaled) network output
    with Jacobians network_t = df_t/dx, (T, d, d), and inputs_t = df_t/dtheta, (T, d, p), none of which depend on the
    state; costate (d,) is E grad R(x_0); keep[t-1] is the probability that f_t is *not* detached, independently of
    the other steps. With direct = 0 (and the whole slope in network) the latent itself is cut. Raises ValueError
    unless keep holds T probabilities. Derived in docs/variance.md, "Random truncation".

    >>> ones = np.ones((2, 1, 1))
    >>> independent_truncation_parts(0 * ones, ones, ones, np.ones(1), [0.5, 0.5]).ravel()
    array([0.5 , 0.25])
    """
    kept = np.asarray(keep, dtype=np.float64)
    if kept.shape != (len(inputs),) or not np.all((kept >= 0) & (kept <= 1)):
        raise ValueError(f"keep = {kept.tolist()}: must hold {len(inputs)} probabilities")
    parts = np.empty((len(inputs), inputs.shape[-1]))
    for t in range(len(inputs)):
        parts[t] = kept[t] * inputs[t].T @ costate
        costate = (direct[t] + kept[t] * network[t]).T @ costate
    return parts


def independent_truncation_shares(keep: Sequence[float] | Array, direct_fraction: Sequence[float] | Array) -> Array:
    """Share of each g_t, (T,), that survives per-step draws in a scalar chain: q_t prod_{s<t} (r_s + q_s (1 - r_s)).

    keep is q_t; direct_fraction r_t is the slope of step t that by-passes the network over its whole slope: 0 when
    the latent is cut, above 1 when the network contracts. One draw per trajectory would leave the share q_t.
    Raises ValueError unless keep holds probabilities and both have one length.

    >>> independent_truncation_shares([0.5, 0.5], [1.25, 1.25])
    array([0.5   , 0.5625])
    """
    fraction = np.asarray(direct_fraction, dtype=np.float64)
    if fraction.shape != np.shape(keep):
        raise ValueError(f"direct_fraction has shape {fraction.shape}: must be {np.shape(keep)}, that of keep")
    direct = fraction[:, None, None]
    return independent_truncation_parts(direct, 1 - direct, np.ones_like(direct), np.ones(1), keep).ravel()
