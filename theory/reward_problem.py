r"""Choosing the entropy strength of reward fine-tuning (Generative bilevel, eqs. (9)-(13)): what holds for every law.

Lower problem g = -E_p r2 + lambda KL(p || p_data), upper objective f = -E_p r1, lambda > 0 the `strength`. Then

    p* ~ p_data exp(r2 / lambda),       p^gamma ~ p_data exp((r1 / gamma + r2) / lambda),       F = -E_{p*} r1,
    F_gamma = -gamma lambda (log Z^gamma - log Z*),      F_gamma' = gamma (KL(p^gamma || p_data) - KL(p* || p_data)).

`RewardProblem` holds these formulas; `theory.reward_tuning` supplies partition functions and moments for Gaussian data
and for finite supports. gamma = None always means the lower problem, that is gamma = infinity in the tilt.
The printed formulas of the paper are lost in our copy; these are re-derived in docs/bilevel.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from theory import checked


class Cumulants(NamedTuple):
    """Of the rewards under a law: E r1, Var r1, Cov(r1, r2) and the third joint cumulant kappa(r1, r1, r2)."""

    mean: float
    variance: float
    covariance: float
    third: float


class RewardProblem(ABC):
    """Every method raises ValueError for strength <= 0, gamma <= 0, and strength at or below `domain(gamma)`."""

    @abstractmethod
    def domain(self, gamma: float | None = None) -> float:
        """The bound that strength must exceed for F (gamma None) or F_gamma to be finite; never below 0."""

    @abstractmethod
    def log_moment(self, power: float, strength: float, gamma: float | None = None) -> float:
        """log E_data exp(power (r1 / gamma + r2) / strength); infinite where the integral is."""

    @abstractmethod
    def divergence(self, strength: float, gamma: float | None = None) -> float:
        """KL(p || p_data) in nats for p = p* or p^gamma: the forward direction, eq. (13)."""

    @abstractmethod
    def cumulants(self, strength: float, gamma: float | None = None) -> Cumulants:
        """The cumulants of the rewards under p* or p^gamma."""

    @abstractmethod
    def data_reward(self) -> float:
        """E_data r1, the upper reward of the model that is not tuned."""

    def log_partition(self, strength: float, gamma: float | None = None) -> float:
        """log Z = log E_data exp((r1 / gamma + r2) / strength)."""
        self.admit(strength, gamma)
        return self.log_moment(1.0, strength, gamma)

    def value(self, strength: float) -> float:
        """F = -E_{p*} r1."""
        return -self.cumulants(strength).mean

    def slope(self, strength: float) -> float:
        """F' = Cov_{p*}(r1, r2) / strength^2."""
        return self.cumulants(strength).covariance / strength**2

    def penalty_value(self, strength: float, gamma: float) -> float:
        """F_gamma = -gamma strength (log Z^gamma - log Z*); rounding grows like gamma times 1e-16."""
        self.admit(strength, gamma)
        return -gamma * strength * (self.log_partition(strength, gamma) - self.log_partition(strength))

    def penalty_slope(self, strength: float, gamma: float) -> float:
        """F_gamma' = gamma (KL(p^gamma || p_data) - KL(p* || p_data)), eq. (12); rounding as in `penalty_value`."""
        self.admit(strength, gamma)
        return gamma * (self.divergence(strength, gamma) - self.divergence(strength))

    def bias_limit(self, strength: float) -> float:
        """lim gamma (F_gamma' - F') = Var(r1) / (2 strength^2) + kappa(r1, r1, r2) / (2 strength^3) under p*."""
        under = self.cumulants(strength)
        return under.variance / (2 * strength**2) + under.third / (2 * strength**3)

    def released_slope(self, strength: float, gamma: float) -> float:
        """What the released code's `est1` estimates, gamma (KL(p_data || p^gamma) - KL(p_data || p*)): reverse KL.

        That is -E_data r1 / strength + gamma (log Z^gamma - log Z*).
        """
        self.admit(strength, gamma)
        partitions = self.log_partition(strength, gamma) - self.log_partition(strength)
        return gamma * partitions - self.data_reward() / strength

    def released_limit(self, strength: float) -> float:
        """lim `released_slope` = (E_{p*} r1 - E_data r1) / strength: zero where tuning leaves E r1 as it was."""
        return (self.cumulants(strength).mean - self.data_reward()) / strength

    def effective_sample_size(self, strength: float, gamma: float | None = None) -> float:
        """(E w)^2 / E w^2 under p_data, w = exp((r1 / gamma + r2) / strength), in [0, 1]: 0 if E w^2 is infinite."""
        self.admit(strength, gamma)
        return math.exp(2 * self.log_moment(1.0, strength, gamma) - self.log_moment(2.0, strength, gamma))

    def optimum(self, low: float = 1e-2, high: float = 1e2) -> float:
        """The strength that minimises F inside [low, high], cut at the domain. See `least` for the search.

        Raises ValueError if F has no minimum inside the interval.
        """
        return least(self.value, self.slope, max(low, self._edge()), high)

    def penalty_optimum(self, gamma: float, low: float = 1e-2, high: float = 1e2) -> float:
        """The strength that minimises F_gamma inside [low, high]; like `optimum`."""
        edge = max(low, self._edge(gamma))
        return least(lambda s: self.penalty_value(s, gamma), lambda s: self.penalty_slope(s, gamma), edge, high)

    def released_root(self, gamma: float | None, low: float = 1e-2, high: float = 1e2) -> float:
        """The strength in [low, high] at which descent along `released_slope` (None: along its limit) stops.

        The largest root where the slope rises through zero. Raises ValueError if there is none.
        """
        if gamma is None:
            roots = rising_roots(self.released_limit, max(low, self._edge()), high)
        else:
            roots = rising_roots(lambda s: self.released_slope(s, gamma), max(low, self._edge(gamma)), high)
        if not roots:
            raise ValueError(
                f"gamma = {gamma}: the released slope must rise through zero in [{low}, {high}]; it does not"
            )
        return roots[-1]

    def admit(self, strength: float, gamma: float | None = None) -> None:
        """Raise ValueError unless the tilt exists at this strength and gamma; with gamma, p* must exist too."""
        if not (math.isfinite(strength) and strength > 0):
            raise ValueError(f"strength = {strength}: must be positive and finite")
        if gamma is not None:
            checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        bound = self.domain(gamma)
        if strength <= bound:
            whose = "the lower problem" if gamma is None else f"the penalty problem at gamma = {gamma:g}"
            raise ValueError(
                f"strength = {strength}: must exceed {bound:.12g}, the domain of {whose} (infinite partition function)"
            )

    def _edge(self, gamma: float | None = None) -> float:
        """Just inside the domain."""
        return self.domain(gamma) * (1 + 1e-9)


def rising_roots(function: Callable[[float], float], low: float, high: float) -> list[float]:
    """Where `function` passes from negative to positive on [low, high], in order, seen on 400 geometric points.

    Raises ValueError unless 0 < low < high.

    >>> rising_roots(lambda s: s - 2.0, 0.1, 10.0)
    [2.0]
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low, high = {low}, {high}: must be 0 < low < high < inf")
    grid = [float(s) for s in np.geomspace(low, high, 400)]
    values = [function(s) for s in grid]
    rises = [i for i in range(399) if values[i] < 0 <= values[i + 1]]
    return [float(brentq(function, grid[i], grid[i + 1], xtol=1e-14, rtol=1e-14)) for i in rises]


def least(value: Callable[[float], float], slope: Callable[[float], float], low: float, high: float) -> float:
    """The minimiser of `value` on [low, high], from its derivative's rising roots; ValueError if it is at an end.

    >>> least(lambda s: (s - 2.0) ** 2, lambda s: 2 * (s - 2.0), 0.1, 10.0)
    2.0
    """
    roots = rising_roots(slope, low, high)
    best = min(roots, key=value, default=None)
    if best is None or value(best) > min(value(low), value(high)):
        raise ValueError(f"low, high = {low:g}, {high:g}: the minimum over strength must lie inside; it is at an end")
    return best
