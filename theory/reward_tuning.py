r"""Reward tuning with closed forms: quadratic rewards on Gaussian data, any rewards on a finite support.

Formulas common to both, and the notation, stand in `theory.reward_problem`. For N(m, S) and r_i = b_i.x - x'B_i x / 2
the tilt is N(M, V) with V = (S^-1 + B / lambda)^-1, B = B2 + B1 / gamma; with u_i = b_i - B_i M,

    Cov(r1, r2)      = u1'V u2 + tr(B1 V B2 V) / 2,
    kappa(r1, r1, r2) = -u1'V B2 V u1 - 2 u1'V B1 V u2 - tr(B1 V B1 V B2 V).

A reward need not be concave: then strength has a positive lower bound, and F_gamma a larger one than F may have.
Proofs stand in docs/bilevel.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, logsumexp

from theory import checked
from theory.checked import Array
from theory.gaussian import Gaussian, kl, tilt
from theory.reward_problem import Cumulants, RewardProblem


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The reward b.x - x'Bx / 2 with b = `linear` (d,), B = `quadratic` (d, d), symmetric; no B means a linear reward.

    Raises ValueError if shapes disagree, B is not symmetric, or an entry is not finite.

    >>> Quadratic([2.0], [[1.0]]).value([1.0])
    1.5
    """

    linear: Array
    quadratic: Array

    def __init__(self, linear: ArrayLike, quadratic: ArrayLike | None = None) -> None:
        b = checked.array("linear", linear, 1)
        matrix = checked.array("quadratic", np.zeros((b.size, b.size)) if quadratic is None else quadratic, 2)
        if matrix.shape != (b.size, b.size):
            raise ValueError(f"quadratic has shape {matrix.shape}: must be {(b.size, b.size)}")
        if not np.allclose(matrix, matrix.T, rtol=1e-12, atol=0.0):
            raise ValueError(f"quadratic = {matrix.tolist()}: must be symmetric")
        object.__setattr__(self, "linear", b)
        object.__setattr__(self, "quadratic", matrix)

    def value(self, x: ArrayLike) -> float:
        """The reward at x (d,)."""
        at = np.asarray(x, dtype=np.float64)
        return float(self.linear @ at - 0.5 * at @ self.quadratic @ at)

    def mean(self, law: Gaussian) -> float:
        """The expected reward under a Gaussian law."""
        return self.value(law.mean) - 0.5 * float(np.trace(self.quadratic @ law.cov))


@dataclass(frozen=True, eq=False)
class RewardTuning(RewardProblem):
    """Gaussian data N(m, S) with quadratic `upper` r1 and `lower` r2 in the same dimension (else ValueError).

    >>> case = RewardTuning(Gaussian.scalar(0.0, 1.0), Quadratic([1.0], [[1.0]]), Quadratic([2.0], [[1.0]]))
    >>> round(case.optimum(), 9), round(case.penalty_optimum(1.0), 9)
    (0.6, 0.455445803)
    >>> case.value(0.0)
    Traceback (most recent call last):
    ...
    ValueError: strength = 0.0: must be positive and finite
    """

    data: Gaussian
    upper: Quadratic
    lower: Quadratic

    def __post_init__(self) -> None:
        for name, reward in (("upper", self.upper), ("lower", self.lower)):
            if reward.linear.size != self.data.dim:
                raise ValueError(f"{name} has dimension {reward.linear.size}: must be that of data, {self.data.dim}")

    def domain(self, gamma: float | None = None) -> float:
        """max(0, -least eigenvalue of S^1/2 B2 S^1/2), and with gamma also that of B2 + B1 / gamma; exclusive."""
        if gamma is None:
            return self._bound(self.lower.quadratic)
        checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        return max(self.domain(), self._bound(self.lower.quadratic + self.upper.quadratic / gamma))

    def tilted(self, strength: float, gamma: float | None = None) -> Gaussian:
        """p*, or p^gamma: the law ~ p_data exp((r1 / gamma + r2) / strength)."""
        self.admit(strength, gamma)
        return self._tilt(1.0, strength, gamma)[0]

    def released_tilt(self, strength: float, gamma: float) -> Gaussian:
        """The law ~ p_data exp((gamma r1 + r2) / strength) of the released `PenaltyScorer`: p^gamma at 1 / gamma."""
        return self.tilted(strength, 1.0 / checked.scalar("gamma", gamma, 0.0, math.inf, closed="()"))

    def log_moment(self, power: float, strength: float, gamma: float | None = None) -> float:
        if strength <= power * max(self._bound(self._exponent(gamma).quadratic), 0.0):
            return math.inf
        return self._tilt(power, strength, gamma)[1]

    def divergence(self, strength: float, gamma: float | None = None) -> float:
        return kl(self.tilted(strength, gamma), self.data)

    def data_reward(self) -> float:
        return self.upper.mean(self.data)

    def cumulants(self, strength: float, gamma: float | None = None) -> Cumulants:
        law = self.tilted(strength, gamma)
        v, b1, b2 = law.cov, self.upper.quadratic, self.lower.quadratic
        u1, u2 = self.upper.linear - b1 @ law.mean, self.lower.linear - b2 @ law.mean
        third = u1 @ v @ b2 @ v @ u1 + 2 * u1 @ v @ b1 @ v @ u2 + np.trace(b1 @ v @ b1 @ v @ b2 @ v)
        return Cumulants(
            mean=self.upper.mean(law),
            variance=float(u1 @ v @ u1 + 0.5 * np.trace(b1 @ v @ b1 @ v)),
            covariance=float(u1 @ v @ u2 + 0.5 * np.trace(b1 @ v @ b2 @ v)),
            third=-float(third),
        )

    def sign_flip(self) -> float:
        """For linear rewards: -b1'S b1 / (2 b1'S b2), below which F_gamma' and F' differ in sign at *every* strength.

        0 if they never do. Raises ValueError unless both rewards are linear and b1'S b2 is not zero.
        """
        if self.upper.quadratic.any() or self.lower.quadratic.any():
            raise ValueError("upper, lower: must be linear rewards for one threshold to hold at every strength")
        own = float(self.upper.linear @ self.data.cov @ self.upper.linear)
        cross = float(self.upper.linear @ self.data.cov @ self.lower.linear)
        if cross == 0:
            raise ValueError("upper, lower: must be correlated under data (b1'S b2 = 0 makes F constant)")
        return max(0.0, -own / (2 * cross))

    def _exponent(self, gamma: float | None) -> Quadratic:
        """r1 / gamma + r2."""
        inverse = 0.0 if gamma is None else 1.0 / gamma
        linear = self.lower.linear + inverse * self.upper.linear
        return Quadratic(linear, self.lower.quadratic + inverse * self.upper.quadratic)

    def _tilt(self, power: float, strength: float, gamma: float | None) -> tuple[Gaussian, float]:
        exponent = self._exponent(gamma)
        try:
            return tilt(self.data, power / strength * exponent.linear, power / strength * exponent.quadratic)
        except ValueError:
            raise ValueError(f"strength = {strength}: must exceed its bound by more than rounding") from None

    def _bound(self, quadratic: Array) -> float:
        eigenvalues, basis = np.linalg.eigh(self.data.cov)
        root = basis * np.sqrt(np.maximum(eigenvalues, 0.0))
        return max(0.0, -float(np.linalg.eigvalsh(root.T @ quadratic @ root)[0]))


class BatchMoments(NamedTuple):
    """Exact mean and variance of an estimate over all batches."""

    mean: float
    variance: float


@dataclass(frozen=True, eq=False)
class FiniteRewardTuning(RewardProblem):
    """Data on k atoms with `probabilities` (k,) and rewards `upper`, `lower` (k,); every strength > 0 is admitted.

    Raises ValueError unless the lengths agree and the probabilities are non-negative with sum 1 (to 1e-12).

    >>> atoms = FiniteRewardTuning([0.7, 0.25, 0.05], [1.0, 0.0, -0.5], [0.0, 0.5, 1.0])
    >>> round(atoms.bias_limit(1.0), 10)
    0.1967001872
    """

    probabilities: Array
    upper: Array
    lower: Array

    def __init__(self, probabilities: ArrayLike, upper: ArrayLike, lower: ArrayLike) -> None:
        masses = checked.array("probabilities", probabilities, 1)
        if (masses < 0).any() or abs(float(masses.sum()) - 1.0) > 1e-12:
            raise ValueError(f"probabilities = {masses.tolist()}: must be non-negative and add up to 1")
        object.__setattr__(self, "probabilities", masses)
        for name, rewards in (("upper", upper), ("lower", lower)):
            object.__setattr__(self, name, checked.array(name, rewards, 1))
            if getattr(self, name).shape != masses.shape:
                raise ValueError(
                    f"{name} has {getattr(self, name).size} entries: must have {masses.size}, one per atom"
                )

    def domain(self, gamma: float | None = None) -> float:
        """0: on a finite support every partition function is finite."""
        if gamma is not None:
            checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        return 0.0

    def tilted(self, strength: float, gamma: float | None = None) -> Array:
        """p*, or p^gamma, as probabilities (k,)."""
        self.admit(strength, gamma)
        return self.probabilities * np.exp(self._exponent(strength, gamma) - self.log_moment(1.0, strength, gamma))

    def log_moment(self, power: float, strength: float, gamma: float | None = None) -> float:
        return float(logsumexp(power * self._exponent(strength, gamma), b=self.probabilities))

    def divergence(self, strength: float, gamma: float | None = None) -> float:
        law = self.tilted(strength, gamma)
        return float(law @ self._exponent(strength, gamma)) - self.log_moment(1.0, strength, gamma)

    def data_reward(self) -> float:
        return float(self.probabilities @ self.upper)

    def cumulants(self, strength: float, gamma: float | None = None) -> Cumulants:
        law = self.tilted(strength, gamma)
        mean = float(law @ self.upper)
        r1, r2 = self.upper - mean, self.lower - float(law @ self.lower)
        return Cumulants(mean, float(law @ r1**2), float(law @ (r1 * r2)), float(law @ (r1**2 * r2)))

    def self_normalised(self, strength: float, gamma: float, batch: int) -> BatchMoments:
        """Moments of the estimate of F_gamma' from `batch` data points by self-normalised weights: (33), forward KL.

        The estimate is `penalty_slope` with the batch in place of p_data: every reweighted mean is a ratio of sums, so
        it is biased. Exact, over the C(batch + k - 1, k - 1) possible counts; raises ValueError for batch < 1.
        """
        return self._over_batches(lambda drawn: drawn.penalty_slope(strength, gamma), batch)

    def released_batch(self, strength: float, gamma: float, batch: int) -> BatchMoments:
        """The same of the released `est1`: `released_slope` with the batch in place of p_data."""
        return self._over_batches(lambda drawn: drawn.released_slope(strength, gamma), batch)

    def _over_batches(self, estimate: Callable[[FiniteRewardTuning], float], batch: int) -> BatchMoments:
        checked.count("batch", batch, 1)
        kept = np.flatnonzero(self.probabilities)
        masses, upper, lower = self.probabilities[kept], self.upper[kept], self.lower[kept]
        chances, estimates = list[float](), list[float]()
        for counts in _compositions(batch, kept.size):
            drawn = np.array(counts, dtype=np.float64)
            log_chance = gammaln(batch + 1) - np.sum(gammaln(drawn + 1)) + drawn @ np.log(masses)
            chances.append(math.exp(float(log_chance)))
            estimates.append(estimate(FiniteRewardTuning(drawn / batch, upper, lower)))
        mean = math.fsum(p * e for p, e in zip(chances, estimates, strict=True))
        return BatchMoments(mean, math.fsum(p * (e - mean) ** 2 for p, e in zip(chances, estimates, strict=True)))

    def _exponent(self, strength: float, gamma: float | None) -> Array:
        inverse = 0.0 if gamma is None else 1.0 / gamma
        return (self.lower + inverse * self.upper) / strength


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` non-negative integers."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
