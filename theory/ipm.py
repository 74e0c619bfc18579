r"""Integral probability metrics between Gaussians: distance, optimal critic, slopes, and SFT-PG's surrogate, exactly.

    Phi(p, q) = sup over f in A of g(p, f),      g(p, f) = E_p f - E_q f                     (SFT-PG, eqs. 7 and 8)

Sets of critics A, all with A = -A: linear ones (weights in the unit ball of l2 or of l1), 1-Lipschitz ones (W1), the
unit ball of the Gaussian kernel's Hilbert space (MMD), and |f| <= 1 (total variation: the integral of |p - q|, at most
2). A maximising f is called a *witness*. Where p = q, and at ties, there are many, and Phi has a kink in the mean of p:
then `witness` wants to be told `towards` which side p is about to move, and the two one-sided slopes differ.

Means closer than rounding count as equal, and so do covariances that agree to 1e-12. Derivations: docs/sft.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erf, ndtr

from theory import chains, checked
from theory.chains import LinearGaussianChain, QuadraticReward
from theory.checked import Array
from theory.gaussian import Gaussian


@dataclass(frozen=True, eq=False)
class Expectation:
    """E f under N(m, C), its gradient in m (d,) and its derivative in C (d, d), which is half its Hessian in m."""

    value: float
    mean_slope: Array
    cov_slope: Array


@dataclass(frozen=True, eq=False)
class Critic:
    """A function f on R^d: `critic(points)` maps (n, d) to (n,), `critic.expect(law)` integrates it exactly."""

    values: Callable[[Array], Array]
    expect: Callable[[Gaussian], Expectation]

    def __call__(self, points: ArrayLike) -> Array:
        """f at the points (n, d), shape (n,); ValueError unless they are a finite array with two axes."""
        return self.values(checked.array("points", points, 2))


class Critics(Protocol):
    """A set A of critics. Errors: ValueError if the laws' dimensions differ or no closed form is known for them."""

    def distance(self, p: Gaussian, q: Gaussian) -> float:
        """Phi(p, q)."""
        ...

    def witness(self, p: Gaussian, q: Gaussian, towards: ArrayLike | None = None) -> Critic:
        """A maximiser of g(p, f); at a kink the limit of those of p with its mean moved `towards` (d,).

        ValueError at a kink without `towards`, or if that is zero there.
        """
        ...

    def lipschitz(self, cov: ArrayLike) -> float:
        """The least l with |E f(N(m, cov)) - E f(N(m', cov))| <= l |m - m'| for all f in A and all m, m'."""
        ...


@dataclass(frozen=True)
class LinearCritics:
    """f(x) = <a, x> with |a| <= 1 in the norm l2 (Phi = |m_p - m_q|) or l1 (Phi = the largest |difference|).

    Raises ValueError for another norm.

    >>> p, q = Gaussian.diagonal([3.0, 4.0], [1.0, 1.0]), Gaussian.diagonal([0.0, 0.0], [2.0, 5.0])
    >>> LinearCritics("l2").distance(p, q), LinearCritics("l1").distance(p, q)
    (5.0, 4.0)
    """

    norm: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "l1"):
            raise ValueError(f"norm = {self.norm!r}: must be 'l2' or 'l1'")

    def distance(self, p: Gaussian, q: Gaussian) -> float:
        """Phi(p, q); see `Critics`."""
        shift = _shift(p, q)
        return float(np.linalg.norm(shift) if self.norm == "l2" else np.abs(shift).max())

    def witness(self, p: Gaussian, q: Gaussian, towards: ArrayLike | None = None) -> Critic:
        """<a, x> with a in the direction of m_p - m_q (l2) or on its largest coordinate (l1)."""
        shift = _shift(p, q)
        if not shift.any():
            shift = _side(towards, p.dim)
        if self.norm == "l2":
            return _linear(shift / np.linalg.norm(shift))
        sizes = np.abs(shift)
        tied = np.flatnonzero(sizes >= (1.0 - 1e-12) * sizes.max())
        winner = tied[0]
        if tied.size > 1:  # the one that grows fastest
            winner = tied[np.argmax(np.sign(shift[tied]) * _side(towards, p.dim)[tied])]
        return _linear(np.sign(shift[winner]) * np.eye(p.dim)[winner])

    def lipschitz(self, cov: ArrayLike) -> float:
        """1 for both norms; see `Critics`."""
        _square(cov)
        return 1.0


@dataclass(frozen=True)
class LipschitzCritics:
    """1-Lipschitz f: Phi is the 1-Wasserstein distance. Any variances on the line; equal covariances in R^d.

    On the line W1 = E|m_p - m_q + (s_p - s_q) Z|, Z standard normal, and the witness is +-|x - c| with c where the two
    distribution functions cross. With equal covariances W1 = |m_p - m_q| and the witness is linear.

    >>> round(LipschitzCritics().distance(Gaussian.scalar(0.0, 4.0), Gaussian.scalar(0.0, 1.0)), 12)  # sqrt(2 / pi)
    0.797884560803
    """

    def distance(self, p: Gaussian, q: Gaussian) -> float:
        """Phi(p, q); see `Critics`."""
        shift = _shift(p, q)
        if _same_cov(p, q):
            return float(np.linalg.norm(shift))
        spread = abs(_std(p, "W1") - _std(q, "W1"))
        return _fold(float(shift[0]), spread)[0]

    def witness(self, p: Gaussian, q: Gaussian, towards: ArrayLike | None = None) -> Critic:
        """Linear for equal covariances, else +-|x - c|; see `Critics`."""
        if _same_cov(p, q):
            return LinearCritics().witness(p, q, towards)
        std_p, std_q = _std(p, "W1"), _std(q, "W1")
        crossing = float(q.mean[0]) - std_q * float(_shift(p, q)[0]) / (std_p - std_q)
        return _absolute(math.copysign(1.0, std_p - std_q), crossing)

    def lipschitz(self, cov: ArrayLike) -> float:
        """1; see `Critics`."""
        _square(cov)
        return 1.0


@dataclass(frozen=True)
class KernelCritics:
    """The unit ball of the Hilbert space of exp(-|x - y|^2 / (2 width^2)): Phi is the MMD. Any d, any covariances.

    Raises ValueError unless width is positive. With different covariances Phi^2 is resolved to about 1e-16, so Phi to
    about 1e-8 where it is as small as that; with equal ones to full relative accuracy. The witness divides a difference
    by Phi: its error is about 1e-16 / Phi.

    >>> round(KernelCritics(0.7).distance(Gaussian.scalar(0.3, 0.25), Gaussian.scalar(1.1, 0.25)), 10)
    0.6233939631
    """

    width: float

    def __post_init__(self) -> None:
        checked.scalar("width", self.width, 0.0, math.inf, closed="()")

    def distance(self, p: Gaussian, q: Gaussian) -> float:
        """Phi(p, q); see `Critics`."""
        shift = _shift(p, q)
        centred = self._embed(q.mean[None], p.cov, q)
        top = float(centred.weight[0])  # what <mu_p, mu_q> would be with equal means
        square = -2.0 * top * math.expm1(-0.5 * float(shift @ centred.inverse @ shift))
        if not _same_cov(p, q):
            square += float(self._at_mean(p, p).weight[0] + self._at_mean(q, q).weight[0]) - 2.0 * top
        return math.sqrt(max(square, 0.0))

    def witness(self, p: Gaussian, q: Gaussian, towards: ArrayLike | None = None) -> Critic:
        """The difference of the mean embeddings (at p = q, of their derivative) divided by its norm; see `Critics`."""
        size = self.distance(p, q)
        if size == 0.0:
            return self._derivative(p, _side(towards, p.dim))

        def values(points: Array) -> Array:
            none = np.zeros((p.dim, p.dim))
            return (self._embed(points, none, p).weight - self._embed(points, none, q).weight) / size

        def expect(law: Gaussian) -> Expectation:
            to_p, to_q = self._at_mean(law, p).expectation(), self._at_mean(law, q).expectation()
            return Expectation(
                (to_p.value - to_q.value) / size,
                (to_p.mean_slope - to_q.mean_slope) / size,
                (to_p.cov_slope - to_q.cov_slope) / size,
            )

        return Critic(values, expect)

    def lipschitz(self, cov: ArrayLike) -> float:
        """The largest norm of a directional derivative of the embedding, sqrt(kappa / (w^2 + 2 least eigenvalue))."""
        spectrum = self.width**2 + 2.0 * np.linalg.eigvalsh(_square(cov))
        return float(np.prod(np.sqrt(self.width / np.sqrt(spectrum))) / math.sqrt(spectrum[0]))

    def _embed(self, points: Array, cov: Array, law: Gaussian) -> _Embedding:
        """Kernel means between N(x, cov) for each point x (n, d), and the law."""
        total = self.width**2 * np.eye(law.dim) + cov + law.cov
        inverse = np.asarray(np.linalg.inv(total), dtype=np.float64)
        shift = points - law.mean
        pull = shift @ inverse
        log_det = float(np.linalg.slogdet(total / self.width**2)[1])
        return _Embedding(np.exp(-0.5 * (log_det + np.sum(shift * pull, axis=1))), pull, inverse)

    def _at_mean(self, law: Gaussian, other: Gaussian) -> _Embedding:
        return self._embed(law.mean[None], law.cov, other)

    def _derivative(self, p: Gaussian, side: Array) -> Critic:
        """The derivative of p's embedding as its mean moves along `side`, divided by its norm."""
        own = self._at_mean(p, p)
        size = math.sqrt(float(own.weight[0]) * float(side @ own.inverse @ side))

        def values(points: Array) -> Array:
            to_p = self._embed(points, np.zeros((p.dim, p.dim)), p)
            return to_p.weight * (to_p.pull @ side) / size

        def expect(law: Gaussian) -> Expectation:
            to_p = self._at_mean(law, p)
            weight, pull, slope = float(to_p.weight[0]) / size, to_p.pull[0], to_p.inverse @ side
            along = float(pull @ side)
            mixed = np.outer(pull, slope)
            hessian = along * (np.outer(pull, pull) - to_p.inverse) - mixed - mixed.T
            return Expectation(weight * along, weight * (slope - along * pull), 0.5 * weight * hessian)

        return Critic(values, expect)


@dataclass(frozen=True)
class BoundedCritics:
    """|f| <= 1: Phi is the total variation, between 0 and 2. Equal covariances in R^d, any variances on the line.

    The covariances must be positive definite.

    >>> round(BoundedCritics().distance(Gaussian.scalar(1.0, 1.0), Gaussian.scalar(0.0, 1.0)), 12)
    0.765849845096
    """

    def distance(self, p: Gaussian, q: Gaussian) -> float:
        """Phi(p, q); see `Critics`."""
        shift = _shift(p, q)
        if _same_cov(p, q):
            return 2.0 * float(erf(math.sqrt(float(shift @ _solve(p, shift)) / 8.0)))
        return gap(self.witness(p, q), p, q)

    def witness(self, p: Gaussian, q: Gaussian, towards: ArrayLike | None = None) -> Critic:
        """The sign of p - q: a half-space for equal covariances, else an interval; see `Critics`."""
        shift = _shift(p, q)
        if _same_cov(p, q):
            normal = _solve(p, shift if shift.any() else _side(towards, p.dim))
            return _half_space(normal, float(normal @ (p.mean + q.mean)) / 2.0)
        std_p, std_q = _std(p, "total variation"), _std(q, "total variation")
        if min(std_p, std_q) == 0.0:
            raise ValueError("cov = 0: must be positive for the total variation")
        # log p/q in y = x - m_q is bend y^2 + slope y + level; its discriminant is a sum of two non-negative terms
        delta = float(shift[0])
        bend = 0.5 * (std_q**-2 - std_p**-2)
        slope = delta / std_p**2
        level = math.log(std_q / std_p) - 0.5 * (delta / std_p) ** 2
        root = math.sqrt((delta / (std_p * std_q)) ** 2 - 4.0 * bend * math.log(std_q / std_p))
        half = -0.5 * (slope + math.copysign(root, slope))  # the form without cancellation
        low, high = sorted((half / bend, level / half))
        return _outside(math.copysign(1.0, bend), float(q.mean[0]) + low, float(q.mean[0]) + high)

    def lipschitz(self, cov: ArrayLike) -> float:
        """sqrt(2 / pi) divided by the least standard deviation; ValueError if that is zero."""
        least = float(np.linalg.eigvalsh(_square(cov))[0])
        if least <= 0.0:
            raise ValueError(f"cov has the eigenvalue {least:g}: must be positive definite for the total variation")
        return math.sqrt(2.0 / (math.pi * least))


def gap(critic: Critic, p: Gaussian, q: Gaussian) -> float:
    """g(p, f) = E_p f - E_q f (SFT-PG, eq. 7).

    >>> p, q = Gaussian.scalar(2.0, 1.0), Gaussian.scalar(0.0, 1.0)
    >>> gap(LipschitzCritics().witness(p, q), p, q)
    2.0
    """
    return critic.expect(p).value - critic.expect(q).value


def gradient(critics: Critics, p: Gaussian, q: Gaussian) -> tuple[Array, Array]:
    """The derivatives (d,) and (d, d) of Phi in the mean and the covariance of p: those of g at the frozen witness.

    For W1 and total variation in R^d, d > 1, the second rests on the envelope alone: no closed form is at hand.
    Raises ValueError at a kink, and where g itself is not differentiable: W1 on the line with a point mass for p.

    >>> p, q = Gaussian.diagonal([3.0, 4.0], [1.0, 1.0]), Gaussian.diagonal([0.0, 0.0], [1.0, 1.0])
    >>> gradient(LinearCritics(), p, q)[0]
    array([0.6, 0.8])
    """
    frozen = critics.witness(p, q).expect(p)
    return frozen.mean_slope, frozen.cov_slope


def one_sided_slopes(critics: Critics, p: Gaussian, q: Gaussian, direction: ArrayLike) -> tuple[float, float]:
    """The left and the right derivative at s = 0 of Phi(p with mean m + s direction, q).

    By Danskin's theorem the right one is the largest slope of g among the witnesses. Equal but for a kink, where the
    left one is smaller (Phi is a supremum). Raises ValueError if the shape is not (d,).

    >>> p = Gaussian.scalar(1.0, 4.0)
    >>> one_sided_slopes(LipschitzCritics(), p, p, [1.0])
    (-1.0, 1.0)
    """
    v = _direction("direction", direction, p.dim)
    if not v.any():
        return 0.0, 0.0
    left, right = (critics.witness(p, q, side).expect(p).mean_slope @ v for side in (-v, v))
    return float(left), float(right)


def surrogate(
    critics: Critics,
    p: Gaussian,
    q: Gaussian,
    mean: ArrayLike,
    constant: float = 2.0,
    towards: ArrayLike | None = None,
) -> float:
    """g(p', f_p) + constant l |m' - m| for p = N(m, C), p' = N(m', C): SFT-PG's eq. (19) for a location family.

    f_p is the witness of (p, q), l the uniform Lipschitz constant of the set of critics. With the constant 2 it bounds
    Phi(p', q), with none below 2 in general; it never falls below Phi(p, q) + l |m' - m|. Raises ValueError if
    mean is not (d,), and at a kink without `towards`.

    >>> p, q = Gaussian.scalar(1.0, 1.0), Gaussian.scalar(0.0, 1.0)
    >>> surrogate(LipschitzCritics(), p, q, [0.5])  # the truth is 0.5, and before the step it was 1
    1.5
    """
    moved = Gaussian(_direction("mean", mean, p.dim), p.cov)
    distance = float(np.linalg.norm(moved.mean - p.mean))
    return gap(critics.witness(p, q, towards), moved, q) + constant * critics.lipschitz(p.cov) * distance


def perpendicular_squared(critics: Critics, p: Gaussian, q: Gaussian, moved: Gaussian) -> float:
    """|P (mu_moved - mu_p)|^2, P the projection of mean embeddings off the witness of (p, q): Hilbert-ball critics.

    Then Phi(moved, q)^2 = g(moved, f_p)^2 + this, for all laws. Raises ValueError for critics that are no Hilbert ball
    (only `KernelCritics` and the l2 ball of `LinearCritics` are) and at p = q.

    >>> p, q, moved = (Gaussian.diagonal(m, [1.0, 1.0]) for m in ([2.0, 0.0], [0.0, 0.0], [1.0, 1.0]))
    >>> round(perpendicular_squared(LinearCritics(), p, q, moved), 12)
    1.0
    """
    if not (isinstance(critics, KernelCritics) or critics == LinearCritics("l2")):
        raise ValueError(f"critics = {critics}: must be the unit ball of a Hilbert space")
    along = gap(critics.witness(p, q), moved, p)
    return max(critics.distance(moved, p) ** 2 - along**2, 0.0)


def hilbert_surrogate(critics: Critics, p: Gaussian, q: Gaussian, moved: Gaussian) -> float:
    """g + |P (mu_moved - mu_p)|^2 / (2 g), g = g(moved, f_p): an upper bound of Phi(moved, q), tight to second order.

    Unlike eq. (19) it can certify a decrease. Infinite if g <= 0, where it says nothing; errors as for
    `perpendicular_squared`.

    >>> p, q, moved = (Gaussian.diagonal(m, [1.0, 1.0]) for m in ([2.0, 0.0], [0.0, 0.0], [1.0, 1.0]))
    >>> round(hilbert_surrogate(LinearCritics(), p, q, moved), 12)  # the truth is sqrt(2), and before the step it was 2
    1.5
    """
    perpendicular = perpendicular_squared(critics, p, q, moved)
    projected = gap(critics.witness(p, q), moved, q)
    return projected + perpendicular / (2.0 * projected) if projected > 0.0 else math.inf


def terminal_law(chain: LinearGaussianChain) -> Gaussian:
    """The law of the chain's sample x_0.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> terminal_law(chain).mean, terminal_law(chain).cov
    (array([2.5]), array([[0.5]]))
    """
    means, covs = chains.marginals(chain)
    return Gaussian(means[0].astype(np.float64), covs[0].astype(np.float64))


def chain_gradient(chain: LinearGaussianChain, critics: Critics, q: Gaussian) -> Array:
    """The gradient (p,) of Phi(law of x_0, q) in the chain's parameters theta; ValueError at a kink.

    The frozen witness enters through its derivatives in the mean and the covariance of x_0 only, so it may be replaced
    by the quadratic reward with the same ones.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[3.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> chain_gradient(chain, LipschitzCritics(), Gaussian.scalar(0.0, 0.5))
    array([3.])
    """
    law = terminal_law(chain)
    frozen = critics.witness(law, q).expect(law)
    curve = frozen.cov_slope + frozen.cov_slope.T
    reward = QuadraticReward(0.0, frozen.mean_slope - curve @ law.mean, curve)
    return np.asarray(chains.gradient(chain, reward), dtype=np.float64)


def chain_one_sided_slopes(
    chain: LinearGaussianChain, critics: Critics, q: Gaussian, direction: ArrayLike
) -> tuple[float, float]:
    """The left and the right derivative of Phi(law of x_0, q) as theta moves along `direction` (p,).

    Raises ValueError for a wrong shape, and for a chain that is not additive: at a kink its covariance moves too.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[3.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> chain_one_sided_slopes(chain, LipschitzCritics(), terminal_law(chain), [1.0])
    (-3.0, 3.0)
    """
    if not chain.additive:
        raise ValueError("chain is bilinear: must be additive for one-sided slopes")
    v = _direction("direction", direction, chain.parameters)
    flat = np.zeros((chain.dim, chain.dim))
    rows = [chains.gradient(chain, QuadraticReward(0.0, row, flat)) for row in np.eye(chain.dim)]
    return one_sided_slopes(critics, terminal_law(chain), q, np.array(rows, dtype=np.float64) @ v)


@dataclass(frozen=True, eq=False)
class _Embedding:
    """Kernel means (n,), inverse @ (point - mean) (n, d), and the inverse (d, d) of width^2 I + both covariances."""

    weight: Array
    pull: Array
    inverse: Array

    def expectation(self) -> Expectation:
        """The first kernel mean with its derivatives in the point and in the covariance around it."""
        weight, pull = float(self.weight[0]), self.pull[0]
        return Expectation(weight, -weight * pull, 0.5 * weight * (np.outer(pull, pull) - self.inverse))


def _linear(a: Array) -> Critic:
    flat = np.zeros((a.size, a.size))
    return Critic(lambda points: points @ a, lambda law: Expectation(float(a @ law.mean), a, flat))


def _absolute(sign: float, centre: float) -> Critic:
    """sign |x - centre| on the line."""

    def expect(law: Gaussian) -> Expectation:
        shift, std = float(law.mean[0]) - centre, math.sqrt(float(law.cov[0, 0]))
        if shift == 0.0 and std == 0.0:
            raise ValueError(f"law is the point mass at {centre}: the critic has a kink there and must be averaged")
        value, slope, bend = _fold(shift, std)
        return Expectation(sign * value, np.array([sign * slope]), np.array([[0.5 * sign * bend]]))

    return Critic(lambda points: sign * np.abs(points[:, 0] - centre), expect)


def _fold(mean: float, std: float) -> tuple[float, float, float]:
    """E|X| of X ~ N(mean, std^2) with its first two derivatives in the mean."""
    if std == 0.0:
        return abs(mean), math.copysign(1.0, mean), 0.0
    z = mean / std
    density = _density(z)
    odds = float(erf(z / math.sqrt(2.0)))
    return mean * odds + 2.0 * std * density, odds, 2.0 * density / std


def _half_space(normal: Array, offset: float) -> Critic:
    """The sign of <normal, x> - offset."""

    def expect(law: Gaussian) -> Expectation:
        std = _positive_root(float(normal @ law.cov @ normal))
        z, a = (float(normal @ law.mean) - offset) / std, normal / std
        twice = 2.0 * _density(z)
        return Expectation(float(erf(z / math.sqrt(2.0))), twice * a, -0.5 * twice * z * np.outer(a, a))

    return Critic(lambda points: np.sign(points @ normal - offset), expect)


def _outside(sign: float, low: float, high: float) -> Critic:
    """sign outside the interval (low, high) of the line, -sign inside."""

    def values(points: Array) -> Array:
        x = points[:, 0]
        return np.where((x > low) & (x < high), -sign, sign)

    def expect(law: Gaussian) -> Expectation:
        mean, std = float(law.mean[0]), _positive_root(float(law.cov[0, 0]))
        a, b = (low - mean) / std, (high - mean) / std
        inside = float(ndtr(b) - ndtr(a))
        slope = (_density(a) - _density(b)) / std
        bend = (_weighted_density(a) - _weighted_density(b)) / std**2
        return Expectation(sign * (1.0 - 2.0 * inside), np.array([-2.0 * sign * slope]), np.array([[-sign * bend]]))

    return Critic(values, expect)


def _positive_root(variance: float) -> float:
    if variance <= 0.0:
        raise ValueError(f"cov gives the critic the variance {variance:g}: must be positive for a critic with a jump")
    return math.sqrt(variance)


def _density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _weighted_density(z: float) -> float:
    return z * _density(z) if math.isfinite(z) else 0.0


def _shift(p: Gaussian, q: Gaussian) -> Array:
    """m_p - m_q, or zero if that is rounding."""
    if p.dim != q.dim:
        raise ValueError(f"q has dimension {q.dim}: must have that of p, {p.dim}")
    shift = p.mean - q.mean
    scale = float(max(np.abs(p.mean).max(), np.abs(q.mean).max()))
    return np.zeros(p.dim) if np.abs(shift).max() <= 64 * np.finfo(np.float64).eps * scale else shift


def _same_cov(p: Gaussian, q: Gaussian) -> bool:
    scale = float(max(np.abs(p.cov).max(), np.abs(q.cov).max()))
    return bool(np.abs(p.cov - q.cov).max() <= 1e-12 * scale)


def _std(law: Gaussian, metric: str) -> float:
    if law.dim > 1:
        raise ValueError(f"p and q have dimension {law.dim} and different covariances: {metric} must have equal ones")
    return math.sqrt(float(law.cov[0, 0]))


def _solve(law: Gaussian, vector: Array) -> Array:
    least = float(np.linalg.eigvalsh(law.cov)[0])
    if least <= 0.0:
        raise ValueError(f"cov has the eigenvalue {least:g}: must be positive definite for the total variation")
    return np.asarray(np.linalg.solve(law.cov, vector), dtype=np.float64)


def _square(cov: ArrayLike) -> Array:
    return checked.covariance("cov", cov, len(checked.array("cov", cov, 2)))


def _direction(name: str, value: ArrayLike, dim: int) -> Array:
    vector = checked.array(name, value, 1)
    if vector.size != dim:
        raise ValueError(f"{name} has shape {vector.shape}: must be ({dim},)")
    return vector


def _side(towards: ArrayLike | None, dim: int) -> Array:
    """The side of a kink to stand on."""
    if towards is None:
        raise ValueError("towards = None: Phi has a kink here, so it must name the direction in which p's mean moves")
    side = _direction("towards", towards, dim)
    if not side.any():
        raise ValueError(f"towards = {side.tolist()}: Phi has a kink here, so it must not be zero")
    return side
