r"""PI-FT's control problem solved to quadrature in one and two dimensions: any reward, any scores.

Notation of theory/control.py. A next value V enters step t only through H(z) = E V(z + sigma W), h = grad H and grad h.
V is the spline of degree 7 through its values on a grid, with linear tails, H is the trapezoidal
rule in W along each axis, and the optimum is found by Newton's method, not by the paper's fixed point. The rule in W
is spectrally accurate; Gauss-Hermite is not a substitute, for the scores of mixtures have poles near the real line.
What limits the accuracy is the spacing of the grid next to the narrowest structure of scores and reward, and the
linear tails next to a reward that is not linear out there: refine and widen to see. Proofs: docs/pift.md.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import NdBSpline, make_interp_spline

from theory import checked
from theory.checked import Array
from theory.control import ControlSchedule, per_step
from theory.mixture import GaussianMixture

Score = Callable[[Array], Array]
"""Points (n, d) to the score there, (n, d)."""
Value = Callable[[Array], Array]
"""Points (n, d) to values there, (n,)."""

DEFAULT_GRID = {1: (20.0, 1601), 2: (8.0, 161)}  # half width and points along each axis, by dimension
DEGREE = 7
REACH, NODE_SPACING = 9.0, 0.1  # the rule in W: beyond 9 there is less than 1e-18 of the mass


class NoContractionWarning(UserWarning):
    """The inner iteration of PI-FT is not a contraction on the grid, so that it need not converge."""


@dataclass(frozen=True, eq=False)
class ControlProblem:
    """A schedule, the pre-trained scores s_0, ..., s_{T-1} and the reward, in `dim` = 1 or 2 dimensions.

    A score maps (n, dim) to (n, dim), the reward (n, dim) to (n,). In one dimension `kinks` lists the points where the
    reward or its derivative jumps; the first smoothing is then exact piece by piece. (Unlisted kinks, and all kinks in
    two dimensions, cost the square of a spacing.) Source: PI-FT, eqs. (1)-(3).

    Raises:
        ValueError: unless there is one score per step, dim is 1 or 2, and there are no kinks in two dimensions.

    >>> ControlProblem(ControlSchedule.ddpm([0.81], 1.0), [], lambda y: y[:, 0])
    Traceback (most recent call last):
    ...
    ValueError: scores has 0 entries: must have one for each of the 1 steps
    """

    schedule: ControlSchedule
    scores: tuple[Score, ...]
    reward: Value
    dim: int
    kinks: tuple[float, ...]

    def __init__(
        self,
        schedule: ControlSchedule,
        scores: Sequence[Score],
        reward: Value,
        dim: int = 1,
        kinks: Sequence[float] = (),
    ) -> None:
        if len(scores) != schedule.steps:
            raise ValueError(f"scores has {len(scores)} entries: must have one for each of the {schedule.steps} steps")
        if dim not in (1, 2):
            raise ValueError(f"dim = {dim}: must be 1 or 2")
        if dim == 2 and len(kinks):
            raise ValueError(f"kinks = {list(kinks)}: must be empty in two dimensions")
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "scores", tuple(scores))
        object.__setattr__(self, "reward", reward)
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "kinks", tuple(sorted(float(kink) for kink in kinks)))

    @staticmethod
    def of_mixture(
        schedule: ControlSchedule, data: GaussianMixture, reward: Value, kinks: Sequence[float] = ()
    ) -> ControlProblem:
        """Exact scores: s_t is that of the data noised to schedule.alpha_bar[t]. Raises like the constructor.

        >>> data = GaussianMixture([1.0], [[1.0]], [[[0.25]]])
        >>> problem = ControlProblem.of_mixture(ControlSchedule.ddpm([0.64], 1.0), data, lambda y: y[:, 0])
        >>> problem.scores[0](np.array([[0.8 + 0.52]]))
        array([[-1.]])
        """
        scores = [data.noised(float(level)).score for level in schedule.alpha_bar]
        return ControlProblem(schedule, scores, reward, data.dim, kinks)

    def score(self, t: int, y: Array) -> Array:
        """s_t at the points y (n, d), as (n, d). Raises ValueError if the callable returns anything else."""
        return _returned(f"scores[{t}]", self.scores[t](y), y.shape)

    def score_jacobian(self, t: int, y: Array) -> Array:
        """grad s_t at y (n, d), as (n, d, d), the last axis that of the derivative: eighth-order differences.

        >>> schedule = ControlSchedule.ddpm([0.81], 1.0)
        >>> ControlProblem(schedule, [lambda y: y**3], lambda y: y[:, 0]).score_jacobian(0, np.array([[2.0]])).round(9)
        array([[[12.]]])
        """
        return jacobian(lambda points: self.score(t, points), y)


def _returned(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    result = np.asarray(value, dtype=np.float64)
    if result.shape != shape:
        raise ValueError(f"{name} returned shape {result.shape}: must be {shape}")
    if not np.isfinite(result).all():
        raise ValueError(f"{name} returned {result[~np.isfinite(result)][0]}: must be finite")
    return result


def _points(y: ArrayLike, dim: int) -> Array:
    points = checked.array("y", y, 2)
    if points.shape[1] != dim:
        raise ValueError(f"y has shape {points.shape}: must be (n, {dim})")
    return points


def jacobian(function: Callable[[Array], Array], y: Array, spacing: float = 0.01) -> Array:
    """The derivative of (n, d) -> (n, ...) at y (n, d), as (n, ..., d), by eighth-order central differences.

    The truncation error is spacing^8 / 630 times the ninth derivative, the rounding about 1e-16 / spacing.

    >>> float(abs(jacobian(np.sin, np.array([[0.3]]))[0, 0, 0] - np.cos(0.3))) < 1e-13
    True
    """
    weights = (4 / 5, -1 / 5, 4 / 105, -1 / 280)

    def column(shift: Array) -> Array:
        pairs = [w * (function(y + k * shift) - function(y - k * shift)) for k, w in enumerate(weights, start=1)]
        return np.sum(pairs, axis=0) / spacing

    return np.stack([column(shift) for shift in spacing * np.eye(y.shape[1])], axis=-1)


# --- smoothing on a grid -----------------------------------------------------------------------------------------


def _grid(axis: Array, dim: int) -> Array:
    return np.stack([x.ravel() for x in np.meshgrid(*[axis] * dim, indexing="ij")], axis=1)


def _average(function: Callable[[Array], Array], axis: Array, sigma: float) -> Array:
    """E f(x + sigma W) at the points x of the axis by the trapezoidal rule, f mapping (n,) to (n, ...)."""
    nodes = np.arange(-REACH, REACH + NODE_SPACING / 2, NODE_SPACING)
    weights = np.exp(-(nodes**2) / 2) * NODE_SPACING / math.sqrt(2 * math.pi)
    return np.asarray(sum(w * function(axis + sigma * node) for node, w in zip(nodes, weights, strict=True)))


def _average_in_pieces(function: Callable[[Array], Array], axis: Array, sigma: float, kinks: Sequence[float]) -> Array:
    """The same for f that is smooth between kinks: Gauss-Legendre in W on every piece."""
    nodes, weights = np.polynomial.legendre.leggauss(128)
    inner = [np.clip((kink - axis) / sigma, -REACH, REACH) for kink in kinks]
    ends = [np.full_like(axis, -REACH), *inner, np.full_like(axis, REACH)]
    total = np.zeros_like(axis)
    for low, high in itertools.pairwise(ends):
        w = (high + low)[:, None] / 2 + (high - low)[:, None] / 2 * nodes
        values = function((axis[:, None] + sigma * w).ravel()).reshape(w.shape)
        density = np.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
        total += (high - low) / 2 * ((values * density) @ weights)
    return total


def _with_linear_tails(axis: Array, values: Array) -> Callable[[Array], Array]:
    """The spline through values (n, ...) on the axis, continued linearly, as a function of (m,) to (m, ...)."""
    spline = make_interp_spline(axis, values, k=DEGREE)
    ends = spline(axis[[0, -1]], 1)

    def evaluate(x: Array) -> Array:
        inside = np.clip(x, axis[0], axis[-1])
        below, above = np.minimum(x - inside, 0), np.maximum(x - inside, 0)
        return spline(inside) + np.multiply.outer(below, ends[0]) + np.multiply.outer(above, ends[1])

    return evaluate


def _smoothed(axis: Array, values: Array, sigma: float) -> Array:
    """E V(z + sigma W) on the tensor grid from V on it, (n, ..., n): one axis after the other."""
    for k in range(values.ndim):
        along = _with_linear_tails(axis, np.moveaxis(values, k, 0))
        values = np.moveaxis(_average(along, axis, sigma), 0, k)
    return values


class Step(NamedTuple):
    """A policy of one time at n points: mean and control (n, d), value (n,), gradient of the value (n, d) and
    control_jacobian (n, d, d), its last axis that of the derivative."""

    mean: Array
    control: Array
    value: Array
    gradient: Array
    control_jacobian: Array


class Lookahead:
    """What step t sees of a next value V: H(z) = E V(z + sigma_t W), h = grad H and grad h at any z.

    Source: PI-FT, eqs. (9), (18), (42), (43), where V is V*_{t+1}, V^(m)_{t+1} or any other function. Built by
    `lookahead` and by `Solution.lookahead`. Outside of the grid H is continued linearly along every axis.
    """

    def __init__(self, problem: ControlProblem, t: int, axis: Array, smoothed: Array) -> None:
        self.problem, self.t, self.axis = problem, t, axis
        self.ratio = problem.schedule.sigma[t] ** 2 / problem.schedule.strength[t]
        self._unit = np.eye(problem.dim, dtype=int)
        knots, coefficients = axis, smoothed
        for k in range(problem.dim):
            spline = make_interp_spline(axis, np.moveaxis(coefficients, k, 0), k=DEGREE)
            knots, coefficients = spline.t, np.moveaxis(spline.c, 0, k)
        self._spline = NdBSpline((knots,) * problem.dim, np.ascontiguousarray(coefficients), DEGREE)

    def value(self, z: ArrayLike) -> Array:
        """H at z (n, d), as (n,)."""
        return self._derivative(_points(z, self.problem.dim), 0 * self._unit[0])

    def gradient(self, z: ArrayLike) -> Array:
        """h at z (n, d), as (n, d)."""
        points = _points(z, self.problem.dim)
        return np.stack([self._derivative(points, e) for e in self._unit], axis=1)

    def hessian(self, z: ArrayLike) -> Array:
        """grad h at z (n, d), as (n, d, d)."""
        points = _points(z, self.problem.dim)
        result = np.empty((len(points), self.problem.dim, self.problem.dim))
        for i, j in itertools.combinations_with_replacement(range(self.problem.dim), 2):
            result[:, i, j] = result[:, j, i] = self._derivative(points, self._unit[i] + self._unit[j])
        return result

    def _derivative(self, z: Array, orders: Array) -> Array:
        """The partial derivative of H; beyond the grid, per axis, H is its value plus its slope at the edge."""
        inside = np.clip(z, self.axis[0], self.axis[-1])
        beyond = z - inside
        total = np.zeros(len(z))
        for linear in itertools.product((0, 1), repeat=self.problem.dim):
            factor = np.ones(len(z))
            for k, extra in enumerate(linear):
                if extra:
                    factor *= beyond[:, k] if orders[k] == 0 else 0.0
                elif orders[k] > 1:
                    factor *= beyond[:, k] == 0
            rows = np.flatnonzero(factor)
            if rows.size:
                nu = tuple(int(order) for order in orders + np.array(linear))
                total[rows] += factor[rows] * self._spline(inside[rows], nu=nu)
        return total

    # --- policies at given points ---

    def pretrained_mean(self, y: Array) -> Array:
        """m_t at y (n, d), as (n, d)."""
        return self.problem.schedule.mean(self.t, y, self.problem.score(self.t, y))

    def pretrained_jacobian(self, y: Array) -> Array:
        """grad m_t at y (n, d), as (n, d, d)."""
        a = self.problem.schedule.alpha[self.t]
        return (np.eye(self.problem.dim) + (1 - a) * self.problem.score_jacobian(self.t, y)) / math.sqrt(a)

    def optimum(self, y: ArrayLike) -> Step:
        """The maximiser of the Bellman equation at y (n, d) (PI-FT, eqs. 9, 18, 24, 34), by Newton's method.

        Raises ValueError unless the one-step problem is concave on the grid.

        >>> problem = ControlProblem(ControlSchedule.ddpm([0.81], 1.0), [lambda y: 0 * y], lambda y: y[:, 0])
        >>> step = lookahead(problem, 0, problem.reward).optimum([[0.0], [0.9]])
        >>> step.value.round(12), step.control.round(12).T  # the mean moves by sigma^2 / strength
        (array([0.095, 1.095]), array([[0.9, 0.9]]))
        """
        points = _points(y, self.problem.dim)
        self.require_concavity()
        mean = self.optimal_mean(points)
        curvature = np.eye(self.problem.dim) - self.ratio * self.hessian(mean)
        slope = np.asarray(np.linalg.solve(curvature, self.pretrained_jacobian(points)), dtype=np.float64)
        return self.step(points, mean, slope)

    def iterates(self, y: ArrayLike, iterations: int, damping: float = 1.0) -> tuple[Step, ...]:
        """PI-FT's policies U^(0) = s, ..., U^(iterations) at y (n, d) and their values (eqs. 42, 43, 50, 55).

        With damping, U moves only that part of the way. Raises ValueError for negative iterations or damping not in
        (0, 1].

        >>> problem = ControlProblem(ControlSchedule.ddpm([0.81], 1.0), [lambda y: 0 * y], lambda y: y[:, 0])
        >>> [float(step.control[0, 0].round(12)) for step in lookahead(problem, 0, problem.reward).iterates([[0.0]], 2)]
        [0.0, 0.9, 0.9]
        """
        points = _points(y, self.problem.dim)
        pretrained, slope = self.pretrained_mean(points), self.pretrained_jacobian(points)
        mean, mean_slope = pretrained, slope
        steps = [self.step(points, mean, mean_slope)]
        for _ in range(_check_iteration(iterations, damping)):
            next_slope = slope + self.ratio * self.hessian(mean) @ mean_slope
            mean = mean + damping * (pretrained + self.ratio * self.gradient(mean) - mean)
            mean_slope = mean_slope + damping * (next_slope - mean_slope)
            steps.append(self.step(points, mean, mean_slope))
        return tuple(steps)

    def step(self, y: Array, mean: Array, mean_jacobian: Array) -> Step:
        """The policy whose means at y (n, d) are given, with their Jacobians (n, d, d): its controls and its value.

        The gradient of the value is (55) in means: grad m' h(M) + (grad M - grad m)' (h(M) - (M - m) / ratio), ratio
        being sigma^2 / strength. At the optimum the second bracket vanishes and (34) remains.
        """
        a = self.problem.schedule.alpha[self.t]
        pretrained, slope = self.pretrained_mean(y), self.pretrained_jacobian(y)
        ascent = self.gradient(mean)
        missing = ascent - (mean - pretrained) / self.ratio
        gradient = np.einsum("nji,nj->ni", slope, ascent) + np.einsum("nji,nj->ni", mean_jacobian - slope, missing)
        return Step(
            mean=mean,
            control=self.problem.schedule.control(self.t, y, mean),
            value=self.policy_value(mean, pretrained),
            gradient=gradient,
            control_jacobian=(math.sqrt(a) * mean_jacobian - np.eye(self.problem.dim)) / (1 - a),
        )

    def policy_value(self, mean: Array, pretrained: Array) -> Array:
        """H(M) - |M - m|^2 / (2 ratio), the value of moving the mean from m to M (n, d), as (n,)."""
        return self.value(mean) - np.sum((mean - pretrained) ** 2, axis=1) / (2 * self.ratio)

    def iterated_mean(self, y: Array, iterations: int, damping: float) -> Array:
        """M^(iterations) at y (n, d), as (n, d)."""
        pretrained = self.pretrained_mean(y)
        mean = pretrained
        for _ in range(iterations):
            mean = mean + damping * (pretrained + self.ratio * self.gradient(mean) - mean)
        return mean

    def optimal_mean(self, y: Array) -> Array:
        """M* at y (n, d), as (n, d), for a concave one-step problem: Newton's method, steps halved until they climb.

        Raises ValueError if that does not converge, which a sound grid excludes.
        """
        pretrained = self.pretrained_mean(y)
        mean = pretrained.copy()
        rows = np.arange(len(y))
        for _ in range(60):
            slope = self.gradient(mean[rows]) - (mean[rows] - pretrained[rows]) / self.ratio
            steepness = np.eye(self.problem.dim) / self.ratio - self.hessian(mean[rows])
            newton = np.asarray(np.linalg.solve(steepness, slope[..., None])[..., 0], dtype=np.float64)
            move = self._halved(mean[rows], pretrained[rows], newton)
            mean[rows] += move
            # Convergence is quadratic: the last move's square is what is left.
            rows = rows[(np.abs(move) > 1e-8 * (1 + np.abs(mean[rows]))).any(axis=1)]
            if not rows.size:
                return mean
        raise ValueError(
            f"step {self.t}: Newton's method did not converge at y = {y[rows[0]].tolist()}: needs a finer grid"
        )

    def _halved(self, mean: Array, pretrained: Array, move: Array) -> Array:
        before = self.policy_value(mean, pretrained)
        rounding = 1e-13 * (1 + np.abs(before))
        for _ in range(40):
            lower = self.policy_value(mean + move, pretrained) < before - rounding
            if not lower.any():
                break
            move = np.where(lower[:, None], move / 2, move)
        return move

    def curvature(self, z: Array) -> tuple[float, float]:
        """The least and the largest eigenvalue of (sigma^2 / strength) grad h among the points z (n, d)."""
        eigenvalues = np.linalg.eigvalsh(self.ratio * self.hessian(z))
        return float(eigenvalues.min()), float(eigenvalues.max())

    @cached_property
    def curvature_on_grid(self) -> tuple[float, float]:
        """`curvature` among all points of the grid."""
        return self.curvature(_grid(self.axis, self.problem.dim))

    def require_concavity(self) -> None:
        """Raises ValueError unless (sigma^2 / strength) lambda_max(grad h) < 1 on the grid."""
        largest = self.curvature_on_grid[1]
        if largest >= 1:
            strength = self.problem.schedule.strength[self.t]
            raise ValueError(
                f"strength[{self.t}] = {strength:g}: sigma^2 sup lambda_max(grad h) / strength = {largest:.6g} at step "
                f"{self.t} must be < 1 (strength above {strength * largest:.6g}); else the one-step problem is not "
                "concave and the optimal control may jump"
            )

    def warn_unless_contracting(self, damping: float) -> None:
        """Warns with NoContractionWarning unless the inner iteration contracts on the grid."""
        least, largest = self.curvature_on_grid
        factor = max(abs(1 - damping + damping * least), abs(1 - damping + damping * largest))
        if factor >= 1:
            condition = "sigma^2 sup||grad h|| / strength" if damping == 1 else f"inner factor with damping {damping:g}"
            warnings.warn(
                f"step {self.t}: {condition} = {factor:.6g} must be < 1; else PI-FT's inner iteration is no contraction"
                " and need not converge (raise strength, or damp if the next value is concave)",
                NoContractionWarning,
                stacklevel=3,
            )


def _check_iteration(iterations: int, damping: float) -> int:
    checked.scalar("damping", damping, 0.0, 1.0, closed="(]")
    return checked.count("iterations", iterations, 0)


def _check_step(problem: ControlProblem, t: int) -> int:
    if not 0 <= t < problem.schedule.steps:
        raise ValueError(f"t = {t}: must be one of 0, ..., {problem.schedule.steps - 1}")
    return t


def _axis(problem: ControlProblem, half_width: float | None, points: int | None) -> Array:
    default_width, default_points = DEFAULT_GRID[problem.dim]
    width = checked.scalar(
        "half_width", default_width if half_width is None else half_width, 0.0, math.inf, closed="()"
    )
    axis = np.linspace(-width, width, checked.count("points", default_points if points is None else points, 16))
    spacing, least = float(axis[1] - axis[0]), float(problem.schedule.sigma.min())
    if spacing > least / 2:
        raise ValueError(f"points = {axis.size}: the spacing {spacing:.3g} must be at most half the sigma {least:.3g}")
    return axis


def _of_callable(
    problem: ControlProblem, t: int, axis: Array, name: str, value: Value, kinks: Sequence[float]
) -> Lookahead:
    sigma = float(problem.schedule.sigma[t])

    def called(x: Array) -> Array:
        return _returned(name, value(x[:, None]), x.shape)

    if problem.dim == 1:  # the function itself, without a spline and its tails
        exact = _average_in_pieces(called, axis, sigma, kinks) if kinks else _average(called, axis, sigma)
        return Lookahead(problem, t, axis, exact)
    grid = _grid(axis, problem.dim)
    return _of_values(problem, t, axis, _returned(name, value(grid), (len(grid),)))


def _of_values(problem: ControlProblem, t: int, axis: Array, values: Array) -> Lookahead:
    on_grid = values.reshape((axis.size,) * problem.dim)
    smoothed = _smoothed(axis, on_grid, float(problem.schedule.sigma[t]))
    return Lookahead(problem, t, axis, smoothed)


def lookahead(
    problem: ControlProblem,
    t: int,
    value: Value,
    kinks: Sequence[float] = (),
    *,
    half_width: float | None = None,
    points: int | None = None,
) -> Lookahead:
    """Step t before any next value, a callable (n, d) -> (n,): the one-step problem of PI-FT's Lemma 3.2.

    `kinks`, in one dimension, as for ControlProblem. Raises ValueError for a step that is not there, a grid too coarse
    for the noise, or values that are not finite.

    >>> problem = ControlProblem(ControlSchedule.ddpm([0.75], 1.0), [lambda y: 0 * y], lambda y: y[:, 0])
    >>> lookahead(problem, 0, lambda y: abs(y[:, 0]), kinks=[0.0]).value([[0.0]]).round(12)  # sigma sqrt(2 / pi)
    array([0.39894228])
    """
    return _of_callable(problem, _check_step(problem, t), _axis(problem, half_width, points), "value", value, kinks)


# --- backward in time --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Solution:
    """A policy of all steps and its value at any points: the optimum, or PI-FT after given inner iterations.

    `iterations` and `damping` are (T,), or None for the optimum. Built by `optimum` and `iterates`.
    """

    problem: ControlProblem
    lookaheads: tuple[Lookahead, ...]
    iterations: tuple[int, ...] | None
    damping: Array | None

    def lookahead(self, t: int) -> Lookahead:
        """Step t before this solution's V_{t+1} (the reward if t = T - 1). Raises ValueError if there is no step t."""
        return self.lookaheads[_check_step(self.problem, t)]

    def at(self, t: int, y: ArrayLike) -> Step:
        """Mean, control and value of step t at y (n, d), with first derivatives. Raises ValueError for a bad t or y."""
        ahead = self.lookahead(t)
        if self.iterations is None or self.damping is None:
            return ahead.optimum(y)
        return ahead.iterates(y, self.iterations[t], float(self.damping[t]))[-1]

    def second_derivatives(self, t: int, y: ArrayLike) -> tuple[Array, Array]:
        """The Hessian of V_t (n, d, d) and the second derivative of the control (n, d, d, d) at y (n, d).

        Differences of the first derivatives, good to about ten digits. Raises like `at`.

        >>> problem = ControlProblem(ControlSchedule.ddpm([0.75], 0.5), [lambda y: 0 * y], lambda y: -(y[:, 0] ** 2))
        >>> hessian, of_control = optimum(problem).second_derivatives(0, [[0.3]])
        >>> hessian.round(8), of_control.round(6) + 0.0  # -2 / (alpha (1 + 2 sigma^2 / strength))
        (array([[[-1.33333333]]]), array([[[[0.]]]]))
        """
        points = _points(y, self.problem.dim)
        return (
            jacobian(lambda x: self.at(t, x).gradient, points),
            jacobian(lambda x: self.at(t, x).control_jacobian, points),
        )


def optimum(problem: ControlProblem, *, half_width: float | None = None, points: int | None = None) -> Solution:
    """V* and u* of PI-FT's Theorem 2.8 on a grid of `points` points per axis over [-half_width, half_width].

    The grid defaults to 1601 points over [-20, 20] in one dimension, 161 points an axis over [-8, 8] in two. Raises
    ValueError where the one-step problem is not concave on the grid, for a grid too coarse for the noise, and for
    callables that return other shapes or anything infinite.

    >>> schedule = ControlSchedule.ddpm([0.64, 0.81], 1.0)
    >>> problem = ControlProblem(schedule, [lambda y: 0 * y] * 2, lambda y: y[:, 0])
    >>> optimum(problem).at(0, [[0.72]]).value.round(12)  # 1 + 0.19 / 2 + (1 / 0.81) 0.36 / 2
    array([1.31722222])
    """
    return _solved(problem, None, None, _axis(problem, half_width, points))


def iterates(
    problem: ControlProblem,
    iterations: int | Sequence[int],
    damping: ArrayLike = 1.0,
    *,
    half_width: float | None = None,
    points: int | None = None,
) -> Solution:
    """PI-FT, Algorithm 1 (eqs. 35, 36), with m_t inner iterations at step t from U^(0) = s; grid as for `optimum`.

    `iterations` and `damping` are one number or (T,). Warns with NoContractionWarning where the inner iteration does
    not contract on the grid. Raises ValueError for iterations that are negative, damping outside (0, 1], other lengths,
    and grids as for `optimum`.

    >>> schedule = ControlSchedule.ddpm([0.64, 0.81], 1.0)
    >>> problem = ControlProblem(schedule, [lambda y: 0 * y] * 2, lambda y: y[:, 0])
    >>> [iterates(problem, m).at(0, [[0.72]]).value.round(8).tolist() for m in (0, 1, [1, 0])]
    [[1.0], [1.31722222], [1.22222222]]
    """
    steps = problem.schedule.steps
    counts = [iterations] * steps if isinstance(iterations, int | np.integer) else list(iterations)
    dampings = per_step("damping", damping, steps)
    if len(counts) != steps:
        raise ValueError(f"iterations has {len(counts)} entries: must have one for each of the {steps} steps")
    checked_counts = tuple(_check_iteration(m, float(eta)) for m, eta in zip(counts, dampings, strict=True))
    return _solved(problem, checked_counts, dampings, _axis(problem, half_width, points))


def _solved(
    problem: ControlProblem, iterations: tuple[int, ...] | None, damping: Array | None, axis: Array
) -> Solution:
    grid = _grid(axis, problem.dim)
    last = problem.schedule.steps - 1
    ahead = _of_callable(problem, last, axis, "reward", problem.reward, problem.kinks)
    lookaheads = [ahead]
    for t in range(last, -1, -1):
        if iterations is None or damping is None:
            ahead.require_concavity()
        elif iterations[t] > 0:
            ahead.warn_unless_contracting(float(damping[t]))
        if t == 0:
            break
        if iterations is None or damping is None:
            mean = ahead.optimal_mean(grid)
        else:
            mean = ahead.iterated_mean(grid, iterations[t], float(damping[t]))
        ahead = _of_values(problem, t - 1, axis, ahead.policy_value(mean, ahead.pretrained_mean(grid)))
        lookaheads.append(ahead)
    return Solution(problem, tuple(lookaheads[::-1]), iterations, damping)


# --- observed on a window ----------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Largest differences of controls, gradients of the value and values; Euclidean norms of vectors."""

    control: float
    gradient: float
    value: float


class Lipschitz(NamedTuple):
    """Largest norms of grad V, Hessian of V, grad U and second derivative of U (operator norms)."""

    value: float
    gradient: float
    control: float
    control_gradient: float


def contraction(solution: Solution, t: int, window: float, points: int | None = None) -> float:
    """rho_t = (sigma^2 / strength) sup ||grad h||, h that of the solution's V_{t+1}, observed on [-window, window]^d.

    The factor of the inner iteration in the supremum norm, the supremum being one over finitely many `points` an axis
    (1601 or 81). PI-FT's (67) has 1 - lambda_t instead. Raises ValueError for a bad t, window or points.

    >>> problem = ControlProblem(ControlSchedule.ddpm([0.75], 0.5), [lambda y: 0 * y], lambda y: -(y[:, 0] ** 2))
    >>> round(contraction(optimum(problem), 0, 3.0), 9)
    1.0
    """
    return max(abs(x) for x in solution.lookahead(t).curvature(_window(solution.problem, window, points)))


def errors(solution: Solution, reference: Solution, t: int, window: float, points: int | None = None) -> Errors:
    """Largest differences between two solutions' step t on [-window, window]^d; points and errors as `contraction`.

    >>> problem = ControlProblem(ControlSchedule.ddpm([0.81], 1.0), [lambda y: 0 * y], lambda y: y[:, 0])
    >>> [round(x, 9) + 0.0 for x in errors(iterates(problem, 0), optimum(problem), 0, 2.0)]
    [0.9, 0.0, 0.095]
    """
    return step_errors(*(s.at(t, _window(s.problem, window, points)) for s in (solution, reference)))


def step_errors(step: Step, reference: Step) -> Errors:
    """Largest differences between two policies of one time at the same points."""
    return Errors(
        control=_largest(step.control - reference.control),
        gradient=_largest(step.gradient - reference.gradient),
        value=float(np.abs(step.value - reference.value).max()),
    )


def lipschitz(solution: Solution, t: int, window: float, points: int | None = None) -> Lipschitz:
    """Observed Lipschitz constants of V_t, grad V_t, U_t and grad U_t on [-window, window]^d (PI-FT, eqs. 14-17).

    Points and errors as `contraction`; lower bounds of the constants on the whole space.

    >>> problem = ControlProblem(ControlSchedule.ddpm([0.75], 0.5), [lambda y: 0 * y], lambda y: -(y[:, 0] ** 2))
    >>> [round(x, 6) + 0.0 for x in lipschitz(optimum(problem), 0, 3.0)]
    [4.0, 1.333333, 2.0, 0.0]
    """
    grid = _window(solution.problem, window, points)
    step = solution.at(t, grid)
    hessian, second = solution.second_derivatives(t, grid)
    angles = np.linspace(0.0, math.pi, 65)
    directions = np.array([[1.0]]) if solution.problem.dim == 1 else np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Lipschitz(
        value=_largest(step.gradient),
        gradient=_operator_norm(hessian),
        control=_operator_norm(step.control_jacobian),
        control_gradient=max(_operator_norm(second @ direction) for direction in directions),
    )


def _window(problem: ControlProblem, window: float, points: int | None) -> Array:
    width = checked.scalar("window", window, 0.0, math.inf, closed="()")
    count = checked.count("points", {1: 1601, 2: 81}[problem.dim] if points is None else points, 2)
    return _grid(np.linspace(-width, width, count), problem.dim)


def _largest(vectors: Array) -> float:
    return float(np.linalg.norm(vectors, axis=1).max())


def _operator_norm(matrices: Array) -> float:
    return float(np.linalg.norm(matrices, ord=2, axis=(1, 2)).max())
