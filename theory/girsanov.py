r"""KL between the paths of two denoisers (Girsanov), and the exact pathwise gradient of an Euler chain (its adjoint).

Two scores s and s_0 drive dY = {Y + 2 s(Y, t)} dt + sqrt(2) dB over [0, T]. The drifts differ by 2 (s - s_0), so
KL(path || path_0) = E int |s - s_0|^2 dt, E over the paths of s; for the two Euler chains it is exactly
sum_j h E|s - s_0|^2(Y_j). The KL of the two laws of Y_T is never larger. Here scores are affine in y, all laws
Gaussian. The DDPM twin of the step is `theory.control.ControlSchedule.step_kl`; `as_control` turns an Euler chain into
a problem of theory.control_linear_quadratic, which computes the same KL from joint laws. Proofs: docs/implicit.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp

from theory import checked
from theory.checked import Array
from theory.control import ControlSchedule
from theory.control_linear_quadratic import LinearQuadratic
from theory.gaussian import Gaussian, affine, kl


@dataclass(frozen=True, eq=False)
class AffineScores:
    """s_j(y) = F_j y + f_j at the Euler steps j = 0..N-1 of length h, F (N, d, d), f (N, d).

    Raises ValueError if the shapes disagree or h is not positive.

    >>> AffineScores([[[-1.0]], [[-1.0]]], [[0.0], [0.5]], 0.1).steps
    2
    """

    F: Array
    f: Array
    step: float

    def __init__(self, F: ArrayLike, f: ArrayLike, step: float) -> None:
        offsets = checked.array("f", f, 2)
        object.__setattr__(self, "f", offsets)
        object.__setattr__(self, "F", _shaped("F", F, (*offsets.shape, offsets.shape[1])))
        object.__setattr__(self, "step", checked.scalar("step", step, 0.0, math.inf, closed="()"))

    @property
    def steps(self) -> int:
        """N."""
        return len(self.f)

    @property
    def dim(self) -> int:
        """d."""
        return self.f.shape[1]

    def laws(self, start: Gaussian) -> list[Gaussian]:
        """The laws of Y_0, ..., Y_N, Y_{j+1} = Y_j + h (Y_j + 2 s_j(Y_j)) + sqrt(2 h) W; Y_0 ~ start.

        >>> AffineScores([[[-1.0]]], [[0.5]], 0.1).laws(Gaussian.scalar(1.0, 1.0))[1].mean
        array([1.])
        """
        h, identity = self.step, np.eye(self.dim)
        result = [_start(self, start)]
        for matrix, offset in zip(self.F, self.f, strict=True):
            result.append(affine(result[-1], (1 + h) * identity + 2 * h * matrix, 2 * h * offset, 2 * h * identity))
        return result


# --- path and marginal KL ----------------------------------------------------------------------------------------


def path_kl(scores: AffineScores, reference: AffineScores, start: Gaussian) -> Array:
    """h E|s_j - s_0j|^2(Y_j), (N,), in nats, Y from `scores`: their sum is the KL of the Euler chains' paths, exactly.

    Both chains start from `start`. Raises ValueError if the chains differ in steps, dimension or h.

    >>> shifted, reference = (AffineScores([[[-1.0]]] * 2, [[shift]] * 2, 0.1) for shift in (0.5, 0.0))
    >>> path_kl(shifted, reference, Gaussian.scalar(0.0, 1.0)).round(12)
    array([0.025, 0.025])
    """
    _same_grid(scores, reference)
    gap, shift = scores.F - reference.F, scores.f - reference.f
    return np.array([scores.step * _mean_square(*parts) for parts in zip(gap, shift, scores.laws(start), strict=False)])


def marginal_kl(scores: AffineScores, reference: AffineScores, start: Gaussian) -> float:
    """KL of the two laws of Y_N, in nats: at most the sum of `path_kl`. Raises like it.

    >>> shifted, reference = (AffineScores([[[-1.0]]] * 2, [[shift]] * 2, 0.1) for shift in (0.5, 0.0))
    >>> round(marginal_kl(shifted, reference, Gaussian.scalar(0.0, 1.0)), 6)
    0.017729
    """
    _same_grid(scores, reference)
    return kl(scores.laws(start)[-1], reference.laws(start)[-1])


def as_control(scores: AffineScores, reference: AffineScores) -> tuple[LinearQuadratic, Array, Array]:
    """The two chains as a problem of `theory.control_linear_quadratic` (no reward) and a control K (N, d, d), k (N, d).

    With 1 / sqrt(alpha) = 1 + h and sigma^2 = 2 h a step of that module is an Euler step if the score is multiplied
    by 2 (1 + h) / (2 + h). Raises like `path_kl`.

    >>> shifted, reference = (AffineScores([[[-1.0]]], [[shift]], 0.1) for shift in (0.5, 0.0))
    >>> problem, K, k = as_control(shifted, reference)
    >>> round(float(problem.schedule.step_kl(0, k[0], [0.0])), 12)
    0.025
    """
    _same_grid(scores, reference)
    h = scores.step
    scale = 2 * (1 + h) / (2 + h)  # 2 h sqrt(alpha) / (1 - alpha)
    ones = np.ones(scores.steps)
    schedule = ControlSchedule(ones / (1 + h) ** 2, ones * math.sqrt(2 * h), 1.0)
    nothing = np.zeros((scores.dim, scores.dim))
    problem = LinearQuadratic(schedule, scale * reference.F, scale * reference.f, nothing, np.zeros(scores.dim))
    return problem, scale * scores.F, scale * scores.f


def path_kl_gradient(
    scores: AffineScores,
    reference: AffineScores,
    start: Gaussian,
    dF: ArrayLike,
    df: ArrayLike,
    *,
    frozen_states: bool = False,
) -> float:
    """The derivative of the path KL when the scores move in the direction dF (N, d, d), df (N, d).

    The states move with the scores. `frozen_states` leaves that part out, as a program does that sums h |s - s_0|^2 at
    detached states; right only if s - s_0 does not depend on y. Raises ValueError for wrong shapes and like `path_kl`.

    >>> tuned, reference = (AffineScores([[[slope]]] * 2, [[0.0]] * 2, 0.5) for slope in (-0.5, -1.0))
    >>> path_kl_gradient(tuned, reference, Gaussian.scalar(0.0, 1.0), [[[1.0]]] * 2, [[0.0]] * 2)
    1.75
    >>> path_kl_gradient(tuned, reference, Gaussian.scalar(0.0, 1.0), [[[1.0]]] * 2, [[0.0]] * 2, frozen_states=True)
    1.5
    """
    _same_grid(scores, reference)
    slopes, shifts = _shaped("dF", dF, scores.F.shape), _shaped("df", df, scores.f.shape)
    h, identity, laws = scores.step, np.eye(scores.dim), scores.laws(start)
    total, d_mean, d_cov = 0.0, np.zeros(scores.dim), np.zeros((scores.dim, scores.dim))
    for j in range(scores.steps):
        mean, cov = laws[j].mean, laws[j].cov
        gap = scores.F[j] - reference.F[j]
        error = gap @ mean + scores.f[j] - reference.f[j]
        total += 2 * h * float(error @ (slopes[j] @ mean + shifts[j]) + np.sum(slopes[j] @ cov * gap))
        if not frozen_states:
            total += h * float(2 * error @ gap @ d_mean + np.sum(gap @ d_cov * gap))
        matrix, d_matrix = (1 + h) * identity + 2 * h * scores.F[j], 2 * h * slopes[j]
        d_mean = matrix @ d_mean + d_matrix @ mean + 2 * h * shifts[j]
        cross = d_matrix @ cov @ matrix.T
        d_cov = matrix @ d_cov @ matrix.T + cross + cross.T
    return total


Affine = Callable[[float], tuple[ArrayLike, ArrayLike]]
"""t to (F (d, d), f (d,)) of the score F y + f at time t of the sampler."""


def diffusion_kl(scores: Affine, reference: Affine, start: Gaussian, horizon: float) -> tuple[float, float]:
    """Path KL E int |s - s_0|^2 dt and KL of the laws of Y_T, in nats, of the diffusions themselves.

    The moments' differential equations to a relative error of 1e-11. Raises ValueError unless T is positive.

    >>> ou = lambda shift: lambda t: ([[-1.0]], [shift])
    >>> [round(value, 10) for value in diffusion_kl(ou(0.5), ou(0.0), Gaussian.scalar(0.0, 1.0), 3.0)]
    [0.75, 0.4514523077]
    """
    checked.scalar("horizon", horizon, 0.0, math.inf, closed="()")
    d = start.dim

    def parts(drive: Affine, t: float) -> tuple[Array, Array]:
        F, f = drive(t)
        return _shaped("F", F, (d, d)), _shaped("f", f, (d,))

    def moments(t: float, state: Array, drive: Affine) -> Array:
        F, f = parts(drive, t)
        drift, cov = np.eye(d) + 2 * F, state[d : d + d * d].reshape(d, d)
        cross = drift @ cov
        return np.concatenate([drift @ state[:d] + 2 * f, (cross + cross.T + 2 * np.eye(d)).ravel()])

    def tuned_with_kl(t: float, state: Array) -> Array:
        (F, f), (F0, f0) = parts(scores, t), parts(reference, t)
        rate = _mean_square(F - F0, f - f0, _law(state[:-1], d))
        return np.append(moments(t, state, scores), rate)

    first = np.concatenate([start.mean, start.cov.ravel()])
    tuned = _solved(tuned_with_kl, horizon, np.append(first, 0.0))
    pretrained = _solved(lambda t, state: moments(t, state, reference), horizon, first)
    return float(tuned[-1]), kl(_law(tuned[:-1], d), _law(pretrained, d))


# --- the pathwise gradient of a nonlinear chain in one dimension -------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """mu(x, theta) = -x + a sin(2 x) + b, theta = (a, b): a drift with one or two wells and its two derivatives.

    All methods map states (...) elementwise; `in_theta` appends an axis of length 2.

    >>> float(Drift(0.7, 0.0)(0.0)), float(Drift(0.7, 0.0).in_x(0.0).round(12))
    (0.0, 0.4)
    """

    a: float
    b: float

    def __call__(self, x: ArrayLike) -> Array:
        x = np.asarray(x, dtype=np.float64)
        return np.asarray(-x + self.a * np.sin(2 * x) + self.b)

    def in_x(self, x: ArrayLike) -> Array:
        """d mu / d x."""
        return np.asarray(-1 + 2 * self.a * np.cos(2 * np.asarray(x, dtype=np.float64)))

    def in_theta(self, x: ArrayLike) -> Array:
        """d mu / d theta, (..., 2)."""
        x = np.asarray(x, dtype=np.float64)
        return np.stack([np.sin(2 * x), np.ones_like(x)], axis=-1)


def euler_paths(drift: Drift, start: ArrayLike, increments: ArrayLike, step: float) -> Array:
    """Y_{s+1} = Y_s + h mu(Y_s) + sqrt(2) dB_s: start (B,), increments dB (B, N), each of variance h; (B, N + 1).

    Raises ValueError if the shapes disagree or h is not positive.

    >>> euler_paths(Drift(0.0, 1.0), [0.0], [[0.0, 0.0]], 0.5)
    array([[0.  , 0.5 , 0.75]])
    """
    noise = checked.array("increments", increments, 2)
    first = _shaped("start", start, noise.shape[:1])
    checked.scalar("step", step, 0.0, math.inf, closed="()")
    paths = np.empty((noise.shape[0], noise.shape[1] + 1))
    paths[:, 0] = first
    for s in range(noise.shape[1]):
        paths[:, s + 1] = paths[:, s] + step * drift(paths[:, s]) + math.sqrt(2) * noise[:, s]
    return paths


def discrete_adjoint(drift: Drift, paths: ArrayLike, step: float, slope: ArrayLike) -> Array:
    """d g(Y_N) / d theta at fixed noise, (B, 2), for `slope` g'(Y_N) (B,): exact, what back-propagation computes.

    A_N = g'(Y_N), A_s = (1 + h mu_x(Y_s)) A_{s+1}, G = sum_s h mu_theta(Y_s) A_{s+1}. Raises ValueError if the shapes
    disagree or h is not positive.

    >>> paths = euler_paths(Drift(0.0, 1.0), [0.0], [[0.0, 0.0]], 0.5)
    >>> discrete_adjoint(Drift(0.0, 1.0), paths, 0.5, [1.0]).round(6)
    array([[0.420735, 0.75    ]])
    """
    return _adjoint(drift, paths, step, slope, endpoint=0)


def euler_adjoint(drift: Drift, paths: ArrayLike, step: float, slope: ArrayLike) -> Array:
    """The same by Euler's method, backwards, for the adjoint equation -dA/dt = mu_x A, dG/dt = -mu_theta A; (B, 2).

    It starts at T and so sees Y_{s+1} where the gradient of the chain has Y_s: "optimise, then discretise". Wrong by
    O(h) in mean square on every path. Raises like `discrete_adjoint`.

    >>> paths = euler_paths(Drift(0.0, 1.0), [0.0], [[0.0, 0.0]], 0.5)
    >>> euler_adjoint(Drift(0.0, 1.0), paths, 0.5, [1.0]).round(6)
    array([[0.709115, 0.75    ]])
    """
    return _adjoint(drift, paths, step, slope, endpoint=1)


def _adjoint(drift: Drift, paths: ArrayLike, step: float, slope: ArrayLike, endpoint: int) -> Array:
    states = checked.array("paths", paths, 2)
    adjoint = _shaped("slope", slope, states.shape[:1])
    checked.scalar("step", step, 0.0, math.inf, closed="()")
    total = np.zeros((len(states), 2))
    for s in reversed(range(states.shape[1] - 1)):
        here = states[:, s + endpoint]
        total += step * drift.in_theta(here) * adjoint[:, None]
        adjoint = (1 + step * drift.in_x(here)) * adjoint
    return total


# --- parts -------------------------------------------------------------------------------------------------------


def _mean_square(matrix: Array, offset: Array, law: Gaussian) -> float:
    """E|matrix y + offset|^2."""
    return float(np.sum(matrix @ law.cov * matrix) + np.sum((matrix @ law.mean + offset) ** 2))


def _solved(derivative: Callable[[float, Array], Array], horizon: float, first: Array) -> Array:
    solution = solve_ivp(derivative, (0.0, horizon), first, method="DOP853", rtol=1e-11, atol=1e-13)
    if not solution.success:
        raise ValueError(f"horizon = {horizon}: the moments cannot be integrated so far ({solution.message})")
    return np.asarray(solution.y[:, -1])


def _law(state: Array, d: int) -> Gaussian:
    cov = state[d:].reshape(d, d)
    return Gaussian(state[:d], (cov + cov.T) / 2)


def _shaped(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    result = checked.array(name, value, len(shape))
    if result.shape != shape:
        raise ValueError(f"{name} has shape {result.shape}: must be {shape}")
    return result


def _start(scores: AffineScores, start: Gaussian) -> Gaussian:
    if start.dim != scores.dim:
        raise ValueError(f"start has dimension {start.dim}: must be {scores.dim}")
    return start


def _same_grid(scores: AffineScores, reference: AffineScores) -> None:
    if scores.f.shape != reference.f.shape or scores.step != reference.step:
        raise ValueError(
            f"reference has {reference.steps} steps of {reference.step} in dimension {reference.dim}: "
            f"must have {scores.steps} of {scores.step} in dimension {scores.dim}, as scores"
        )
