r"""Linear-Gaussian chains with a quadratic reward: exact objective, gradients and laws.

Notation. Steps run $t = T, \dots, 1$; index 0 of every per-step array is step $t = 1$.

    x_{t-1} = (A_t + sum_i theta_i N_{t,i}) x_t + B_t theta + c_t + std_t eps_t,     x_T ~ N(mean_T, cov_T),

with eps_t standard normal. Without `N` the chain is *additive* (its mean is linear in (x, theta)); with it, *bilinear*.
Each step has its own copy theta_t of the parameters, all equal unless a function takes `step_parameters`.
The return is the reward at x_0 minus the running penalties, and the objective J is its mean.

Arrays may hold `fractions.Fraction` (NumPy dtype object). The functions that only add and multiply then return exact
rational numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]  # float64, or object with Fraction entries
Noise = Literal["gaussian", "rademacher"]

_MAX_NODES = 200_000
_to_fraction = np.frompyfunc(Fraction, 1, 1)


def _assign(owner: object, given: dict[str, ArrayLike]) -> None:
    """Set fields of a frozen dataclass to arrays: float64, or Fractions if any entry of any of them is an object."""
    arrays = {name: np.asarray(value) for name, value in given.items()}
    exact = any(array.dtype == object for array in arrays.values())
    for name, array in arrays.items():
        finite = np.isfinite(array.astype(np.float64))
        if not finite.all():
            raise ValueError(f"{name} has {int((~finite).sum())} entries that are not finite; all must be finite")
        converted = np.asarray(_to_fraction(array), dtype=object) if exact else array.astype(np.float64)
        converted.setflags(write=False)
        object.__setattr__(owner, name, converted)


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must have shape {shape}")


def _check_symmetric(name: str, array: Array) -> None:
    gap = float(np.abs((array - array.T).astype(np.float64)).max(initial=0.0))
    if gap > 1e-12 * (1.0 + float(np.abs(array.astype(np.float64)).max(initial=0.0))):
        raise ValueError(f"{name} differs from its transpose by {gap:g}; it must be symmetric")


@dataclass(frozen=True, eq=False)
class LinearGaussianChain:
    """The chain of the module docstring.

    Shapes: A (T, d, d), B (T, d, p), c (T, d), std (T,), theta (p,), mean_T (d,), cov_T (d, d), and N (T, p, d, d) or
    None. Raises ValueError for a wrong shape, a non-finite entry, a negative std or a cov_T that is not a covariance.
    A zero std is allowed: the step is then deterministic and its noise is no source of a score.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.1], [2.0], [1.0], [[1.0]])
    >>> chain.steps, chain.dim, chain.parameters, chain.additive
    (1, 1, 1, True)
    """

    A: Array
    B: Array
    c: Array
    std: Array
    theta: Array
    mean_T: Array
    cov_T: Array
    N: Array | None = None

    def __init__(
        self,
        A: ArrayLike,
        B: ArrayLike,
        c: ArrayLike,
        std: ArrayLike,
        theta: ArrayLike,
        mean_T: ArrayLike,
        cov_T: ArrayLike,
        N: ArrayLike | None = None,
    ) -> None:
        given = {"A": A, "B": B, "c": c, "std": std, "theta": theta, "mean_T": mean_T, "cov_T": cov_T}
        _assign(self, given if N is None else {**given, "N": N})
        if self.B.ndim != 3 or 0 in self.B.shape:
            raise ValueError(f"B has shape {self.B.shape}; it must have shape (T, d, p), none of them zero")
        steps, dim, count = self.B.shape
        _check_shape("A", self.A, (steps, dim, dim))
        _check_shape("c", self.c, (steps, dim))
        _check_shape("std", self.std, (steps,))
        _check_shape("theta", self.theta, (count,))
        _check_shape("mean_T", self.mean_T, (dim,))
        _check_shape("cov_T", self.cov_T, (dim, dim))
        if self.N is not None:
            _check_shape("N", self.N, (steps, count, dim, dim))
        if (self.std < 0).any():
            raise ValueError(f"std has the entry {min(self.std)}; all entries must be at least 0")
        _check_symmetric("cov_T", self.cov_T)
        eigenvalues = np.linalg.eigvalsh(self.cov_T.astype(np.float64))
        if eigenvalues[0] < -1e-12 * max(1.0, float(eigenvalues[-1])):
            raise ValueError(f"cov_T has the eigenvalue {eigenvalues[0]:g}; it must be positive semi-definite")

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return self.B.shape[0]

    @property
    def dim(self) -> int:
        """Dimension d of the state."""
        return self.B.shape[1]

    @property
    def parameters(self) -> int:
        """Number p of parameters."""
        return self.B.shape[2]

    @property
    def additive(self) -> bool:
        """Whether the mean of a step is linear in (x, theta)."""
        return self.N is None or not self.N.any()

    @property
    def exact(self) -> bool:
        """Whether the entries are fractions."""
        return self.theta.dtype == object


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """R(x) = constant + linear . x + x^T quadratic x / 2.

    Shapes: constant (), linear (d,), quadratic (d, d). Raises ValueError for a wrong shape or an asymmetric quadratic.

    >>> QuadraticReward(1.0, [1.0], [[2.0]]).linear
    array([1.])
    """

    constant: Array
    linear: Array
    quadratic: Array

    def __init__(self, constant: ArrayLike, linear: ArrayLike, quadratic: ArrayLike) -> None:
        _assign(self, {"constant": constant, "linear": linear, "quadratic": quadratic})
        _check_shape("constant", self.constant, ())
        if self.linear.ndim != 1:
            raise ValueError(f"linear has shape {self.linear.shape}; it must have shape (d,)")
        _check_shape("quadratic", self.quadratic, 2 * self.linear.shape)
        _check_symmetric("quadratic", self.quadratic)


@dataclass(frozen=True, eq=False)
class KLPenalty:
    """strength * sum_t KL(step t at theta || step t at reference_theta), a running cost.

    Each term is |mean_t(x_t, theta_t) - mean_t(x_t, reference_theta)|^2 / (2 std_t^2). Shapes: strength (),
    reference_theta (p,). Raises ValueError for a negative strength or a wrong shape.

    >>> float(KLPenalty(0.5, [0.0]).strength)
    0.5
    """

    strength: Array
    reference_theta: Array

    def __init__(self, strength: ArrayLike, reference_theta: ArrayLike) -> None:
        _assign(self, {"strength": strength, "reference_theta": reference_theta})
        _check_shape("strength", self.strength, ())
        if self.strength < 0:
            raise ValueError(f"strength is {self.strength[()]}; it must be at least 0")
        if self.reference_theta.ndim != 1:
            raise ValueError(f"reference_theta has shape {self.reference_theta.shape}; it must have shape (p,)")


def check_problem(chain: LinearGaussianChain, reward: QuadraticReward, penalty: KLPenalty | None) -> None:
    """Raise ValueError unless the reward and the penalty fit the chain.

    >>> chain = LinearGaussianChain([[[1.0]]], [[[1.0]]], [[0.0]], [1.0], [2.0], [0.0], [[1.0]])
    >>> check_problem(chain, QuadraticReward(0.0, [1.0], [[0.0]]), None)
    """
    _check_shape("linear", reward.linear, (chain.dim,))
    if penalty is not None:
        _check_shape("reference_theta", penalty.reference_theta, (chain.parameters,))
        if not chain.std.all():
            raise ValueError(f"std is 0 at step {int(np.argmin(chain.std)) + 1}; with a penalty it must be positive")


@dataclass(frozen=True)
class _Step:
    """Step t at its own parameters: mean(x) = matrix x + offset, and d mean / d theta_i = N_i x + B_i.

    The penalty is rate / 2 * |drift x + shift|^2; parameter noise of standard deviation mu acts on theta_t.
    """

    matrix: Array  # (d, d)
    offset: Array  # (d,)
    variance: Any  # std_t^2
    slopes: Array  # N, (p, d, d)
    columns: Array  # B transposed, (p, d)
    drift: Array  # (d, d)
    shift: Array  # (d,)
    rate: Any
    mu: Any


def _steps(
    chain: LinearGaussianChain, penalty: KLPenalty | None, step_parameters: Array, noise_levels: Array
) -> list[_Step]:
    """The steps t = 1..T, in this order."""
    zero = np.zeros_like(chain.theta, shape=(chain.parameters, chain.dim, chain.dim))
    steps: list[_Step] = []
    for i in range(chain.steps):
        slopes = zero if chain.N is None else chain.N[i]
        theta = step_parameters[i]
        change = theta - (theta if penalty is None else penalty.reference_theta)
        variance = chain.std[i] * chain.std[i]
        steps.append(
            _Step(
                matrix=chain.A[i] + np.tensordot(theta, slopes, axes=1),
                offset=chain.B[i] @ theta + chain.c[i],
                variance=variance,
                slopes=slopes,
                columns=chain.B[i].T,
                drift=np.tensordot(change, slopes, axes=1),
                shift=chain.B[i] @ change,
                rate=0 if penalty is None else penalty.strength[()] / variance,
                mu=noise_levels[i],
            )
        )
    return steps


def _propagate(step: _Step, mean: Array, cov: Array) -> tuple[Array, Array]:
    """Mean and covariance after one step; parameter noise enters through its second moment only."""
    spread = step.slopes @ mean + step.columns  # (p, d): E of d mean / d theta_i
    noise = spread.T @ spread + sum(slope @ cov @ slope.T for slope in step.slopes)
    white = step.variance * np.eye(len(mean), dtype=mean.dtype)
    return step.matrix @ mean + step.offset, step.matrix @ cov @ step.matrix.T + white + step.mu * step.mu * noise


def _expected_penalty(step: _Step, mean: Array, cov: Array) -> Any:
    """Mean cost of the step for a state with this mean and covariance."""
    drift = step.drift @ mean + step.shift
    spread = step.slopes @ mean + step.columns
    square = drift @ drift + np.trace(step.drift @ cov @ step.drift.T)
    noise = (spread * spread).sum() + sum(np.trace(slope @ cov @ slope.T) for slope in step.slopes)
    return step.rate * (square + step.mu * step.mu * noise) / 2


def _resolve_parameters(chain: LinearGaussianChain, step_parameters: ArrayLike | None) -> Array:
    if step_parameters is None:
        return np.repeat(chain.theta[None], chain.steps, axis=0)
    parameters = np.asarray(step_parameters)
    _check_shape("step_parameters", parameters, (chain.steps, chain.parameters))
    return parameters


def _expected_return(chain: LinearGaussianChain, reward: QuadraticReward, steps: list[_Step]) -> Any:
    mean, cov, cost = chain.mean_T, chain.cov_T, 0
    for step in reversed(steps):
        cost = cost + _expected_penalty(step, mean, cov)
        mean, cov = _propagate(step, mean, cov)
    curvature = mean @ reward.quadratic @ mean + np.trace(reward.quadratic @ cov)
    return reward.constant[()] + reward.linear @ mean + curvature / 2 - cost


def _adjoint(chain: LinearGaussianChain, reward: QuadraticReward, steps: list[_Step]) -> Array:
    """Per-step gradients from value functions V_{t-1}(x) = const + slope . x + x^T curve x / 2 and the marginals."""
    mean, cov = chain.mean_T, chain.cov_T
    marginal: list[tuple[Array, Array]] = []
    for step in reversed(steps):
        marginal.insert(0, (mean, cov + np.outer(mean, mean)))
        mean, cov = _propagate(step, mean, cov)
    slope, curve = reward.linear, reward.quadratic
    rows: list[Array] = []
    for step, (first, second) in zip(steps, marginal, strict=True):
        # E over x of D_i(x)^T (force + pull x), D_i(x) = N_i x + B_i
        force = slope + curve @ step.offset - step.rate * step.shift
        pull = curve @ step.matrix - step.rate * step.drift
        rows.append(
            np.array(
                [
                    (slopes @ first + column) @ force + np.trace(slopes.T @ pull @ second) + column @ pull @ first
                    for slopes, column in zip(step.slopes, step.columns, strict=True)
                ]
            )
        )
        inner = curve - step.rate * np.eye(chain.dim, dtype=curve.dtype)  # what parameter noise of this step feels
        noise_slope = sum(s.T @ inner @ b for s, b in zip(step.slopes, step.columns, strict=True))
        noise_curve = sum(s.T @ inner @ s for s in step.slopes)
        slope = (
            step.matrix.T @ (slope + curve @ step.offset)
            - step.rate * step.drift.T @ step.shift
            + step.mu * step.mu * noise_slope
        )
        curve = (
            step.matrix.T @ curve @ step.matrix
            - step.rate * step.drift.T @ step.drift
            + step.mu * step.mu * noise_curve
        )
    return np.stack(rows)


def objective(
    chain: LinearGaussianChain,
    reward: QuadraticReward,
    penalty: KLPenalty | None = None,
    *,
    step_parameters: ArrayLike | None = None,
) -> Any:
    """Exact J = E[R(x_0) - penalties], by the recursion of means and covariances.

    `step_parameters` (T, p) replaces the common theta by one per step. ValueError if shapes do not fit.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> float(objective(chain, QuadraticReward(0.0, [0.0], [[2.0]])))
    6.75
    """
    check_problem(chain, reward, penalty)
    levels = np.zeros_like(chain.std)
    return _expected_return(chain, reward, _steps(chain, penalty, _resolve_parameters(chain, step_parameters), levels))


def step_gradients(
    chain: LinearGaussianChain,
    reward: QuadraticReward,
    penalty: KLPenalty | None = None,
    *,
    step_parameters: ArrayLike | None = None,
) -> Array:
    """Exact g_t = dJ / d theta_t, shape (T, p), by quadratic value functions.

    Derived in docs/credit-matrix.md. ValueError if shapes do not fit.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> step_gradients(chain, QuadraticReward(0.0, [0.0], [[2.0]]))
    array([[5.]])
    """
    check_problem(chain, reward, penalty)
    levels = np.zeros_like(chain.std)
    return _adjoint(chain, reward, _steps(chain, penalty, _resolve_parameters(chain, step_parameters), levels))


def gradient(chain: LinearGaussianChain, reward: QuadraticReward, penalty: KLPenalty | None = None) -> Array:
    """Exact gradient of J in the common theta, shape (p,): the sum of the per-step gradients.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> gradient(chain, QuadraticReward(0.0, [0.0], [[2.0]]))
    array([5.])
    """
    return step_gradients(chain, reward, penalty).sum(axis=0)


def _noise_levels(chain: LinearGaussianChain, mu: Any, noisy: ArrayLike | None) -> Array:
    if not mu > 0:
        raise ValueError(f"mu is {mu}; it must be positive")
    mask = np.ones(chain.steps, dtype=bool) if noisy is None else np.asarray(noisy, dtype=bool)
    _check_shape("noisy", mask, (chain.steps,))
    return mask * mu


def _shared_parameters(chain: LinearGaussianChain, levels: Array, noise: Noise) -> tuple[Array, Array]:
    """Weights (n,) and step parameters (n, T, p) that integrate every objective of this chain over xi exactly.

    The objective is quadratic in a common shift of an additive chain, where second differences suffice, and of degree
    2T in each coordinate otherwise, where T + 1 Gauss-Hermite nodes do.
    """
    count = chain.parameters
    if chain.additive:
        shifts = np.vstack([np.zeros((1, count)), np.eye(count), -np.eye(count)])
        weights = np.r_[1.0 - count, np.full(2 * count, 0.5)]
    else:
        nodes, masses = np.array([-1.0, 1.0]), np.array([0.5, 0.5])
        if noise == "gaussian":
            nodes, masses = np.polynomial.hermite_e.hermegauss(chain.steps + 1)
        if len(nodes) ** count > _MAX_NODES:
            raise ValueError(f"theta has {count} entries: {len(nodes)}^{count} nodes; at most {_MAX_NODES} are allowed")
        shifts = np.array(list(itertools.product(nodes, repeat=count)))
        weights = np.array(list(itertools.product(masses / masses.sum(), repeat=count))).prod(axis=1)
    return weights, chain.theta + levels[:, None] * shifts[:, None]


def smoothed_objective(
    chain: LinearGaussianChain,
    reward: QuadraticReward,
    mu: Any,
    noise: Noise = "gaussian",
    shared_noise: bool = False,
    penalty: KLPenalty | None = None,
    noisy: ArrayLike | None = None,
) -> Any:
    """Exact J_mu = E J(theta_1 + mu xi_1, ..., theta_T + mu xi_T).

    `noisy` (T,) says which steps are perturbed (default: all); `shared_noise` uses one xi for all of them. With one xi
    per step the law of xi matters through its second moment only, so both laws give the same number. ValueError if mu
    is not positive, shapes do not fit or a shared xi needs too many quadrature nodes.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> float(smoothed_objective(chain, QuadraticReward(0.0, [0.0], [[2.0]]), 0.5))
    7.0
    """
    check_problem(chain, reward, penalty)
    levels = _noise_levels(chain, mu, noisy)
    if shared_noise:
        weights, parameters = _shared_parameters(chain, levels, noise)
        values = [objective(chain, reward, penalty, step_parameters=p) for p in parameters]
        return np.array(values) @ weights
    return _expected_return(chain, reward, _steps(chain, penalty, _resolve_parameters(chain, None), levels))


def smoothed_step_gradients(
    chain: LinearGaussianChain,
    reward: QuadraticReward,
    mu: Any,
    noise: Noise = "gaussian",
    shared_noise: bool = False,
    penalty: KLPenalty | None = None,
    noisy: ArrayLike | None = None,
) -> Array:
    """Exact d J_mu / d theta_t, shape (T, p); arguments and errors as for `smoothed_objective`.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> smoothed_step_gradients(chain, QuadraticReward(0.0, [0.0], [[2.0]]), 0.5)
    array([[5.]])
    """
    check_problem(chain, reward, penalty)
    levels = _noise_levels(chain, mu, noisy)
    if shared_noise:
        weights, parameters = _shared_parameters(chain, levels, noise)
        rows = [step_gradients(chain, reward, penalty, step_parameters=p) for p in parameters]
        return np.tensordot(weights, np.array(rows), axes=1)
    return _adjoint(chain, reward, _steps(chain, penalty, _resolve_parameters(chain, None), levels))


def marginals(chain: LinearGaussianChain) -> tuple[Array, Array]:
    """Exact means (T+1, d) and covariances (T+1, d, d) of x_0..x_T; here index t is time t.

    >>> chain = LinearGaussianChain([[[0.5]]], [[[1.0]]], [[0.0]], [0.5], [2.0], [1.0], [[1.0]])
    >>> marginals(chain)[0].tolist()
    [[2.5], [1.0]]
    """
    mean, cov = chain.mean_T, chain.cov_T
    means, covs = [mean], [cov]
    for step in reversed(_steps(chain, None, _resolve_parameters(chain, None), np.zeros_like(chain.std))):
        mean, cov = _propagate(step, mean, cov)
        means.insert(0, mean)
        covs.insert(0, cov)
    return np.stack(means), np.stack(covs)


def second_moment_reward(chain: LinearGaussianChain, reward: QuadraticReward) -> Any:
    """Exact E[R(x_0)^2] for the Gaussian x_0. ValueError if shapes do not fit.

    >>> chain = LinearGaussianChain([[[0.0]]], [[[0.0]]], [[0.0]], [1.0], [0.0], [0.0], [[1.0]])
    >>> float(second_moment_reward(chain, QuadraticReward(0.0, [0.0], [[2.0]])))
    3.0
    """
    check_problem(chain, reward, None)
    means, covs = marginals(chain)
    slope = reward.linear + reward.quadratic @ means[0]
    spread = reward.quadratic @ covs[0]
    first = objective(chain, reward)
    return first * first + slope @ covs[0] @ slope + np.trace(spread @ spread) / 2
