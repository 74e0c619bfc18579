"""DDPM and DDIM sampling of Gaussian data with the exact score: output laws, path KL, ELBO and limits.

Data N(m, C); every quantity splits over the eigenvectors of C, with eigenvalues s^2. With
D(a) = a s^2 + 1 - a the variance of x_t at a = alpha_bar_t, every reverse step is, along an eigenvector,

    x_{t-1} - sqrt(a_{t-1}) m = slope_t (x_t - sqrt(a_t) m) + sqrt(variance_t) z,        x_T ~ N(0, 1),

so that the output law follows from the slopes and variances alone. Arrays over steps have t = 1..T along the first
axis and the eigenvectors, in the order of numpy.linalg.eigh, along the second. Proofs stand in docs/ddpm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array
from theory.gaussian import Gaussian, entropy
from theory.schedules import NoiseSchedule

Variance = Literal["beta", "posterior", "optimal"]

# lim of the path KL per dimension for the variance beta-tilde, without its infinite step t = 1, as T grows and the rate
# beta(u) of the SDE starts at a positive value. Derived in docs/ddpm.md, "The posterior variance does not vanish".
POSTERIOR_VARIANCE_LIMIT = 0.5 * float(np.euler_gamma)


def ddpm_posterior_mean_coefficients(schedule: NoiseSchedule) -> tuple[Array, Array]:
    """The coefficients, each (T,), of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0), t = 1..T.

    sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) and sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t);
    Ho et al. 2020, eq. (7). SFT-PG, eq. (2), prints beta_{t-1} in the first: see docs/ddpm.md, "The posterior mean".

    >>> of_x0, of_xt = ddpm_posterior_mean_coefficients(NoiseSchedule([0.1, 0.3]))
    >>> of_x0.round(6), of_xt.round(6)
    (array([1.      , 0.769203]), array([0.      , 0.226124]))
    """
    before = schedule.alpha_bar_previous
    noise = 1.0 - schedule.alpha_bar
    return np.sqrt(before) * schedule.beta / noise, np.sqrt(schedule.alpha) * (1.0 - before) / noise


def minimal_score_matching_loss(data: Gaussian, alpha_bar: ArrayLike) -> Array:
    """min over predictions of E|eps - prediction(x_t)|^2 at each alpha_bar (T,): sum over eigenvectors a s^2 / D(a).

    Derived in docs/ddpm.md, "The optimal score". Raises ValueError unless every alpha_bar lies in [0, 1).

    >>> minimal_score_matching_loss(Gaussian.scalar(1.0, 4.0), [0.5])
    array([0.8])
    """
    levels = _levels(alpha_bar)
    variances, _ = _eigen(data)
    return np.sum(levels[:, None] * variances / _marginal_variance(levels, variances), axis=1)


def ancestral_steps(variances: ArrayLike, schedule: NoiseSchedule, variance: Variance = "beta") -> tuple[Array, Array]:
    """Slopes and noise variances, each (T, d), of ancestral sampling for data variances (d,).

    The slope sqrt(alpha_t) D_{t-1}/D_t is that of the exact reverse law, whatever the noise: beta_t for "beta",
    beta-tilde_t for "posterior", the exact beta_t D_{t-1}/D_t for "optimal" (docs/ddpm.md, "Ancestral sampling").
    Raises ValueError for a negative data variance or an unknown choice.

    >>> slopes, noise = ancestral_steps([1.0], NoiseSchedule([0.19, 0.36]), "optimal")
    >>> slopes[:, 0].round(12), noise[:, 0].round(12)
    (array([0.9, 0.8]), array([0.19, 0.36]))
    """
    _check_variance(variance)
    spread = _variances(variances)
    marginal = _marginal_variance(schedule.alpha_bar, spread)
    ratio = np.concatenate([spread[None], marginal[:-1]]) / marginal
    slopes = np.sqrt(schedule.alpha)[:, None] * ratio
    if variance == "optimal":
        return slopes, schedule.beta[:, None] * ratio
    chosen = schedule.beta if variance == "beta" else schedule.posterior_variance
    return slopes, np.repeat(chosen[:, None], spread.size, axis=1)


def ddim_steps(variances: ArrayLike, alpha_bar: ArrayLike, eta: float = 0.0) -> tuple[Array, Array]:
    """Slopes and noise variances, each (S, d), of DDIM on the sub-sampled alpha_bar (S,), t_1 < ... < t_S.

    Song et al. 2021 (arXiv 2010.02502), eqs. (12) and (16), bilevel paper eq. (26); the last step goes to alpha_bar 1.
    Derived in docs/ddpm.md, "DDIM". Raises ValueError unless 1 > alpha_bar_1 >= ... >= alpha_bar_S >= 0 with only the
    last possibly 0, and 0 <= eta <= 1.

    >>> slopes, noise = ddim_steps([1.0], [0.5, 0.0])
    >>> slopes[:, 0].round(6), noise[:, 0]
    (array([0.707107, 0.707107]), array([0., 0.]))
    """
    checked.scalar("eta", eta, 0.0, 1.0)
    spread = _variances(variances)
    now = _grid(alpha_bar)
    then = np.concatenate([[1.0], now[:-1]])
    noise = eta**2 * (1.0 - then) / (1.0 - now) * (1.0 - now / then)
    along_data = np.sqrt(now * then)[:, None] * spread
    # Rounding may push 1 - a' - sigma^2 below zero where it vanishes (eta = 1, first step of a repeated level).
    along_noise = np.sqrt(np.maximum(1.0 - then - noise, 0.0) * (1.0 - now))[:, None]
    slopes = (along_data + along_noise) / _marginal_variance(now, spread)
    return slopes, np.repeat(noise[:, None], spread.size, axis=1)


def ancestral_law(data: Gaussian, schedule: NoiseSchedule, variance: Variance = "beta") -> Gaussian:
    """The exact output law of ancestral sampling with the exact score from x_T ~ N(0, I).

    Source: Ho et al. 2020, Algorithm 2; bilevel paper, eq. (25). Raises ValueError for an unknown variance choice.

    >>> law = ancestral_law(Gaussian.scalar(1.0, 1.0), NoiseSchedule([0.1, 0.3]))
    >>> law.cov.round(12)
    array([[1.]])
    """
    eigenvalues, basis = _eigen(data)
    return _output(data, basis, schedule.alpha_bar[-1], *ancestral_steps(eigenvalues, schedule, variance))


def ddim_law(data: Gaussian, alpha_bar: ArrayLike, eta: float = 0.0) -> Gaussian:
    """The exact output law of DDIM with the exact score on alpha_bar (S,), from x_T ~ N(0, I).

    eta = 0 is deterministic; eta = 1 without skipping is ancestral sampling with the posterior variance.
    Source: Song et al. 2021 (arXiv 2010.02502), eq. (12). Raises ValueError like `ddim_steps`.

    >>> ddim_law(Gaussian.scalar(1.0, 1.0), [0.5, 0.0]).cov.round(12)
    array([[0.25]])
    """
    eigenvalues, basis = _eigen(data)
    return _output(data, basis, _grid(alpha_bar)[-1], *ddim_steps(eigenvalues, alpha_bar, eta))


def ddim_angle_law(data: Gaussian, alpha_bar: ArrayLike) -> Gaussian:
    """`ddim_law` at eta = 0 in closed form: the standard deviation is s/sqrt(D_T) times a product of cosines.

    The angles are arctan(sqrt((1 - a)/a)/s); derived in docs/ddpm.md, "The angle formula". Raises ValueError like
    `ddim_steps`.

    >>> ddim_angle_law(Gaussian.scalar(1.0, 1.0), [0.5, 0.0]).cov.round(12)
    array([[0.25]])
    """
    eigenvalues, basis = _eigen(data)
    levels = _grid(alpha_bar)
    angles = np.arctan2(np.sqrt(1.0 - levels)[:, None], np.sqrt(levels)[:, None] * np.sqrt(eigenvalues))
    turns = np.diff(angles, axis=0, prepend=np.zeros((1, eigenvalues.size)))
    scale = np.sqrt(eigenvalues / _marginal_variance(levels[-1:], eigenvalues)[0])
    # A point mass (s = 0) makes its whole turn of pi/2 in the first step, and its scale is zero: the product is zero.
    deviations = scale * np.prod(np.cos(turns), axis=0)
    shift = -math.sqrt(float(levels[-1])) * deviations * (basis.T @ data.mean)
    return Gaussian(data.mean + basis @ shift, (basis * deviations**2) @ basis.T)


def optimal_ddim_schedule(data_std: float, steps: int) -> Array:
    """The alpha_bar (S,), ending at 0, whose S deterministic DDIM steps reproduce N(m, data_std^2) best.

    alpha_bar_i = 1/(1 + s^2 tan^2(pi i/(2 S))): equal angles, the cosine schedule for s = 1. Best among the schedules
    that end at alpha_bar = 0, in W2 and in either KL; derived in docs/ddpm.md, "Equal angles are optimal".
    Raises ValueError unless data_std > 0 and steps >= 1.

    >>> optimal_ddim_schedule(1.0, 4).round(6)
    array([0.853553, 0.5     , 0.146447, 0.      ])
    """
    s = checked.scalar("data_std", data_std, 0.0, math.inf, closed="()")
    fraction = np.arange(1, checked.count("steps", steps, 1) + 1) / steps
    # As the sine of the complement the cosine is exactly zero at the last angle.
    cosine = np.sin(0.5 * math.pi * (1.0 - fraction))
    return cosine**2 / (cosine**2 + s**2 * np.sin(0.5 * math.pi * fraction) ** 2)


def optimal_ddim_w2_squared(data_std: float, steps: int) -> float:
    """The squared 2-Wasserstein error s^2 (1 - cos^S(pi/(2 S)))^2 that `optimal_ddim_schedule` attains.

    Derived in docs/ddpm.md, "Equal angles are optimal". Raises ValueError like `optimal_ddim_schedule`.

    >>> round(optimal_ddim_w2_squared(2.0, 1), 12)
    4.0
    """
    s = checked.scalar("data_std", data_std, 0.0, math.inf, closed="()")
    return s**2 * (1.0 - math.cos(0.5 * math.pi / checked.count("steps", steps, 1)) ** steps) ** 2


@dataclass(frozen=True, eq=False)
class PathKL:
    """KL(q(x_0..x_T) || p(x_0..x_T)) by the chain rule, in nats.

    `prior` is KL(q(x_T) || N(0, I)); steps (T,) are E KL(q(x_{t-1} | x_t) || p(x_{t-1} | x_t)), t = 1..T.
    """

    prior: float
    steps: Array

    @property
    def total(self) -> float:
        """The prior term plus all steps."""
        return self.prior + float(np.sum(self.steps))


def path_kl(data: Gaussian, schedule: NoiseSchedule, variance: Variance = "beta") -> PathKL:
    """KL from the forward path to the path of ancestral sampling with the exact score; bounds KL(data || output).

    The means agree, so that a step costs the sum over eigenvectors of (r - 1 - log r)/2, r the ratio of the exact to
    the chosen variance. Infinite for "posterior" at t = 1, where the chosen variance is zero, and for "beta" at t = 1
    if the data are degenerate. Derived in docs/ddpm.md, "The path KL". Raises ValueError for an unknown variance.

    >>> round(path_kl(Gaussian.scalar(1.0, 1.0), NoiseSchedule([0.1, 0.3])).total, 12)
    0.315
    >>> path_kl(Gaussian.scalar(0.0, 4.0), NoiseSchedule([0.1, 0.3]), "posterior").steps.round(6)
    array([     inf, 1.090808])
    """
    eigenvalues, basis = _eigen(data)
    level = float(schedule.alpha_bar[-1])
    excess = level * (eigenvalues - 1.0)
    prior = 0.5 * float(np.sum(excess - np.log1p(excess)) + level * np.sum((basis.T @ data.mean) ** 2))
    ratio_excess = _ratio_excess(eigenvalues, schedule, variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        costs = np.where(np.isinf(ratio_excess), np.inf, 0.5 * (ratio_excess - np.log1p(ratio_excess)))
    return PathKL(prior, np.sum(costs, axis=1))


def elbo(data: Gaussian, schedule: NoiseSchedule, variance: Variance = "beta") -> float:
    """The evidence lower bound in nats, averaged over the data: -entropy(data) - path_kl(...).total.

    Source: Ho et al. 2020, eqs. (3) and (5); SFT-PG, eq. (5). Raises ValueError for degenerate data, which have no
    density, or an unknown variance choice.

    >>> round(elbo(Gaussian.scalar(1.0, 1.0), NoiseSchedule([0.1, 0.3])), 9)
    -1.733938533
    """
    nats = entropy(data)
    if nats == -math.inf:
        raise ValueError(f"data.cov = {data.cov.tolist()}: must be positive definite")
    return -nats - path_kl(data, schedule, variance).total


@dataclass(frozen=True, eq=False)
class LimitConstants:
    """Limits per coordinate, each (d,), as T grows under `vp_linear` with variance beta.

    `prior` is the floor of the path KL. With x_T drawn from q(x_T) instead of N(0, I), T path KL tends to `path_kl`,
    T (output variance - data variance) to `variance_gap`, and T^2 KL(data || output) to `marginal_kl`.
    """

    prior: Array
    path_kl: Array
    variance_gap: Array
    marginal_kl: Array


def limit_constants(
    data_variance: ArrayLike, data_mean: ArrayLike, beta_min: float = 0.1, beta_max: float = 20.0
) -> LimitConstants:
    """The constants of the first-order errors of ancestral sampling with variance beta, per coordinate (d,).

    Integrals over u in [0, 1] along alpha_bar(u) = exp(-beta_min u - (beta_max - beta_min) u^2/2), by Gauss-Legendre
    quadrature. Derived in docs/ddpm.md, "Many steps". Raises ValueError unless data_variance and data_mean have one
    length, the variances are positive, and 0 < beta_min <= beta_max.

    >>> constants = limit_constants([0.25], [1.0])
    >>> constants.path_kl.round(8), constants.variance_gap.round(8), constants.marginal_kl.round(8)
    (array([1.09191724]), array([0.8494121]), array([2.88600368]))
    """
    spread = _variances(data_variance)
    mean = checked.array("data_mean", data_mean, 1)
    if mean.shape != spread.shape or (spread == 0).any():
        raise ValueError(
            f"data_variance, data_mean = {spread.tolist()}, {mean.tolist()}: must be of one length, variances positive"
        )
    low = checked.scalar("beta_min", beta_min, 0.0, math.inf, closed="()")
    high = checked.scalar("beta_max", beta_max, low, math.inf, closed="[)")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u, weights = 0.5 * (nodes + 1.0)[:, None], 0.5 * weights[:, None]
    beta = low + (high - low) * u
    level = np.exp(-low * u - 0.5 * (high - low) * u**2)
    marginal = 1.0 + level * (spread - 1.0)
    path = np.sum(weights * (beta * level * (1.0 - spread) / marginal) ** 2, axis=0) / 4.0
    gap = spread**2 * (1.0 - spread) * np.sum(weights * (beta * level) ** 2 / marginal**3, axis=0)
    last = math.exp(-0.5 * (low + high))
    excess = last * (spread - 1.0)
    prior = 0.5 * (excess - np.log1p(excess) + last * mean**2)
    return LimitConstants(prior, path, gap, (gap / spread) ** 2 / 4.0)


def _check_variance(variance: Variance) -> None:
    if variance not in ("beta", "posterior", "optimal"):
        raise ValueError(f"variance = {variance!r}: must be 'beta', 'posterior' or 'optimal'")


def _variances(variances: ArrayLike) -> Array:
    spread = checked.array("variances", variances, 1)
    if (spread < 0).any():
        raise ValueError(f"variances = {spread.tolist()}: must be non-negative")
    return spread


def _levels(alpha_bar: ArrayLike) -> Array:
    levels = checked.array("alpha_bar", alpha_bar, 1)
    if (levels < 0).any() or (levels >= 1).any():
        raise ValueError(f"alpha_bar = {levels.tolist()}: must lie in [0, 1)")
    return levels


def _grid(alpha_bar: ArrayLike) -> Array:
    levels = _levels(alpha_bar)
    if (np.diff(levels) > 0).any() or (levels[:-1] == 0).any():
        raise ValueError(f"alpha_bar = {levels.tolist()}: must not increase, and may be zero only at the end")
    return levels


def _marginal_variance(levels: Array, variances: Array) -> Array:
    """D(a) = a s^2 + 1 - a, as (T, d)."""
    return levels[:, None] * variances + (1.0 - levels)[:, None]


def _eigen(data: Gaussian) -> tuple[Array, Array]:
    eigenvalues, basis = np.linalg.eigh(data.cov)
    rounding = 64 * data.dim * np.finfo(np.float64).eps * eigenvalues[-1]
    return np.where(eigenvalues > rounding, eigenvalues, 0.0), np.asarray(basis, dtype=np.float64)


def _output(data: Gaussian, basis: Array, last: float, slopes: Array, noise: Array) -> Gaussian:
    """Push N(0, I) at level `last` through the steps: gains of later noise are products of the remaining slopes."""
    gains = np.cumprod(np.concatenate([np.ones((1, slopes.shape[1])), slopes]), axis=0)
    variances = np.sum(gains[:-1] ** 2 * noise, axis=0) + gains[-1] ** 2
    shift = -math.sqrt(last) * gains[-1] * (basis.T @ data.mean)
    return Gaussian(data.mean + basis @ shift, (basis * variances) @ basis.T)


def _ratio_excess(variances: Array, schedule: NoiseSchedule, variance: Variance) -> Array:
    """Exact over chosen variance, minus one, (T, d), by formulas that do not cancel (docs/ddpm.md, "The path KL")."""
    _check_variance(variance)
    if variance == "optimal":
        return np.zeros((schedule.steps, variances.size))
    before = schedule.alpha_bar_previous[:, None]
    noise = schedule.one_minus_alpha_bar[:, None]
    drop = before * schedule.beta[:, None]
    marginal = schedule.alpha_bar[:, None] * variances + noise
    if variance == "beta":
        excess = drop * (variances - 1.0) / marginal
        excess[0] = np.where(variances > 0, excess[0], -1.0)
        return excess
    excess = np.empty_like(marginal)
    excess[1:] = drop[1:] * variances / (noise[:-1] * marginal[1:])
    excess[0] = np.where(variances > 0, np.inf, 0.0)
    return excess
