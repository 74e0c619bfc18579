r"""Zeroth-order gradient estimators with Gaussian directions: exact moments on quadratics, and bounds of their bias.

The bilevel paper's eq. (14) estimates the gradient of an objective that can only be evaluated, at y with v ~ N(0, I_n):

    central      (f(y + nu v) - f(y - nu v)) / (2 nu) v        the paper's two-point estimator
    forward      (f(y + nu v) - f(y)) / nu v
    residual     (f(y + nu v) - f(y' + nu v')) scale v         one evaluation per update: the other is the previous one

All three have the mean grad f_nu(y), f_nu(y) = E f(y + nu v), if `scale` = 1/nu. On f with gradient g at y and constant
Hessian H the moments below are exact. Proofs stand in docs/bilevel.md, "The zeroth-order estimator".

The last functions say how small a Frechet distance (W2^2 of Gaussian fits) from n samples can be at a perfect model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from theory import checked
from theory.checked import Array

Noise = Literal["independent", "common"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (n,) and covariance (n, n) of an estimate."""

    mean: Array
    covariance: Array

    @property
    def second_moment(self) -> float:
        """E |estimate|^2."""
        return float(np.sum(self.mean**2) + np.trace(self.covariance))


def central_moments(
    gradient: ArrayLike, nu: float, noise_variance: float = 0.0, noise: Noise = "independent"
) -> Moments:
    """The central estimator on a quadratic with gradient (n,) at y: mean g, covariance |g|^2 I + g g'; any Hessian.

    Each evaluation has independent noise of `noise_variance`, which adds n noise_variance/(2 nu^2) to the second
    moment (n + 2)|g|^2; with `noise` "common" (the same random numbers in both) additive noise cancels.
    Raises ValueError for nu <= 0, a negative noise variance or an unknown noise.

    >>> round(central_moments([0.5, -1.0, 2.0, 0.3], 0.5).second_moment, 12)
    32.04
    >>> round(central_moments([0.5, -1.0, 2.0, 0.3], 0.01, 0.05**2).second_moment, 12)
    82.04
    """
    g = checked.array("gradient", gradient, 1)
    return Moments(g.copy(), _linear_part(g) + _noise(nu, noise_variance, noise) / 2.0 * np.eye(g.size))


def forward_moments(
    gradient: ArrayLike, hessian: ArrayLike, nu: float, noise_variance: float = 0.0, noise: Noise = "independent"
) -> Moments:
    """The forward difference on a quadratic with gradient (n,) and Hessian (n, n) at y: also unbiased.

    Its second moment exceeds the central one by nu^2/4 (n + 4)((tr H)^2 + 2 tr H^2), and four times the noise.
    Raises ValueError like `central_moments`, or if the Hessian is not symmetric (n, n).

    >>> round(forward_moments([1.0, 0.0], [[2.0, 0.0], [0.0, -1.0]], 0.5).second_moment, 12)
    8.125
    """
    g = checked.array("gradient", gradient, 1)
    H = _hessian(hessian, g.size)
    trace, square = float(np.trace(H)), H @ H
    curved = (trace**2 + 2.0 * float(np.trace(square))) * np.eye(g.size) + 4.0 * trace * H + 8.0 * square
    added = _noise(nu, noise_variance, noise) * 2.0 * np.eye(g.size)
    return Moments(g.copy(), _linear_part(g) + 0.25 * nu**2 * curved + added)


def residual_moments(
    gradient: ArrayLike, hessian: ArrayLike, nu: float, scale: float | None = None, noise_variance: float = 0.0
) -> Moments:
    """The one-point residual estimator on a quadratic, where both evaluations were made about the same y.

    `scale` defaults to 1/nu, which is unbiased; the released code has 1/(2 nu), whose mean is half the gradient. With
    scale 1/nu the second moment is (2 n + 2)|g|^2 + nu^2 (n + 2) tr H^2 + 2 n noise_variance/nu^2.
    Raises ValueError like `forward_moments`, or for scale <= 0.

    >>> residual_moments([1.0, -2.0], [[0.0, 0.0], [0.0, 0.0]], 0.01, scale=1 / 0.02).mean
    array([ 0.5, -1. ])
    """
    g = checked.array("gradient", gradient, 1)
    H = _hessian(hessian, g.size)
    eye, square = np.eye(g.size), H @ H
    added = _noise(nu, noise_variance, "independent") * 2.0 * eye
    factor = 1.0 if scale is None else nu * checked.scalar("scale", scale, 0.0, math.inf, closed="()")
    covariance = _linear_part(g) + g @ g * eye + nu**2 * (np.trace(square) * eye + 2.0 * square) + added
    return Moments(factor * g, factor**2 * covariance)


def cubic_moments(coefficient: float, x: float, nu: float) -> tuple[float, float]:
    """Mean and second moment of the central estimator on a x^3: 3 a x^2 + 3 a nu^2, and a polynomial in nu^2.

    The bias 3 a nu^2 attains `bias_bound_hessian`. Raises ValueError for nu <= 0.

    >>> tuple(round(moment, 12) for moment in cubic_moments(0.7, 0.3, 0.1))
    (0.21, 0.151998)
    """
    checked.scalar("nu", nu, 0.0, math.inf, closed="()")
    a = coefficient
    second = a**2 * (27.0 * x**4 + 90.0 * x**2 * nu**2 + 105.0 * nu**4)
    return 3.0 * a * (x**2 + nu**2), second


def bias_bound_gradient(lipschitz: float, nu: float, n: int) -> float:
    """|grad f_nu - grad f| <= L nu E|v| if the gradient is L-Lipschitz; E|v| = sqrt 2 Gamma((n+1)/2)/Gamma(n/2).

    At most L nu sqrt n, and so below nu L (n + 3)^(3/2)/2 (Nesterov and Spokoiny 2017, Lemma 3). Attained by x|x|/2 at
    0, n = 1: nu sqrt(2/pi). Raises ValueError for a negative constant, nu <= 0 or n < 1.

    >>> round(bias_bound_gradient(1.0, 0.1, 1), 9)
    0.079788456
    """
    checked.count("n", n, 1)
    mean_norm = math.sqrt(2.0) * math.exp(gammaln(0.5 * (n + 1)) - gammaln(0.5 * n))
    return _constant(lipschitz, nu) * nu * mean_norm


def bias_bound_hessian(lipschitz: float, nu: float, n: int) -> float:
    """|grad f_nu - grad f| <= L nu^2 n/2 if the Hessian is L-Lipschitz in the operator norm.

    Below nu^2 L (n + 4)^2/6 (Nesterov and Spokoiny 2017, Lemma 3), and attained by the cubic at n = 1. Raises
    ValueError like `bias_bound_gradient`.

    >>> round(bias_bound_hessian(6 * 0.7, 0.1, 1), 12)
    0.021
    """
    return 0.5 * _constant(lipschitz, nu) * nu**2 * checked.count("n", n, 1)


def nesterov_spokoiny_bounds(
    gradient_lipschitz: float, hessian_lipschitz: float, nu: float, n: int
) -> tuple[float, float]:
    """The published bounds nu L1 (n + 3)^(3/2)/2 and nu^2 L2 (n + 4)^2/6; true, and larger than the two above.

    Source: Nesterov and Spokoiny 2017, Lemma 3; implied by ours (docs/bilevel.md). Raises ValueError like
    `bias_bound_gradient`.

    >>> nesterov_spokoiny_bounds(1.0, 6.0, 0.5, 1)
    (2.0, 6.25)
    """
    checked.count("n", n, 1)
    first, second = _constant(gradient_lipschitz, nu), _constant(hessian_lipschitz, nu)
    return 0.5 * nu * first * (n + 3) ** 1.5, nu**2 * second * (n + 4) ** 2 / 6.0


def c4(n: int) -> float:
    """E[sample deviation]/deviation of n normal samples, with n - 1 in the variance. Raises ValueError for n < 2.

    >>> round(c4(2), 12) == round(math.sqrt(2 / math.pi), 12)
    True
    """
    checked.count("n", n, 2)
    return math.sqrt(2.0 / (n - 1)) * math.exp(gammaln(0.5 * n) - gammaln(0.5 * (n - 1)))


def frechet_floor(n: int, variance: float = 1.0) -> float:
    """E W2^2(N(m, v), Gaussian fitted to n samples of N(m, v)) on the line: v (1/n + 2 (1 - c4(n))).

    Raises ValueError for n < 2 or a variance that is not positive.

    >>> round(frechet_floor(36), 10)
    0.042010665
    """
    checked.scalar("variance", variance, 0.0, math.inf, closed="()")
    return variance * (1.0 / checked.count("n", n, 2) + 2.0 * (1.0 - c4(n)))


def frechet_rank_bound(eigenvalues: ArrayLike, n: int) -> float:
    """What W2^2(N(m, C), Gaussian fitted to n samples) never falls below, whatever the samples and the model.

    The sum of the d - n + 1 least `eigenvalues` (d,) of C, because the fit lives on an affine space of dimension n - 1;
    d - n + 1 if C = I, zero if n > d. Raises ValueError for a negative eigenvalue or n < 2.

    >>> frechet_rank_bound(np.ones(2048), 36)
    2013.0
    """
    values = _eigenvalues(eigenvalues)
    missing = max(values.size - (checked.count("n", n, 2) - 1), 0)
    return float(np.sum(np.sort(values)[:missing]))


def frechet_expected_bound(d: int, n: int) -> float:
    """A lower bound of E W2^2(N(m, I_d), Gaussian fitted to n of its own samples): d/n + 2 (d - sqrt(r d)).

    r = min(n - 1, d) is the rank of the sample covariance. Sharper than the rank bound d - n + 1 by at least d/n.
    Raises ValueError for d < 1 or n < 2.

    >>> round(frechet_expected_bound(64, 36), 6)
    35.120501
    """
    checked.count("d", d, 1)
    rank = min(checked.count("n", n, 2) - 1, d)
    return d / n + 2.0 * (d - math.sqrt(rank * d))


def _linear_part(g: Array) -> Array:
    """The covariance |g|^2 I + g g' of (v.g) v."""
    return g @ g * np.eye(g.size) + np.outer(g, g)


def _noise(nu: float, noise_variance: float, noise: Noise) -> float:
    """noise_variance/nu^2, or 0 for common random numbers."""
    checked.scalar("nu", nu, 0.0, math.inf, closed="()")
    checked.scalar("noise_variance", noise_variance, 0.0, math.inf, closed="[)")
    if noise not in ("independent", "common"):
        raise ValueError(f"noise = {noise!r}: must be 'independent' or 'common'")
    return noise_variance / nu**2 if noise == "independent" else 0.0


def _hessian(hessian: ArrayLike, n: int) -> Array:
    H = checked.array("hessian", hessian, 2)
    if H.shape != (n, n) or not np.allclose(H, H.T, rtol=1e-12, atol=0.0):
        raise ValueError(f"hessian = {H.tolist()}: must be symmetric of shape {(n, n)}")
    return H


def _constant(lipschitz: float, nu: float) -> float:
    checked.scalar("nu", nu, 0.0, math.inf, closed="()")
    return checked.scalar("lipschitz", lipschitz, 0.0, math.inf, closed="[)")


def _eigenvalues(eigenvalues: ArrayLike) -> Array:
    values = checked.array("eigenvalues", eigenvalues, 1)
    if (values < 0).any():
        raise ValueError(f"eigenvalues = {values.tolist()}: must be non-negative")
    return values
