r"""The exponential tilt of PI-FT's section 4.2 and its distance from the best control, on the line, by quadrature.

Notation of theory.control, with one strength b for all steps. Restricted to steps N(M, sigma_t^2) the best value is

    V*_t(y) = max_M { E V*_{t+1}(M + sigma_t W) - b (M - m_t(y))^2 / (2 sigma_t^2) },      V*_T = r;

without that restriction it is the tilt (the Hopf-Cole transform; the solution of eq. 79 in the continuous limit)

    V_tilt_t(y) = b log E_pre[exp(r(Y_T) / b) | Y_t = y],   dP_tilt / dP_pre = exp((r(Y_T) - V_tilt_0(Y_0)) / b),

and V_tilt_0 - V*_0 = b KL(P* || P_tilt) >= 0 from every starting point. Statements and proofs: docs/pift.md.

Functions are kept on a grid of [-half_width, half_width] and continued linearly outside; an expectation at any point is
a sum of the Gaussian kernel over the grid (Nystrom; the trapezoidal rule, spectrally accurate for smooth integrands).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory import checked
from theory.checked import Array
from theory.control import ControlSchedule
from theory.mixture import GaussianMixture

Score = Callable[[int, Array], Array]
"""Step t and points (n,) to the pre-trained score s_t there, (n,)."""
Function = Callable[[Array], Array]
"""Points (n,) to values (n,): a reward or a density."""

_TAIL = 9.0  # standard deviations kept of a Gaussian: the rest weighs 2e-19


def continuous_schedule(horizon: float, steps: int, strength: float, rate: float = 1.0) -> ControlSchedule:
    """alpha = 1 - rate dt and sigma^2 = rate dt with dt = horizon / steps: PI-FT's section 4.2 discretised.

    As dt -> 0: dY = rate (Y / 2 + U) dtau + sqrt(rate) dW at the running cost strength rate |U - s|^2 / 2.
    Raises ValueError unless the arguments are positive, steps is an integer and rate dt < 1.

    >>> continuous_schedule(1.0, 4, 0.5).alpha, float(continuous_schedule(1.0, 4, 0.5).sigma[0])
    (array([0.75, 0.75, 0.75, 0.75]), 0.5)
    >>> continuous_schedule(1.0, 4, 0.5, rate=4.0)
    Traceback (most recent call last):
    ...
    ValueError: rate dt = 1.0: must lie in (0.0, 1.0)
    """
    for name, value in (("horizon", horizon), ("strength", strength), ("rate", rate)):
        checked.scalar(name, value, 0.0, math.inf, closed="()")
    checked.count("steps", steps, 1)
    noise = checked.scalar("rate dt", rate * horizon / steps, 0.0, 1.0, closed="()")
    return ControlSchedule(np.full(steps, 1.0 - noise), np.full(steps, math.sqrt(noise)), strength)


def mixture_score(schedule: ControlSchedule, data: GaussianMixture) -> Score:
    """The scores of one-dimensional data at the schedule's noise levels: a perfect pre-trained model.

    Raises ValueError if the data are not one-dimensional.

    >>> s = mixture_score(ControlSchedule.ddpm([0.5, 0.8], 1.0), GaussianMixture([1.0], [[1.0]], [[[0.25]]]))
    >>> s(1, np.array([0.0])).round(12)  # sqrt(0.8) / (0.8 * 0.25 + 0.2)
    array([2.23606798])
    """
    if data.dim != 1:
        raise ValueError(f"data has dimension {data.dim}: must have 1")
    levels = [data.noised(float(level)) for level in schedule.alpha_bar]
    return lambda t, y: levels[t].score(y[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class LineProblem:
    """A fine-tuning problem on the line with one strength b for all steps, and the grid to solve it on.

    `score` and `reward` take points (n,); take the window wide, what leaves it is lost from the laws.

    Raises:
        ValueError: if the strength varies with the step (there is no tilt then), half_width is not positive, or points
            are fewer than 3 or so few that their spacing exceeds half of a sigma.

    >>> LineProblem(ControlSchedule.ddpm([0.8, 0.9], [1.0, 2.0]), lambda t, y: -y, np.sin)
    Traceback (most recent call last):
    ...
    ValueError: strength = [1.0, 2.0]: must be the same for all steps, the optimum is no tilt of the path law otherwise
    """

    schedule: ControlSchedule
    score: Score
    reward: Function
    half_width: float = 10.0
    points: int = 801

    def __post_init__(self) -> None:
        strength = self.schedule.strength
        if (strength != strength[0]).any():
            raise ValueError(
                f"strength = {strength.tolist()}: must be the same for all steps, "
                "the optimum is no tilt of the path law otherwise"
            )
        checked.scalar("half_width", self.half_width, 0.0, math.inf, closed="()")
        checked.count("points", self.points, 3)
        least = float(self.schedule.sigma.min())
        if self.spacing > least / 2:
            raise ValueError(
                f"points = {self.points}: the spacing {self.spacing:.3g} must not exceed half of the least "
                f"sigma {least:.3g}"
            )

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return self.schedule.steps

    @property
    def strength(self) -> float:
        """The strength b."""
        return float(self.schedule.strength[0])

    @property
    def spacing(self) -> float:
        """The distance of two points of the grid."""
        return 2.0 * self.half_width / (self.points - 1)

    @property
    def grid(self) -> Array:
        """The grid, (n,)."""
        return np.linspace(-self.half_width, self.half_width, self.points)

    def mean(self, t: int, y: Array) -> Array:
        """The means m_t of the pre-trained step from the points y (n,)."""
        return self.schedule.mean(t, y, self.score(t, y))


@dataclass(frozen=True, eq=False)
class Solution:
    """Both value functions on the grid, (T + 1, n) each, and the optimal means M*_t there, (T, n)."""

    problem: LineProblem
    tilt: Array
    optimal: Array
    means: Array


def solve(problem: LineProblem) -> Solution:
    """Both backward recursions.

    While `contraction` < 1 the optimal means are unique. Where it is not, the *global* maximum is taken, but V* may
    have kinks and the quadrature is then only of the second order in the spacing.

    >>> flat = solve(LineProblem(continuous_schedule(1.0, 4, 0.5), lambda t, y: 0.0 * y, lambda y: 0.0 * y + 2.0))
    >>> float(abs(flat.tilt - 2.0).max()) < 1e-12, float(abs(flat.optimal - 2.0).max()) < 1e-12
    (True, True)
    """
    grid = problem.grid
    tilt = optimal = np.asarray(problem.reward(grid), dtype=np.float64)
    tilts, optima = [tilt], [optimal]
    means: list[Array] = []
    for t in reversed(range(problem.steps)):
        m = problem.mean(t, grid)
        tilt = _tilted(problem, t, tilt, m)
        optimal, best = _maximised(problem, t, optimal, m)
        tilts.append(tilt)
        optima.append(optimal)
        means.append(best)
    return Solution(problem, np.stack(tilts[::-1]), np.stack(optima[::-1]), np.stack(means[::-1]))


def tilt_at(solution: Solution, y: ArrayLike, t: int = 0) -> Array:
    """V_tilt_t at any points y (n,). Raises ValueError unless 0 <= t < T.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 2.0), lambda t, y: -0.5 * y, lambda y: 0.3 * y)
    >>> y = np.array([1.0])  # an affine reward: 0.3 m(y) + 0.3^2 sigma^2 / (2 b)
    >>> round(float(tilt_at(solve(problem), y)[0] - 0.3 * problem.mean(0, y)[0]), 12), 0.3**2 * 0.5 / 4.0
    (0.01125, 0.01125)
    """
    _check_step(solution, t)
    points = checked.array("y", y, 1)
    return _tilted(solution.problem, t, solution.tilt[t + 1], solution.problem.mean(t, points))


def optimal_at(solution: Solution, y: ArrayLike, t: int = 0) -> tuple[Array, Array]:
    """V*_t and the optimal mean M*_t at any points y (n,); the control is `schedule.control(t, y, mean)`.

    Raises ValueError unless 0 <= t < T.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> optimal_at(solve(problem), [1.2])[1].round(9)  # M = m - sigma^2 M / b with m = 1.2 / sqrt(0.5)
    array([1.13137085])
    """
    _check_step(solution, t)
    points = checked.array("y", y, 1)
    return _maximised(solution.problem, t, solution.optimal[t + 1], solution.problem.mean(t, points))


def contraction(solution: Solution, window: float = 8.0) -> Array:
    """rho_t = sigma_t^2 sup |h_t'| / b with h_t(z) = E grad V*_{t+1}(z + sigma_t W) and |z| <= window, (T,).

    PI-FT contracts by rho_t at step t, and the optimal control is unique where rho_t < 1. Raises ValueError unless the
    window lies in the grid.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> contraction(solve(problem)).round(9)
    array([0.5])
    """
    problem = solution.problem
    checked.scalar("window", window, 0.0, problem.half_width)
    inside = problem.grid[np.abs(problem.grid) <= window]
    slopes = [_smoothed(problem, t, solution.optimal[t + 1], inside)[2] for t in range(problem.steps)]
    return problem.schedule.sigma**2 * np.abs(np.stack(slopes)).max(axis=1) / problem.strength


# --- the gap -----------------------------------------------------------------------------------------------------


def gap(solution: Solution, y: float) -> float:
    """V_tilt_0(y) - V*_0(y), by subtraction.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> round(gap(solve(problem), 0.3), 9), round((0.5 - math.log(1.5)) / 2, 9)
    (0.047267446, 0.047267446)
    """
    return float(tilt_at(solution, [y])[0] - optimal_at(solution, [y])[0][0])


def path_kl(solution: Solution, y: float) -> float:
    """KL(P* || P_tilt) in nats from Y_0 = y: the KL of every step, averaged over the law of the *controlled* chain.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> round(path_kl(solve(problem), 0.3), 9)  # the strength is 1: this is the gap
    0.047267446
    """
    problem = solution.problem
    total = 0.0
    for t, points, mass in _visits(solution, y, "optimal"):
        m = problem.mean(t, points)
        best = _optimum(solution, t, points)[1]
        nodes = _nodes(problem, best, _TAIL * float(problem.schedule.sigma[t]))
        # log N(z; M, sigma^2) - log N(z; m, sigma^2) - (V_tilt_{t+1}(z) - V_tilt_t(y)) / b
        log_optimal = _log_kernel(problem, t, nodes, best)
        log_tilt = _log_kernel(problem, t, nodes, m) + _continued(solution.tilt[t + 1], nodes) / problem.strength
        log_tilt -= _tilted(problem, t, solution.tilt[t + 1], m)[:, None] / problem.strength
        total += float(mass @ np.sum(np.exp(log_optimal) * (log_optimal - log_tilt), axis=1))
    return total


def leading_gap(solution: Solution, y: float) -> float:
    """sum_t sigma_t^4 E_{u*}[(E V*_{t+1}''(M*_t + sigma_t W))^2] / (4 b) from Y_0 = y: the gap's term of order dt.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> round(leading_gap(solve(problem), 0.3), 9)
    0.0625
    """
    problem = solution.problem
    total = 0.0
    for t, points, mass in _visits(solution, y, "optimal"):
        best = _optimum(solution, t, points)[1]
        curvature = _smoothed(problem, t, solution.optimal[t + 1], best)[2]
        total += float(problem.schedule.sigma[t] ** 4 * (mass @ curvature**2))
    return total / (4.0 * problem.strength)


def gap_bounds(solution: Solution, y: float) -> tuple[float, float]:
    """Lower and upper bound on the gap at Y_0 = y from the loss of single steps.

    The loss of step t is what V*_t lacks to the tilt of V*_{t+1}, b log E_pre exp(V*_{t+1} / b). Its sum averaged over
    the chain of those one-step tilts is at most the gap; averaged over the tilted chain it is at least the gap.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> [round(bound, 9) for bound in gap_bounds(solve(problem), 0.3)]  # one step: both are the gap
    [0.047267446, 0.047267446]
    """
    problem = solution.problem

    def losses(law: str) -> Iterator[float]:
        for t, points, mass in _visits(solution, y, law):
            m = problem.mean(t, points)
            one_step_tilt = _tilted(problem, t, solution.optimal[t + 1], m)
            yield float(mass @ (one_step_tilt - _optimum(solution, t, points)[0]))

    return sum(losses("one-step tilts")), sum(losses("tilt"))


# --- laws --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TerminalLaws:
    """Densities of Y_T on the grid, (n,) each, with the law of Y_0 held fixed in the first three.

    pretrained: p_pre; controlled: under the optimal means; tilted: the tilted chain; target: p_pre exp(r / b) / Z,
    which the tilted chain reaches only from Y_0 tilted by exp(V_tilt_0 / b).
    """

    pretrained: Array
    controlled: Array
    tilted: Array
    target: Array


def terminal_laws(solution: Solution, initial: Function, *, tilt_start: bool = False) -> TerminalLaws:
    """The laws of Y_T from the density `initial` of Y_0; `tilt_start` starts the tilted chain from the tilted Y_0.

    Raises ValueError if the density is negative on the grid or its integral there is not 1 within 1e-6.

    >>> problem = LineProblem(continuous_schedule(0.5, 1, 1.0), lambda t, y: 0.0 * y, lambda y: -(y**2) / 2)
    >>> laws = terminal_laws(solve(problem), lambda y: np.exp(-(y**2)) / math.sqrt(math.pi), tilt_start=True)
    >>> total_variation(problem, laws.tilted, laws.target) < 1e-12
    True
    """
    problem = solution.problem
    grid, b = problem.grid, problem.strength
    start = checked.array("initial", initial(grid), 1)
    mass = float(start.sum()) * problem.spacing
    if (start < 0).any() or abs(mass - 1.0) > 1e-6:
        raise ValueError(f"initial has least value {start.min():g} and mass {mass:g}: must be a density on the grid")
    pretrained = controlled = start
    tilted = _reweighted(problem, start, solution.tilt[0]) if tilt_start else start
    for t in range(problem.steps):
        m = problem.mean(t, grid)
        pretrained = _pushed(problem, t, pretrained, m)
        controlled = _pushed(problem, t, controlled, solution.means[t])
        tilted = _pushed(problem, t, tilted, m, solution.tilt[t + 1] / b)
    return TerminalLaws(pretrained, controlled, tilted, _reweighted(problem, pretrained, solution.tilt[-1]))


def total_variation(problem: LineProblem, p: Array, q: Array) -> float:
    """Half of the integral of |p - q|, of two densities on the grid.

    >>> problem = LineProblem(continuous_schedule(1.0, 4, 1.0), lambda t, y: -y, np.sin)
    >>> block = lambda low: np.where((problem.grid >= low) & (problem.grid < low + 2.0), 0.5, 0.0)
    >>> round(total_variation(problem, block(0.0), block(0.5)), 12)
    0.25
    """
    return 0.5 * problem.spacing * float(np.abs(p - q).sum())


def _reweighted(problem: LineProblem, density: Array, values: Array) -> Array:
    """density exp(values / b) / Z."""
    weighted = density * np.exp((values - values.max()) / problem.strength)
    return weighted / (weighted.sum() * problem.spacing)


def _visits(solution: Solution, y: float, law: str) -> Iterator[tuple[int, Array, Array]]:
    """For each t the points and probabilities of Y_t from Y_0 = y, under "optimal", "tilt" or "one-step tilts"."""
    problem = solution.problem
    points, mass = checked.array("y", [y], 1), np.array([1.0])
    for t in range(problem.steps):
        yield t, points, mass
        if law == "optimal":
            mass = _pushed(problem, t, mass, _optimum(solution, t, points)[1])
        else:
            values = solution.tilt if law == "tilt" else solution.optimal
            mass = _pushed(problem, t, mass, problem.mean(t, points), values[t + 1] / problem.strength)
        points = problem.grid


def _optimum(solution: Solution, t: int, points: Array) -> tuple[Array, Array]:
    """V*_t and M*_t at the points of a visit, which are the grid for t > 0."""
    if t > 0:
        return solution.optimal[t], solution.means[t]
    return _maximised(solution.problem, t, solution.optimal[t + 1], solution.problem.mean(t, points))


def _pushed(problem: LineProblem, t: int, mass: Array, means: Array, tilt: Array | None = None) -> Array:
    """The law of the next state on the grid if sources of the given mass step to N(means, sigma_t^2).

    `tilt` (n,) on the grid multiplies that kernel by exp(tilt) and normalises it.
    """
    reach = _TAIL * float(problem.schedule.sigma[t])
    if tilt is not None:
        reach += _shift(problem, t, tilt)
    nodes = _nodes(problem, means, reach)
    log_weights = _log_kernel(problem, t, nodes, means)
    if tilt is not None:
        log_weights += _continued(tilt, nodes)
        log_weights -= _log_sum_exp(log_weights)[:, None]
    kept = (nodes >= 0) & (nodes < problem.points)
    weights = mass[:, None] * np.exp(log_weights)
    return np.asarray(np.bincount(nodes[kept], weights[kept], minlength=problem.points), dtype=np.float64)


# --- expectations over one step ----------------------------------------------------------------------------------


def _tilted(problem: LineProblem, t: int, values: Array, means: Array) -> Array:
    """b log E exp(values(mean + sigma_t W) / b) at means (k,)."""
    scaled = values / problem.strength
    nodes = _nodes(problem, means, _TAIL * float(problem.schedule.sigma[t]) + _shift(problem, t, scaled))
    return problem.strength * _log_sum_exp(_log_kernel(problem, t, nodes, means) + _continued(scaled, nodes))


def _smoothed(problem: LineProblem, t: int, values: Array, z: Array) -> tuple[Array, Array, Array]:
    """E V(z + sigma W) and its first two derivatives in z (k,), the Gaussian taking the derivatives."""
    sigma = float(problem.schedule.sigma[t])
    nodes = _nodes(problem, z, _TAIL * sigma)
    w = (_position(problem, nodes) - z[:, None]) / sigma
    weights = np.exp(_log_kernel(problem, t, nodes, z))
    around = _continued(values, nodes)
    centre = around[:, [around.shape[1] // 2]]  # subtracted, lest the derivatives cancel digits
    weighted = weights * (around - centre)
    first = np.sum(w * weighted, axis=1) / sigma
    second = np.sum((w**2 - 1.0) * weighted, axis=1) / sigma**2
    return centre[:, 0] + weighted.sum(axis=1), first, second


def _maximised(problem: LineProblem, t: int, values: Array, means: Array) -> tuple[Array, Array]:
    """max_M E V(M + sigma W) - b (M - m)^2 / (2 sigma^2) and its maximiser, at pre-trained means m (k,).

    The best point of the grid, then Newton on M = m + sigma^2 h(M) / b, kept only where it improves.
    """
    grid = problem.grid
    gain = float(problem.schedule.sigma[t]) ** 2 / problem.strength
    candidates = _smoothed(problem, t, values, grid)[0] - (grid - means[:, None]) ** 2 / (2.0 * gain)
    best = np.argmax(candidates, axis=1)
    at_grid, on_grid = candidates[np.arange(means.size), best], grid[best]
    # A maximiser lies within a spacing of the grid's best point, except beyond the window, where V is linear.
    limit = np.where((best == 0) | (best == grid.size - 1), np.inf, problem.spacing)
    refined = on_grid
    for _ in range(30):
        _, slope, curvature = _smoothed(problem, t, values, refined)
        residual = refined - means - gain * slope
        # where 1 - gain h' <= 0 Newton would climb down; one fixed-point step instead
        move = residual / np.where(gain * curvature < 1.0, 1.0 - gain * curvature, 1.0)
        refined = refined - np.clip(move, -limit, limit)
        if np.abs(move).max() < 1e-9:  # squared by this very move
            break
    value = _smoothed(problem, t, values, refined)[0] - (refined - means) ** 2 / (2.0 * gain)
    improved = value >= at_grid
    return np.where(improved, value, at_grid), np.where(improved, refined, on_grid)


def _check_step(solution: Solution, t: int) -> None:
    last = solution.problem.steps - 1
    if checked.count("t", t, 0) > last:
        raise ValueError(f"t = {t}: must be at most {last}")


Index = NDArray[np.int64]


def _nodes(problem: LineProblem, centres: Array, reach: float) -> Index:
    """Indices of the grid's points within `reach` of each centre (k,), (k, 2 w + 1); they may lie off the grid."""
    nearest = np.rint((centres + problem.half_width) / problem.spacing).astype(np.int64)
    width = math.ceil(reach / problem.spacing)
    return nearest[:, None] + np.arange(-width, width + 1)


def _position(problem: LineProblem, nodes: Index) -> Array:
    return np.asarray(nodes * problem.spacing - problem.half_width, dtype=np.float64)


def _continued(values: Array, nodes: Index) -> Array:
    """values (n,) at nodes of any index, linearly continued beyond the grid."""
    first, last = int(nodes.min()), values.size - 1
    line = np.arange(first, int(nodes.max()) + 1)
    below = (values[0] - values[1]) * np.maximum(-line, 0)
    above = (values[-1] - values[-2]) * np.maximum(line - last, 0)
    return (values[np.clip(line, 0, last)] + below + above)[nodes - first]


def _log_kernel(problem: LineProblem, t: int, nodes: Index, means: Array) -> Array:
    """Logarithms of the quadrature weights of N(means, sigma_t^2) at the nodes."""
    sigma = float(problem.schedule.sigma[t])
    w = (_position(problem, nodes) - means[:, None]) / sigma
    return -0.5 * w**2 + math.log(problem.spacing / (sigma * math.sqrt(2.0 * math.pi)))


def _shift(problem: LineProblem, t: int, exponent: Array) -> float:
    """How far exp(exponent) can move the mean of a Gaussian step: sigma_t^2 times its largest slope."""
    slope = float(np.abs(np.diff(exponent)).max()) / problem.spacing
    return float(problem.schedule.sigma[t]) ** 2 * slope


def _log_sum_exp(exponents: Array) -> Array:
    """log sum exp over the last axis, without overflow."""
    top = exponents.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.sum(np.exp(exponents - top), axis=-1)) + top[..., 0], dtype=np.float64)
