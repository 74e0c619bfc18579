r"""Sampling guided towards a target reward, on Gaussian data N(m, C) with the exact score: laws of the output.

The reward is g'x. To the score at x_t, of level a = alpha_bar_t, guidance adds the gradient of

    -(b_t / 2) (y - g' E[x_0 | x_t])^2        (generative bilevel, eq. (32), as reconstructed: b = 2 beta)

and so pulls towards the target y. Scalars used throughout: the reward's `variance` v = g'Cg under the data, the `gap`
y - g'm and z^2 = b v / 2. In the information clock kappa = Var(g' E[x_0 | x_t]), which runs from 0 to v, the posterior
mean of the reward, less g'm, solves (constant b)

    reverse SDE:            du = b (gap - u) dkappa + dW_kappa,
    probability-flow ODE:   du = {u / (2 kappa) + b (gap - u) / 2} dkappa        (the limit of DDIM with many steps),

from u = 0. The output's reward is u at kappa = v, plus g'm. No noise schedule appears. Proofs: docs/bilevel.md.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import dawsn

from theory import checked, gaussian
from theory.checked import Array
from theory.gaussian import Gaussian

Sampler = Literal["sde", "ode"]

# The maximum of 2 z D(z), D Dawson's function, and where it is attained: D(z) + z D'(z) = 0, D' = 1 - 2 z D.
OVERSHOOT_MAXIMUM = 1.2847494396568465
OVERSHOOT_ARGUMENT = 1.5019752682686115


# --- one round with a constant strength ---------------------------------------------------------------------------


def reward_moments(variance: float, gap: float, strength: float, sampler: Sampler = "sde") -> tuple[float, float]:
    """Mean, less g'm, and variance of the output's reward for constant b = `strength`.

    SDE: gap (1 - exp(-2 z^2)) and v (1 - exp(-4 z^2)) / (4 z^2), for every covariance C of the data. ODE: gap 2 z D(z)
    and v exp(-2 z^2), if g is an eigenvector of C. Derived in docs/bilevel.md, "Guided sampling: the output's law".
    Raises ValueError for a negative or infinite variance or strength, or an unknown sampler.

    >>> [round(moment, 12) for moment in reward_moments(1.0, 1.0, 2.0)]
    [0.864664716763, 0.245421090278]
    >>> [round(moment, 12) for moment in reward_moments(1.0, 1.0, 2.0, "ode")]
    [1.076159013826, 0.135335283237]
    """
    v, gap = _not_negative("variance", variance), _finite("gap", gap)
    x = _not_negative("strength", strength) * v
    if _check_sampler(sampler) == "sde":
        return -gap * math.expm1(-x), v * _average_decay(2 * x)
    return gap * overshoot(math.sqrt(x / 2)), v * math.exp(-x)


def overshoot(z: float) -> float:
    """2 z D(z), D(z) = exp(-z^2) int_0^z exp(s^2) ds: how far of the way to the target the guided ODE (DDIM) gets.

    More than 1 for z > 0.9241..., at most `OVERSHOOT_MAXIMUM`, at z = `OVERSHOOT_ARGUMENT`; 1 + 1/(2 z^2) + ... for
    large z. The SDE's share is 1 - exp(-2 z^2) < 1. Derived in docs/bilevel.md, "Guided sampling: the overshoot".
    Raises ValueError for a negative z.

    >>> round(overshoot(OVERSHOOT_ARGUMENT) - OVERSHOOT_MAXIMUM, 14), overshoot(1.0) > 1.0
    (0.0, True)
    """
    return float(2 * _not_negative("z", z) * dawsn(z))


def guided_law(
    data: Gaussian, gradient: ArrayLike, target: float, strength: float, sampler: Sampler = "sde"
) -> Gaussian:
    """The output's law (d,) for the reward g'x, g = `gradient` (d,), an eigenvector of C; constant b = `strength`.

    Along g the law is that of `reward_moments`; orthogonal to it that of the data. A zero gradient leaves the data.
    Source: generative bilevel, Algorithm 5, one round. Raises ValueError if g is no eigenvector of data.cov (the law
    is then still Gaussian, but has no closed form), and as `reward_moments`.

    >>> law = guided_law(Gaussian.diagonal([0.5, 3.0], [2.0, 1.0]), [0.8, 0.0], 3.0, 0.5)
    >>> law.mean.round(9), law.cov.round(9)
    (array([2.03629962, 3.        ]), array([[1.12806672, 0.        ],
           [0.        , 1.        ]]))
    """
    g = _gradient(data, gradient)
    image = data.cov @ g
    square = float(g @ g)
    if square == 0.0:
        return data
    variance = float(g @ image)
    if np.abs(image - variance / square * g).max() > 1e-9 * np.abs(image).max():
        raise ValueError(f"gradient = {g.tolist()}: must be an eigenvector of data.cov")
    mean, spread = reward_moments(variance, target - float(g @ data.mean), strength, sampler)
    return Gaussian(data.mean + g * (mean / square), data.cov + np.outer(g, g) * ((spread - variance) / square**2))


def path_kl(variance: float, gap: float, strength: float) -> float:
    """KL in nats between the paths of the guided and the unguided reverse SDE, constant b, for every covariance C.

    b^2/2 int_0^v E (gap - u)^2 dkappa = {b gap^2 (1 - e^{-2x}) + x - (1 - e^{-2x})/2} / 4 with x = b v.
    At least the KL of the outputs, with equality only without guidance. Derived in docs/bilevel.md, "Guided sampling:
    path and marginal KL". Raises ValueError for a negative or infinite variance or strength.

    >>> round(path_kl(1.0, 1.0, 2.0), 12)
    0.868131635417
    """
    v, gap = _not_negative("variance", variance), _finite("gap", gap)
    b = _not_negative("strength", strength)
    x = b * v
    # x - (1 - exp(-2x))/2 = x (1 - average decay): the second factor cancels only where it does not matter.
    return 0.5 * b * x * gap**2 * _average_decay(2 * x) + 0.25 * x * (1.0 - _average_decay(2 * x))


# --- the strength that gives the posterior, and the tilt -----------------------------------------------------------


def exact_strength(data: Gaussian, gradient: ArrayLike, noise_variance: float, alpha_bar: ArrayLike) -> Array:
    """b_t = 1 / (sigma^2 + g' Cov(x_0 | x_t) g) at the levels alpha_bar (S,) in [0, 1]; shape (S,).

    With it the guidance is the score of the observation y = g'x_0 + N(0, sigma^2), sigma^2 = `noise_variance`, and
    either sampler ends in `posterior_law`. Derived in docs/bilevel.md, "Guided sampling: the exact strength". Raises
    ValueError unless sigma^2 > 0, or for a level outside [0, 1].

    >>> exact_strength(Gaussian.scalar(0.0, 1.0), [1.0], 1.0, [1.0, 0.5, 0.0]).round(9)
    array([1.        , 0.66666667, 0.5       ])
    """
    g, noise = _gradient(data, gradient), _positive("noise_variance", noise_variance)
    levels = checked.array("alpha_bar", alpha_bar, 1)
    if (levels < 0).any() or (levels > 1).any():
        raise ValueError(f"alpha_bar = {levels.tolist()}: must lie in [0, 1]")
    eigenvalues, basis = np.linalg.eigh(data.cov)
    spread = np.maximum(eigenvalues, 0.0)
    unexplained = (1.0 - levels)[:, None]
    with np.errstate(invalid="ignore"):  # a point mass at level 1: 0/0
        posterior = np.nan_to_num(spread * unexplained / (levels[:, None] * spread + unexplained))
    return 1.0 / (noise + posterior @ (basis.T @ g) ** 2)


def posterior_law(data: Gaussian, gradient: ArrayLike, target: float, noise_variance: float) -> Gaussian:
    """The law of x_0 given g'x_0 + N(0, sigma^2) = y, for every C: the output under `exact_strength`.

    Raises ValueError unless sigma^2 > 0.

    >>> posterior_law(Gaussian.scalar(0.0, 1.0), [1.0], 1.0, 1.0).mean
    array([0.5])
    """
    g, noise = _gradient(data, gradient), _positive("noise_variance", noise_variance)
    image = data.cov @ g
    gain = image / (noise + float(g @ image))
    gap = _finite("target", target) - float(g @ data.mean)
    return Gaussian(data.mean + gain * gap, data.cov - np.outer(gain, image))


def target_tilt(data: Gaussian, gradient: ArrayLike, entropy_strength: float) -> Gaussian:
    """p_data exp(g'x / lambda), lambda = `entropy_strength` > 0: N(m + C g / lambda, C), what the tuning asks for.

    >>> target_tilt(Gaussian.scalar(0.0, 2.0), [1.0], 0.5).mean
    array([4.])
    """
    g = _gradient(data, gradient)
    return Gaussian(data.mean + data.cov @ g / _positive("entropy_strength", entropy_strength), data.cov)


def matched_kl(x: float, shift: float, sampler: Sampler = "sde") -> float:
    """KL(output || tilt) in nats when b times the gap is 1/lambda, so that the pull starts as the tilt's.

    x = b v and `shift` = v / lambda^2, the squared distance of the tilt from the data in standard deviations. Positive
    for every x > 0: the tilt is reached only for b -> 0, where the target rises like 1/b. Derived in docs/bilevel.md,
    "Guided sampling: the joint limit". Raises ValueError for negative arguments or an unknown sampler.

    >>> round(matched_kl(0.128, 0.0128), 7)  # data N(m, 2), g = 0.8, lambda = 10, b = 0.1
    0.0037885
    """
    x, shift = _not_negative("x", x), _not_negative("shift", shift)
    if _check_sampler(sampler) == "sde":
        ratio, lost = _average_decay(2 * x), 1.0 - _average_decay(x)
        excess = ratio - 1.0
        return 0.5 * (excess - math.log1p(excess) + shift * lost**2)
    reach = 1.0 if x == 0.0 else overshoot(math.sqrt(x / 2)) / x
    return 0.5 * (math.expm1(-x) + x + shift * (1.0 - reach) ** 2)


def matched_kl_leading(x: float, shift: float, sampler: Sampler = "sde") -> float:
    """The leading term of `matched_kl` for small x: x^2/4 (1 + shift/2) for the SDE, x^2/4 (1 + 2 shift/9) for the ODE.

    >>> round(matched_kl_leading(0.1, 1.0), 12)
    0.00375
    """
    return x**2 / 4 * (1 + shift * (1 / 2 if _check_sampler(sampler) == "sde" else 2 / 9))


# --- S steps of DDIM, as in code ----------------------------------------------------------------------------------


def guided_ddim_steps(
    data: Gaussian, alpha_bar: ArrayLike, gradient: ArrayLike, target: float, strength: ArrayLike
) -> tuple[Array, Array]:
    """Matrices (S, d, d) and offsets (S, d) of the steps x -> M x + c of deterministic DDIM with guided noise.

    The predicted noise is eps*(x) + sqrt(1 - a) b grad_x (y - g'xhat_0(x))^2 / 2, xhat_0 from the exact eps*; the step
    uses it throughout. `alpha_bar` (S,) is 1 > a_1 >= ... >= a_S >= 0 with only the last possibly 0, entry i stepping
    to entry i - 1 and the first to 1; `strength` is b, one number or (S,). Any covariance. Source: the code published
    with the bilevel paper, for one sample, with DDIM for its scheduler. Raises ValueError for another grid or shape, or
    a negative strength.

    >>> matrices, offsets = guided_ddim_steps(Gaussian.scalar(0.0, 1.0), [0.5, 0.0], [1.0], 1.0, 1.0)
    >>> matrices.round(9).ravel(), offsets.round(9).ravel()
    (array([0.35355339, 0.70710678]), array([0.5       , 0.70710678]))
    """
    g = _gradient(data, gradient)
    now = _grid(alpha_bar)
    then = np.concatenate([[1.0], now[:-1]])
    strengths = np.asarray(strength, dtype=np.float64)
    if strengths.shape not in ((), now.shape):
        raise ValueError(f"strength has shape {strengths.shape}: must be one number or {now.shape}")
    strengths = np.broadcast_to(strengths, now.shape)
    if not (np.isfinite(strengths).all() and (strengths >= 0).all()):
        raise ValueError(f"strength = {np.asarray(strength).tolist()}: must be non-negative and finite")
    gap = _finite("target", target) - float(g @ data.mean)
    identity = np.eye(data.dim)
    matrices, offsets = np.empty((now.size, data.dim, data.dim)), np.empty((now.size, data.dim))
    for i in range(now.size):
        a, next_a, b = float(now[i]), float(then[i]), float(strengths[i])
        # D^-1 = Cov(x_t)^-1; xhat_0 - m = sqrt(a) C D^-1 (x - sqrt(a) m).
        precision = np.asarray(np.linalg.inv(a * data.cov + (1.0 - a) * identity), dtype=np.float64)
        explained: Array = data.cov @ precision
        along_data = math.sqrt(next_a * a) * explained
        along_noise = math.sqrt((1.0 - next_a) * (1.0 - a)) * precision
        # A change delta of the noise moves the next state by (sqrt(1 - a') - sqrt(a' (1 - a) / a)) delta, and the
        # guidance is proportional to sqrt(a): written so, a = 0 needs no special case.
        turn = math.sqrt(next_a * (1.0 - a)) - math.sqrt(a * (1.0 - next_a))
        pull = b * math.sqrt(1.0 - a) * turn * (explained @ g)
        matrices[i] = along_data + along_noise - math.sqrt(a) * np.outer(pull, explained @ g)
        offsets[i] = math.sqrt(next_a) * data.mean + pull * gap - math.sqrt(a) * matrices[i] @ data.mean
    return matrices, offsets


def guided_ddim_law(
    data: Gaussian, alpha_bar: ArrayLike, gradient: ArrayLike, target: float, strength: ArrayLike
) -> Gaussian:
    """The exact output law of `guided_ddim_steps` from x_T ~ N(0, I); raises like it.

    >>> guided_ddim_law(Gaussian.scalar(0.0, 1.0), [0.5, 0.0], [1.0], 1.0, 1.0).mean.round(9)
    array([0.75])
    """
    law = Gaussian(np.zeros(data.dim), np.eye(data.dim))
    matrices, offsets = guided_ddim_steps(data, alpha_bar, gradient, target, strength)
    for matrix, offset in zip(matrices[::-1], offsets[::-1], strict=True):
        law = gaussian.affine(law, matrix, offset)
    return law


# --- Algorithm 5 over rounds --------------------------------------------------------------------------------------


def rounds(
    data: Gaussian,
    linear: ArrayLike,
    quadratic: ArrayLike,
    targets: ArrayLike,
    strength: float,
    sampler: Sampler = "sde",
    *,
    intercept: bool = False,
) -> list[Gaussian]:
    """Output laws of rounds k = 1..K with targets (K,) and infinitely many samples; reward r(x) = b'x - x'Bx/2.

    Round k is guided by g_k = grad r(mean of round k - 1), round 0 being the data; b = `linear` (d,), B = `quadratic`
    (d, d). The prediction of the reward is g_k'xhat_0, as in eq. (32); `intercept` adds r(mean) - g_k'mean, the exact
    linearisation, as the released code intends. Source: generative bilevel, Algorithm 5. Raises ValueError if shapes
    disagree, if a g_k is no eigenvector of data.cov (isotropic data always pass), or as `guided_law`.

    >>> data = Gaussian.scalar(0.0, 1.0)
    >>> [round(float(law.mean[0]), 6) for law in rounds(data, [1.0], [[0.5]], [1.0, 1.0], 1.0)]
    [0.632121, 0.546254]
    """
    b, curvature = _quadratic_reward(data, linear, quadratic)
    laws: list[Gaussian] = []
    mean = data.mean
    for target in checked.array("targets", targets, 1):
        g = b - curvature @ mean
        # r(mean) - g'mean = mean'B mean / 2.
        aim = float(target) - (0.5 * float(mean @ curvature @ mean) if intercept else 0.0)
        laws.append(guided_law(data, g, aim, strength, sampler))
        mean = laws[-1].mean
    return laws


def limit_rounds(
    data: Gaussian, linear: ArrayLike, quadratic: ArrayLike, entropy_strength: float, count: int
) -> list[Gaussian]:
    """`rounds` in the joint limit b -> 0 with b (y_k - g_k'm) = 1/lambda: the laws N(mu_k, C).

    mu_k = m + C grad r(mu_{k-1})/lambda. The fixed point is the mean of the tilt p_data exp(r/lambda), reached from
    everywhere if and only if `contraction` is less than 1; the covariance stays C. Derived in docs/bilevel.md, "Guided
    sampling: rounds". Raises ValueError if shapes disagree, unless lambda > 0 and count >= 1.

    >>> laws = limit_rounds(Gaussian.scalar(0.0, 1.0), [2.0], [[1.0]], 2.0, 3)
    >>> [float(law.mean[0]) for law in laws]
    [1.0, 0.5, 0.75]
    """
    b, curvature = _quadratic_reward(data, linear, quadratic)
    lam = _positive("entropy_strength", entropy_strength)
    means = [data.mean]
    for _ in range(checked.count("count", count, 1)):
        means.append(data.mean + data.cov @ (b - curvature @ means[-1]) / lam)
    return [Gaussian(mean, data.cov) for mean in means[1:]]


def contraction(data: Gaussian, quadratic: ArrayLike, entropy_strength: float) -> float:
    """The spectral radius of C B / lambda: the factor by which a round of `limit_rounds` shrinks the error in the end.

    At 1 and above the rounds do not converge for almost every start. Raises ValueError like `limit_rounds`.

    >>> contraction(Gaussian.scalar(0.0, 1.0), [[1.0]], 2.0)
    0.5
    """
    _, curvature = _quadratic_reward(data, np.zeros(data.dim), quadratic)
    return float(np.abs(np.linalg.eigvals(data.cov @ curvature)).max()) / _positive(
        "entropy_strength", entropy_strength
    )


def missed_covariance_kl(data: Gaussian, quadratic: ArrayLike, entropy_strength: float) -> float:
    """KL(N(mu, C) || tilt), mu the tilt's mean: sum of (rho - log(1 + rho))/2 over the eigenvalues rho of C B / lambda.

    What is left at the fixed point of `limit_rounds`. Raises ValueError if the tilt does not exist (rho <= -1), or
    like `limit_rounds`.

    >>> round(missed_covariance_kl(Gaussian.scalar(0.0, 1.0), [[1.0]], 2.0), 9)
    0.047267446
    """
    _, curvature = _quadratic_reward(data, np.zeros(data.dim), quadratic)
    lam = _positive("entropy_strength", entropy_strength)
    ratios = np.linalg.eigvals(data.cov @ curvature).real / lam  # real: similar to C^1/2 B C^1/2
    if ratios.min() <= -1.0:
        raise ValueError(f"quadratic = {curvature.tolist()}: must leave the inverse covariance plus B/lambda positive")
    return 0.5 * float(np.sum(ratios - np.log1p(ratios)))


# --- what the released code differentiates -------------------------------------------------------------------------


def batch_pull(predicted: ArrayLike, last_predicted: ArrayLike, last_rewards: ArrayLike, target: float) -> Array:
    """What a batch of B samples is pulled by in the released code: -dL/d(g_j'xhat_j), (B,).

    `predicted` (B,) holds g_j'xhat_j, `last_predicted` g_j'x_j and `last_rewards` r(x_j) of the last round. Intended is
    y - {r(x_j) + g_j'(xhat_j - x_j)} for sample j. The released loss is half a *mean* of squares over a (B, B) array,
    since rewards of shape (B, 1) are added to an array (B,): sample j is pulled by the *batch mean* of the rewards,
    divided by B. Derived in docs/bilevel.md, "Guided sampling: the released batch". Raises ValueError for different
    lengths.

    >>> batch_pull([1.0, 2.0], [1.0, 2.0], [0.0, 4.0], 10.0)  # intended: 10 and 6
    array([4., 4.])
    """
    now, last = checked.array("predicted", predicted, 1), checked.array("last_predicted", last_predicted, 1)
    rewards = checked.array("last_rewards", last_rewards, 1)
    if not now.shape == last.shape == rewards.shape:
        raise ValueError(f"predicted, ... have lengths {now.size}, {last.size}, {rewards.size}: must be equal")
    return (_finite("target", target) - rewards.mean() - (now - last)) / now.size


# --- helpers ------------------------------------------------------------------------------------------------------


def _average_decay(x: float) -> float:
    """(1 - exp(-x)) / x, 1 at x = 0."""
    return -math.expm1(-x) / x if x > 0.0 else 1.0


def _grid(alpha_bar: ArrayLike) -> Array:
    levels = checked.array("alpha_bar", alpha_bar, 1)
    before = np.concatenate([[1.0], levels[:-1]])
    ordered = (levels <= before).all() and levels[0] < 1.0 and levels[-1] >= 0.0
    if not (ordered and (levels[:-1] > 0.0).all()):
        raise ValueError(f"alpha_bar = {levels.tolist()}: must fall from below 1 to at least 0, only the last being 0")
    return levels


def _gradient(data: Gaussian, gradient: ArrayLike) -> Array:
    g = checked.array("gradient", gradient, 1)
    if g.size != data.dim:
        raise ValueError(f"gradient has {g.size} entries: must have {data.dim}, the dimension of the data")
    return g


def _quadratic_reward(data: Gaussian, linear: ArrayLike, quadratic: ArrayLike) -> tuple[Array, Array]:
    b, curvature = checked.array("linear", linear, 1), checked.array("quadratic", quadratic, 2)
    if b.size != data.dim or curvature.shape != data.cov.shape:
        raise ValueError(
            f"linear, quadratic have shapes {b.shape}, {curvature.shape}: must be (d,), (d, d), d = {data.dim}"
        )
    if not np.allclose(curvature, curvature.T, rtol=1e-12, atol=0.0):
        raise ValueError(f"quadratic = {curvature.tolist()}: must be symmetric")
    return b, curvature


def _check_sampler(sampler: Sampler) -> Sampler:
    if sampler not in ("sde", "ode"):
        raise ValueError(f"sampler = {sampler!r}: must be 'sde' or 'ode'")
    return sampler


def _finite(name: str, value: float) -> float:
    return checked.scalar(name, value, -math.inf, math.inf, closed="()")


def _not_negative(name: str, value: float) -> float:
    return checked.scalar(name, value, 0.0, math.inf, closed="[)")


def _positive(name: str, value: float) -> float:
    return checked.scalar(name, value, 0.0, math.inf, closed="()")
