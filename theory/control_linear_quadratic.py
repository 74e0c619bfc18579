r"""The linear-quadratic case of PI-FT, exact in every dimension: scores F_t y + f_t, reward r = q.y - y'Qy / 2.

Notation of `theory.control`. The pre-trained step has the mean m_t(y) = Phi_t y + phi_t, values are quadratic,
V_t(y) = -y'P_t y / 2 + p_t.y + c_t, and controls affine, U_t(y) = K_t y + k_t. With epsilon = sigma^2 / beta and
R = (I + epsilon P_{t+1})^-1 the optimal step has the mean R (m + epsilon p_{t+1}). What decides everything is the
curvature x, the eigenvalues of epsilon P_{t+1}: the Bellman problem is concave if x > -1, Algorithm 1 multiplies its
error by -x. Assumption 2.6 of the paper (a Lipschitz reward) fails here, so errors are those of the coefficients.
Statements and proofs: docs/pift.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array
from theory.control import ControlSchedule, per_step
from theory.gaussian import Gaussian, affine, kl, tilt


class DivergenceWarning(UserWarning):
    """Algorithm 1 does not contract at some step."""


@dataclass(frozen=True, eq=False)
class LinearQuadratic:
    """Scores s_t(y) = F_t y + f_t, F (T, d, d), f (T, d); reward q.y - y'Qy / 2, Q (d, d) symmetric, q (d,).

    Q may have any sign: positive directions are concave ones. F need not be symmetric.

    Raises:
        ValueError: if the shapes disagree with the T steps of the schedule or with one d, or Q is not symmetric.

    >>> LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0]).dim
    1
    """

    schedule: ControlSchedule
    F: Array
    f: Array
    Q: Array
    q: Array

    def __init__(self, schedule: ControlSchedule, F: ArrayLike, f: ArrayLike, Q: ArrayLike, q: ArrayLike) -> None:
        linear = checked.array("q", q, 1)
        quadratic = _shaped("Q", Q, (linear.size, linear.size))
        if np.abs(quadratic - quadratic.T).max() > 1e-12 * np.abs(quadratic).max():
            raise ValueError(f"Q = {quadratic.tolist()}: must be symmetric")
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "F", _shaped("F", F, (schedule.steps, linear.size, linear.size)))
        object.__setattr__(self, "f", _shaped("f", f, (schedule.steps, linear.size)))
        object.__setattr__(self, "Q", quadratic)
        object.__setattr__(self, "q", linear)

    @staticmethod
    def of_gaussian(
        schedule: ControlSchedule, mean: ArrayLike, cov: ArrayLike, Q: ArrayLike, q: ArrayLike
    ) -> LinearQuadratic:
        """The scores of data N(mean, cov), mean (d,), cov (d, d), noised to the levels `schedule.alpha_bar`.

        Y_t has the law N(sqrt(alpha_bar) mean, alpha_bar cov + (1 - alpha_bar) I). Raises ValueError as the
        constructor, or if cov is not a covariance.

        >>> problem = LinearQuadratic.of_gaussian(ControlSchedule.ddpm([0.64], 0.36), [0.5], [[1.0]], [[1.0]], [1.0])
        >>> problem.F.tolist(), problem.f.tolist()
        ([[[-1.0]]], [[0.4]])
        """
        centre = checked.array("mean", mean, 1)
        spread = checked.covariance("cov", cov, centre.size)
        level = schedule.alpha_bar[:, None, None]
        precision = np.linalg.inv(level * spread + (1.0 - level) * np.eye(centre.size))
        return LinearQuadratic(schedule, -precision, precision @ centre * np.sqrt(level[:, :, 0]), Q, q)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.q.size


@dataclass(frozen=True, eq=False)
class Solution:
    """Controls K_t y + k_t, K (T, d, d), k (T, d), and values -y'P_t y / 2 + p_t.y + c_t for t = 0..T.

    P (T + 1, d, d), p (T + 1, d), c (T + 1,); index T holds the reward.
    """

    K: Array
    k: Array
    P: Array
    p: Array
    c: Array

    def control(self, t: int, y: ArrayLike) -> Array:
        """U_t(y), (..., d) to (..., d)."""
        return np.asarray(y, dtype=np.float64) @ self.K[t].T + self.k[t]

    def value(self, t: int, y: ArrayLike) -> Array:
        """V_t(y), (..., d) to (...)."""
        point = np.asarray(y, dtype=np.float64)
        return np.asarray(-0.5 * np.sum(point @ self.P[t] * point, axis=-1) + point @ self.p[t] + self.c[t])


# --- the optimum -------------------------------------------------------------------------------------------------


def optimum(problem: LinearQuadratic) -> Solution:
    """The optimal controls and the optimal values, by the Riccati recursion of the Bellman equation (PI-FT, eq. 9).

    Raises ValueError if the Bellman problem of a step is not strictly concave, that is if the strength does not exceed
    sigma^2 times the largest curvature of the next value function; the objective has no maximum then.

    >>> schedule = ControlSchedule.ddpm([0.64], 0.36)
    >>> best = optimum(LinearQuadratic(schedule, [[[0.0]]], [[0.0]], [[1.0]], [1.0]))
    >>> best.P[:, 0, 0].tolist(), best.c.round(12).tolist()
    ([0.78125, 1.0], [0.07, 0.0])
    """
    schedule, solution = problem.schedule, _blank(problem)
    for t in reversed(range(schedule.steps)):
        variance, maximised = schedule.sigma[t] ** 2, _maximised(problem, t, solution.P[t + 1], solution.p[t + 1])
        solution.K[t], solution.k[t] = _control_of_mean(schedule, t, maximised.matrix, maximised.offset)
        solution.P[t], solution.p[t] = maximised.P, maximised.p
        solution.c[t] = solution.c[t + 1] - 0.5 * variance * np.trace(solution.P[t + 1]) + maximised.c
    return solution


def curvature(problem: LinearQuadratic, P: ArrayLike) -> Array:
    """The eigenvalues x of sigma_t^2 P_{t+1} / beta_t, ascending, (T, d), for value matrices P (T + 1, d, d).

    Raises ValueError for another shape.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.72), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> curvature(problem, optimum(problem).P)
    array([[0.5]])
    """
    schedule = problem.schedule
    matrices = _shaped("P", P, (schedule.steps + 1, problem.dim, problem.dim))[1:]
    return np.asarray(np.linalg.eigvalsh(matrices) * (schedule.sigma**2 / schedule.strength)[:, None])


# --- Algorithm 1 -------------------------------------------------------------------------------------------------


def policy_iteration(problem: LinearQuadratic, iterations: int | Sequence[int], damping: ArrayLike = 1.0) -> Solution:
    """Algorithm 1, literally: from U = s, m_t updates (35) of the control, then its value by (36), for t = T-1, ..., 0.

    `iterations` m_t and `damping` eta_t are one number or (T,). A damped update keeps the part 1 - eta of the control;
    eta = 1 is the paper's. The closed form is `policy_iteration_in_closed_form`.

    Warns DivergenceWarning at every step with m_t > 0 where the error is not contracted (without damping: where
    sigma^2 max|eig P| / beta >= 1, P being the matrix of the next value function).
    Raises ValueError for negative iterations, a damping that is not positive, or values beyond the float range.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.72), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> [round(float(policy_iteration(problem, m).P[0, 0, 0]), 9) for m in (0, 1, 2, 20)]
    [1.5625, 1.171875, 1.07421875, 1.041666667]
    >>> optimum(problem).P[0].round(9)
    array([[1.04166667]])
    """
    schedule, solution = problem.schedule, _blank(problem)
    counts, eta = _counts(iterations, schedule.steps), per_step("damping", damping, schedule.steps)
    for t in reversed(range(schedule.steps)):
        P, p, slope, shift = solution.P[t + 1], solution.p[t + 1], problem.F[t], problem.f[t]
        message = _divergence(problem, t, P, float(eta[t]))
        if counts[t] and message:
            warnings.warn(message, DivergenceWarning, stacklevel=2)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(counts[t]):
                matrix, offset = _mean_of_control(schedule, t, slope, shift)
                updated_slope = problem.F[t] - schedule.gain[t] * P @ matrix
                updated_shift = problem.f[t] + schedule.gain[t] * (p - P @ offset)
                slope, shift = (
                    (1.0 - eta[t]) * slope + eta[t] * updated_slope,
                    (1.0 - eta[t]) * shift + eta[t] * updated_shift,
                )
            solution.K[t], solution.k[t] = slope, shift
            _evaluate_step(problem, solution, t)
        if not all(np.isfinite(part[t]).all() for part in (solution.K, solution.P, solution.p, solution.c)):
            raise ValueError(f"iterations = {counts}: the values of step {t} exceed the float range")
    return solution


def policy_iteration_in_closed_form(
    problem: LinearQuadratic, iterations: int | Sequence[int], damping: ArrayLike = 1.0
) -> Solution:
    """What Algorithm 1 returns, from powers of N = I - eta (I + epsilon P) instead of iterations; arguments as there.

    The control's error is N^m times that of s, the value's is of order N^{2m}. Undamped N = -epsilon P, and P_t is
    Phi'PR (I - N^{2m+1}) Phi (docs/pift.md, "Algorithm 1 in closed form").
    Raises ValueError as `policy_iteration`, or where the Bellman problem of a step is not concave.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.72), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> policy_iteration_in_closed_form(problem, 2).P[0].round(12)
    array([[1.07421875]])
    """
    schedule, solution = problem.schedule, _blank(problem)
    counts, eta = _counts(iterations, schedule.steps), per_step("damping", damping, schedule.steps)
    Phi, phi = _mean_maps(problem, problem.F, problem.f)
    for t in reversed(range(schedule.steps)):
        P, p, epsilon = solution.P[t + 1], solution.p[t + 1], schedule.sigma[t] ** 2 / schedule.strength[t]
        best, eye = _maximised(problem, t, P, p), np.eye(problem.dim)
        power = np.linalg.matrix_power(eye - eta[t] * (eye + epsilon * P), counts[t])
        solution.K[t], solution.k[t] = _control_of_mean(
            schedule, t, best.matrix + power @ (Phi[t] - best.matrix), best.offset + power @ (phi[t] - best.offset)
        )
        # V = (the maximum) - (epsilon / 2) g'R N^{2m} g with g = P m - p, the gradient that s has ignored
        loss = epsilon * best.R @ power @ power
        slope, at_zero = P @ Phi[t], P @ phi[t] - p
        solution.P[t] = _symmetric(best.P + slope.T @ loss @ slope)
        solution.p[t] = best.p - slope.T @ loss @ at_zero
        smoothing = 0.5 * schedule.sigma[t] ** 2 * np.trace(P)
        solution.c[t] = solution.c[t + 1] - smoothing + best.c - 0.5 * at_zero @ loss @ at_zero
    return solution


def contraction(problem: LinearQuadratic, P: ArrayLike, damping: ArrayLike = 1.0) -> Array:
    """max |1 - eta (1 + x)| over the `curvature` x of each step, (T,): the factor of one iteration of Algorithm 1.

    P (T + 1, d, d) are the values that Algorithm 1 works with, or the optimal ones in the limit. Undamped it is
    sigma^2 max|eig P| / beta. Raises ValueError for another shape or a damping that is not positive.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.18), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> contraction(problem, optimum(problem).P), contraction(problem, optimum(problem).P, 0.5)
    (array([2.]), array([0.5]))
    """
    eta = per_step("damping", damping, problem.schedule.steps)
    return np.asarray(np.abs(1.0 - eta[:, None] * (1.0 + curvature(problem, P))).max(axis=1))


def best_damping(problem: LinearQuadratic, P: ArrayLike) -> Array:
    """2 / (2 + min x + max x), (T,): the damping of least `contraction`, (max x - min x) / (2 + min x + max x) < 1.

    The curvature x must be known for it; 2 / (2 + rho) is best if all one knows is 0 <= x <= rho.
    Raises ValueError where the Bellman problem is not concave (x <= -1): no damping contracts there.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.18), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> best_damping(problem, optimum(problem).P)
    array([0.33333333])
    """
    x = curvature(problem, P)
    for t in range(problem.schedule.steps):
        _check_concave(problem, t, float(x[t, 0]))
    return 2.0 / (2.0 + x[:, 0] + x[:, -1])


# --- any affine policy -------------------------------------------------------------------------------------------


def value_of(problem: LinearQuadratic, K: ArrayLike, k: ArrayLike) -> Solution:
    """The values of the controls K_t y + k_t, by the backward recursion (36); K (T, d, d), k (T, d).

    Raises ValueError for other shapes.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.72), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> value_of(problem, problem.F, problem.f).P[0]
    array([[1.5625]])
    """
    solution = _blank(problem)
    solution.K[:], solution.k[:] = _policy(problem, K, k)
    for t in reversed(range(problem.schedule.steps)):
        _evaluate_step(problem, solution, t)
    return solution


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a policy achieves from a law of Y_0: E r(Y_T), and KL_t averaged over Y_t, (T,), in nats.

    `step_kl` averages over the controlled law of Y_t, as PI-FT's objective (3) does; `step_kl_pretrained` over the
    pre-trained one, which is the divergence in the other direction, KL(pre-trained || controlled).
    """

    reward: float
    step_kl: Array
    step_kl_pretrained: Array
    strength: Array

    @property
    def objective(self) -> float:
        """J = E r(Y_T) - sum_t beta_t KL_t (PI-FT, eqs. 2-3)."""
        return self.reward - float(self.strength @ self.step_kl)


def evaluate(problem: LinearQuadratic, K: ArrayLike, k: ArrayLike, start: Gaussian) -> Evaluation:
    """Reward and divergences of the controls K_t y + k_t from Y_0 ~ start, by the forward recursion of two moments.

    Raises ValueError if K is not (T, d, d), k not (T, d), or start not of dimension d.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> best = optimum(problem)
    >>> round(evaluate(problem, best.K, best.k, Gaussian.scalar(0.0, 1.0)).objective, 12)
    -0.320625
    """
    matrices, offsets = _policy(problem, K, k)
    controlled = marginals(problem, matrices, offsets, start)
    pretrained = marginals(problem, problem.F, problem.f, start)
    gap, shift = matrices - problem.F, offsets - problem.f
    weight = _kl_weight(problem.schedule)

    def kl_under(laws: list[Gaussian]) -> Array:
        squares = [_mean_square(gap[t], shift[t], laws[t]) for t in range(problem.schedule.steps)]
        return np.asarray(0.5 * weight * np.array(squares))

    last = controlled[-1]
    second = last.cov + np.outer(last.mean, last.mean)
    reward = float(problem.q @ last.mean - 0.5 * np.sum(problem.Q * second))
    return Evaluation(reward, kl_under(controlled), kl_under(pretrained), problem.schedule.strength)


def marginals(problem: LinearQuadratic, K: ArrayLike, k: ArrayLike, start: Gaussian) -> list[Gaussian]:
    """The laws of Y_0, ..., Y_T under the controls K_t y + k_t; raises like `evaluate`.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> marginals(problem, problem.F, problem.f, Gaussian.scalar(0.0, 1.0))[1].cov
    array([[1.9225]])
    """
    matrices, offsets = _mean_maps(problem, *_policy(problem, K, k))
    laws = [_start(problem, start)]
    for matrix, offset, sigma in zip(matrices, offsets, problem.schedule.sigma, strict=True):
        laws.append(affine(laws[-1], matrix, offset, sigma**2 * np.eye(problem.dim)))
    return laws


def path_law(problem: LinearQuadratic, K: ArrayLike, k: ArrayLike, start: Gaussian) -> Gaussian:
    """The joint law of (Y_0, ..., Y_T), of dimension (T + 1) d, under the controls K_t y + k_t; raises like `evaluate`.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> path_law(problem, problem.F, problem.f, Gaussian.scalar(0.0, 1.0)).cov
    array([[1.    , 1.25  ],
           [1.25  , 1.9225]])
    """
    noise = (problem.schedule.sigma**2)[:, None, None] * np.eye(problem.dim)
    return _joint(_start(problem, start), *_mean_maps(problem, *_policy(problem, K, k)), noise)


def path_kl(
    problem: LinearQuadratic, K: ArrayLike, k: ArrayLike, start: Gaussian, pretrained_start: Gaussian | None = None
) -> float:
    """KL of the controlled path from the pre-trained path (PI-FT, Remark 2.4), from the two joint laws alone.

    The pre-trained path starts from `pretrained_start`, by default also from `start`. Raises like `evaluate`.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> round(path_kl(problem, problem.F, problem.f + 1.0, Gaussian.scalar(0.0, 1.0)), 12)
    0.28125
    """
    other = start if pretrained_start is None else pretrained_start
    return kl(path_law(problem, K, k, start), path_law(problem, problem.F, problem.f, other))


# --- the exponential tilt ----------------------------------------------------------------------------------------


def tilted_constants(problem: LinearQuadratic) -> Array:
    """The constants c_t, (T + 1,), of V^tilt_t(y) = beta log E_pre[exp(r(Y_T) / beta) | Y_t = y].

    P_t and p_t are those of `optimum`. Raises ValueError as `optimum`, or unless all strengths are equal: with
    different ones there is no single exponential to tilt the path by.

    >>> tilted_constants(LinearQuadratic(ControlSchedule.ddpm([0.64], 0.36), [[[0]]], [[0]], [[1]], [1])).round(9)
    array([0.12523351, 0.        ])
    """
    strength, best = _one_strength(problem), optimum(problem)
    constants = np.zeros(problem.schedule.steps + 1)
    for t in reversed(range(problem.schedule.steps)):
        maximised = _maximised(problem, t, best.P[t + 1], best.p[t + 1])
        constants[t] = constants[t + 1] + 0.5 * strength * np.linalg.slogdet(maximised.R)[1] + maximised.c
    return constants


def tilt_gap(problem: LinearQuadratic) -> Array:
    """sigma_t^2 tr P_{t+1} / 2 - (beta / 2) log det(I + sigma_t^2 P_{t+1} / beta), (T,), each >= 0.

    V^tilt_t - V*_t is the sum over the steps from t on, whatever y. Raises like `tilted_constants`.

    >>> tilt_gap(LinearQuadratic(ControlSchedule.ddpm([0.64], 0.36), [[[0]]], [[0]], [[1]], [1])).round(9)
    array([0.05523351])
    """
    strength = _one_strength(problem)
    x = curvature(problem, optimum(problem).P)
    return np.asarray(0.5 * strength * np.sum(x - np.log1p(x), axis=1))


def tilt_gap_leading(problem: LinearQuadratic) -> Array:
    """sigma_t^4 tr(P_{t+1}^2) / (4 beta), (T,): `tilt_gap` to leading order in sigma^2; raises like it.

    >>> tilt_gap_leading(LinearQuadratic(ControlSchedule.ddpm([0.64], 0.36), [[[0]]], [[0]], [[1]], [1]))
    array([0.09])
    """
    strength = _one_strength(problem)
    return np.asarray(0.25 * strength * np.sum(curvature(problem, optimum(problem).P) ** 2, axis=1))


def tilted_path_law(problem: LinearQuadratic, start: Gaussian) -> Gaussian:
    """The joint law of (Y_0, ..., Y_T), tilted by exp(r(Y_T) / beta) given Y_0, and Y_0 ~ start.

    Its steps have the mean of the optimal control and the covariance sigma^2 (I + sigma^2 P / beta)^-1 instead of
    sigma^2 I. Raises like `tilted_constants`, or if start has another dimension.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> tilted_path_law(problem, Gaussian.scalar(0.0, 1.0)).cov
    array([[1.      , 0.625   ],
           [0.625   , 0.570625]])
    """
    _one_strength(problem)
    best = optimum(problem)
    steps = [_maximised(problem, t, best.P[t + 1], best.p[t + 1]) for t in range(problem.schedule.steps)]
    noise = (problem.schedule.sigma**2)[:, None, None] * np.array([step.R for step in steps])
    matrices, offsets = np.array([step.matrix for step in steps]), np.array([step.offset for step in steps])
    return _joint(_start(problem, start), matrices, offsets, noise)


def state_law(path: Gaussian, t: int, dim: int) -> Gaussian:
    """The law of Y_t from a joint law of (Y_0, ..., Y_T) with `dim` coordinates each; t = -1 is the last.

    Raises ValueError if dim does not divide the dimension of the path, or there is no such t.

    >>> state_law(Gaussian([1.0, 2.0], [[1.0, 0.5], [0.5, 3.0]]), -1, 1).mean
    array([2.])
    """
    count, rest = divmod(path.dim, checked.count("dim", dim, 1))
    if rest or not -count <= t < count:
        raise ValueError(f"t = {t}, dim = {dim}: must name a state of a path with {path.dim} coordinates")
    block = slice((t % count) * dim, (t % count + 1) * dim)
    return Gaussian(path.mean[block], path.cov[block, block])


def reward_tilted_law(problem: LinearQuadratic, start: Gaussian) -> Gaussian:
    """The law proportional to p_pre exp(r / beta), p_pre the pre-trained law of Y_T from Y_0 ~ start.

    The tilted chain ends there only if its Y_0 is tilted too. Raises ValueError if the strengths differ, if start has
    another dimension, or if the law cannot be normalised.

    >>> problem = LinearQuadratic(ControlSchedule([0.64], [0.6], 0.36), [[[0.0]]], [[0.0]], [[1.0]], [1.0])
    >>> reward_tilted_law(problem, Gaussian.scalar(0.0, 1.0)).cov.round(9)
    array([[0.30322015]])
    """
    strength = _one_strength(problem)
    last = marginals(problem, problem.F, problem.f, start)[-1]
    return tilt(last, problem.q / strength, problem.Q / strength)[0]


# --- one step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Maximum:
    """max over M of -M'PM / 2 + p.M - |M - m|^2 / (2 epsilon) at m = Phi y + phi: the maximiser is matrix y + offset,
    the maximum -y'Py / 2 + p.y + c."""

    R: Array
    matrix: Array
    offset: Array
    P: Array
    p: Array
    c: float


def _maximised(problem: LinearQuadratic, t: int, P: Array, p: Array) -> _Maximum:
    schedule = problem.schedule
    epsilon = float(schedule.sigma[t] ** 2 / schedule.strength[t])
    _check_concave(problem, t, epsilon * float(np.linalg.eigvalsh(P)[0]))
    R = _symmetric(np.asarray(np.linalg.inv(np.eye(problem.dim) + epsilon * P), dtype=np.float64))
    Phi, phi = _mean_of_control(schedule, t, problem.F[t], problem.f[t])
    constant = 0.5 * epsilon * p @ R @ p - 0.5 * phi @ P @ R @ phi + p @ R @ phi
    return _Maximum(
        R=R,
        matrix=R @ Phi,
        offset=R @ (phi + epsilon * p),
        P=_symmetric(Phi.T @ P @ R @ Phi),
        p=Phi.T @ R @ (p - P @ phi),
        c=float(constant),
    )


def _check_concave(problem: LinearQuadratic, t: int, least: float) -> None:
    if least <= -1.0 + 64 * problem.dim * np.finfo(np.float64).eps:
        strength = float(problem.schedule.strength[t])
        raise ValueError(
            f"strength[{t}] = {strength}: must exceed {-least * strength:.12g}, sigma^2 times the largest curvature "
            f"of the value at {t + 1}, or the Bellman problem of step {t} is not concave"
        )


def _evaluate_step(problem: LinearQuadratic, solution: Solution, t: int) -> None:
    """V_t from V_{t+1} and the control of step t (PI-FT, eq. 36), in place."""
    P, p, weight = solution.P[t + 1], solution.p[t + 1], problem.schedule.strength[t] * _kl_weight(problem.schedule)[t]
    matrix, offset = _mean_of_control(problem.schedule, t, solution.K[t], solution.k[t])
    gap, shift = solution.K[t] - problem.F[t], solution.k[t] - problem.f[t]
    solution.P[t] = _symmetric(matrix.T @ P @ matrix + weight * gap.T @ gap)
    solution.p[t] = matrix.T @ (p - P @ offset) - weight * gap.T @ shift
    at_offset = p @ offset - 0.5 * offset @ P @ offset - 0.5 * problem.schedule.sigma[t] ** 2 * np.trace(P)
    solution.c[t] = solution.c[t + 1] + at_offset - 0.5 * weight * shift @ shift


def _divergence(problem: LinearQuadratic, t: int, P: Array, damping: float) -> str:
    """The text of a DivergenceWarning for step t, empty if Algorithm 1 contracts there."""
    x = np.linalg.eigvalsh(P) * problem.schedule.sigma[t] ** 2 / problem.schedule.strength[t]
    factor, rho = float(np.abs(1.0 - damping * (1.0 + x)).max()), float(np.abs(x).max())
    if factor < 1.0:
        return ""
    consequence = "diverges" if factor > 1.0 else "does not converge"
    remedy = f"damping 2 / (2 + rho) = {2 / (2 + rho):.6g} converges"
    if x[0] <= -1.0:
        remedy = "no damping converges, the Bellman problem is not concave"
    with_damping = "without damping" if damping == 1.0 else f"with damping {damping:.6g}"
    return (
        f"step {t}: rho = sigma^2 max|eig P| / strength = {rho:.6g}, contraction factor {factor:.6g} >= 1: "
        f"policy iteration {with_damping} {consequence}; {remedy}"
    )


# --- matrices of means, paths ------------------------------------------------------------------------------------


def _mean_of_control(schedule: ControlSchedule, t: int, K: Array, k: Array) -> tuple[Array, Array]:
    """Matrix and offset of the mean of step t, as a function of y, under the control K y + k."""
    a = schedule.alpha[t]
    return (np.eye(k.size) + (1.0 - a) * K) / np.sqrt(a), (1.0 - a) * k / np.sqrt(a)


def _control_of_mean(schedule: ControlSchedule, t: int, matrix: Array, offset: Array) -> tuple[Array, Array]:
    a = schedule.alpha[t]
    return (np.sqrt(a) * matrix - np.eye(offset.size)) / (1.0 - a), np.sqrt(a) * offset / (1.0 - a)


def _mean_maps(problem: LinearQuadratic, K: Array, k: Array) -> tuple[Array, Array]:
    maps = [_mean_of_control(problem.schedule, t, K[t], k[t]) for t in range(problem.schedule.steps)]
    return np.array([matrix for matrix, _ in maps]), np.array([offset for _, offset in maps])


def _kl_weight(schedule: ControlSchedule) -> Array:
    """KL_t = weight |U - s|^2 / 2 (PI-FT, eq. 6)."""
    return np.asarray((1.0 - schedule.alpha) ** 2 / (schedule.alpha * schedule.sigma**2))


def _mean_square(matrix: Array, offset: Array, law: Gaussian) -> float:
    """E|matrix y + offset|^2."""
    return float(np.sum(matrix @ law.cov * matrix) + np.sum((matrix @ law.mean + offset) ** 2))


def _joint(start: Gaussian, matrices: Array, offsets: Array, noise: Array) -> Gaussian:
    """The law of (Y_0, ..., Y_T), Y_{t+1} = matrices[t] Y_t + offsets[t] + N(0, noise[t])."""
    d, steps = start.dim, len(matrices)
    mean, cov = np.zeros((steps + 1) * d), np.zeros(((steps + 1) * d, (steps + 1) * d))
    mean[:d], cov[:d, :d] = start.mean, start.cov
    for t in range(steps):
        now, then, past = slice(t * d, (t + 1) * d), slice((t + 1) * d, (t + 2) * d), slice(0, (t + 1) * d)
        mean[then] = matrices[t] @ mean[now] + offsets[t]
        cov[then, past] = matrices[t] @ cov[now, past]
        cov[past, then] = cov[then, past].T
        cov[then, then] = matrices[t] @ cov[now, now] @ matrices[t].T + noise[t]
    return Gaussian(mean, cov)


# --- arguments ---------------------------------------------------------------------------------------------------


def _blank(problem: LinearQuadratic) -> Solution:
    steps, d = problem.schedule.steps, problem.dim
    P, p = np.zeros((steps + 1, d, d)), np.zeros((steps + 1, d))
    P[-1], p[-1] = problem.Q, problem.q
    return Solution(np.zeros((steps, d, d)), np.zeros((steps, d)), P, p, np.zeros(steps + 1))


def _shaped(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    result = checked.array(name, value, len(shape))
    if result.shape != shape:
        raise ValueError(f"{name} has shape {result.shape}: must be {shape}")
    return result


def _policy(problem: LinearQuadratic, K: ArrayLike, k: ArrayLike) -> tuple[Array, Array]:
    steps, d = problem.schedule.steps, problem.dim
    return _shaped("K", K, (steps, d, d)), _shaped("k", k, (steps, d))


def _start(problem: LinearQuadratic, start: Gaussian) -> Gaussian:
    if start.dim != problem.dim:
        raise ValueError(f"start has dimension {start.dim}: must be {problem.dim}")
    return start


def _counts(iterations: int | Sequence[int], steps: int) -> list[int]:
    repeated = [iterations] * steps if isinstance(iterations, int) else list(iterations)
    if len(repeated) != steps:
        raise ValueError(f"iterations has {len(repeated)} entries: must have one for each of the {steps} steps")
    return [checked.count(f"iterations[{t}]", value, 0) for t, value in enumerate(repeated)]


def _one_strength(problem: LinearQuadratic) -> float:
    strength = problem.schedule.strength
    if (strength != strength[0]).any():
        raise ValueError(f"strength = {strength.tolist()}: must be the same at all steps for an exponential tilt")
    return float(strength[0])


def _symmetric(matrix: Array) -> Array:
    return np.asarray(0.5 * (matrix + matrix.T))
