r"""Fine-tuning as stochastic control: the system of PI-FT, in its own time.

Notation, fixed for all modules `control*` of this room. Time runs *forwards*, t = 0, ..., T - 1, from noise Y_0 to the
sample Y_T (PI-FT, eqs. 1-3); a chain of `algorithms` takes the same step as its step T - t. With W standard normal,

    Y_{t+1} = (Y_t + (1 - alpha_t) U_t(Y_t)) / sqrt(alpha_t) + sigma_t W_t,

the control U_t stands where the pre-trained model has its score s_t. What is maximised is E[r(Y_T)] less
sum_t beta_t KL_t, KL_t the divergence of step t from the pre-trained step; beta_t is called `strength` here, beta being
the noise schedule's. V_t is the value function, V_T = r. Everything is simplest in the *means* of the steps,

    m_t(y) = (y + (1 - alpha_t) s_t(y)) / sqrt(alpha_t)  (pre-trained),   M_t(y) the same with U_t  (controlled):
    KL_t = |M - m|^2 / (2 sigma^2),  the optimal M* = m + (sigma^2 / beta) h(M*),  h(z) = E grad V_{t+1}(z + sigma W).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array


@dataclass(frozen=True, eq=False)
class ControlSchedule:
    """alpha_t, sigma_t and the strength beta_t of the regularisation, (T,) each, index 0 being the noisiest step.

    Source: PI-FT, eqs. (1)-(3). `strength` may be one number for all steps.

    Raises:
        ValueError: if the lengths disagree, an alpha lies outside (0, 1), or a sigma or strength is not positive.

    >>> ControlSchedule([0.8, 0.9], [0.4, 0.3], 0.5).strength
    array([0.5, 0.5])
    >>> ControlSchedule([0.8, 0.9], [0.4], 0.5)
    Traceback (most recent call last):
    ...
    ValueError: sigma has 1 entries: must have one for each of the 2 of alpha
    """

    alpha: Array
    sigma: Array
    strength: Array

    def __init__(self, alpha: ArrayLike, sigma: ArrayLike, strength: ArrayLike) -> None:
        a = checked.array("alpha", alpha, 1)
        outside = np.flatnonzero((a <= 0) | (a >= 1))
        if outside.size:
            raise ValueError(f"alpha[{outside[0]}] = {a[outside[0]]}: must lie in (0, 1)")
        object.__setattr__(self, "alpha", a)
        object.__setattr__(self, "sigma", per_step("sigma", sigma, a.size))
        object.__setattr__(self, "strength", per_step("strength", strength, a.size))

    @staticmethod
    def ddpm(alpha: ArrayLike, strength: ArrayLike) -> ControlSchedule:
        """DDPM's choice sigma_t^2 = 1 - alpha_t (PI-FT, footnote 1); raises like the constructor.

        >>> ControlSchedule.ddpm([0.75, 0.84], 1.0).sigma
        array([0.5, 0.4])
        """
        a = checked.array("alpha", alpha, 1)
        return ControlSchedule(a, np.sqrt(np.maximum(1.0 - a, 0.0)), strength)

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return self.alpha.size

    @property
    def gain(self) -> Array:
        """g_t = sqrt(alpha_t) sigma_t^2 / (beta_t (1 - alpha_t)), (T,): U* = s + g h(M*) (PI-FT, eq. 18).

        >>> ControlSchedule.ddpm([0.81], 0.5).gain.round(12)
        array([1.8])
        """
        return np.sqrt(self.alpha) * self.sigma**2 / (self.strength * (1.0 - self.alpha))

    @property
    def alpha_bar(self) -> Array:
        """prod_{k >= t} alpha_k, (T,): the noise level of Y_t, whose score s_t is.

        >>> ControlSchedule.ddpm([0.8, 0.9], 1.0).alpha_bar.round(12)
        array([0.72, 0.9 ])
        """
        return np.asarray(np.cumprod(self.alpha[::-1])[::-1], dtype=np.float64)

    def with_strength(self, strength: ArrayLike) -> ControlSchedule:
        """The same steps, otherwise regularised; raises ValueError unless every strength is positive."""
        return ControlSchedule(self.alpha, self.sigma, strength)

    def mean(self, t: int, y: ArrayLike, control: ArrayLike) -> Array:
        """The mean of Y_{t+1} given Y_t = y under the control's value there; any broadcastable shapes.

        >>> ControlSchedule.ddpm([0.64], 1.0).mean(0, 1.0, -0.5)
        array(1.025)
        """
        a = self.alpha[t]
        return np.asarray((np.asarray(y) + (1.0 - a) * np.asarray(control)) / np.sqrt(a), dtype=np.float64)

    def control(self, t: int, y: ArrayLike, mean: ArrayLike) -> Array:
        """The control whose step has the given mean at Y_t = y: the inverse of `mean`.

        >>> ControlSchedule.ddpm([0.64], 1.0).control(0, 1.0, 1.025)
        array(-0.5)
        """
        a = self.alpha[t]
        return np.asarray((np.sqrt(a) * np.asarray(mean) - np.asarray(y)) / (1.0 - a), dtype=np.float64)

    def step_kl(self, t: int, control: ArrayLike, score: ArrayLike) -> Array:
        """KL of step t under a control from the pre-trained step, in nats (PI-FT, Lemma 2.5, eq. 6).

        (1 - alpha)^2 |control - score|^2 / (2 alpha sigma^2), the norm over the last axis: (..., d) to (...).

        >>> ControlSchedule.ddpm([0.5], 1.0).step_kl(0, [[1.0, 0.0]], [[0.0, 2.0]])
        array([2.5])
        """
        gap = np.asarray(control, dtype=np.float64) - np.asarray(score, dtype=np.float64)
        a = self.alpha[t]
        return np.asarray((1.0 - a) ** 2 * np.sum(gap**2, axis=-1) / (2.0 * a * self.sigma[t] ** 2), dtype=np.float64)


def per_step(name: str, value: ArrayLike, steps: int, *, positive: bool = True) -> Array:
    """`value` as a read-only (T,) array, a single number being repeated.

    Raises ValueError if it has another length, is not finite, or is not positive (non-negative, if not `positive`).

    >>> per_step("strength", 0.5, 3)
    array([0.5, 0.5, 0.5])
    >>> per_step("strength", [0.5, -1.0], 2)
    Traceback (most recent call last):
    ...
    ValueError: strength[1] = -1.0: must be positive
    """
    repeated = np.full(steps, value) if np.ndim(value) == 0 else value
    values = checked.array(name, repeated, 1)
    if values.size != steps:
        raise ValueError(f"{name} has {values.size} entries: must have one for each of the {steps} of alpha")
    wrong = np.flatnonzero(values <= 0 if positive else values < 0)
    if wrong.size:
        raise ValueError(
            f"{name}[{wrong[0]}] = {values[wrong[0]]}: must be {'positive' if positive else 'non-negative'}"
        )
    return values
