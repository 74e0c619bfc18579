r"""What the penalty gradient of Generative bilevel costs: Lemma 1's constant, sharp and as published, and Theorem 1.

Notation of `theory.penalty`. Lemma 1 bounds |grad F_gamma - grad F| by C / gamma; the constant as published (after Kwon
et al. 2023, Lemma 3.1) is true and loose by a factor between 4 and 16, and two families show that neither the sharp
constant nor these two factors can be improved. Proofs stand in docs/bilevel.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array
from theory.penalty import Bilevel, Cubic


class Constants(NamedTuple):
    """The constants of Lemma 1: mu of the strong convexity of g in u; the others are Lipschitz constants.

    l_f0 of f in u, l_f1 of grad f and l_g1 of grad g in z = (x, u), l_g2 of the Hessian of g (in z) as u moves.

    >>> tight = Constants(mu=1.0, l_f0=1.0, l_f1=0.0, l_g1=1.0, l_g2=1.0)
    >>> tight.published, tight.sharp
    (8.0, 0.5)
    """

    mu: float
    l_f0: float
    l_f1: float
    l_g1: float
    l_g2: float

    @property
    def published(self) -> float:
        """C = 4 l_f0 l_g1 / mu^2 (l_f1 + 2 l_f0 l_g2 / mu), for gamma >= 2 l_f1 / mu."""
        return 4 * self.l_f0 * self.l_g1 / self.mu**2 * (self.l_f1 + 2 * self.l_f0 * self.l_g2 / self.mu)

    @property
    def sharp(self) -> float:
        """C = l_f0 l_g1 / mu^2 (l_f1 + l_f0 l_g2 / (2 mu)), for every gamma > 0."""
        return self.l_f0 * self.l_g1 / self.mu**2 * (self.l_f1 + self.l_f0 * self.l_g2 / (2 * self.mu))

    @property
    def least_gamma(self) -> float:
        """2 l_f1 / mu, below which the published lemma claims nothing."""
        return 2 * self.l_f1 / self.mu


def constants(problem: Bilevel, x: ArrayLike, gamma: float) -> Constants:
    """The least constants that hold on the segment from u*(x) to u^gamma(x), where the lemma's proof uses them.

    f and g are cubic, so all five are exact: Hessians are affine on the segment (their extreme eigenvalue and norm sit
    at an end), |grad_u f|^2 is a quartic, and l_g2 is the norm of the third derivative in the segment's direction.
    Raises ValueError like `Bilevel`, and if u^gamma = u*.

    >>> constants(one_dimensional(2.0, 1.0, 1.0, 1.0), [3.0], 10.0)
    Constants(mu=1.0, l_f0=4.0, l_f1=2.0, l_g1=2.0, l_g2=0.0)
    """
    k = problem.dim
    at = checked.array("x", x, 1)
    star, delta = np.concatenate([at, problem.lower_solution(at)]), problem.displacement(at, gamma)
    if not delta.any():
        raise ValueError(f"x = {at.tolist()}: the segment from u* to u^gamma must not be a point")
    step = np.concatenate([np.zeros(k), delta])
    ends = (star, star + step)
    f, g = problem.upper, problem.lower
    forces = (f.gradient(star)[k:], (f.hessian(star) @ step)[k:], 0.5 * ((f.cubic @ step) @ step)[k:])
    return Constants(
        mu=min(float(np.linalg.eigvalsh(g.hessian(z)[k:, k:])[0]) for z in ends),
        l_f0=_largest_norm(forces),
        l_f1=max(float(np.linalg.norm(f.hessian(z), 2)) for z in ends),
        l_g1=max(float(np.linalg.norm(g.hessian(z), 2)) for z in ends),
        l_g2=float(np.linalg.norm(g.cubic @ step, 2)) / float(np.linalg.norm(step)),
    )


def _largest_norm(coefficients: tuple[Array, Array, Array]) -> float:
    """max over s in [0, 1] of |c0 + c1 s + c2 s^2|."""
    c0, c1, c2 = coefficients
    quartic = np.polynomial.Polynomial([c0 @ c0, 2 * c0 @ c1, c1 @ c1 + 2 * c0 @ c2, 2 * c1 @ c2, c2 @ c2])
    inside = [float(s.real) for s in quartic.deriv().roots() if 0 < s.real < 1]
    return max(float(np.linalg.norm(c0 + s * c1 + s**2 * c2)) for s in [0.0, 1.0, *inside])


# --- Families -------------------------------------------------------------------------------------------------------


def extremal_quadratic(mu: float, l_g1: float, l_f0: float = 1.0, l_f1: float = 1.0) -> Bilevel:
    """At x = 0 and large gamma the bias attains the sharp constant with l_g2 = 0; the published one is 4 times that.

    g = -mu x^2/2 + q x u + mu u^2/2 with q^2 = l_g1^2 - mu^2, f = l_f0 u + z'Rz/2, R = l_f1 times the reflection whose
    last column is the direction that [I, -A H^-1] stretches most. Raises ValueError unless 0 < mu <= l_g1.

    >>> [constants(extremal_quadratic(1.0, 3.0), [0.0], 1e9)[i].__round__(6) for i in range(5)]
    [1.0, 1.0, 1.0, 3.0, 0.0]
    """
    lower, (a, b) = _saddle(mu, l_g1)
    return Bilevel(Cubic([0.0, l_f0], l_f1 * np.array([[-b, a], [a, b]])), Cubic([0.0, 0.0], lower), 1)


def extremal_cubic(mu: float, l_g1: float, l_f0: float = 1.0, l_g2: float = 1.0) -> Bilevel:
    """The same with f = l_f0 u, l_f1 = 0, and g + l_g2 Re(conj(w) (x + iu)^3) / 6: here the published one is 16 times.

    -w is the stretched direction as a complex number. Raises ValueError unless 0 < mu <= l_g1.

    >>> [constants(extremal_cubic(1.0, 3.0), [0.0], 1e9)[i].__round__(6) for i in range(5)]
    [1.0, 1.0, 0.0, 3.0, 1.0]
    """
    lower, (a, b) = _saddle(mu, l_g1)
    # Third derivatives of Re(conj(w) zeta^3) / 6, zeta = x + iu: a factor i for each derivative in u; w = -(a + ib).
    by_order = [float((-(a - 1j * b) * 1j**order).real) for order in range(4)]
    cubic = np.array([[[by_order[i + j + k] for k in (0, 1)] for j in (0, 1)] for i in (0, 1)])
    return Bilevel(Cubic([0.0, l_f0], np.zeros((2, 2))), Cubic([0.0, 0.0], lower, l_g2 * cubic), 1)


def _saddle(mu: float, l_g1: float) -> tuple[Array, tuple[float, float]]:
    """The Hessian [[-mu, q], [q, mu]] of norm l_g1, q <= 0, and the unit vector along [1, -q / mu]."""
    checked.scalar("mu", mu, 0.0, math.inf, closed="()")
    checked.scalar("l_g1", l_g1, mu, math.inf, closed="[)")
    q = -math.sqrt(l_g1**2 - mu**2)
    return np.array([[-mu, q], [q, mu]]), (mu / l_g1, -q / l_g1)


def one_dimensional(a: float, c: float, mu: float, k: float) -> Bilevel:
    """f = a (u - c)^2 / 2, g = mu (u - k x)^2 / 2 up to a constant in f, with a, mu > 0.

    F' = a k (k x - c), F_gamma' = F' gamma mu / (a + gamma mu), and C / (gamma |F_gamma' - F'|) is
    4 (1 + k^2) / |k| (1 + a / (gamma mu)) >= 8 for the published C.

    >>> one_dimensional(1.0, 0.0, 1.0, 2.0).gradient([3.0])
    array([12.])
    """
    checked.scalar("a", a, 0.0, math.inf, closed="()")
    checked.scalar("mu", mu, 0.0, math.inf, closed="()")
    lower = mu * np.array([[k * k, -k], [-k, 1.0]])
    return Bilevel(Cubic([0.0, -a * c], [[0.0, 0.0], [0.0, a]]), Cubic([0.0, 0.0], lower), 1)


# --- The descent inequality of Theorem 1 ----------------------------------------------------------------------------


def inner_error_bound(of: Constants, gamma: float, penalty: float, lower: float) -> float:
    """(l_f1 + gamma l_g1) |e_penalty| + gamma l_g1 |e_lower|: the error of eq. (4) from inexact inner solutions.

    Together with C / gamma: with inner errors of eps each, no gamma brings the sum below 2 sqrt(2 C l_g1 eps).
    Raises ValueError for a negative error or gamma <= 0. `of` must hold on the segments to the inexact solutions.

    >>> inner_error_bound(Constants(1.0, 1.0, 0.5, 3.0, 0.0), 100.0, 0.25, 0.5)
    225.125
    """
    checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
    checked.scalar("penalty", penalty, 0.0, math.inf, closed="[)")
    checked.scalar("lower", lower, 0.0, math.inf, closed="[)")
    return (of.l_f1 + gamma * of.l_g1) * penalty + gamma * of.l_g1 * lower


def projected_step(x: ArrayLike, direction: ArrayLike, eta: float, low: float = -math.inf) -> Array:
    """x+ = max(x - eta direction, low): the step of Algorithm 1 on X = [low, inf)^n, (n,).

    >>> projected_step([1.0], [5.0], 0.5, low=0.1)
    array([0.1])
    """
    checked.scalar("eta", eta, 0.0, math.inf, closed="()")
    return np.maximum(checked.array("x", x, 1) - eta * checked.array("direction", direction, 1), low)


def descent_bound(value: float, mapping: ArrayLike, error: ArrayLike, eta: float) -> float:
    """Theorem 1: F(x+) <= F(x) - eta |G|^2 / 4 + eta |e|^2 with G = (x - x+) / eta, e = direction - grad F.

    For F with an L-Lipschitz gradient on a convex X that holds x, and eta <= 1 / L. So F falls where |G| > 2 |e|.

    >>> descent_bound(1.0, [2.0], [0.5], 0.1)
    0.925
    """
    checked.scalar("eta", eta, 0.0, math.inf, closed="()")
    return value - eta * float(np.sum(np.square(mapping))) / 4 + eta * float(np.sum(np.square(error)))


def descent_slack(
    value: Callable[[Array], float],
    gradient: Callable[[Array], Array],
    x: ArrayLike,
    direction: ArrayLike,
    eta: float,
    low: float = -math.inf,
) -> float:
    """`descent_bound` minus F(x+) for one projected step from x along -direction; Theorem 1 says >= 0 if eta <= 1 / L.

    `value` and `gradient` are F and grad F of an (n,) array.

    >>> descent_slack(lambda x: 0.5 * float(x @ x), lambda x: x, [1.0], [1.0], 1.0)
    0.25
    """
    at = checked.array("x", x, 1)
    after = projected_step(at, direction, eta, low)
    error = checked.array("direction", direction, 1) - gradient(at)
    return descent_bound(value(at), (at - after) / eta, error, eta) - value(after)
