r"""Policy gradient for controls that are linear in features: PI-FT, section 4.1, with every expectation exact.

The controls are U_t(y) = K_t phi_t(y), the K_t (d, n) stacked to a policy K (T, d, n), and

    J(K) = E r(Y_T) - sum_t strength_t E KL_t(Y_t),    Y_0 of a given normal law,

is maximised. In two classes of policies J is exact: `AffinePolicies` (phi = (y, 1), affine scores, quadratic reward,
any dimension; by moments, J being a polynomial in K) and `GridPolicies` (one dimension, phi_t = (s_t, u*_t - s_t) with
the score of a Gaussian mixture, any smooth reward; by quadrature). Both are realizable (PI-FT, Assumption 4.1): the
optimal control is in the class. The functions below take either. Q_t(y, u) is the value of the control u in step t at
Y_t = y, the policy being followed from t + 1 on; Q*_t is that of the optimal policy, u*_t its maximiser. Statements and
proofs: docs/pift.md, "Policy gradient with linear features".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory import checked
from theory.chains import QuadraticReward
from theory.checked import Array
from theory.control import ControlSchedule
from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture

Numbers = NDArray[Any]
"""Real or, for derivatives by a complex step, complex."""


class Policies(Protocol):
    """A class of policies in which everything is exact; `policy` is (T, d, n) throughout."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, d, n)."""
        ...

    def evaluate(self, policy: Numbers) -> tuple[Any, Numbers]:
        """J and its gradient (T, d, n), analytic in the entries of `policy`."""
        ...

    def curvature(self, policy: Array) -> Array:
        """E[-grad_u^2 Q_t (x) phi phi'] at the policy, (T, d n, d n)."""
        ...

    def regret(self, policy: Array) -> Array:
        """E[Q*_t(Y_t, u*_t) - Q*_t(Y_t, U_t)] for Y_t under the policy, (T,)."""
        ...

    def optimum(self) -> Array:
        """K*, the policy of the optimal control."""
        ...

    def pretrained(self) -> Array:
        """The policy of the pre-trained score."""
        ...


# --- what holds in every class -----------------------------------------------------------------------------------


def objective(policies: Policies, policy: ArrayLike) -> float:
    """J(K). Raises ValueError for a policy of another shape.

    >>> round(objective(line(), [[[-1.0, 0.0]]]), 12)
    -0.25
    """
    return float(policies.evaluate(_checked(policies, policy))[0])


def gradient(policies: Policies, policy: ArrayLike) -> Array:
    """The gradient of J in K, (T, d, n): E[grad_u Q_t(Y_t, K_t phi) phi'] (PI-FT, eq. 77). Raises like `objective`.

    >>> gradient(line(), [[[-1.0, 0.0]]]).round(12).tolist()
    [[[-0.75, 1.5]]]
    """
    return np.asarray(policies.evaluate(_checked(policies, policy))[1], dtype=np.float64)


def hessian(policies: Policies, policy: ArrayLike) -> Array:
    """The Hessian of J, (T d n, T d n), K flattened in C order: exact to rounding, by a complex step of the gradient.

    Raises ValueError like `objective`.

    >>> hessian(line(), [[[-1.0, 0.0]]]).round(12) + 0.0
    array([[-4.5,  0. ],
           [ 0. , -4.5]])
    """
    centre = _checked(policies, policy)
    columns: list[Any] = []
    for direction in np.eye(centre.size).reshape(-1, *centre.shape):
        moved = policies.evaluate(centre + 1e-30j * direction)[1]
        columns.append(np.imag(moved).ravel() / 1e-30)
    return np.stack(columns, axis=1).astype(np.float64)


def block_sizes(policies: Policies, matrix: ArrayLike) -> Array:
    """The largest |entry| of each block (K_s, K_t) of a matrix shaped like the Hessian, (T, T).

    Raises ValueError for another shape.

    >>> block_sizes(line(steps=2), np.arange(16.0).reshape(4, 4))
    array([[ 5.,  7.],
           [13., 15.]])
    """
    steps, dim, features = policies.shape
    size = dim * features
    values = checked.array("matrix", matrix, 2)
    if values.shape != (steps * size, steps * size):
        raise ValueError(f"matrix has shape {values.shape}: must be {(steps * size, steps * size)}")
    return np.abs(values).reshape(steps, size, steps, size).max(axis=(1, 3))


def local_rate(policies: Policies, step: float) -> float:
    """max |1 - step mu| over the eigenvalues mu of -Hessian(K*): the rate of gradient ascent near K*, if below one.

    Takes the Hessian from its diagonal blocks, the others being zero there: docs/pift.md, "Block-diagonal Hessian".
    Raises ValueError unless the step is positive.

    >>> round(local_rate(line(), 0.2), 12)
    0.1
    """
    checked.scalar("step", step, 0.0, math.inf, closed="()")
    eigenvalues = np.linalg.eigvalsh(policies.curvature(policies.optimum()))
    return float(np.abs(1.0 - step * eigenvalues).max())


def ascend(policies: Policies, policy: ArrayLike, step: float, updates: int) -> Array:
    """The iterates of K <- K + step grad J(K), (updates + 1, T, d, n); inf or NaN once beyond the float range.

    Raises ValueError like `objective`, and unless step is positive and updates >= 0.

    >>> ascend(line(), [[[-1.0, 0.0]]], 0.2, 2)[:, 0, 0, 1].round(12).tolist()
    [0.0, 0.3, 0.33]
    """
    checked.scalar("step", step, 0.0, math.inf, closed="()")
    path = np.empty((checked.count("updates", updates, 0) + 1, *policies.shape))
    path[0] = _checked(policies, policy)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(updates):
            path[k + 1] = path[k] + step * policies.evaluate(path[k])[1]
    return path


def _price(schedule: ControlSchedule, t: int) -> float:
    """strength (1 - alpha)^2 / (alpha sigma^2): strength_t KL_t is half of it times |U - s|^2 (PI-FT, eq. 6)."""
    a = schedule.alpha[t]
    return float(schedule.strength[t] * (1.0 - a) ** 2 / (a * schedule.sigma[t] ** 2))


def _checked(policies: Policies, policy: ArrayLike) -> Array:
    values = checked.array("policy", policy, 3)
    if values.shape != policies.shape:
        raise ValueError(f"policy has shape {values.shape}: must be (T, d, n) = {policies.shape}")
    return values


# --- affine controls, quadratic reward ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AffinePolicies:
    """U_t(y) = K_t (y, 1), K_t (d, d + 1); scores s_t(y) = score[t] (y, 1), score (T, d, d + 1); Y_0 ~ start.

    All is in the second moments S_t of z = (y, 1) and in the values V_t = z' W_t z, both symmetric (d + 1, d + 1).
    Raises ValueError if the shapes do not fit, or if the problem is not well-posed: strength[t] I + sigma[t]^2 P must
    be positive definite for -P the Hessian of the optimal value function of step t + 1, for every t.

    >>> policies = line(steps=2)
    >>> policies.shape, objective(policies, policies.optimum()) > objective(policies, policies.pretrained())
    ((2, 1, 2), True)
    """

    schedule: ControlSchedule
    score: Array
    reward: QuadraticReward
    start: Gaussian

    def __init__(self, schedule: ControlSchedule, score: ArrayLike, reward: QuadraticReward, start: Gaussian) -> None:
        coefficients = checked.array("score", score, 3)
        expected = (schedule.steps, start.dim, start.dim + 1)
        if coefficients.shape != expected:
            raise ValueError(f"score has shape {coefficients.shape}: must be (T, d, d + 1) = {expected}")
        if reward.linear.shape != (start.dim,):
            raise ValueError(f"reward has dimension {len(reward.linear)}: must be {start.dim}, that of start")
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "score", coefficients)
        object.__setattr__(self, "reward", reward)
        object.__setattr__(self, "start", start)
        self.optimum()  # raises

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, d, d + 1)."""
        return self.schedule.steps, self.start.dim, self.start.dim + 1

    def pretrained(self) -> Array:
        """The coefficients of the score."""
        return self.score

    def optimum(self) -> Array:
        """K* by the Riccati recursion: (strength/sigma^2 + P) M* = strength/sigma^2 m + (0, p), V = -y'Py/2 + p'y + ...

        >>> line().optimum().round(12)
        array([[[-1.16666667,  0.33333333]]])
        """
        dim = self.start.dim
        policy = np.empty(self.shape)
        value = self._final_value()
        for t in reversed(range(self.schedule.steps)):
            weight = self.schedule.strength[t] / self.schedule.sigma[t] ** 2
            bowl = weight * np.eye(dim) - 2.0 * value[:dim, :dim]
            least = float(np.linalg.eigvalsh(bowl)[0])
            if least <= 0:
                strength = float(self.schedule.strength[t])
                needed = strength - self.schedule.sigma[t] ** 2 * least
                raise ValueError(f"strength[{t}] = {strength:g}: must exceed {needed:.6g}, or there is no optimum")
            target = weight * self._mean(t, self.score[t])
            target[:, dim] += 2.0 * value[:dim, dim]
            a = self.schedule.alpha[t]
            policy[t] = (math.sqrt(a) * np.linalg.solve(bowl, target) - np.eye(dim, dim + 1)) / (1.0 - a)
            value = self._value_before(t, policy[t], value)
        return policy

    def evaluate(self, policy: Numbers) -> tuple[Any, Numbers]:
        """J and its gradient: forward through the moments, backward through the values."""
        moments, values = self._moments(policy), self._values(policy)
        dim = self.start.dim
        slopes: list[Numbers] = []
        for t, (moment, value) in enumerate(zip(moments, values[1:], strict=True)):
            a = self.schedule.alpha[t]
            slope = 2.0 * (1.0 - a) / math.sqrt(a) * (value @ self._step(t, policy[t]))[:dim]
            slopes.append((slope - _price(self.schedule, t) * (policy[t] - self.score[t])) @ moment)
        return np.sum(values[0] * moments[0]), np.stack(slopes)

    def curvature(self, policy: Array) -> Array:
        """(1 - alpha)^2/alpha (strength/sigma^2 + P_{t+1}) (x) S_t: minus the diagonal blocks, at *any* policy.

        -P_{t+1} is the Hessian of V_{t+1} under the policy. Shape (T, d (d + 1), d (d + 1)).
        """
        blocks: list[Array] = []
        for t, (moment, value) in enumerate(zip(self._moments(policy), self._values(policy)[1:], strict=True)):
            blocks.append(np.asarray(np.kron(self._bowl(t, value), moment), dtype=np.float64))
        return np.stack(blocks)

    def regret(self, policy: Array) -> Array:
        """tr(H*_t (K - K*)_t S_t(K) (K - K*)_t') / 2, H*_t = -grad_u^2 Q*_t; the sum over t is J(K*) - J(K).

        >>> policies = line(steps=2)
        >>> lost = objective(policies, policies.optimum()) - objective(policies, policies.score)
        >>> round(float(lost - policies.regret(policies.score).sum()), 14) + 0.0
        0.0
        """
        best = self.optimum()
        terms: list[float] = []
        for t, (moment, value) in enumerate(zip(self._moments(policy), self._values(best)[1:], strict=True)):
            error = policy[t] - best[t]
            terms.append(float(np.sum(self._bowl(t, value) * (error @ moment @ error.T))) / 2.0)
        return np.array(terms)

    def second_moments(self, policy: Array) -> Array:
        """S_t = E phi phi' under the policy, (T, d + 1, d + 1)."""
        return np.stack(self._moments(_checked(self, policy)))

    def _bowl(self, t: int, value: Array) -> Array:
        """-grad_u^2 Q_t, a constant here, for W_{t+1} = value."""
        dim, a = self.start.dim, self.schedule.alpha[t]
        return _price(self.schedule, t) * np.eye(dim) - 2.0 * (1.0 - a) ** 2 / a * value[:dim, :dim]

    def _mean(self, t: int, coefficients: Numbers) -> Numbers:
        """The mean of Y_{t+1} as (d, d + 1) coefficients of z."""
        dim, a = self.start.dim, self.schedule.alpha[t]
        return (np.eye(dim, dim + 1) + (1.0 - a) * coefficients) / math.sqrt(a)

    def _step(self, t: int, coefficients: Numbers) -> Numbers:
        return np.vstack([self._mean(t, coefficients), np.eye(1, self.start.dim + 1, self.start.dim)])

    def _moments(self, policy: Numbers) -> list[Numbers]:
        """S_0, ..., S_{T-1}."""
        dim = self.start.dim
        mean = np.append(self.start.mean, 1.0)
        moments: list[Numbers] = [np.outer(mean, mean)]
        moments[0][:dim, :dim] += self.start.cov
        for t in range(self.schedule.steps - 1):
            step = self._step(t, policy[t])
            noise = self.schedule.sigma[t] ** 2 * np.diag(np.append(np.ones(dim), 0.0))
            moments.append(step @ moments[-1] @ step.T + noise)
        return moments

    def _values(self, policy: Numbers) -> list[Numbers]:
        """W_0, ..., W_T."""
        values: list[Numbers] = [self._final_value()]
        for t in reversed(range(self.schedule.steps)):
            values.append(self._value_before(t, policy[t], values[-1]))
        return values[::-1]

    def _final_value(self) -> Array:
        half = self.reward.linear[:, None] / 2.0
        value = np.block([[self.reward.quadratic / 2.0, half], [half.T, self.reward.constant.reshape(1, 1)]])
        return value.astype(np.float64)

    def _value_before(self, t: int, coefficients: Numbers, value: Numbers) -> Numbers:
        dim = self.start.dim
        step = self._step(t, coefficients)
        error = coefficients - self.score[t]
        before = step.T @ value @ step - _price(self.schedule, t) / 2.0 * error.T @ error
        before[dim, dim] += self.schedule.sigma[t] ** 2 * np.trace(value[:dim, :dim])
        return before


def gaussian_scores(schedule: ControlSchedule, data: Gaussian) -> Array:
    """The exact scores of normal data at the noise levels of Y_0..Y_{T-1}: (T, d, d + 1), coefficients of (y, 1).

    >>> gaussian_scores(ControlSchedule.ddpm([0.64], 1.0), Gaussian.scalar(1.0, 1.0))
    array([[[-1. ,  0.8]]])
    """
    scores: list[Array] = []
    for level in schedule.alpha_bar:
        precision = np.asarray(np.linalg.inv(level * data.cov + (1.0 - level) * np.eye(data.dim)), dtype=np.float64)
        scores.append(np.column_stack([-precision, precision @ data.mean * math.sqrt(level)]))
    return np.stack(scores)


def line(steps: int = 1) -> AffinePolicies:
    """The smallest example, for tests: on the line the pre-trained mean is y/2, the reward y - y^2/2, Y_0 ~ N(0, 1).

    alpha, sigma^2 and the strength are all 1/4, the score is -y. Raises ValueError unless steps >= 1.

    >>> line().schedule.mean(0, 1.0, -1.0)
    array(0.5)
    """
    quarter = np.full(checked.count("steps", steps, 1), 0.25)
    score = np.tile([[-1.0, 0.0]], (steps, 1, 1))
    reward = QuadraticReward(0.0, [1.0], [[-1.0]])
    return AffinePolicies(ControlSchedule(quarter, np.sqrt(quarter), 0.25), score, reward, Gaussian.scalar(0.0, 1.0))


# --- a nonlinear class on a grid ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GridPolicies:
    """U_t = K_t[0] s_t + K_t[1] (u*_t - s_t) in one dimension: in every step K* is (1, 1), the score (1, 0).

    s_t is the score of `data` at the noise level of Y_t, u*_t the optimal control, Y_0 ~ start. Densities on `points`
    points of [-half_width, half_width] are pushed forward, values pulled back by the trapezoidal rule (see
    `theory.grid`); the weights of each step are normalised, which makes this a control problem on the grid and so keeps
    the identities of docs/pift.md exact whatever the spacing. `grid` is (points,), `features` (T, points, 2).

    Raises ValueError unless data and start are one-dimensional and start has a density, the spacing is at most half of
    the least sigma, the reward gives finite values (points,), and the problem is well-posed: strength[t] must exceed
    sigma[t]^2 times the largest curvature of the smoothed optimal value of step t + 1, taken over the points that are
    at least six sigma[t] from the ends of the grid.

    >>> schedule = ControlSchedule.ddpm([0.8, 0.9], [0.5, 0.4])
    >>> data = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.5]], [[0.5]]])
    >>> policies = GridPolicies(schedule, data, lambda y: np.log(np.cosh(y)), Gaussian.scalar(0.0, 1.0), 10.0, 201)
    >>> gradient(policies, policies.optimum()).round(12).any()
    np.False_
    """

    schedule: ControlSchedule
    grid: Array
    features: Array
    final: Array
    weights: Array

    def __init__(
        self,
        schedule: ControlSchedule,
        data: GaussianMixture,
        reward: Callable[[Array], ArrayLike],
        start: Gaussian,
        half_width: float,
        points: int,
    ) -> None:
        if data.dim != 1 or start.dim != 1:
            raise ValueError(f"data, start have dimensions {data.dim}, {start.dim}: must be 1")
        if start.cov[0, 0] <= 0:
            raise ValueError(f"start = N({start.mean[0]:g}, {start.cov[0, 0]:g}): must have a density")
        checked.scalar("half_width", half_width, 0.0, math.inf, closed="()")
        grid = np.linspace(-half_width, half_width, checked.count("points", points, 3))
        spacing, least = grid[1] - grid[0], float(schedule.sigma.min())
        if spacing > least / 2:
            raise ValueError(
                f"points = {points}: the spacing {spacing:.3g} must not exceed half of sigma = {least:.3g}"
            )
        final = checked.array("reward", reward(grid), 1)
        if final.shape != grid.shape:
            raise ValueError(f"reward has shape {final.shape}: must give one value for each of the {points} points")
        density = np.exp(-((grid - start.mean[0]) ** 2) / (2.0 * start.cov[0, 0]))
        for array in (grid, density):
            array.setflags(write=False)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "final", final)
        object.__setattr__(self, "weights", density / density.sum())
        object.__setattr__(self, "features", self._optimal_features(data))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, 1, 2)."""
        return self.schedule.steps, 1, 2

    def pretrained(self) -> Array:
        """(1, 0) in every step."""
        return np.tile([1.0, 0.0], (self.schedule.steps, 1, 1))

    def optimum(self) -> Array:
        """(1, 1) in every step."""
        return np.ones(self.shape)

    def evaluate(self, policy: Numbers) -> tuple[Any, Numbers]:
        """J and its gradient: forward through the densities, backward through the values."""
        densities, kernels, values = self._passes(policy)
        rows: list[Numbers] = []
        for t, density in enumerate(densities):
            a = self.schedule.alpha[t]
            slope = (1.0 - a) / math.sqrt(a) * _slope(self.grid, kernels[t], values[t + 1], self.schedule.sigma[t])
            slope = slope - _price(self.schedule, t) * (self._control(t, policy) - self.features[t, :, 0])
            rows.append((density * slope)[None] @ self.features[t])
        return np.sum(densities[0] * values[0]), np.stack(rows)

    def curvature(self, policy: Array) -> Array:
        """E[(1 - alpha)^2/alpha (strength/sigma^2 - h'(M)) phi phi'] at any policy, (T, 2, 2).

        Minus the diagonal blocks of the Hessian. h is that of `theory.control` for V_{t+1} under the policy.
        """
        densities, kernels, values = self._passes(policy)
        blocks: list[Array] = []
        for t, density in enumerate(densities):
            a, sigma = self.schedule.alpha[t], self.schedule.sigma[t]
            bowl = _price(self.schedule, t) - (1.0 - a) ** 2 / a * _bend(self.grid, kernels[t], values[t + 1], sigma)
            blocks.append(self.features[t].T @ (self.features[t] * (density * bowl)[:, None]))
        return np.stack(blocks)

    def regret(self, policy: Array) -> Array:
        """E[Q*_t(Y_t, u*_t) - Q*_t(Y_t, U_t)] for Y_t under the policy, (T,); the sum is J(K*) - J(K)."""
        densities, kernels, _ = self._passes(policy)
        _, _, best = self._passes(self.optimum())
        terms: list[float] = []
        for t, density in enumerate(densities):
            terms.append(float(density @ (best[t] - self._value(t, policy, kernels[t], best[t + 1]))))
        return np.array(terms)

    def _control(self, t: int, policy: Numbers) -> Numbers:
        return self.features[t] @ policy[t, 0]

    def _value(self, t: int, policy: Numbers, kernel: Numbers, value: Numbers) -> Numbers:
        """Q_t(y, U_t(y)) on the grid for V_{t+1} = value."""
        return (
            kernel @ value - _price(self.schedule, t) / 2.0 * (self._control(t, policy) - self.features[t, :, 0]) ** 2
        )

    def _passes(self, policy: Numbers) -> tuple[list[Numbers], list[Numbers], list[Numbers]]:
        """The laws of Y_0..Y_{T-1}, the kernels of the T steps and the values V_0..V_T, all on the grid."""
        kernels: list[Numbers] = []
        for t in range(self.schedule.steps):
            a = self.schedule.alpha[t]
            mean = (self.grid + (1.0 - a) * self._control(t, policy)) / math.sqrt(a)
            kernels.append(_kernel(self.grid, mean, self.schedule.sigma[t]))
        densities: list[Numbers] = [self.weights]
        for kernel in kernels[:-1]:
            densities.append(densities[-1] @ kernel)
        values: list[Numbers] = [self.final]
        for t in reversed(range(self.schedule.steps)):
            values.append(self._value(t, policy, kernels[t], values[-1]))
        return densities, kernels, values[::-1]

    def _optimal_features(self, data: GaussianMixture) -> Array:
        """(s_t, u*_t - s_t): backwards, the optimal means solve M = m + sigma^2/strength h(M)."""
        value = np.array(self.final)
        features = np.empty((self.schedule.steps, self.grid.size, 2))
        for t in reversed(range(self.schedule.steps)):
            sigma = float(self.schedule.sigma[t])
            score = data.noised_score(self.grid[:, None], self.schedule.alpha_bar[t])[:, 0]
            pretrained = self.schedule.mean(t, self.grid, score)
            gain = sigma**2 / self.schedule.strength[t]
            mean = _optimal_mean(self.grid, pretrained, value, sigma, gain, t)
            features[t] = np.column_stack([score, self.schedule.control(t, self.grid, mean) - score])
            value = _kernel(self.grid, mean, sigma) @ value - (mean - pretrained) ** 2 / (2.0 * gain)
        features.setflags(write=False)
        return features


def _kernel(grid: Array, mean: Numbers, sigma: float) -> Numbers:
    """Probabilities [i, j] of the grid's point j when the mean is mean[i]: rows sum to one, exactly."""
    exponent = -((grid[None, :] - mean[:, None]) ** 2) / (2.0 * sigma**2)
    weights = np.exp(exponent - exponent.real.max(axis=1, keepdims=True))  # a constant: no part of a derivative
    return weights / weights.sum(axis=1, keepdims=True)


def _slope(grid: Array, kernel: Numbers, value: Numbers, sigma: float) -> Numbers:
    """d/d mean of kernel @ value: a covariance, the rows being an exponential family in mean/sigma^2."""
    return np.sum(kernel * _centred(kernel, grid) * _centred(kernel, value), axis=1) / sigma**2


def _bend(grid: Array, kernel: Array, value: Array, sigma: float) -> Array:
    """The second derivative of kernel @ value in the mean: the third mixed cumulant of (y, y, value)."""
    return np.sum(kernel * _centred(kernel, grid) ** 2 * _centred(kernel, value), axis=1) / sigma**4


def _centred(kernel: Numbers, value: Numbers) -> Numbers:
    """value[j] less its mean in row i: without it the covariances would cancel where the values are large."""
    return value[None, :] - (kernel @ value)[:, None]


def _optimal_mean(grid: Array, pretrained: Array, value: Array, sigma: float, gain: float, t: int) -> Array:
    """The zeros of M - pretrained - gain h(M), by Newton's method kept inside a bracket."""
    inside = grid[np.abs(grid) <= grid[-1] - 6.0 * sigma]  # near the ends of the grid h is not that of a smooth value
    if inside.size:
        bend = float(_bend(grid, _kernel(grid, inside, sigma), value, sigma).max())
        if gain * bend >= 1.0:
            strength, needed = sigma**2 / gain, sigma**2 * bend
            raise ValueError(f"strength[{t}] = {strength:g}: must exceed {needed:.6g}, or optima need not be unique")
    reach = 2.0 * gain * float(np.abs(np.gradient(value, grid)).max())  # |h| is at most the slope of the value
    low, high, mean = pretrained - reach, pretrained + reach, pretrained
    for _ in range(100):
        kernel = _kernel(grid, mean, sigma)
        residual = mean - pretrained - gain * _slope(grid, kernel, value, sigma)
        if np.abs(residual).max() <= 1e-13 * (1.0 + np.abs(mean).max()):
            return mean
        low, high = np.where(residual < 0, mean, low), np.where(residual > 0, mean, high)
        with np.errstate(divide="ignore"):
            newton = mean - residual / (1.0 - gain * _bend(grid, kernel, value, sigma))
        mean = np.where((newton > low) & (newton < high), newton, (low + high) / 2.0)
    raise ArithmeticError(f"no optimal control of step {t} found within 100 iterations")
