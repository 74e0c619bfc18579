r"""Unadjusted Langevin sampling, and Implicit Diffusion's single loop (Algorithm 1) on two Gaussian problems, exactly.

The chain x <- x - gamma grad_x V + sqrt(2 gamma) z samples pi_theta ~ exp(-V) up to a bias; the parameter descends
l(theta) = -E_{pi_theta} R along Gamma(p, theta) = Cov_p(R, grad_theta V) at the law p of the chain,

    p_{k+1} = one step with theta_k,   theta_{k+1} = theta_k - gamma_k epsilon_k Gamma(p, theta_k),

where p is p_k in the order "printed" in Algorithm 1 and p_{k+1} in the order "released" in the authors' code. In both
problems p_k stays Gaussian if p_0 is, so that a few numbers follow the whole loop. Derived in docs/implicit.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from theory import checked
from theory.checked import Array
from theory.gaussian import Gaussian

Order = Literal["printed", "released"]


# --- The chain alone: V = (x - mu)' A (x - mu) / 2 ------------------------------------------------------------------


def stable_step(precision: ArrayLike) -> float:
    """2 / lambda_max(A): the chain forgets its start exactly for the steps gamma below it. precision is A, (d, d).

    Raises ValueError unless A is symmetric and positive definite.

    >>> stable_step([[4.0, 0.0], [0.0, 1.0]])
    0.5
    """
    eigenvalues, _ = _spectrum(precision)
    return 2 / float(eigenvalues[-1])


def law(precision: ArrayLike, mean: ArrayLike, start: Gaussian, gamma: float, steps: int) -> Gaussian:
    """The law after `steps` steps from `start`, N(m_0, S_0); `precision` is A (d, d), `mean` is mu (d,).

    Raises ValueError for shapes that do not fit, an A that is not positive definite, steps < 0, and gamma outside
    (0, 2 / lambda_max), where no invariant law exists.

    >>> law([[1.0]], [0.0], Gaussian.scalar(4.0, 0.0), 0.5, 2).mean
    array([1.])
    """
    limit = invariant(precision, mean, gamma)
    checked.count("steps", steps, 0)
    if start.dim != limit.dim:
        raise ValueError(f"start has dimension {start.dim}: must be that of mean, {limit.dim}")
    eigenvalues, basis = _spectrum(precision)
    power = basis @ ((1 - gamma * eigenvalues) ** steps * basis).T
    return Gaussian(limit.mean + power @ (start.mean - limit.mean), limit.cov + power @ (start.cov - limit.cov) @ power)


def invariant(precision: ArrayLike, mean: ArrayLike, gamma: float) -> Gaussian:
    """The invariant law N(mu, A^-1 (I - gamma A / 2)^-1): the right mean, and a variance too large in each direction.

    Raises ValueError like `law`.

    >>> invariant([[1.5]], [0.0], 0.5).cov.round(9)
    array([[1.06666667]])
    """
    eigenvalues, basis = _stable_spectrum(precision, gamma)
    centre = checked.array("mean", mean, 1)
    if centre.size != eigenvalues.size:
        raise ValueError(f"mean has shape {centre.shape}: must be {eigenvalues.shape}")
    return Gaussian(centre, (basis / (eigenvalues * (1 - gamma * eigenvalues / 2))) @ basis.T)


def divergence(precision: ArrayLike, gamma: float) -> float:
    """KL(invariant law || target) in nats.

    The sum over the eigenvalues a of A of (s / (1 - s) + log(1 - s)) / 2, s = gamma a / 2.
    Raises ValueError like `law`.

    >>> round(divergence([[1.5]], 0.5), 10)
    0.0649981854
    """
    s = gamma * _stable_spectrum(precision, gamma)[0] / 2
    # The two terms cancel to s^2 / 2 for a small s; their series s^n (1 - 1/n) does not.
    series = sum(s**n * (1 - 1 / n) for n in range(2, 14))
    return float(np.where(s < 0.02, series, s / (1 - s) + np.log1p(-s)).sum() / 2)


def leading_divergence(precision: ArrayLike, gamma: float) -> float:
    """The leading term of `divergence` for small steps: the sum over the eigenvalues a of gamma^2 a^2 / 16.

    Raises ValueError like `law`.

    >>> leading_divergence([[2.0]], 0.5)
    0.0625
    """
    return float(((gamma * _stable_spectrum(precision, gamma)[0]) ** 2).sum() / 16)


def _spectrum(precision: ArrayLike) -> tuple[Array, Array]:
    matrix = checked.array("precision", precision, 2)
    eigenvalues, basis = np.linalg.eigh(checked.covariance("precision", matrix, len(matrix)))
    if eigenvalues[0] <= 0:
        raise ValueError(f"precision = {matrix.tolist()}: must be positive definite, or exp(-V) has no integral")
    return eigenvalues, basis


def _stable_spectrum(precision: ArrayLike, gamma: float) -> tuple[Array, Array]:
    eigenvalues, basis = _spectrum(precision)
    _check_steps(np.array([gamma], dtype=np.float64), float(eigenvalues[-1]))
    return eigenvalues, basis


# --- The two problems -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanProblem:
    """V = a (x - theta)^2 / 2, R = -r (x - c)^2 / 2: pi_theta = N(theta, 1/a), and the optimum is theta = c.

    Raises ValueError unless a > 0, r > 0 and c is finite.

    >>> problem = MeanProblem(a=1.5, r=1.0, c=2.0)
    >>> float(problem.gradient(-1.0)), problem.implicit_gradient(0.0, 1.0)
    (-3.0, -3.0)
    """

    a: float
    r: float
    c: float

    def __post_init__(self) -> None:
        checked.scalar("a", self.a, 0.0, math.inf, closed="()")
        checked.scalar("r", self.r, 0.0, math.inf, closed="()")
        checked.scalar("c", self.c, -math.inf, math.inf, closed="()")

    def objective(self, theta: ArrayLike) -> Array:
        """l(theta) = r ((theta - c)^2 + 1/a) / 2, elementwise."""
        return self.r * ((np.asarray(theta, dtype=np.float64) - self.c) ** 2 + 1 / self.a) / 2

    def gradient(self, theta: ArrayLike) -> Array:
        """grad l(theta) = r (theta - c), elementwise."""
        return self.r * (np.asarray(theta, dtype=np.float64) - self.c)

    def implicit_gradient(self, mean: float, variance: float) -> float:
        """Gamma(N(mean, variance), theta) = a r variance (mean - c); it does not depend on theta."""
        return self.a * self.r * variance * (mean - self.c)


@dataclass(frozen=True)
class PrecisionProblem:
    """V = e^theta x^2 / 2, R = -(x^2 - c)^2 / 2: pi_theta = N(0, e^-theta), and the optimum is e^-theta = c / 3.

    Raises ValueError unless c > 0 and finite; without that the optimum is not attained.

    >>> problem = PrecisionProblem(c=1.5)
    >>> float(problem.gradient(math.log(2.0))), problem.implicit_gradient(1.0, 0.0)
    (0.0, -1.5)
    """

    c: float

    def __post_init__(self) -> None:
        checked.scalar("c", self.c, 0.0, math.inf, closed="()")

    def objective(self, theta: ArrayLike) -> Array:
        """l(theta) = (3 v^2 - 2 c v + c^2) / 2 with v = e^-theta, elementwise."""
        v = np.exp(-np.asarray(theta, dtype=np.float64))
        return (3 * v**2 - 2 * self.c * v + self.c**2) / 2

    def gradient(self, theta: ArrayLike) -> Array:
        """grad l(theta) = c v - 3 v^2 with v = e^-theta, elementwise."""
        v = np.exp(-np.asarray(theta, dtype=np.float64))
        return v * (self.c - 3 * v)

    def implicit_gradient(self, variance: float, theta: float) -> float:
        """Gamma(N(0, variance), theta) = e^theta variance^2 (c - 3 variance)."""
        return math.exp(theta) * variance**2 * (self.c - 3 * variance)


def running_squared_gradient(problem: MeanProblem | PrecisionProblem, theta: ArrayLike) -> Array:
    """The averages of |grad l(theta_j)|^2 over j < K for K = 1, 2, ..; theta is (n,), so is the result.

    >>> running_squared_gradient(MeanProblem(1.0, 1.0, 0.0), [2.0, 1.0])
    array([4. , 2.5])
    """
    squares = problem.gradient(checked.array("theta", theta, 1)) ** 2
    return np.cumsum(squares) / np.arange(1, len(squares) + 1)


# --- Algorithm 1, discrete ------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """Mean and variance of p_k, and theta_k, for k = 0..K: shape (K + 1,) each."""

    mean: Array
    variance: Array
    theta: Array


def run_mean(
    problem: MeanProblem,
    start: tuple[float, float, float],
    gamma: ArrayLike,
    epsilon: ArrayLike,
    updates: int,
    *,
    order: Order = "printed",
) -> Trajectory:
    """K = `updates` rounds of Algorithm 1 on the mean problem from `start` = (mean, variance, theta), p_0 Gaussian.

    gamma and epsilon are numbers or arrays (K,). Raises ValueError for a negative variance, gamma outside (0, 2/a),
    negative epsilon, shapes that do not fit, an unknown order, and a trajectory beyond the float range.

    >>> path = run_mean(MeanProblem(1.5, 1.0, 2.0), (0.0, 1.0, -1.0), 0.1, 0.2, 2)
    >>> path.mean.round(9), path.theta.round(9)
    (array([ 0.    , -0.15  , -0.2685]), array([-1.        , -0.94      , -0.88049875]))
    """
    gammas = _schedule("gamma", gamma, updates)
    _check_steps(gammas, problem.a)

    def move(state: _State, step: float) -> tuple[float, float]:
        m, v, theta = state
        return m - step * problem.a * (m - theta), (1 - step * problem.a) ** 2 * v + 2 * step

    return _run(
        start, gammas, epsilon, order, move, lambda mean, variance, theta: problem.implicit_gradient(mean, variance)
    )


def run_precision(
    problem: PrecisionProblem,
    start: tuple[float, float],
    gamma: ArrayLike,
    epsilon: ArrayLike,
    updates: int,
    *,
    order: Order = "printed",
) -> Trajectory:
    """K = `updates` rounds of Algorithm 1 on the precision problem from `start` = (variance, theta), p_0 centred.

    Raises ValueError as `run_mean`, but without its bound on gamma: the chain is stable where gamma e^theta < 2, which
    moves with theta. For a constant gamma > c/6 theta grows at every step from the second on: no fixed point exists.

    >>> path = run_precision(PrecisionProblem(1.5), (1.0, 1.0), 0.2, 0.3, 1)
    >>> path.variance[1].round(12), path.theta[1].round(11)
    (np.float64(0.608249512574), np.float64(1.24464536456))
    """
    gammas = _schedule("gamma", gamma, updates)
    _check_steps(gammas, 0.0)

    def move(state: _State, step: float) -> tuple[float, float]:
        _, v, theta = state
        return 0.0, (1 - step * math.exp(theta)) ** 2 * v + 2 * step

    variance, theta = start
    return _run(
        (0.0, variance, theta),
        gammas,
        epsilon,
        order,
        move,
        lambda mean, variance, theta: problem.implicit_gradient(variance, theta),
    )


_State = tuple[float, float, float]


def _run(
    start: _State,
    gammas: Array,
    epsilon: ArrayLike,
    order: Order,
    move: Callable[[_State, float], tuple[float, float]],
    implicit_gradient: Callable[[float, float, float], float],
) -> Trajectory:
    _check_order(order)
    epsilons = _schedule("epsilon", epsilon, len(gammas))
    if (epsilons < 0).any():
        raise ValueError(f"epsilon = {float(epsilons.min())}: must not be negative")
    m, v, theta = (float(value) for value in checked.array("start", start, 1))
    checked.scalar("variance", v, 0.0, math.inf, closed="[)")
    path = [(m, v, theta)]
    for k, (step, rate) in enumerate(zip(gammas.tolist(), epsilons.tolist(), strict=True)):
        try:
            new_m, new_v = move((m, v, theta), step)
            seen_m, seen_v = (m, v) if order == "printed" else (new_m, new_v)
            theta -= step * rate * implicit_gradient(seen_m, seen_v, theta)
            m, v = new_m, new_v
        except OverflowError:
            theta = math.inf
        if not math.isfinite(m + v + theta):
            raise ValueError(f"gamma[{k}] = {step}: the loop diverges, its state leaves the float range at k = {k + 1}")
        path.append((m, v, theta))
    return Trajectory(*np.array(path).T)


def _schedule(name: str, value: ArrayLike, updates: int) -> Array:
    checked.count("updates", updates, 0)
    schedule = np.asarray(value, dtype=np.float64)
    if schedule.shape not in {(), (updates,)}:
        raise ValueError(f"{name} has shape {schedule.shape}: must be a number or have shape {(updates,)}")
    if not np.isfinite(schedule).all():
        raise ValueError(f"{name} = {schedule.tolist()}: must be finite")
    return np.broadcast_to(schedule, (updates,))


def _check_steps(gammas: Array, curvature: float) -> None:
    """Refuse steps outside (0, 2 / curvature), or not positive where the curvature is not known (0)."""
    bound = 2 / curvature if curvature > 0 else math.inf
    outside = gammas[~((gammas > 0) & (gammas < bound))]
    if outside.size:
        rule = f"(0, {bound:.6g}), 2 / {curvature:.6g} being the bound of stability" if curvature > 0 else "(0, inf)"
        raise ValueError(f"gamma = {outside[0]}: must lie in {rule}")


def _check_order(order: str) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order = {order!r}: must be one of {get_args(Order)}")


# --- Stability and fixed points for constant steps ------------------------------------------------------------------


def mean_matrix(problem: MeanProblem, gamma: float, epsilon: float, *, order: Order = "printed") -> Array:
    """The matrix (2, 2) that moves (m - c, theta - c) by one round once the variance is stationary.

    The fixed point of the loop is theta = m = c for every gamma, epsilon and order: no bias is left.
    Raises ValueError for gamma outside (0, 2/a), epsilon not positive, or an unknown order.

    >>> mean_matrix(MeanProblem(1.0, 1.0, 0.0), 1.0, 0.25)
    array([[ 0. ,  1. ],
           [-0.5,  1. ]])
    """
    alpha, beta = _mean_rates(problem, gamma, epsilon)
    _check_order(order)
    return _two_step_matrix(alpha, beta, 1 - alpha, order)


def mean_stable_step(problem: MeanProblem, epsilon: float, *, order: Order = "printed") -> float:
    """The loop on the mean problem converges exactly for gamma below this, at a constant gamma and epsilon.

    Printed: 1 / (a/2 + epsilon r). Released: 2 / (a + sqrt(a epsilon r)). Both are below the chain's own 2/a.
    Raises ValueError like `mean_matrix`.

    >>> problem = MeanProblem(1.0, 1.0, 0.0)
    >>> mean_stable_step(problem, 1.5), mean_stable_step(problem, 1.0, order="released")
    (0.5, 1.0)
    """
    _check_order(order)
    drift = problem.r * checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="()")
    if order == "printed":
        return 1 / (problem.a / 2 + drift)
    return 2 / (problem.a + math.sqrt(problem.a * drift))


def mean_oscillates(problem: MeanProblem, gamma: float, epsilon: float, *, order: Order = "printed") -> bool:
    """Whether theta_k spirals around c: `mean_matrix` has a pair of complex eigenvalues.

    Printed: epsilon r > a/4 - gamma a^2/8. Released, with alpha = gamma a and beta = 2 gamma epsilon r / (2 - alpha):
    (1 - sqrt(1 - alpha))^2 < alpha beta < (1 + sqrt(1 - alpha))^2; never for alpha >= 1, where the chain itself
    alternates. Raises ValueError like `mean_matrix`.

    >>> problem = MeanProblem(1.0, 1.0, 0.0)
    >>> [mean_oscillates(problem, 0.4, epsilon) for epsilon in (0.19, 0.21)]
    [False, True]
    """
    alpha, beta = _mean_rates(problem, gamma, epsilon)
    _check_order(order)
    if order == "printed":
        return alpha < 4 * beta
    root = math.sqrt(max(1 - alpha, 0.0))
    return (1 - root) ** 2 < alpha * beta < (1 + root) ** 2


class FixedPoint(NamedTuple):
    """Where the loop on the precision problem settles: variance, theta, and the gradient grad l(theta) left over."""

    variance: float
    theta: float
    gradient: float


def precision_fixed_point(problem: PrecisionProblem, gamma: float) -> FixedPoint:
    """The fixed point for a constant gamma, of either order and any epsilon: v = c/3 and grad l = c gamma / 2 exactly.

    e^theta = (1 - sqrt(1 - 6 gamma / c)) / gamma. The other root, with a plus, is a fixed point too, with the same
    gradient, but repels. Raises ValueError unless 0 < gamma < c/6; beyond that the chain's variance, which is at least
    2 gamma, cannot reach c/3.

    >>> point = precision_fixed_point(PrecisionProblem(1.5), 0.2)
    >>> point.variance, round(point.theta, 11), point.gradient
    (0.5, 1.01665431172, 0.15000000000000002)
    """
    c = problem.c
    checked.scalar("gamma", gamma, 0.0, c / 6, closed="()")
    return FixedPoint(c / 3, math.log(6 / c / (1 + math.sqrt(1 - 6 * gamma / c))), c * gamma / 2)


def precision_matrix(problem: PrecisionProblem, gamma: float, epsilon: float, *, order: Order = "printed") -> Array:
    """The derivative (2, 2) of one round in (log v, theta) at `precision_fixed_point`; raises ValueError like it.

    >>> precision_matrix(PrecisionProblem(6.0), 0.75, 0.5).round(12)
    array([[ 0.25, -0.5 ],
           [ 6.  ,  1.  ]])
    """
    s, beta = _precision_rates(problem, gamma, epsilon)
    _check_order(order)
    # The parameter sees the relative error of v, and v sees that of e^theta with the opposite sign.
    forward = np.array([[(1 - s) ** 2, -2 * s * (1 - s)], [0.0, 1.0]])
    update = np.array([[1.0, 0.0], [beta, 1.0]])
    if order == "released":
        return update @ forward
    return forward + (update - np.eye(2))


def precision_stable_epsilon(problem: PrecisionProblem, gamma: float, *, order: Order = "printed") -> float:
    """`precision_fixed_point` attracts its neighbourhood for epsilon below this, and not above.

    Printed: 9 (2 - s) / (2 s (1 - s) c^3), released: 9 (1 + (1 - s)^2) / (s^2 (1 - s) c^3); s = gamma e^theta there.
    Raises ValueError like `precision_fixed_point`, and for an unknown order.

    >>> precision_stable_epsilon(PrecisionProblem(6.0), 0.75)
    0.125
    """
    s, scale = _precision_rates(problem, gamma, 1.0)
    _check_order(order)
    limit = (2 - s) / (2 * (1 - s)) if order == "printed" else (1 + (1 - s) ** 2) / (s * (1 - s))
    return limit / scale


def _mean_rates(problem: MeanProblem, gamma: float, epsilon: float) -> tuple[float, float]:
    """alpha = gamma a, and beta = gamma epsilon a r v at the stationary variance v = 1 / (a (1 - alpha / 2))."""
    _check_steps(np.array([gamma], dtype=np.float64), problem.a)
    checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="()")
    alpha = gamma * problem.a
    return alpha, gamma * epsilon * problem.r / (1 - alpha / 2)


def _precision_rates(problem: PrecisionProblem, gamma: float, epsilon: float) -> tuple[float, float]:
    """s = gamma e^theta at the fixed point, and beta = -gamma epsilon dGamma / d log v = epsilon s c^3 / 9."""
    s = gamma * math.exp(precision_fixed_point(problem, gamma).theta)
    return s, checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="()") * s * problem.c**3 / 9


def _two_step_matrix(alpha: float, beta: float, decay: float, order: Order) -> Array:
    if order == "printed":
        return np.array([[decay, alpha], [-beta, 1.0]])
    return np.array([[decay, alpha], [-beta * decay, 1 - alpha * beta]])


# --- Continuous time ------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """The mean problem in continuous time, shape (n,) each; `squared_gradient` integrates |grad l|^2 up to t."""

    mean: Array
    variance: Array
    theta: Array
    squared_gradient: Array


def flow_mean(
    problem: MeanProblem,
    start: tuple[float, float, float],
    epsilon: float | Callable[[float], float],
    times: ArrayLike,
) -> Flow:
    """m' = -a (m - theta), v' = 2 - 2 a v, theta' = -epsilon a r v (m - c) from `start` = (mean, variance, theta) at 0.

    For a constant epsilon and a start at the variance 1/a by matrix exponentials; otherwise, also for a function
    epsilon(t), by an eighth-order solver with relative tolerance 1e-12. times (n,) must be increasing and not negative.
    Raises ValueError for other times, a negative variance or epsilon, or if the solver fails.

    >>> flow = flow_mean(MeanProblem(1.0, 1.0, 0.0), (1.0, 1.0, 1.0), 0.25, [0.0, 2.0])
    >>> flow.theta.round(12)[1] == (1.5 * math.exp(-1.0)).__round__(12)
    np.True_
    """
    a, r, c = problem.a, problem.r, problem.c
    points = checked.array("times", times, 1)
    if points[0] < 0 or (np.diff(points) <= 0).any():
        raise ValueError(f"times = {points.tolist()}: must be increasing and not negative")
    m, v, theta = (float(value) for value in checked.array("start", start, 1))
    checked.scalar("variance", v, 0.0, math.inf, closed="[)")
    variance = 1 / a + (v - 1 / a) * np.exp(-2 * a * points)
    x, y = m - c, theta - c
    if not callable(epsilon) and v == 1 / a:
        drift = checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="[)") * r
        # Linear in (x, y), and in (x^2, x y, y^2) with the integral of (r y)^2 as a fourth coordinate.
        first = np.array([[-a, a], [-drift, 0.0]])
        second = np.array([[-2 * a, 2 * a, 0, 0], [-drift, -a, a, 0], [0, -2 * drift, 0, 0], [0, 0, r**2, 0]])
        state = _linear_flow(first, [x, y], points)
        integral = _linear_flow(second, [x * x, x * y, y * y, 0.0], points)[:, 3]
        return Flow(c + state[:, 0], variance, c + state[:, 1], integral)

    def derivative(t: float, state: Array) -> list[float]:
        ratio = 1 + (a * v - 1) * math.exp(-2 * a * t)
        rate = epsilon(t) if callable(epsilon) else epsilon
        push = checked.scalar("epsilon", rate, 0.0, math.inf, closed="[)") * r * ratio * state[0]
        return [-a * (state[0] - state[1]), -push, (r * state[1]) ** 2]

    end = max(float(points[-1]), 1e-300)  # the solver wants a non-empty interval
    scale = max(abs(x), abs(y), 1e-300)
    solution = solve_ivp(derivative, (0.0, end), [x, y, 0.0], "DOP853", t_eval=points, rtol=1e-12, atol=1e-15 * scale)
    if not solution.success:
        raise ValueError(f"epsilon = {epsilon!r}: the solver failed, {solution.message}")
    return Flow(c + solution.y[0], variance, c + solution.y[1], solution.y[2])


def _linear_flow(matrix: Array, start: list[float], times: Array) -> Array:
    """exp(matrix t) start for each time, (n, size)."""
    path = np.empty((times.size, len(start)))
    for row, t in enumerate(times.tolist()):
        path[row] = np.asarray(expm(matrix * t), dtype=np.float64) @ start
    return path


def flow_total(problem: MeanProblem, mean: float, theta: float, epsilon: float) -> float:
    """The integral of |grad l(theta_t)|^2 over all t >= 0 along `flow_mean` from (mean, 1/a, theta), constant epsilon.

    Raises ValueError unless epsilon > 0.

    >>> flow_total(MeanProblem(1.0, 1.0, 0.0), 1.0, 1.0, 0.25)
    1.625
    """
    a, r = problem.a, problem.r
    drift = checked.scalar("epsilon", epsilon, 0.0, math.inf, closed="()") * r
    x, y = mean - problem.c, theta - problem.c
    return r**2 * (y**2 / (2 * drift) * (1 + drift / a) + drift * x**2 / (2 * a**2) - x * y / a)


# --- A constant small epsilon gives O(1/T) --------------------------------------------------------------------------


class RateConstants(NamedTuple):
    """What the bound of docs/implicit.md, "Constant steps give 1/T", asks of a problem and of a start.

    With u^2 = KL(p_t || pi_theta), at every t of the trajectory: u^2 <= I / (2 mu), I the Fisher divergence
    (log-Sobolev); |E_p grad_theta V - E_pi grad_theta V| <= sqrt(2) C u (true if |grad_theta V| <= C);
    |Gamma(p, theta) - grad l| <= K u. gap = l(theta_0) - inf l, and u0 = u at t = 0.
    """

    mu: float
    C: float
    K: float
    gap: float
    u0: float


def mean_rate_constants(problem: MeanProblem, mean: float, theta: float) -> RateConstants:
    """The constants of the mean problem from (mean, 1/a, theta).

    mu = a, C = sqrt(a), K = r sqrt(2/a), gap = r (theta - c)^2 / 2, u0 = sqrt(a/2) |mean - theta|.
    grad_theta V is not bounded there; C and K hold because v = 1/a at all times, which is not true of other starts.

    >>> mean_rate_constants(MeanProblem(4.0, 2.0, 0.0), 1.0, 3.0).gap
    9.0
    """
    a, r = problem.a, problem.r
    gap = r * (theta - problem.c) ** 2 / 2
    return RateConstants(a, math.sqrt(a), r * math.sqrt(2 / a), gap, math.sqrt(a / 2) * abs(mean - theta))


def rate_bound(constants: RateConstants, epsilon: float) -> float:
    """An upper bound of the integral of |grad l(theta_t)|^2 over any [0, T] for the flow with this constant epsilon.

    Divided by T it is the rate. As epsilon -> 0 it tends to gap / epsilon, what exact gradient descent earns.
    Raises ValueError for constants that are negative (or mu = 0), or unless 0 < epsilon < mu / (sqrt(2) C K).

    >>> round(rate_bound(RateConstants(mu=1.0, C=1.0, K=math.sqrt(2), gap=0.5, u0=0.0), 0.25), 12)
    3.0
    """
    contraction, share = _contraction(constants, epsilon, math.sqrt(2))
    coupling = constants.K * constants.u0 / math.sqrt(2 * contraction)
    # G^2 (1 - rho) <= gap / epsilon + coupling G, G the L2 norm of the gradient, rho = share / sqrt(2).
    free = 1 - share / math.sqrt(2)
    root = (coupling + math.sqrt(coupling**2 + 4 * free * constants.gap / epsilon)) / (2 * free)
    return root**2


def simple_rate_bound(constants: RateConstants, epsilon: float) -> float:
    """(2 gap / epsilon + K^2 u0^2 / mu') / (1 - (C K epsilon / mu')^2), mu' = mu - C K epsilon / sqrt(2).

    A weaker but shorter bound than `rate_bound`. Raises ValueError as it, the limit being mu / ((1 + 1/sqrt(2)) C K).

    >>> round(simple_rate_bound(RateConstants(mu=1.0, C=1.0, K=math.sqrt(2), gap=0.5, u0=0.0), 0.25), 12)
    5.142857142857
    """
    contraction, share = _contraction(constants, epsilon, 1 + 1 / math.sqrt(2))
    return (2 * constants.gap / epsilon + (constants.K * constants.u0) ** 2 / contraction) / (1 - share**2)


def _contraction(constants: RateConstants, epsilon: float, factor: float) -> tuple[float, float]:
    """mu' and C K epsilon / mu', after the check that epsilon < mu / (factor C K)."""
    mu, force, lipschitz = constants.mu, constants.C, constants.K
    checked.scalar("mu", mu, 0.0, math.inf, closed="()")
    for name in ("C", "K", "gap", "u0"):
        checked.scalar(name, getattr(constants, name), 0.0, math.inf, closed="[)")
    product = force * lipschitz
    limit = mu / (factor * product) if product > 0 else math.inf
    checked.scalar("epsilon", epsilon, 0.0, limit, closed="()")
    contraction = mu - product * epsilon / math.sqrt(2)
    return contraction, product * epsilon / contraction
