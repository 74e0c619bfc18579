r"""The penalty method of Generative bilevel (eqs. (1)-(4), (17), (18)) in finite dimension, exactly.

    F(x) = f(x, u*(x)),  u* = argmin_u g(x, .),       F_gamma(x) = min_u f(x, u) + gamma (g(x, u) - g(x, u*)),

the inner minimum at u^gamma. f and g are polynomials of degree three in z = (x, u), so every derivative is closed; a
cubic has no global minimum, and "minimiser" means the local one that damped Newton reaches from u = 0 (or from u*).
With delta = u^gamma - u*, differences of g and f are taken as polynomials in delta: nothing is lost at large gamma.
The printed formulas of the paper are lost in our copy; these are re-derived. Proofs stand in docs/bilevel.md; the
constants of Lemma 1 and the inequality of Theorem 1 in `theory.penalty_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array


@dataclass(frozen=True, eq=False)
class Cubic:
    """The polynomial l.z + z'Qz/2 + T[z, z, z]/6 for l (n,), Q (n, n), T (n, n, n), symmetrised; T may be left out.

    Raises ValueError unless the shapes agree and the entries are finite.

    >>> Cubic([1.0], [[2.0]], [[[6.0]]]).value([2.0])
    14.0
    >>> Cubic([1.0], [[2.0, 0.0]])
    Traceback (most recent call last):
    ...
    ValueError: quadratic has shape (1, 2): must be (1, 1)
    """

    linear: Array
    quadratic: Array
    cubic: Array

    def __init__(self, linear: ArrayLike, quadratic: ArrayLike, cubic: ArrayLike | None = None) -> None:
        first = checked.array("linear", linear, 1)
        n = first.size
        second = checked.array("quadratic", quadratic, 2)
        third = checked.array("cubic", np.zeros((n, n, n)) if cubic is None else cubic, 3)
        for name, tensor in (("quadratic", second), ("cubic", third)):
            if tensor.shape != (n,) * tensor.ndim:
                raise ValueError(f"{name} has shape {tensor.shape}: must be {(n,) * tensor.ndim}")
        orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        object.__setattr__(self, "linear", first)
        object.__setattr__(self, "quadratic", 0.5 * (second + second.T))
        object.__setattr__(self, "cubic", np.sum([third.transpose(order) for order in orders], axis=0) / 6.0)

    def value(self, z: ArrayLike) -> float:
        """The polynomial at z (n,)."""
        at = np.asarray(z, dtype=np.float64)
        return float(at @ (self.linear + (self.quadratic / 2.0 + self.cubic @ at / 6.0) @ at))

    def gradient(self, z: ArrayLike) -> Array:
        """l + Q z + T[z, z]/2, (n,)."""
        at = np.asarray(z, dtype=np.float64)
        return self.linear + (self.quadratic + self.cubic @ at / 2.0) @ at

    def hessian(self, z: ArrayLike) -> Array:
        """Q + T[z], (n, n)."""
        return self.quadratic + self.cubic @ np.asarray(z, dtype=np.float64)

    def scale(self, z: ArrayLike) -> float:
        """The size of the terms of the gradient at z (n,): its rounding error is a few ulp of this."""
        size = float(np.linalg.norm(np.asarray(z, dtype=np.float64)))
        norms = [float(np.linalg.norm(tensor)) for tensor in (self.linear, self.quadratic, self.cubic)]
        return norms[0] + (norms[1] + norms[2] * size) * size


@dataclass(frozen=True, eq=False)
class Bilevel:
    """min_x f(x, u*(x)), u* = argmin_u g(x, .), with f = `upper`, g = `lower` in z = (x, u); x has `dim` entries.

    Every method takes x (dim,), and gamma > 0 where it is named. Raises ValueError if the sizes disagree, gamma is not
    positive and finite, or the inner problem has no minimiser near (Newton meets an indefinite Hessian and stops).

    >>> toy = Bilevel(Cubic([0, -1.0], [[0, 0], [0, 1]]), Cubic([0, 0], [[1, -1], [-1, 1.0]]), 1)
    >>> toy.lower_solution([3.0]), toy.gradient([3.0]), toy.penalty_gradient([3.0], 1.0)
    (array([3.]), array([2.]), array([1.]))
    """

    upper: Cubic
    lower: Cubic
    dim: int

    def __post_init__(self) -> None:
        n = self.lower.linear.size
        if self.upper.linear.size != n:
            raise ValueError(f"upper takes {self.upper.linear.size} variables: must take those of lower, {n}")
        checked.count("dim", self.dim, 1)
        if self.dim >= n:
            raise ValueError(f"dim = {self.dim}: must leave at least one of the {n} variables to the lower problem")

    def lower_solution(self, x: ArrayLike) -> Array:
        """u*(x), (m,), the local minimiser of g(x, .) that Newton reaches from u = 0."""
        at, size = self._upper(x), self.lower.linear.size - self.dim
        k = self.dim

        def gradient(u: Array) -> Array:
            return self.lower.gradient(np.concatenate([at, u]))[k:]

        def hessian(u: Array) -> Array:
            return self.lower.hessian(np.concatenate([at, u]))[k:, k:]

        scale = self.lower.scale(np.concatenate([at, np.zeros(size)]))
        return _newton(gradient, hessian, np.zeros(size), scale, "lower problem")

    def displacement(self, x: ArrayLike, gamma: float) -> Array:
        """delta = u^gamma - u*, (m,), to full *relative* accuracy at every gamma."""
        t = 1.0 / checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        star, k = self._star(x), self.dim
        curvature, third = self.lower.hessian(star)[k:, k:], self.lower.cubic[k:, k:, k:]

        # grad_u g(u*) = 0 leaves t grad_u f(u* + delta) + H delta + T[delta, delta]/2 = 0.
        def gradient(delta: Array) -> Array:
            shifted = star + np.concatenate([np.zeros(k), delta])
            return t * self.upper.gradient(shifted)[k:] + (curvature + third @ delta / 2.0) @ delta

        def hessian(delta: Array) -> Array:
            shifted = star + np.concatenate([np.zeros(k), delta])
            return t * self.upper.hessian(shifted)[k:, k:] + curvature + third @ delta

        scale = t * self.upper.scale(star)
        return _newton(gradient, hessian, np.zeros(star.size - k), scale, "penalty problem")

    def penalty_solution(self, x: ArrayLike, gamma: float) -> Array:
        """u^gamma(x), (m,), the local minimiser of f + gamma g that Newton reaches from u*; eq. (3)."""
        return self.lower_solution(x) + self.displacement(x, gamma)

    def value(self, x: ArrayLike) -> float:
        """F(x) = f(x, u*(x)); eq. (1)."""
        return self.upper.value(self._star(x))

    def gradient(self, x: ArrayLike) -> Array:
        """grad F = grad_x f - A H^-1 grad_u f by the implicit function theorem, A = d^2 g/dx du, (dim,)."""
        star = self._star(x)
        return self._reduce(star) @ self.upper.gradient(star)

    def penalty_value(self, x: ArrayLike, gamma: float) -> float:
        """F_gamma(x); eq. (2)."""
        star, delta = self._star(x), self.displacement(x, gamma)
        k = self.dim
        step = np.concatenate([np.zeros(k), delta])
        rise = delta @ (self.lower.hessian(star)[k:, k:] / 2.0 + self.lower.cubic[k:, k:, k:] @ delta / 6.0) @ delta
        return self.upper.value(star + step) + gamma * float(rise)

    def penalty_gradient(self, x: ArrayLike, gamma: float) -> Array:
        """grad F_gamma = grad_x f(u^gamma) + gamma (grad_x g(u^gamma) - grad_x g(u*)), (dim,); eqs. (4), (18)."""
        star, delta = self._star(x), self.displacement(x, gamma)
        k = self.dim
        moved = star + np.concatenate([np.zeros(k), delta])
        change = (self.lower.hessian(star)[:k, k:] + self.lower.cubic[:k, k:, k:] @ delta / 2.0) @ delta
        return self.upper.gradient(moved)[:k] + gamma * change

    def inexact_gradient(self, x: ArrayLike, gamma: float, lower: ArrayLike, penalty: ArrayLike) -> Array:
        """Eq. (4) with any `lower` (m,) in place of u* and any `penalty` (m,) in place of u^gamma, (dim,).

        The error is gamma A (e_penalty - e_lower) plus O(e): multiplied by gamma unless the two inner errors agree;
        `theory.penalty_bounds.inner_error_bound` bounds it.
        """
        checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        at, k = self._upper(x), self.dim
        y = np.concatenate([at, self._inner("lower", lower)])
        z = np.concatenate([at, self._inner("penalty", penalty)])
        return self.upper.gradient(z)[:k] + gamma * (self.lower.gradient(z)[:k] - self.lower.gradient(y)[:k])

    def bias(self, x: ArrayLike, gamma: float) -> Array:
        """gamma (grad F_gamma - grad F), (dim,), without cancellation; tends to -grad psi / 2.

        Equal to [I, -A H^-1] gamma w, w = grad f(u^gamma) - grad f(u*) + gamma T[delta, delta] / 2.
        """
        star, delta = self._star(x), self.displacement(x, gamma)
        step = np.concatenate([np.zeros(self.dim), delta])
        change = (self.upper.hessian(star) + self.upper.cubic @ step / 2.0) @ step
        curved = (self.lower.cubic @ step) @ step
        return self._reduce(star) @ (gamma * change + gamma**2 * curved / 2.0)

    def value_bias(self, x: ArrayLike, gamma: float) -> float:
        """gamma (F_gamma - F) without cancellation; at most 0 at the global minimiser, and tends to -psi / 2."""
        star, delta = self._star(x), self.displacement(x, gamma)
        step = np.concatenate([np.zeros(self.dim), delta])
        curved = self.upper.hessian(star) / 2.0 + self.upper.cubic @ step / 6.0
        change = self.upper.gradient(star) @ step + step @ curved @ step
        rise = step @ (self.lower.hessian(star) / 2.0 + self.lower.cubic @ step / 6.0) @ step
        return float(gamma * change + gamma**2 * rise)

    def psi(self, x: ArrayLike) -> float:
        """psi = grad_u f' H^-1 grad_u f at u*, H = d^2 g/du^2."""
        star, k = self._star(x), self.dim
        force = self.upper.gradient(star)[k:]
        return float(force @ np.linalg.solve(self.lower.hessian(star)[k:, k:], force))

    def psi_gradient(self, x: ArrayLike) -> Array:
        """grad psi, (dim,), through u*(x): with p = H^-1 grad_u f, grad psi = 2 p' D(grad_u f) - p' D(H) p."""
        star, k = self._star(x), self.dim
        response = self._reduce(star)  # (dim, n) = [I, (du*/dx)']
        p = np.linalg.solve(self.lower.hessian(star)[k:, k:], self.upper.gradient(star)[k:])
        force_change = response @ self.upper.hessian(star)[:, k:]
        curvature_change = response @ (self.lower.cubic[:, k:, k:] @ p)
        return 2.0 * force_change @ p - curvature_change @ p

    def _star(self, x: ArrayLike) -> Array:
        return np.concatenate([self._upper(x), self.lower_solution(x)])

    def _reduce(self, star: Array) -> Array:
        """[I, -A H^-1], (dim, n): the derivative of z = (x, u*(x)) in x, transposed."""
        hessian, k = self.lower.hessian(star), self.dim
        lag = np.asarray(np.linalg.solve(hessian[k:, k:], -hessian[k:, :k]), dtype=np.float64)
        return np.concatenate([np.eye(k), lag.T], axis=1)

    def _upper(self, x: ArrayLike) -> Array:
        at = checked.array("x", x, 1)
        if at.size != self.dim:
            raise ValueError(f"x has {at.size} entries: must have {self.dim}")
        return at

    def _inner(self, name: str, u: ArrayLike) -> Array:
        at, size = checked.array(name, u, 1), self.lower.linear.size - self.dim
        if at.size != size:
            raise ValueError(f"{name} has {at.size} entries: must have {size}")
        return at


def _newton(
    gradient: Callable[[Array], Array], hessian: Callable[[Array], Array], start: Array, scale: float, name: str
) -> Array:
    """The zero of `gradient` from `start`, steps halved until |gradient| falls; `scale` is the size of its terms."""
    u, slope = start, gradient(start)
    for _ in range(100):
        curvature = hessian(u)
        if np.linalg.eigvalsh(curvature)[0] <= 0:
            break
        step, fraction = np.linalg.solve(curvature, slope), 1.0
        while fraction > 1e-3 and not np.linalg.norm(gradient(u - fraction * step)) < np.linalg.norm(slope):
            fraction /= 2
        if fraction <= 1e-3:
            if np.linalg.norm(slope) <= 1e-10 * scale:  # rounding: it cannot fall any further
                return u
            break
        u = u - fraction * step
        slope = gradient(u)
    raise ValueError(f"{name}: must have a minimiser on Newton's path from {start}; stopped at {u}, gradient {slope}")
