r"""Reward tuning on Gaussian mixtures: a quadratic reward tilts a mixture into a mixture, component by component.

With Z_k the partition function of component k on its own, the tilt of sum_k w_k N(m_k, C_k) is

    sum_k (w_k Z_k / Z) N(M_k, V_k),   Z = sum_k w_k Z_k,

N(M_k, V_k) the tilt of component k; cumulants follow by the laws of total covariance and cumulance. Notation and
general formulas stand in `theory.reward_problem`, those of one component in `theory.reward_tuning`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from theory.checked import Array
from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture
from theory.reward_problem import Cumulants, RewardProblem
from theory.reward_tuning import Quadratic, RewardTuning


@dataclass(frozen=True, eq=False)
class MixtureRewardTuning(RewardProblem):
    """Data from a mixture with quadratic `upper` r1 and `lower` r2 in the same dimension (else ValueError).

    >>> two = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.1]], [[0.1]]])
    >>> case = MixtureRewardTuning(two, Quadratic([0.0], [[1.0]]), Quadratic([1.0]))
    >>> case.tilted(1.0).weights.round(6)
    array([0.119203, 0.880797])
    >>> round(case.value(1.0), 12)
    0.631159415596
    """

    data: GaussianMixture
    upper: Quadratic
    lower: Quadratic

    def __post_init__(self) -> None:
        _ = self.components  # they check the dimensions

    @cached_property
    def components(self) -> list[RewardTuning]:
        """The same problem on each component alone."""
        parts = zip(self.data.means, self.data.covs, strict=True)
        return [RewardTuning(Gaussian(mean, cov), self.upper, self.lower) for mean, cov in parts]

    def domain(self, gamma: float | None = None) -> float:
        """The largest of the components' bounds; exclusive."""
        return max(part.domain(gamma) for part in self.components)

    def tilted(self, strength: float, gamma: float | None = None) -> GaussianMixture:
        """p*, or p^gamma. Raises ValueError also if a component's weight underflows."""
        self.admit(strength, gamma)
        laws = [part.tilted(strength, gamma) for part in self.components]
        return GaussianMixture(
            self._weights(strength, gamma), np.stack([p.mean for p in laws]), np.stack([p.cov for p in laws])
        )

    def log_moment(self, power: float, strength: float, gamma: float | None = None) -> float:
        return float(np.logaddexp.reduce(self._log_masses(power, strength, gamma)))

    def divergence(self, strength: float, gamma: float | None = None) -> float:
        self.admit(strength, gamma)
        rewards = self.lower, self.upper
        shares = 1.0, 0.0 if gamma is None else 1.0 / gamma
        laws = [part.tilted(strength, gamma) for part in self.components]
        means = [sum(share * r.mean(law) for share, r in zip(shares, rewards, strict=True)) for law in laws]
        mean = float(self._weights(strength, gamma) @ means)
        return mean / strength - self.log_partition(strength, gamma)

    def data_reward(self) -> float:
        return float(self.data.weights @ [part.data_reward() for part in self.components])

    def cumulants(self, strength: float, gamma: float | None = None) -> Cumulants:
        self.admit(strength, gamma)
        weights = self._weights(strength, gamma)
        within = [part.cumulants(strength, gamma) for part in self.components]
        one, variance, covariance, third = (np.array(column) for column in zip(*within, strict=True))
        two = np.array([self.lower.mean(part.tilted(strength, gamma)) for part in self.components])
        mean = float(weights @ one)
        d1, d2 = one - mean, two - weights @ two
        return Cumulants(
            mean=mean,
            variance=float(weights @ (variance + d1**2)),
            covariance=float(weights @ (covariance + d1 * d2)),
            third=float(weights @ (third + 2 * d1 * covariance + d2 * variance + d1**2 * d2)),
        )

    def _log_masses(self, power: float, strength: float, gamma: float | None) -> Array:
        """log(w_k E_k exp(power (r1 / gamma + r2) / strength)), (m,)."""
        moments = np.array([part.log_moment(power, strength, gamma) for part in self.components])
        return np.log(self.data.weights) + moments if np.isfinite(moments).all() else np.full(moments.shape, math.inf)

    def _weights(self, strength: float, gamma: float | None) -> Array:
        masses = self._log_masses(1.0, strength, gamma)
        weights = np.exp(masses - np.logaddexp.reduce(masses))
        return weights / weights.sum()
