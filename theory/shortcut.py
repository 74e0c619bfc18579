r"""Shortcut fine-tuning (SFT-PG): its gradient, baselines, critic regulariser and Wasserstein bound, exactly.

The chains are those of `theory.chains`, additive and with every std positive; index t = 0..T-1 of a per-step array is
the step that draws x_t from x_{t+1}, as in the paper. The scores and their sum are

    s_t = d log p_t(x_t | x_{t+1}) / d theta_t = B_t' eps_t / std_t   (p,),      S = sum_t s_t,

and f is the critic, a `QuadraticReward`. A function of x_{t+1} is a `QuadraticReward` too. With chains of
`fractions.Fraction` the baselines and variances are exact rational numbers.

The second half concerns Gaussian data N(m, v) on the line, DDPM steps with the exact score, and the schedules of
`theory.schedules`; several dimensions split over the eigenvectors of the covariance (`theory.ddpm`).
Proofs stand in docs/sft.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from theory import checked, ddpm
from theory.chains import Array, LinearGaussianChain, QuadraticReward, check_problem, marginals
from theory.gaussian import Gaussian, w2_squared
from theory.schedules import NoiseSchedule

Functions = Sequence[QuadraticReward]


# --- The policy-gradient form ---------------------------------------------------------------------------------------


def score_gradient(chain: LinearGaussianChain, critic: QuadraticReward) -> Array:
    """E[f(x_0) s_t] for each step, (T, p): the right side of SFT-PG, eq. (18); their sum is the gradient of E f(x_0).

    Raises ValueError unless the chain is additive, every std is positive and the critic fits.

    >>> score_gradient(two_step_example(), QuadraticReward(0.0, [0.0], [[2.0]])).sum().round(12)
    np.float64(3.2)
    """
    _check(chain, critic)
    means, _ = marginals(chain)
    force = critic.linear + critic.quadratic @ means[0]
    # Stein's identity: E[f eps_t] is the mean gradient of f pulled back through the later steps, times std_t.
    return np.stack([(gain @ columns).T @ force for gain, columns in zip(_gains(chain), chain.B, strict=True)])


def log_sum_factors(std: ArrayLike, dim: int) -> Array:
    """The factors (T,) in (0, 1] by which the printed "log of a sum" of SFT-PG, eq. (16), shrinks each step's gradient.

    rho_t = E[w_t |eps_t|^2] / d with w_t = p_t / sum_tau p_tau; `dim` is d. By quadrature, to about 1e-12; derived in
    docs/sft.md, "The gradient". Raises ValueError unless every std is positive and dim >= 1.

    >>> log_sum_factors([0.5, 0.5], 1).round(9)
    array([0.32477092, 0.32477092])
    """
    widths = checked.array("std", std, 1)
    if (widths <= 0).any():
        raise ValueError(f"std = {widths.tolist()}: must be positive")
    checked.count("dim", dim, 1)
    if widths.size == 1:
        return np.ones(1)
    # The law of r = |eps_t|, on panels so that the quadrature follows the sharp edge of exp(-u p(r)).
    nodes, masses = np.polynomial.legendre.leggauss(40)
    edges = np.linspace(0.0, math.sqrt(dim) + 12.0, 61)
    half = 0.5 * np.diff(edges)[:, None]
    r = (edges[:-1, None] + half * (1.0 + nodes)).ravel()
    log_law = (dim - 1) * np.log(r) - 0.5 * r**2
    law = (half * masses).ravel() * np.exp(log_law - log_law.max())
    law /= law.sum()
    # p_t up to a common factor that makes the densest step's density about one.
    density = np.exp(0.5 * (dim - r**2) + dim * np.log(widths.min() / widths)[:, None])
    # 1 / sum p = integral of exp(-u sum p) du, which splits over the steps; u = exp(v), trapezoidal rule in v.
    spacing = 0.2
    total = np.zeros(widths.size)
    for u in np.exp(np.arange(-45.0 - 0.2 * dim, 60.0 + 8.0 * math.sqrt(dim), spacing)):
        kernel = np.exp(-u * density)
        alone = kernel @ law
        weighted = (kernel * density) @ (law * r**2)
        for t in range(widths.size):
            total[t] += u * weighted[t] * np.prod(np.delete(alone, t))
    return spacing * total / dim


def log_sum_gradient(chain: LinearGaussianChain, critic: QuadraticReward) -> Array:
    """E[f(x_0) grad_theta log sum_t p_t(x_t | x_{t+1})], (p,): SFT-PG, eq. (16), as printed. It is not the gradient.

    Raises ValueError like `score_gradient`.

    >>> log_sum_gradient(two_step_example(), QuadraticReward(0.0, [0.0], [[2.0]]))[0].round(11)
    np.float64(1.05375399718)
    """
    parts = score_gradient(chain, critic).astype(np.float64)
    return log_sum_factors(chain.std.astype(np.float64), chain.dim) @ parts


def two_step_example() -> LinearGaussianChain:
    """x_1 = x_2 + theta + 0.8 eps_1, x_0 = x_1 + theta + 0.5 eps_0, theta = 0.4, x_2 standard normal.

    >>> two_step_example().steps
    2
    """
    one = [[[1.0]], [[1.0]]]
    return LinearGaussianChain(one, one, [[0.0], [0.0]], [0.5, 0.8], [0.4], [0.0], [[1.0]])


class EnvelopeTerms(NamedTuple):
    """The parts of SFT-PG, eq. (17), each (d,): the gradient of Phi, the first term, and the second in two readings."""

    gradient: Array
    frozen_critic: Array
    printed: Array  # d alpha*/d theta . d/d alpha E_p f
    with_target: Array  # the same with E_p f - E_q f, which vanishes


def envelope_terms(mean: ArrayLike, target: ArrayLike) -> EnvelopeTerms:
    """Eq. (17) for the critics <a, x>, |a| = 1, between p = N(theta, I) and q = N(target, I); mean = theta, (d,).

    Phi = |theta - target|. The envelope theorem needs the derivative of E_p f - E_q f at its maximum; that of E_p f
    alone, which is printed, is not zero. Raises ValueError if the shapes differ or theta equals the target, where
    Phi has a kink.

    >>> terms = envelope_terms([1.0, 0.5], [-0.3, 0.2])
    >>> terms.frozen_critic.round(6), terms.printed.round(6), terms.with_target.round(6) + 0.0
    (array([0.974391, 0.22486 ]), array([-0.044214,  0.191594]), array([0., 0.]))
    """
    theta, other = checked.array("mean", mean, 1), checked.array("target", target, 1)
    if theta.shape != other.shape:
        raise ValueError(f"target has shape {other.shape}: must be that of mean, {theta.shape}")
    shift = theta - other
    distance = float(np.linalg.norm(shift))
    if distance == 0.0:
        raise ValueError(f"target = {other.tolist()}: must differ from mean")
    critic = shift / distance
    moved = (np.eye(theta.size) - np.outer(critic, critic)) / distance  # d a*/d theta, symmetric
    return EnvelopeTerms(critic, critic, moved @ theta, moved @ shift)


# --- Baselines ------------------------------------------------------------------------------------------------------


def value_functions(chain: LinearGaussianChain, critic: QuadraticReward) -> list[QuadraticReward]:
    """V_{t+1}(x) = E[f(x_0) | x_{t+1} = x], t = 0..T-1: what SFT-PG, below eq. (21), calls the optimal baseline.

    Raises ValueError like `score_gradient`.

    >>> value_functions(two_step_example(), QuadraticReward(0.0, [0.0], [[2.0]]))[0].constant.round(12)
    np.float64(0.41)
    """
    _check(chain, critic)
    values: list[QuadraticReward] = []
    value = critic
    for t in range(chain.steps):
        matrix, offset = chain.A[t], chain.B[t] @ chain.theta + chain.c[t]
        force = value.linear + value.quadratic @ offset
        spread = chain.std[t] * chain.std[t] * np.trace(value.quadratic)
        constant = value.constant[()] + value.linear @ offset + (offset @ value.quadratic @ offset + spread) / 2
        value = QuadraticReward(constant, matrix.T @ force, matrix.T @ value.quadratic @ matrix)
        values.append(value)
    return values


def optimal_baselines(chain: LinearGaussianChain, critic: QuadraticReward) -> list[QuadraticReward]:
    """b*_t(x_{t+1}) = E[f <s_t, S> | x_{t+1}] / E[|s_t|^2 | x_{t+1}], t = 0..T-1: the least total variance.

    Derived in docs/sft.md, "The optimal baseline". Raises ValueError like `score_gradient`, and for a step whose B is
    zero, which has no score.

    >>> fair = one_step_example(1)
    >>> float(optimal_baselines(fair, QuadraticReward(0.0, [0.0], [[2.0]]))[0].constant)
    3.0
    """
    values = value_functions(chain, critic)
    weights = score_moments(chain)
    means, covs = marginals(chain)
    gains = _gains(chain)
    past = _past_covariances(chain)
    baselines: list[QuadraticReward] = []
    for t, (value, weight) in enumerate(zip(values, weights, strict=True)):
        into = gains[t] @ chain.B[t]  # (d, p): d x_0 / d theta_t
        bend = sum(np.trace(into.T @ critic.quadratic @ gains[s] @ chain.B[s]) for s in range(t + 1))
        constant, linear, quadratic = value.constant[()] + bend / weight, value.linear, value.quadratic
        if t + 1 < chain.steps:
            # E[f s_t | x] = force + pull x; the scores of the steps before have the mean regression (x - mean).
            through = gains[t] @ chain.A[t]
            force = into.T @ (critic.linear + critic.quadratic @ (means[0] - through @ means[t + 1]))
            pull = into.T @ critic.quadratic @ through
            regression = _solve(covs[t + 1], past[t].T).T
            shift = regression @ means[t + 1]
            cross = pull.T @ regression
            constant = constant - force @ shift / weight
            linear = linear + (regression.T @ force - pull.T @ shift) / weight
            quadratic = quadratic + (cross + cross.T) / weight
        baselines.append(QuadraticReward(constant, linear, quadratic))
    return baselines


def score_moments(chain: LinearGaussianChain) -> list[Any]:
    """E[|s_t|^2 | x_{t+1}] = |B_t|^2 / std_t^2, (T,), the same at every x_{t+1}; ValueError if one is zero.

    >>> [round(float(moment), 12) for moment in score_moments(two_step_example())]
    [4.0, 1.5625]
    """
    _check(chain, None)
    weights = [(columns * columns).sum() / (std * std) for columns, std in zip(chain.B, chain.std, strict=True)]
    for t, weight in enumerate(weights):
        if not weight:
            raise ValueError(f"B[{t}] is zero: must not be, for the step has no score")
    return weights


def optimal_constants(chain: LinearGaussianChain, critic: QuadraticReward) -> list[Any]:
    """The best constant for each step, (T,): E b*_t(x_{t+1}). Raises ValueError like `optimal_baselines`.

    >>> optimal_constants(one_step_example(1), QuadraticReward(-2.0, [0.0], [[2.0]]))[0]
    np.float64(1.0)
    """
    return [_mean(b, *law) for b, law in zip(optimal_baselines(chain, critic), _inputs(chain), strict=True)]


def estimator_variance(chain: LinearGaussianChain, critic: QuadraticReward, baselines: Functions | None = None) -> Any:
    """The trace of Cov(sum_t (f(x_0) - b_t(x_{t+1})) s_t), exact; `baselines` are T functions, or None for none.

    Source: SFT-PG, eq. (21). Raises ValueError like `optimal_baselines` or unless there is one baseline for each step.

    >>> f = QuadraticReward(0.0, [0.0], [[2.0]])
    >>> chain = one_step_example(1)
    >>> choices = [None, value_functions(chain, f), optimal_baselines(chain, f)]
    >>> [float(estimator_variance(chain, f, baselines)) for baselines in choices]
    [15.0, 10.0, 6.0]
    """
    best = optimal_baselines(chain, critic)
    used = constant_baselines(chain, [0] * chain.steps) if baselines is None else baselines
    if len(used) != chain.steps:
        raise ValueError(f"baselines has {len(used)} entries: must have one for each of the {chain.steps} steps")
    gradient = score_gradient(chain, critic).sum(axis=0)
    second = _plain_second_moment(chain, critic) - gradient @ gradient
    for weight, b, optimum, (mean, cov) in zip(score_moments(chain), used, best, _inputs(chain), strict=True):
        check_problem(chain, b, None)
        off = QuadraticReward(b.constant - optimum.constant, b.linear - optimum.linear, b.quadratic - optimum.quadratic)
        second = second + weight * (_square(off, mean, cov) - _square(optimum, mean, cov))
    return second


def constant_baselines(chain: LinearGaussianChain, values: Sequence[Any]) -> list[QuadraticReward]:
    """The constants `values` (T,) as functions of x_{t+1}, of the chain's number type.

    >>> len(constant_baselines(two_step_example(), [1.0, 2.0]))
    2
    """
    linear = np.zeros_like(chain.theta, shape=(chain.dim,))
    quadratic = np.zeros_like(chain.theta, shape=(chain.dim, chain.dim))
    return [QuadraticReward(value, linear, quadratic) for value in values]


def one_step_example(dim: int) -> LinearGaussianChain:
    """x_0 = theta + eps at theta = 0, in d = `dim` dimensions: with f = |x|^2 the variances are those of docs/sft.md.

    >>> chain, f = one_step_example(3), QuadraticReward(0.0, [0.0] * 3, 2 * np.eye(3))
    >>> [float(estimator_variance(chain, f, rule(chain, f))) for rule in (value_functions, optimal_baselines)]
    [42.0, 30.0]
    """
    eye, zero = np.eye(checked.count("dim", dim, 1)), np.zeros((dim, dim))
    return LinearGaussianChain(zero[None], eye[None], zero[:1], [1.0], zero[0], zero[0], zero)


class BumpVariances(NamedTuple):
    """Variances of the one-step estimator without baseline, with V and with b*."""

    none: float
    value: float
    optimal: float


def bump_variances(width: float, dim: int = 1) -> BumpVariances:
    """Variances for x_0 = theta + eps in d = `dim` dimensions and the critic f = exp(-|x_0 - theta|^2 / (2 width^2)).

    V = (1 + r)^(-d/2) and b* = V / (1 + r), r = width^-2: for a narrow critic V is far too large and the loss is
    unbounded. Derived in docs/sft.md, "The value function is not optimal". Raises ValueError unless width > 0.

    >>> narrow = bump_variances(0.1)
    >>> round(narrow.value / narrow.optimal, 3), round(narrow.value / narrow.none, 3)
    (28.735, 28.656)
    """
    r = checked.scalar("width", width, 0.0, math.inf, closed="()") ** -2
    d = checked.count("dim", dim, 1)
    value = (1.0 + r) ** (-0.5 * d)
    best = value / (1.0 + r)
    none = d * (1.0 + 2.0 * r) ** (-0.5 * d - 1.0)
    return BumpVariances(none, none + d * value * (value - 2.0 * best), none - d * best**2)


# --- What the baseline regulariser penalises ------------------------------------------------------------------------


def input_correlations(chain: LinearGaussianChain) -> Array:
    """The correlations (T,) of x_0 with x_{t+1}, t = 0..T-1, of a chain on the line.

    Raises ValueError unless the chain is additive, of dimension one and with every std positive.

    >>> input_correlations(two_step_example()).round(6)
    array([0.931518, 0.727393])
    """
    _check(chain, None)
    if chain.dim != 1:
        raise ValueError(f"chain has dimension {chain.dim}: must be 1")
    _, covs = marginals(chain)
    through = np.array([float((g @ a)[0, 0]) for g, a in zip(_gains(chain), chain.A, strict=True)])
    spread = covs[:, 0, 0].astype(np.float64)
    return through * np.sqrt(spread[1:] / spread[0])


def chi_squared(shift: float, ratio: float = 1.0) -> float:
    """chi^2(q || p) for p = N(m, v) and q = N(m + shift sqrt(v), ratio v); infinite for ratio >= 2.

    Raises ValueError unless ratio > 0 and the shift is finite, and above exp(700).

    >>> round(chi_squared(0.5), 10)
    0.2840254167
    """
    checked.scalar("shift", shift, -math.inf, math.inf, closed="()")
    checked.scalar("ratio", ratio, 0.0, math.inf, closed="()")
    if ratio >= 2.0:
        return math.inf
    exponent = shift**2 / (2.0 - ratio) - 0.5 * math.log(ratio * (2.0 - ratio))
    if exponent > 700.0:
        raise ValueError(f"shift = {shift}: chi-squared, exp({exponent:.6g}) - 1, must be a finite float")
    return math.expm1(exponent)


def sampled_regulariser_supremum(correlations: ArrayLike, shift: float, strength: float, ratio: float = 1.0) -> float:
    """sup over all f in L^2(p) and all baselines of g - strength sum_t E(V_{t+1}(x_{t+1}) - f(x_0))^2.

    This is SFT-PG, eq. (24), with the regulariser of the released code, whose target is f(x_0) in place of
    E[f(x_0) | x_{t+1}]. x_0 and x_{t+1} are jointly normal with the given correlations (T,); p is the law of x_0 and
    q = N(m + shift sqrt(v), ratio v). Equals chi^2(q || p) / (4 strength T) if all correlations vanish, and is larger
    otherwise; infinite if chi^2 is. Derived in docs/sft.md, "The regulariser". Raises ValueError unless every
    |correlation| < 1 and strength > 0, and like `chi_squared`. The series has about 20 / min(ratio, 2 - ratio) terms.

    >>> round(sampled_regulariser_supremum([0.0], 0.5, 0.1), 10)
    0.7100635417
    """
    rho = checked.array("correlations", correlations, 1)
    if (np.abs(rho) >= 1).any():
        raise ValueError(f"correlations = {rho.tolist()}: must lie in (-1, 1)")
    checked.scalar("strength", strength, 0.0, math.inf, closed="()")
    total = chi_squared(shift, ratio)
    if math.isinf(total):
        return math.inf
    # Coefficients of q/p in the orthonormal Hermite polynomials of p, by their three-term recurrence.
    before, now = 0.0, 1.0
    supremum = left = 0.0
    for k in itertools.count():
        before, now = now, (shift * now + math.sqrt(k) * (ratio - 1.0) * before) / math.sqrt(k + 1.0)
        left += now**2
        supremum += now**2 / (4.0 * strength * float(np.sum(1.0 - rho ** (2 * (k + 1)))))
        # Two neighbours cannot both vanish, and past their peak the pairs fall like (ratio - 1)^(2 k).
        if now**2 + before**2 <= 1e-17 * ratio * (2.0 - ratio) * left:
            return supremum
    raise AssertionError("unreachable")


def linear_critic_objective(
    correlations: ArrayLike, shift: float, strength: float, slope: float, *, sampled: bool
) -> float:
    """Eq. (24) at the critic f(x) = -slope x, standardised so that p has variance one, with the best baseline.

    `sampled` chooses the target f(x_0) of the released code; otherwise the target is the printed E[f(x_0) | x_{t+1}],
    the best baseline attains it, the regulariser is zero and the objective grows with the slope without bound.
    Raises ValueError like `sampled_regulariser_supremum`.

    >>> linear_critic_objective([0.6], 0.5, 0.1, 100.0, sampled=False)
    50.0
    >>> round(linear_critic_objective([0.6], 0.5, 0.1, 100.0, sampled=True), 9)
    -590.0
    """
    rho = checked.array("correlations", correlations, 1)
    if (np.abs(rho) >= 1).any():
        raise ValueError(f"correlations = {rho.tolist()}: must lie in (-1, 1)")
    checked.scalar("strength", strength, 0.0, math.inf, closed="()")
    penalty = float(np.sum(1.0 - rho**2)) if sampled else 0.0
    return slope * shift - strength * slope**2 * penalty


# --- The Wasserstein bound of eq. (9) -------------------------------------------------------------------------------


def released_schedule(T: int) -> NoiseSchedule:
    """beta = sigmoid(linspace(-6, 6, T)) (1e-2 - 1e-5) + 1e-5, the schedule of the released toy code, for every T.

    alpha_bar_T is far from 0 for a short chain. Raises ValueError unless T >= 1.

    >>> released_schedule(10).alpha_bar[-1].round(10)
    np.float64(0.9509783649)
    """
    rise = np.linspace(-6.0, 6.0, checked.count("T", T, 1))
    return NoiseSchedule((1e-2 - 1e-5) / (1.0 + np.exp(-rise)) + 1e-5)


def contraction(variance: float, schedule: NoiseSchedule) -> float:
    """I(T) = sqrt(alpha_bar_T) v / D_T of SFT-PG, eq. (9), for data of variance v.

    D_T = alpha_bar_T v + 1 - alpha_bar_T is the variance of x_T. I(T) is the product of the slopes of the exact reverse
    steps (`theory.ddpm.ancestral_steps`), each the Lipschitz constant of its mean. Derived in docs/sft.md, "The
    Wasserstein bound". Raises ValueError for a negative variance.

    >>> round(contraction(0.09, released_schedule(10)), 10)
    0.6520058768
    """
    v = checked.scalar("variance", variance, 0.0, math.inf, closed="[)")
    level, noise = float(schedule.alpha_bar[-1]), float(schedule.one_minus_alpha_bar[-1])
    return math.sqrt(level) * v / (level * v + noise)


def reverse_w2(
    mean: float, variance: float, schedule: NoiseSchedule, choice: ddpm.Variance | Array = "optimal"
) -> Array:
    """W2(p_t, q_t), t = 0..T: the sampler from N(0, 1) with the exact score against the noised data N(mean, variance).

    `choice` is the noise of the reverse steps: a name of `theory.ddpm` or the variances (T,) themselves. Raises
    ValueError for a negative variance, an unknown name or a wrong shape.

    >>> reverse_w2(0.5, 0.09, released_schedule(10))[[0, -1]].round(10)
    array([0.4929008 , 0.79910601])
    """
    v = checked.scalar("variance", variance, 0.0, math.inf, closed="[)")
    slopes, exact = _scalar_steps(v, schedule)
    if isinstance(choice, np.ndarray):
        noise = _noise(choice, schedule)
    else:
        noise = ddpm.ancestral_steps([v], schedule, choice)[1][:, 0]
    marginal = np.concatenate([[v], schedule.alpha_bar * v + schedule.one_minus_alpha_bar])
    gap = -math.sqrt(float(schedule.alpha_bar[-1])) * mean
    excess = float(schedule.alpha_bar[-1]) * (1.0 - v)  # the sampler's variance minus the data's, which may be tiny
    distances = np.empty(schedule.steps + 1)
    for t in reversed(range(schedule.steps + 1)):
        spread = excess / (math.sqrt(max(marginal[t] + excess, 0.0)) + math.sqrt(marginal[t])) if excess else 0.0
        distances[t] = math.hypot(gap, spread)
        if t:
            gap *= slopes[t - 1]
            excess = slopes[t - 1] ** 2 * excess + (noise[t - 1] - exact[t - 1])
    return distances


def mean_error_bound(slopes: ArrayLike, errors: ArrayLike, start: float) -> float:
    """sum_t (prod_{s < t} slope_s) error_t + (prod_t slope_t) start: a bound of W2(p_0, q_0), sharp.

    For a sampler with the exact noise whose step t has a mean with Lipschitz constant slope_t, slopes (T,), t = 1..T,
    and differs from the exact one by errors (T,) in L^2(q_t); `start` is W2(p_T, q_T). This is what the O(sqrt J) of
    SFT-PG, eq. (9), stands for. Raises ValueError for different lengths or a negative entry.

    >>> mean_error_bound([0.5, 0.75], [0.25, 0.5], 1.0)
    0.875
    """
    gains, each = _gains_and_errors(slopes, errors)
    distance = checked.scalar("start", start, 0.0, math.inf, closed="[)")
    return float(gains[:-1] @ each + gains[-1] * distance)


def noise_error_bound(slopes: ArrayLike, deviations: ArrayLike, start: float) -> float:
    """sqrt(sum_t (prod_{s < t} slope_s)^2 deviation_t^2 + (prod_t slope_t)^2 start^2): the same for wrong noise.

    For exact means and noise whose standard deviation is off by deviations (T,): its coupling error is independent of
    the distance so far, so that squares add. Not an O(sqrt J) of the means. Raises ValueError like `mean_error_bound`.

    >>> noise_error_bound([0.5], [3.0], 8.0)
    5.0
    """
    gains, each = _gains_and_errors(slopes, deviations)
    distance = checked.scalar("start", start, 0.0, math.inf, closed="[)")
    return math.sqrt(float(gains[:-1] ** 2 @ each**2 + gains[-1] ** 2 * distance**2))


def noise_deviations(variance: float, schedule: NoiseSchedule, choice: ddpm.Variance) -> Array:
    """|sqrt(chosen variance) - sqrt(exact variance)| of the reverse steps, (T,), t = 1..T.

    Raises ValueError for a negative variance or an unknown choice.

    >>> noise_deviations(1.0, NoiseSchedule([0.1, 0.3]), "beta")
    array([0., 0.])
    """
    v = checked.scalar("variance", variance, 0.0, math.inf, closed="[)")
    chosen, exact = (ddpm.ancestral_steps([v], schedule, name)[1][:, 0] for name in (choice, "optimal"))
    return np.abs(np.sqrt(chosen) - np.sqrt(exact))


# --- The optimal reverse variance -----------------------------------------------------------------------------------


def analytic_variance(variances: ArrayLike, schedule: NoiseSchedule) -> Array:
    """The optimal isotropic reverse variance (T,), t = 1..T, for Gaussian data with eigenvalue variances (d,).

    Bao et al. 2022 (Analytic-DPM, arXiv 2201.06503), Theorem 1, at lambda_t^2 = beta-tilde_t:

        beta-tilde_t + (sqrt(N_t/alpha_t) - sqrt(N_{t-1} - beta-tilde_t))^2 (1 - N_t E|score|^2 / d)

    with N = 1 - alpha_bar. For Gaussian data it is the mean over the eigenvectors of the exact variance (docs/sft.md,
    "The optimal reverse variance"). Raises ValueError for a negative variance.

    >>> analytic_variance([1.0, 1.0], NoiseSchedule([0.1, 0.3])).round(12)
    array([0.1, 0.3])
    """
    spread = checked.array("variances", variances, 1)
    if (spread < 0).any():
        raise ValueError(f"variances = {spread.tolist()}: must be non-negative")
    noise = schedule.one_minus_alpha_bar
    before = np.concatenate([[0.0], noise[:-1]])
    smallest = schedule.posterior_variance
    # 1 - noise E|score|^2/d = mean of a v / D, without the cancellation of the difference.
    signal = schedule.alpha_bar[:, None] * spread
    share = np.mean(signal / (signal + noise[:, None]), axis=1)
    # Rounding may push 1 - alpha_bar_{t-1} - beta-tilde_t below zero where it vanishes, at t = 1.
    rest = np.sqrt(np.maximum(before - smallest, 0.0))
    return smallest + (np.sqrt(noise / schedule.alpha) - rest) ** 2 * share


def sampler_w2(data: Gaussian, schedule: NoiseSchedule) -> dict[ddpm.Variance, float]:
    """W2(output, data) of ancestral sampling with the exact score, for the noise beta, beta-tilde and the exact one.

    Raises ValueError if rounding leaves no covariance, like `theory.gaussian.Gaussian`.

    >>> errors = sampler_w2(Gaussian.scalar(0.5, 0.09), released_schedule(10))
    >>> {name: round(error, 6) for name, error in errors.items()}
    {'beta': 0.494128, 'posterior': 0.486137, 'optimal': 0.492901}
    """
    names: tuple[ddpm.Variance, ...] = ("beta", "posterior", "optimal")
    return {name: math.sqrt(w2_squared(ddpm.ancestral_law(data, schedule, name), data)) for name in names}


# --- Parts ----------------------------------------------------------------------------------------------------------


def _check(chain: LinearGaussianChain, critic: QuadraticReward | None) -> None:
    if critic is not None:
        check_problem(chain, critic, None)
    if not chain.additive:
        raise ValueError("chain.N is not zero: the chain must be additive")
    if not (chain.std > 0).all():
        raise ValueError(f"std = {chain.std.tolist()}: must be positive, or a step has no score")


def _gains(chain: LinearGaussianChain) -> list[Array]:
    """d x_0 / d x_t, (d, d), t = 0..T-1."""
    gains = [np.eye(chain.dim, dtype=int).astype(chain.theta.dtype)]
    for matrix in chain.A[:-1]:
        gains.append(gains[-1] @ matrix)
    return gains


def _past_covariances(chain: LinearGaussianChain) -> list[Array]:
    """Cov(sum_{tau > t} s_tau, x_{t+1}), (p, d), t = 0..T-1; the last is zero, for x_T precedes every score."""
    covariance = np.zeros_like(chain.theta, shape=(chain.parameters, chain.dim))
    past = [covariance]
    for t in reversed(range(1, chain.steps)):
        covariance = covariance @ chain.A[t].T + chain.B[t].T
        past.insert(0, covariance)
    return past


def _inputs(chain: LinearGaussianChain) -> list[tuple[Array, Array]]:
    """Mean and covariance of x_{t+1}, t = 0..T-1."""
    means, covs = marginals(chain)
    return list(zip(means[1:], covs[1:], strict=True))


def _mean(f: QuadraticReward, mean: Array, cov: Array) -> Any:
    return f.constant[()] + f.linear @ mean + (mean @ f.quadratic @ mean + np.trace(f.quadratic @ cov)) / 2


def _square(f: QuadraticReward, mean: Array, cov: Array) -> Any:
    """E f(x)^2 for x ~ N(mean, cov)."""
    slope, spread, level = f.linear + f.quadratic @ mean, f.quadratic @ cov, _mean(f, mean, cov)
    return level * level + slope @ cov @ slope + np.trace(spread @ spread) / 2


def _plain_second_moment(chain: LinearGaussianChain, f: QuadraticReward) -> Any:
    """E f(x_0)^2 |S|^2: Stein's identity twice, E f^2 S_k^2 = Var(S_k) E f^2 + c_k' E[Hessian of f^2] c_k."""
    means, covs = marginals(chain)
    slope = f.linear + f.quadratic @ means[0]
    squares = np.outer(slope, slope) + f.quadratic @ covs[0] @ f.quadratic  # E[grad f grad f']
    hessian = 2 * (squares + _mean(f, means[0], covs[0]) * f.quadratic)
    parts = [gain @ columns for gain, columns in zip(_gains(chain), chain.B, strict=True)]
    into = np.stack(parts).sum(axis=0)  # Cov(x_0, S), (d, p)
    return sum(score_moments(chain)) * _square(f, means[0], covs[0]) + np.trace(into.T @ hessian @ into)


def _solve(matrix: Array, right: Array) -> Array:
    """matrix^-1 right for a positive definite matrix, of floats or of fractions."""
    if matrix.dtype != object:
        return np.linalg.solve(matrix, right)
    rows = np.concatenate([matrix, right], axis=1)
    for i in range(len(rows)):  # Gauss-Jordan; the pivots of a positive definite matrix are positive
        rows[i] = rows[i] / rows[i, i]
        for j in range(len(rows)):
            if j != i:
                rows[j] = rows[j] - rows[j, i] * rows[i]
    return rows[:, len(rows) :]


def _scalar_steps(variance: float, schedule: NoiseSchedule) -> tuple[Array, Array]:
    slopes, noise = ddpm.ancestral_steps([variance], schedule, "optimal")
    return slopes[:, 0], noise[:, 0]


def _noise(choice: Array, schedule: NoiseSchedule) -> Array:
    noise = checked.array("choice", choice, 1)
    if noise.shape != (schedule.steps,) or (noise < 0).any():
        raise ValueError(f"choice has shape {noise.shape}: must be {(schedule.steps,)}, with no negative entry")
    return noise


def _gains_and_errors(slopes: ArrayLike, errors: ArrayLike) -> tuple[Array, Array]:
    """Products of the slopes of the steps that follow, (T + 1,), and the errors (T,)."""
    factors, each = checked.array("slopes", slopes, 1), checked.array("errors", errors, 1)
    if factors.shape != each.shape or (factors < 0).any() or (each < 0).any():
        raise ValueError(
            f"slopes, errors have shapes {factors.shape}, {each.shape}: must be equal, with no negative entry"
        )
    return np.cumprod(np.concatenate([[1.0], factors])), each
