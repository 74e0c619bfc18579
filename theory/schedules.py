r"""Noise schedules: beta_t, t = 1..T, and alpha_bar_t = prod_{s <= t} (1 - beta_s).

An array over t = 1..T has its entry t at index t - 1; an array over t = 0..T starts with alpha_bar_0 = 1.

The four-parameter families are those of generative bilevel optimisation, eqs. (16) and (34), in two forms. With the
shape f and the time y(t) (derived in docs/ddpm.md, "Schedule families"):

* `form="chen"` (Chen 2023, arXiv 2301.10972): alpha_bar = (f(y(t)) - f(end)) / (f(start) - f(end)),
  y(t) = start + (end - start) t / T. It falls from 1 to exactly 0; Chen's floor of 1e-9 is not applied.
* `form="released"` (the code published with the bilevel paper): alpha_bar = f(y(t)) / f(y(0)) with every beta clipped
  to [0, 0.999] and y(t) = ((end - start) t + start) / T, where `start` is divided by T by mistake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory import checked
from theory.checked import Array

Form = Literal["chen", "released"]

# Nichol and Dhariwal (2021), section 3.2, and the released code of the bilevel paper; Chen (2023), Algorithm 1.
MAX_BETA = 0.999
MIN_ALPHA_BAR = 1e-9


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variances beta (T,) of the forward steps x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps.

    Source: Ho et al. 2020, eq. (2). Raises ValueError unless every beta lies strictly between 0 and 1.

    >>> NoiseSchedule([0.1, 0.3]).alpha_bar
    array([0.9 , 0.63])
    >>> NoiseSchedule([0.1, 1.0])
    Traceback (most recent call last):
    ...
    ValueError: beta[1] = 1.0: must lie in (0, 1)
    """

    beta: Array

    def __init__(self, beta: ArrayLike) -> None:
        values = checked.array("beta", beta, 1)
        outside = np.flatnonzero((values <= 0) | (values >= 1))
        if outside.size:
            raise ValueError(f"beta[{outside[0]}] = {values[outside[0]]}: must lie in (0, 1)")
        object.__setattr__(self, "beta", values)

    @staticmethod
    def from_alpha_bar(alpha_bar: ArrayLike) -> NoiseSchedule:
        """The schedule with the given alpha_bar (T,), t = 1..T.

        Raises ValueError unless 1 > alpha_bar_1 > ... > alpha_bar_T > 0.

        >>> NoiseSchedule.from_alpha_bar([0.9, 0.63]).beta.round(12)
        array([0.1, 0.3])
        """
        values = checked.array("alpha_bar", alpha_bar, 1)
        before = np.concatenate([[1.0], values[:-1]])
        wrong = np.flatnonzero((values <= 0) | (values >= before))
        if wrong.size:
            i = wrong[0]
            raise ValueError(f"alpha_bar[{i}] = {values[i]}: must be positive and less than {before[i]} before it")
        return NoiseSchedule((before - values) / before)

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return self.beta.size

    @property
    def alpha(self) -> Array:
        """alpha_t = 1 - beta_t, (T,)."""
        return 1.0 - self.beta

    @property
    def alpha_bar(self) -> Array:
        """alpha_bar_t = alpha_1 ... alpha_t, (T,)."""
        return np.cumprod(self.alpha, dtype=np.float64)

    @property
    def one_minus_alpha_bar(self) -> Array:
        """1 - alpha_bar_t, (T,), accurate also where the betas of a fine schedule are tiny."""
        return -np.expm1(np.cumsum(np.log1p(-self.beta)))

    @property
    def alpha_bar_previous(self) -> Array:
        """alpha_bar_{t-1}, (T,), starting with alpha_bar_0 = 1."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @property
    def posterior_variance(self) -> Array:
        """beta-tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), (T,); Ho et al. 2020, eq. (7).

        The first entry is zero.

        >>> NoiseSchedule([0.1, 0.3]).posterior_variance.round(12)
        array([0.        , 0.08108108])
        """
        noise = self.one_minus_alpha_bar
        return self.beta * np.concatenate([[0.0], noise[:-1]]) / noise


def linear(T: int, first: float, last: float) -> NoiseSchedule:
    """Equally spaced betas from `first` to `last` (Ho et al. 2020, section 4). Raises ValueError outside (0, 1).

    >>> linear(3, 0.1, 0.3).beta.round(12)
    array([0.1, 0.2, 0.3])
    """
    return NoiseSchedule(np.linspace(first, last, checked.count("T", T, 1)))


def vp_linear(T: int, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
    """The variance-preserving SDE with rate beta(u) = beta_min + (beta_max - beta_min) u, by the midpoint rule.

    beta_t = beta((t - 1/2) / T) / T (Song et al. 2021, arXiv 2011.13456, eq. 32, at midpoints). Raises ValueError
    unless 0 < beta_min <= beta_max, and for a T so small that some beta reaches 1.

    >>> vp_linear(20).beta[-1].round(12)
    np.float64(0.975125)
    >>> vp_linear(19)
    Traceback (most recent call last):
    ...
    ValueError: T = 19: must be so large that every beta is below 1, the last is 1.02507
    """
    checked.count("T", T, 1)
    low = checked.scalar("beta_min", beta_min, 0.0, math.inf, closed="()")
    high = checked.scalar("beta_max", beta_max, low, math.inf, closed="[)")
    beta = (low + (high - low) * (np.arange(T) + 0.5) / T) / T
    if beta[-1] >= 1:
        raise ValueError(f"T = {T}: must be so large that every beta is below 1, the last is {beta[-1]:.6g}")
    return NoiseSchedule(beta)


def cosine(T: int, offset: float = 0.008) -> NoiseSchedule:
    """alpha_bar proportional to cos^2(pi/2 (t/T + offset)/(1 + offset)), beta at most 0.999 (Nichol and Dhariwal 2021).

    Source: arXiv 2102.09672, eq. (17). Raises ValueError for a negative offset.

    >>> cosine(2, 0.0).beta.round(12)
    array([0.5  , 0.999])
    """
    checked.scalar("offset", offset, 0.0, math.inf, closed="[)")
    alpha_bar = cosine_family(T, 0.0, 1.0, 1.0, offset, form="released")
    return NoiseSchedule.from_alpha_bar(alpha_bar[1:])


def sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> NoiseSchedule:
    """The sigmoid schedule of Chen 2023 (arXiv 2301.10972, Algorithm 1), alpha_bar at least 1e-9.

    Raises ValueError unless start < end and tau > 0, or if so many steps reach the floor that a beta vanishes.

    >>> sigmoid(2).alpha_bar.round(12)
    array([5.e-01, 1.e-09])
    """
    alpha_bar = sigmoid_family(T, start, end, tau, 0.0, form="chen")
    return NoiseSchedule.from_alpha_bar(np.maximum(alpha_bar[1:], MIN_ALPHA_BAR))


def cosine_family(T: int, start: float, end: float, tau: float, epsilon: float, form: Form = "chen") -> Array:
    """alpha_bar_t for t = 0..T, (T + 1,), with shape f(y) = cos(pi/2 (y + epsilon)/(1 + epsilon))^(2 tau).

    Covers Nichol and Dhariwal (start 0, end 1, tau 1) and Chen (epsilon 0) in the form "chen"; bilevel paper, eq. (16).
    Raises ValueError unless tau > 0 and epsilon >= 0, for "chen" unless 0 <= start < end <= 1, and for "released" where
    that code divides 0 by 0.

    >>> cosine_family(4, 0.0, 1.0, 1.0, 0.0).round(6)
    array([1.      , 0.853553, 0.5     , 0.146447, 0.      ])
    >>> cosine_family(1000, 0.0, 1.01, 1.0, 0.008, form="released")
    Traceback (most recent call last):
    ...
    ValueError: start, end = 0.0, 1.01: must keep the cosine positive until the last step, 9 betas are 0/0
    """
    _check_cosine(start, end, tau, epsilon, form)
    return _normalised(_cosine_shape(_time(T, start, end, form), tau, epsilon), start, end, form)


def cosine_family_jacobian(T: int, start: float, end: float, tau: float, epsilon: float, form: Form = "chen") -> Array:
    """d alpha_bar_t / d(start, end, tau, epsilon) for t = 0..T, (T + 1, 4); clipped betas count as constants.

    Raises ValueError like `cosine_family`, and for "chen" with end = 1 and tau <= 1/2, where f is not differentiable.

    >>> cosine_family_jacobian(2, 0.0, 1.0, 1.0, 0.0)[1].round(6)
    array([-0.785398, -0.785398, -0.346574, -0.785398])
    """
    _check_cosine(start, end, tau, epsilon, form)
    if form == "chen" and end == 1 and tau <= 0.5:
        raise ValueError(f"tau = {tau}: must exceed 1/2 for a derivative at end = 1")
    y = _time(T, start, end, form)
    f = _cosine_shape(y, tau, epsilon)
    alpha_bar = _normalised(f, start, end, form)
    quarter = 0.5 * math.pi
    angle = quarter * (1.0 - y) / (1.0 + epsilon)
    cosine_of_time = np.maximum(np.sin(angle), 0.0)
    # At a zero of the cosine log(0) and 0^(2 tau - 1) stand for limits that are zero, or belong to a clipped beta.
    with np.errstate(divide="ignore", invalid="ignore"):
        by_angle = 2.0 * tau * cosine_of_time ** (2.0 * tau - 1.0) * np.cos(angle)
        by_tau = np.where(f > 0, 2.0 * f * np.log(cosine_of_time), 0.0)
    by_time = -by_angle * quarter / (1.0 + epsilon)
    by_epsilon = -by_angle * angle / (1.0 + epsilon)
    gradient = np.column_stack([by_time[:, None] * _time_gradient(T, form), by_tau, by_epsilon])
    return _normalised_gradient(f, gradient, alpha_bar, form)


def sigmoid_family(T: int, start: float, end: float, tau: float, epsilon: float, form: Form = "chen") -> Array:
    """alpha_bar_t for t = 0..T, (T + 1,), with shape f(y) = 1 / (1 + exp(-(k - y)/tau - epsilon)).

    k = 0 for "chen", which is Chen's sigmoid schedule at epsilon 0; k = 1 for "released"; bilevel paper, eq. (34).
    Raises ValueError unless tau > 0, and for "chen" unless start < end.

    >>> sigmoid_family(4, -3.0, 3.0, 1.0, 0.0).round(6)
    array([1.      , 0.850854, 0.5     , 0.149146, 0.      ])
    >>> sigmoid_family(1000, -3.0, 3.0, 1.0, 0.0, form="released")[-1].round(9)
    np.float64(0.009174937)
    """
    _check_sigmoid(start, end, tau, epsilon, form)
    return _normalised(_sigmoid_shape(_time(T, start, end, form), tau, epsilon, form), start, end, form)


def sigmoid_family_jacobian(T: int, start: float, end: float, tau: float, epsilon: float, form: Form = "chen") -> Array:
    """d alpha_bar_t / d(start, end, tau, epsilon) for t = 0..T, (T + 1, 4). Raises ValueError like `sigmoid_family`.

    >>> sigmoid_family_jacobian(2, -3.0, 3.0, 1.0, 0.0)[1].round(6)
    array([-0.113144, -0.113144, -0.      ,  0.226287])
    """
    _check_sigmoid(start, end, tau, epsilon, form)
    y = _time(T, start, end, form)
    f = _sigmoid_shape(y, tau, epsilon, form)
    # 1 - f as the sigmoid of the negated argument, which does not cancel.
    slope = f * np.exp(-np.logaddexp(0.0, _sigmoid_argument(y, tau, epsilon, form)))
    by_tau = slope * (y - _sigmoid_centre(form)) / tau**2
    gradient = np.column_stack([(-slope / tau)[:, None] * _time_gradient(T, form), by_tau, slope])
    return _normalised_gradient(f, gradient, _normalised(f, start, end, form), form)


def ddim_grid(T: int, S: int) -> NDArray[np.int64]:
    """The S indices floor(i (T - 1)/(S - 1)), i = 0..S-1, into arrays over t = 1..T: the sub-sampled DDIM times.

    Source: Song et al. 2021 (arXiv 2010.02502), appendix D.2, "linear". Raises ValueError unless 2 <= S <= T.

    >>> ddim_grid(1000, 4).tolist()
    [0, 333, 666, 999]
    """
    checked.count("T", T, 2)
    checked.count("S", S, 2)
    if S > T:
        raise ValueError(f"S = {S}: must not exceed T = {T}")
    return np.arange(S, dtype=np.int64) * (T - 1) // (S - 1)


def _check_form(form: Form) -> None:
    if form not in ("chen", "released"):
        raise ValueError(f"form = {form!r}: must be 'chen' or 'released'")


def _check_cosine(start: float, end: float, tau: float, epsilon: float, form: Form) -> None:
    _check_form(form)
    checked.array("start, end, tau, epsilon", [start, end, tau, epsilon], 1)
    checked.scalar("tau", tau, 0.0, math.inf, closed="()")
    checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="[)")
    if form == "chen" and not 0 <= start < end <= 1:
        raise ValueError(f"start, end = {start}, {end}: must satisfy 0 <= start < end <= 1")


def _check_sigmoid(start: float, end: float, tau: float, epsilon: float, form: Form) -> None:
    _check_form(form)
    checked.array("start, end, tau, epsilon", [start, end, tau, epsilon], 1)
    checked.scalar("tau", tau, 0.0, math.inf, closed="()")
    if form == "chen" and not start < end:
        raise ValueError(f"start, end = {start}, {end}: must satisfy start < end")


def _time(T: int, start: float, end: float, form: Form) -> Array:
    u = np.arange(checked.count("T", T, 1) + 1) / T
    # Written so that y(0) = start and y(T) = end hold exactly.
    return (1.0 - u) * start + u * end if form == "chen" else u * (end - start) + start / T


def _time_gradient(T: int, form: Form) -> Array:
    """dy/d(start, end), (T + 1, 2)."""
    u = np.arange(T + 1) / T
    return np.column_stack([(1.0 if form == "chen" else 1.0 / T) - u, u])


def _cosine_shape(y: Array, tau: float, epsilon: float) -> Array:
    # As a sine of the complement, whose zero at y = 1 is exact.
    return np.maximum(np.sin(0.5 * math.pi * (1.0 - y) / (1.0 + epsilon)), 0.0) ** (2.0 * tau)


def _sigmoid_centre(form: Form) -> float:
    return 0.0 if form == "chen" else 1.0


def _sigmoid_argument(y: Array, tau: float, epsilon: float, form: Form) -> Array:
    return (_sigmoid_centre(form) - y) / tau + epsilon


def _sigmoid_shape(y: Array, tau: float, epsilon: float, form: Form) -> Array:
    return np.exp(-np.logaddexp(0.0, -_sigmoid_argument(y, tau, epsilon, form)))


def _normalised(f: Array, start: float, end: float, form: Form) -> Array:
    if form == "chen":
        return (f - f[-1]) / (f[0] - f[-1])
    undefined = int(np.sum(f[:-1] == 0))
    if undefined:
        raise ValueError(
            f"start, end = {start}, {end}: must keep the cosine positive until the last step, {undefined} betas are 0/0"
        )
    return np.concatenate([[1.0], np.cumprod(1.0 - np.clip(1.0 - f[1:] / f[:-1], 0.0, MAX_BETA))])


def _normalised_gradient(f: Array, gradient: Array, alpha_bar: Array, form: Form) -> Array:
    """The Jacobian of alpha_bar from f (T + 1,) and its gradient (T + 1, 4)."""
    if form == "chen":
        fall = gradient - gradient[-1]
        return (fall - alpha_bar[:, None] * fall[0]) / (f[0] - f[-1])
    ratio = f[1:] / f[:-1]
    free = (ratio > 1.0 - MAX_BETA) & (ratio < 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(free[:, None], np.diff(gradient / f[:, None], axis=0), 0.0)
    return alpha_bar[:, None] * np.concatenate([np.zeros((1, 4)), np.cumsum(steps, axis=0)])
