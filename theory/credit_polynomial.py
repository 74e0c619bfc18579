r"""Exact moments of credit-matrix estimators by polynomial algebra: any chain, any parameter noise, running costs.

The roll-out, the costates and the estimate are polynomials in the independent standard variables (whitened $x_T$,
$\epsilon_1..\epsilon_T$, $\xi$); `theory.polynomials` takes their moments. With fractions in the chain everything is an
exact rational number. The cost grows quickly with T, d and p: this engine is for small instances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from theory.chains import Array, KLPenalty, LinearGaussianChain, Noise, QuadraticReward
from theory.credit_wick import square_root
from theory.polynomials import Coefficient, Polynomial, Variables, even_part

Vector = list[Polynomial]
Matrix = list[Vector]


@dataclass(frozen=True)
class _Step:
    """What the sweep needs of step t; a costate is a vector of d polynomials."""

    jacobian: Matrix  # (d, d): d mean / d x_t
    directions: Matrix  # (d, p): d mean / d theta_t
    noise: Vector  # eps_t, (d,)
    cost: Polynomial
    cost_state: Vector  # d cost / d x_t, (d,)
    cost_parameters: Vector  # d cost / d theta_t, (p,)


@dataclass(frozen=True)
class Rollout:
    """The chain, its reward and its costs as polynomials; xi[t-1] is the noise of theta_t, or None if it has none."""

    variables: Variables
    chain_indices: range
    parameter_indices: range
    steps: tuple[_Step, ...]
    reward: Polynomial
    reward_gradient: Vector
    xi: tuple[Vector | None, ...]
    std: Sequence[Coefficient]
    mu: Coefficient
    xi_shares: int  # number of steps that share one xi


def rollout(
    chain: LinearGaussianChain,
    reward: QuadraticReward,
    *,
    noisy: Sequence[bool],
    mu: Any,
    noise: Noise,
    shared_noise: bool,
    penalty: KLPenalty | None,
    limit: int,
) -> Rollout:
    """The roll-out with theta_t + mu xi_t at the steps where `noisy`; `limit` bounds the monomials of a polynomial.

    Raises ValueError above the limit, and for an exact chain whose cov_T has no rational Cholesky factor.

    >>> chain = LinearGaussianChain([[[1.0]]], [[[1.0]]], [[0.0]], [1.0], [2.0], [0.0], [[1.0]])
    >>> options = {"mu": 0.0, "noise": "gaussian", "shared_noise": False, "penalty": None, "limit": 100}
    >>> rollout(chain, QuadraticReward(0.0, [1.0], [[0.0]]), noisy=[False], **options).reward.exponents()
    {(1, 0): 1.0, (0, 0): 2.0, (0, 1): 1.0}
    """
    steps, dim, count = chain.B.shape
    number: Callable[[Any], Coefficient] = Fraction if chain.exact else float
    sources = sum(noisy) if not shared_noise else int(any(noisy))
    size = dim * (steps + 1)
    variables = Variables(("gaussian",) * size + (noise,) * (count * sources), limit)
    symbols = variables.all()
    xi: list[Vector | None] = []
    used = 0
    for perturbed in noisy:
        begin = size + count * (0 if shared_noise else used)
        xi.append(symbols[begin : begin + count] if perturbed else None)
        used += perturbed

    root = _cholesky(chain.cov_T) if chain.exact else square_root(chain.cov_T)
    state = [
        _combine(variables, zip(row, symbols[:dim], strict=True), start)
        for row, start in zip(root.tolist(), chain.mean_T.tolist(), strict=True)
    ]
    mu_value = number(mu)
    std = chain.std.tolist()
    built: list[_Step] = []
    for i in reversed(range(steps)):
        perturbation = xi[i]
        theta = [variables.constant(value) for value in chain.theta.tolist()]
        if perturbation is not None:
            theta = [value + mu_value * symbol for value, symbol in zip(theta, perturbation, strict=True)]
        symbols_t = symbols[dim * (i + 1) : dim * (i + 2)]
        mean, step = _build_step(chain, i, penalty, number, variables, theta, state, symbols_t)
        built.insert(0, step)
        state = [value + std[i] * symbol for value, symbol in zip(mean, symbols_t, strict=True)]

    quadratic = [[number(value) for value in row] for row in reward.quadratic.tolist()]
    linear = [number(value) for value in reward.linear.tolist()]
    curved = [_combine(variables, zip(row, state, strict=True), 0) for row in quadratic]
    value = variables.constant(number(reward.constant.item()))
    for slope, bend, x in zip(linear, curved, state, strict=True):
        value = value + (bend * number(0.5) + slope) * x
    return Rollout(
        variables=variables,
        chain_indices=range(size),
        parameter_indices=range(size, len(symbols)),
        steps=tuple(built),
        reward=value,
        reward_gradient=[bend + slope for bend, slope in zip(curved, linear, strict=True)],
        xi=tuple(xi),
        std=std,
        mu=mu_value,
        xi_shares=sum(noisy) if shared_noise else 1,
    )


def estimate(
    roll: Rollout, weights: Array, *, baseline: Coefficient, antithetic: bool, chain_antithetic: bool
) -> Vector:
    """The estimate of one credit matrix `weights` (T, T+2), a vector of p polynomials.

    >>> chain = LinearGaussianChain([[[1.0]]], [[[1.0]]], [[0.0]], [1.0], [2.0], [0.0], [[1.0]])
    >>> options = {"mu": 0.0, "noise": "gaussian", "shared_noise": False, "penalty": None, "limit": 100}
    >>> roll = rollout(chain, QuadraticReward(0.0, [0.0], [[2.0]]), noisy=[False], **options)
    >>> flags = {"baseline": 0.0, "antithetic": False, "chain_antithetic": False}
    >>> estimate(roll, np.array([[1.0, 0.0, 0.0]]), **flags)[0].exponents()
    {(1, 0): 2.0, (0, 0): 4.0, (0, 1): 2.0}
    """
    steps, count = len(roll.steps), len(roll.steps[0].cost_parameters)
    zero = roll.variables.constant(0)
    columns: list[list[Coefficient]] = weights.T.tolist()
    total = _pull_back(roll, roll.reward_gradient, 1, columns[0], costs=True)

    # The return after step k is the reward minus the costs of the steps below k; summing by parts, the reward meets
    # the sum of all scores once and each cost the scores of the steps above it.
    scores: list[Vector] = []
    for k in range(1, steps + 1):
        if any(columns[k]):
            costate = [symbol * (1 / roll.std[k - 1]) for symbol in roll.steps[k - 1].noise]
            scores.append(_pull_back(roll, costate, k, columns[k], costs=False))
            total = _add(total, _pull_back(roll, [zero] * len(costate), k, columns[k], costs=True))
        else:
            scores.append([zero] * count)
    above = [zero] * count
    scale = roll.mu * roll.xi_shares
    for weight, xi in zip(columns[-1], roll.xi, strict=True):
        if weight and xi is not None:
            above = _add(above, [symbol * (weight / scale) for symbol in xi])
    for k in reversed(range(steps)):
        total = _add(total, [roll.steps[k].cost * score * -1 for score in above])
        above = _add(above, scores[k])
    advantage = roll.reward - baseline
    total = _add(total, [advantage * score for score in above])
    if antithetic:
        total = [even_part(component, roll.parameter_indices) for component in total]
    if chain_antithetic:
        total = [even_part(component, roll.chain_indices) for component in total]
    return total


def _pull_back(roll: Rollout, costate: Vector, k: int, weights: Sequence[Coefficient], *, costs: bool) -> Vector:
    """sum over t >= k of weights[t-1] * (costate injected at the mean of step k and pulled back to theta_t).

    With `costs` the gradient of the costs of steps k..t is subtracted along the way.
    """
    last = max((t for t in range(k, len(weights) + 1) if weights[t - 1]), default=0)
    total = [roll.variables.constant(0)] * len(roll.steps[0].cost_parameters)
    for t in range(k, last + 1):
        step = roll.steps[t - 1]
        if weights[t - 1]:
            row = _transposed_product(step.directions, costate)
            if costs:
                row = [value - cost for value, cost in zip(row, step.cost_parameters, strict=True)]
            total = [value + weights[t - 1] * entry for value, entry in zip(total, row, strict=True)]
        if t < last:
            costate = _transposed_product(step.jacobian, costate)
            if costs:
                costate = [value - cost for value, cost in zip(costate, step.cost_state, strict=True)]
    return total


def _build_step(
    chain: LinearGaussianChain,
    i: int,
    penalty: KLPenalty | None,
    number: Callable[[Any], Coefficient],
    variables: Variables,
    theta: Vector,
    state: Vector,
    noise: Vector,
) -> tuple[Vector, _Step]:
    """Mean of step i + 1 given the polynomials theta and x_t, and the step's derivatives and cost."""
    dim, count = chain.dim, chain.parameters
    slopes: list[list[list[Coefficient]]] = [] if chain.N is None else chain.N[i].tolist()
    base: list[list[Coefficient]] = chain.A[i].tolist()
    columns: list[list[Coefficient]] = chain.B[i].tolist()
    offset: list[Coefficient] = chain.c[i].tolist()
    jacobian = [[variables.constant(value) for value in row] for row in base]
    directions = [[variables.constant(value) for value in row] for row in columns]
    for j, slope in enumerate(slopes):
        for a in range(dim):
            for b in range(dim):
                jacobian[a][b] = jacobian[a][b] + slope[a][b] * theta[j]
            directions[a][j] = directions[a][j] + _combine(variables, zip(slope[a], state, strict=True), 0)
    mean = [
        _combine(variables, zip(base[a], state, strict=True), offset[a]) + _inner(directions[a], theta)
        for a in range(dim)
    ]
    zero = variables.constant(0)
    if penalty is None:
        return mean, _Step(jacobian, directions, noise, zero, [zero] * dim, [zero] * count)
    rate = number(penalty.strength.item()) / number(chain.std[i] * chain.std[i])
    change = [value - number(base) for value, base in zip(theta, penalty.reference_theta.tolist(), strict=True)]
    gap = [_inner(directions[a], change) for a in range(dim)]
    drift = [[variables.constant(0)] * dim for _ in range(dim)]
    for j, slope in enumerate(slopes):
        drift = [[drift[a][b] + slope[a][b] * change[j] for b in range(dim)] for a in range(dim)]
    half = rate * number(0.5)
    return mean, _Step(
        jacobian=jacobian,
        directions=directions,
        noise=noise,
        cost=_inner(gap, gap) * half,
        cost_state=[value * rate for value in _transposed_product(drift, gap)],
        cost_parameters=[value * rate for value in _transposed_product(directions, gap)],
    )


def _combine(variables: Variables, pairs: Any, start: Coefficient) -> Polynomial:
    """start + the sum of number * polynomial over the pairs."""
    total = variables.constant(start)
    for factor, polynomial in pairs:
        if factor:
            total = total + factor * polynomial
    return total


def _inner(first: Vector, second: Vector) -> Polynomial:
    total = first[0] * second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        total = total + a * b
    return total


def _transposed_product(matrix: Matrix, vector: Vector) -> Vector:
    return [_inner([row[j] for row in matrix], vector) for j in range(len(matrix[0]))]


def _add(first: Vector, second: Vector) -> Vector:
    return [a + b for a, b in zip(first, second, strict=True)]


def _cholesky(cov: Array) -> Array:
    """Rational Cholesky factor; ValueError if a pivot is not the square of a fraction."""
    dim = len(cov)
    factor = np.zeros_like(cov)
    for j in range(dim):
        pivot: Fraction = cov[j, j] - sum(factor[j, :j] ** 2)
        root = Fraction(math.isqrt(max(pivot.numerator, 0)), math.isqrt(pivot.denominator))
        if root * root != pivot:
            raise ValueError(f"cov_T has the Cholesky pivot {pivot}; for exact moments it must be a fraction squared")
        factor[j, j] = root
        for i in range(j + 1, dim):
            rest = cov[i, j] - sum(factor[i, :j] * factor[j, :j])
            factor[i, j] = rest / root if root else rest
    return factor
