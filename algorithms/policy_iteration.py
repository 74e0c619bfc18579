r"""PI-FT's policy iteration in function space, on chains of one or two dimensions, to quadrature accuracy.

What is maximised is E[reward(x_0)] less sum_t b_t KL(step t || reference's step t), b_t the `strength`. Steps are those
of this room, t = T, ..., 1; PI-FT's time is T - t. All is said in the means of the steps, m_t(x) the reference's and
M_t(x) the policy's. With W standard normal and V_0 the reward, the value of a policy is (PI-FT, eq. 36)

    V_t(x) = E V_{t-1}(M_t(x) + std_t W) - b_t |M_t(x) - m_t(x)|^2 / (2 std_t^2).

The right side, seen as a function of the mean M, has gradient h_t(M) - b_t (M - m) / std_t^2 with h_t(z) =
E grad V_{t-1}(z + std_t W). Policy iteration is gradient ascent on it from M = m (PI-FT, Algorithm 1, eq. 35), with
damping eta:

    M <- (1 - eta) M + eta (m + std_t^2 h_t(M) / b_t).

Its Jacobian has eigenvalues 1 - eta + eta e, where e runs over the eigenvalues of std_t^2 grad h_t / b_t. Hence: the
one-step problem is strictly concave iff all e < 1; undamped iteration contracts if all |e| < 1.

V_{t-1} is kept on a uniform grid. Gaussian expectations are sums of the kernel over its nodes, the gradient being
E[V(z + std W) W] / std; for a smooth V the error of such sums, as always with the trapezoidal rule, falls like
exp(-2 pi^2 std^2 / spacing^2). Values at any point are the same formulas given V_{t-1}, so nothing is interpolated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from algorithms.chain import Chain, Condition, Params
from algorithms.objective import Reward

REACH = 8.0  # kernels are cut at so many standard deviations; the mass beyond is 1e-15
COARSEST = 0.75  # spacing over standard deviation: exp(-2 pi^2 / COARSEST^2) = 6e-16
RIPPLE = 1e-3  # of the range of the values: the largest ripple that is not warned of
CHUNK = 2048  # points that are worked on at once, so that their windows stay in the cache


class NotContracting(UserWarning):
    """Policy iteration that need not converge: its Jacobian has an eigenvalue of modulus >= 1 in the window."""


class Unresolved(UserWarning):
    """Values that change too fast for the grid: sums over its nodes are not accurate."""


# --- the grid ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A uniform grid in one or two dimensions, and the window in its middle where answers are wanted.

    Values beyond the grid are extrapolated, exactly if they are affine. What this spoils is a border of the grid as
    wide as the chain moves: leave that much around the window. Conditions are checked and movements are measured in
    the window only, since the border is wrong and the chain does not go there. The spacing must resolve the noise of
    every step (or ValueError) and the values themselves (or `Unresolved`); to be sure, solve on `finer()` and compare.

    Args:
        lower, upper, points: first and last node and number of nodes of each axis; numbers mean one dimension.
        window: (lower, upper) of the window; by default half as wide as the grid, in its middle.

    Raises:
        ValueError: if lengths disagree, there are not one or two axes, bounds are not in order, an axis has fewer than
            3 nodes, or the window does not lie in the grid or holds no node.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    points: tuple[int, ...]
    window: tuple[tuple[float, ...], tuple[float, ...]]

    def __init__(
        self,
        lower: float | Sequence[float],
        upper: float | Sequence[float],
        points: int | Sequence[int],
        window: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
    ) -> None:
        low, high = _axes(lower), _axes(upper)
        count = (points,) if isinstance(points, int) else tuple(points)
        if not len(low) == len(high) == len(count):
            raise ValueError(
                f"lower, upper, points have {len(low)}, {len(high)}, {len(count)} entries: must agree in number"
            )
        if len(low) not in (1, 2):
            raise ValueError(f"lower has {len(low)} entries: the grid must have 1 or 2 dimensions")
        for a, b, n in zip(low, high, count, strict=True):
            if not (math.isfinite(a) and math.isfinite(b) and a < b):
                raise ValueError(f"lower = {a:g}: must be finite and less than upper = {b:g}")
            if n < 3:
                raise ValueError(f"points = {n}: must be >= 3 on every axis")
        if window is None:
            inner = [(0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b) for a, b in zip(low, high, strict=True)]
            window = tuple(w[0] for w in inner), tuple(w[1] for w in inner)
        w_low, w_high = _axes(window[0]), _axes(window[1])
        if len(w_low) != len(low) or len(w_high) != len(low):
            raise ValueError(f"window = {window}: must have a lower and an upper bound for each of {len(low)} axes")
        if not all(a <= c < d <= b for a, c, d, b in zip(low, w_low, w_high, high, strict=True)):
            raise ValueError(f"window = {(w_low, w_high)}: must lie within the grid, {(low, high)}")
        for name, value in (("lower", low), ("upper", high), ("points", count), ("window", (w_low, w_high))):
            object.__setattr__(self, name, value)
        if not bool(self.inside(self.nodes()).any()):
            raise ValueError(f"window = {(w_low, w_high)}: must hold a node of the grid")

    @property
    def dimension(self) -> int:
        return len(self.points)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbouring nodes, of each axis."""
        return tuple((b - a) / (n - 1) for a, b, n in zip(self.lower, self.upper, self.points, strict=True))

    def nodes(self, padding: Sequence[int] = (0, 0)) -> Tensor:
        """Return the nodes (N, d), the last axis fastest, with `padding` further ones at both ends of each axis."""
        axes = [
            a + h * torch.arange(-p, n + p, dtype=torch.float64)
            for a, h, n, p in zip(self.lower, self.spacing, self.points, padding, strict=False)
        ]
        return torch.cartesian_prod(*axes).reshape(-1, self.dimension)

    def finer(self) -> Grid:
        """Return the grid with half the spacing, and the same window."""
        return Grid(self.lower, self.upper, [2 * n - 1 for n in self.points], self.window)

    def inside(self, x: Tensor) -> Tensor:
        """Return which of the points x (n, d) lie in the window, up to rounding: (n,) bool."""
        slack = 1e-9 * x.new_tensor(self.spacing)
        low, high = (x.new_tensor(bound) for bound in self.window)
        return ((x >= low - slack) & (x <= high + slack)).all(1)


def _axes(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, int | float) else tuple(float(v) for v in value)


# --- Gaussian expectations ---------------------------------------------------------------------------------------


def _kernels(gap: Tensor, std: float, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of nodes at z + gap in E V(z + std W), and their first and second derivatives by z."""
    u = gap / std
    weight = spacing / (std * math.sqrt(2 * math.pi)) * torch.exp(-0.5 * u * u)
    return weight, weight * u / std, weight * (u * u - 1) / std**2


def _radius(std: float, spacing: float) -> int:
    return math.ceil(REACH * std / spacing)


def _split(std: float, spacing: float) -> tuple[float, float]:
    """Return (s1, s2), s1^2 + s2^2 = std^2: s1 is applied to all nodes at once, s2 in a small window around a point.

    Both must be resolved by the grid, so that a `std` below sqrt(2) times the least one is left whole (s1 = 0).
    """
    least = spacing / COARSEST
    return (math.sqrt(std**2 - least**2), least) if std**2 >= 2 * least**2 else (0.0, std)


def _stencils(std: float, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_kernels` at the nodes within reach of a node."""
    radius = _radius(std, spacing)
    return _kernels(spacing * torch.arange(-radius, radius + 1, dtype=torch.float64), std, spacing)


def _convolve(values: Tensor, stencils: Sequence[Tensor]) -> Tensor:
    """Apply one stencil along each axis, which loses its length less one."""
    for axis, stencil in enumerate(stencils):
        values = values.unfold(axis, len(stencil), 1) @ stencil
    return values


def _ripple(values: Tensor, grid: Grid, padding: Sequence[int]) -> float:
    """Return the largest amplitude in the window at the highest frequency of the grid, node to node.

    It bounds what the sums over nodes cannot see. For V analytic it decays as exp(-c / spacing), the error of the sums
    as its square; for V with kinks both decay as a power of the spacing.
    """
    radius = math.ceil(REACH / COARSEST)  # there is so much padding at least
    k = torch.arange(-radius, radius + 1, dtype=torch.float64)
    stencil = torch.exp(-0.5 * (k / 2).square())
    stencil = stencil / stencil.sum() * torch.cos(math.pi * k)
    window, largest = grid.inside(grid.nodes()), 0.0
    for axis in range(grid.dimension):
        near = values
        for other, (n, p) in enumerate(zip(grid.points, padding, strict=True)):
            spare = radius if other == axis else 0
            near = near.narrow(other, p - spare, n + 2 * spare)
        found = near.unfold(axis, len(stencil), 1) @ stencil
        largest = max(largest, found.flatten()[window].abs().max().item())
    return largest


def _reflected(values: Tensor, padding: Sequence[int]) -> Tensor:
    """Continue node values by `padding` nodes at both ends of each axis: odd reflection, V(u + s) = 2 V(u) - V(u - s).

    Exact for affine V. A continuation that is exact for quadratic V too was tried: it lets errors of the border grow
    from step to step, up to a loss of concavity that is not there.
    """
    for axis, width in enumerate(padding):
        v, steps = values.movedim(axis, 0), torch.arange(1, width + 1)
        left, right = 2 * v[0] - v[steps], 2 * v[-1] - v[len(v) - 1 - steps]
        values = torch.cat([left.flip(0), v, right]).movedim(0, axis)
    return values


@dataclass(frozen=True, eq=False)
class Smoothed:
    """E V(z + std W) at any z, for a V known on the nodes of a grid and around it.

    Part of the Gaussian is applied to all nodes at once, and the least part that the grid resolves when z is known: the
    cost per point does not grow with std. Beyond the grid the function is continued by its tangent.
    """

    grid: Grid
    std: float
    level: float  # taken off the values, so that a large constant costs no digits
    values: Tensor  # V - level on the padded nodes
    table: Tensor  # V - level smoothed by the first part, on nodes padded by the second part's radius
    ripple: float  # of V, in the window

    @staticmethod
    def padding(grid: Grid, std: float) -> tuple[int, ...]:
        """Return how many nodes beyond the grid's ends are needed, on each axis."""
        return tuple(sum(_radius(s, h) for s in _split(std, h)) for h in grid.spacing)

    @classmethod
    def of(cls, grid: Grid, std: float, values: Tensor) -> Smoothed:
        """Smooth the values on the padded nodes, shaped like the padded grid."""
        middle = values[tuple(n // 2 for n in values.shape)].item()
        values = values - middle
        first = []
        for h in grid.spacing:
            s1, _ = _split(std, h)
            first.append(_stencils(s1, h)[0] if s1 else torch.ones(1, dtype=torch.float64))
        ripple = _ripple(values, grid, cls.padding(grid, std))
        return cls(grid, std, middle, values, _convolve(values, first), ripple)

    @property
    def bounds(self) -> tuple[float, float]:
        """The extreme eigenvalues of the Hessian over the nodes in the window."""
        return self._curvature[0]

    @property
    def everywhere(self) -> tuple[float, float]:
        """The same over all nodes."""
        return self._curvature[1]

    @cached_property  # evaluating a policy does not ask for it
    def _curvature(self) -> tuple[tuple[float, float], tuple[float, float]]:
        whole, inner = [], self.values
        for axis, h in enumerate(self.grid.spacing):
            s1, s2 = _split(self.std, h)
            whole.append(_stencils(self.std, h))
            spare = _radius(s1, h) + _radius(s2, h) - _radius(self.std, h)
            inner = inner.narrow(axis, spare, inner.shape[axis] - 2 * spare)
        least, largest = _eigenvalues(inner, whole)
        window = self.grid.inside(self.grid.nodes())
        inside = least[window].min().item(), largest[window].max().item()
        return inside, (least.min().item(), largest.max().item())

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return E V(z + std W) (n,) and its gradient (n, d) at z (n, d); both are differentiable in z."""
        parts = [self._chunk(part) for part in z.split(CHUNK)]
        return torch.cat([found[0] for found in parts]), torch.cat([torch.stack(found[1:], 1) for found in parts])

    def value(self, z: Tensor) -> Tensor:
        """Return E V(z + std W) (n,) alone, in half the time."""
        return torch.cat([self._chunk(part, gradient=False)[0] for part in z.split(CHUNK)])

    def _chunk(self, z: Tensor, gradient: bool = True) -> tuple[Tensor, ...]:
        """Return the values at z and, if asked for, the derivatives by each axis, (n,) each."""
        windows, starts, weights, slopes = self.table, [], [], []
        for axis, h in enumerate(self.grid.spacing):
            low, high = self.grid.lower[axis], self.grid.upper[axis]
            s = _split(self.std, h)[1]
            radius = _radius(s, h)
            at = z[:, axis].clamp(low, high)
            beyond = (z[:, axis] - at)[:, None]
            start = ((at.detach() - low) / h).round().long()
            offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
            w, w1, _ = _kernels(low + h * (start[:, None] + offsets) - at[:, None], s, h)
            starts.append(start)
            weights.append(w + beyond * w1)
            slopes.append(w1)
            windows = windows.unfold(axis, 2 * radius + 1, 1)
        near = windows[tuple(starts)]  # (n, K) or (n, K, K')
        if self.grid.dimension == 1:
            value, partial = (near * weights[0]).sum(1), lambda: ((near * slopes[0]).sum(1),)
        else:
            # Rows first: they are contiguous.
            rows = torch.bmm(weights[0][:, None], near)[:, 0]  # (n, K')
            value = (rows * weights[1]).sum(1)

            def partial() -> tuple[Tensor, ...]:
                sloped = torch.bmm(slopes[0][:, None], near)[:, 0]
                return (sloped * weights[1]).sum(1), (rows * slopes[1]).sum(1)

        return (value + self.level, *(partial() if gradient else ()))


def _eigenvalues(values: Tensor, stencils: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the least and largest eigenvalue of the Hessian of the smoothed values at every node, (N,) each."""
    if len(stencils) == 1:
        second = _convolve(values, [stencils[0][2]])
        return second, second
    x, y = stencils
    xx, xy, yy = (_convolve(values, [x[i], y[2 - i]]).flatten() for i in (2, 1, 0))
    centre, radius = 0.5 * (xx + yy), torch.hypot(0.5 * (xx - yy), xy)
    return centre - radius, centre + radius


# --- values of policies ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Fine-tuning a chain of shape (1,) or (2,) under KL regularisation: what is maximised, and on which grid.

    Attributes:
        chain, params: the reference.
        reward: of x_0, called with no condition; smooth on the scale of the grid.
        strength: (T,), entry t - 1 being b_t; a number is repeated.

    Raises:
        ValueError: if the chain's shape is neither (1,) nor (2,) or not the grid's, strengths are not positive or not
            one per step, a step has no noise, or the grid is too coarse or too narrow for the noise of a step.
    """

    chain: Chain
    params: Params
    reward: Reward
    strength: tuple[float, ...]
    grid: Grid

    def __init__(
        self, chain: Chain, params: Params, reward: Reward, strength: float | Sequence[float], grid: Grid
    ) -> None:
        if tuple(chain.shape) not in ((1,), (2,)):
            raise ValueError(f"chain has latents of shape {tuple(chain.shape)}: must be (1,) or (2,)")
        if chain.shape[0] != grid.dimension:
            raise ValueError(f"grid has {grid.dimension} dimensions: must have the {chain.shape[0]} of the chain")
        per_step = (strength,) * chain.steps if isinstance(strength, int | float) else tuple(map(float, strength))
        if len(per_step) != chain.steps:
            raise ValueError(
                f"strength has {len(per_step)} entries: must have one for each of the chain's {chain.steps} steps"
            )
        for t, b in enumerate(per_step, 1):
            if not (b > 0 and math.isfinite(b)):
                raise ValueError(f"strength of step t = {t} is {b:g}: must be positive and finite")
        for t in range(1, chain.steps + 1):
            _check_resolution(grid, chain.std(t), t)
        fixed = {name: value.detach().clone() for name, value in params.items()}
        for name, value in zip(
            ("chain", "params", "reward", "strength", "grid"), (chain, fixed, reward, per_step, grid), strict=True
        ):
            object.__setattr__(self, name, value)

    def reference(self, t: int, x: Tensor) -> Tensor:
        """Return the reference's mean m_t(x), (n, d)."""
        return self.chain.mean(self.params, x, t, None)

    def smoothed(self, t: int, below: Tensor) -> Smoothed:
        """Return z -> E V_{t-1}(z + std_t W) from the node values `below` of V_{t-1}; V_0 is asked beyond the grid."""
        std, grid = float(self.chain.std(t)), self.grid
        padding = Smoothed.padding(grid, std)
        if t > 1:
            return Smoothed.of(grid, std, _reflected(below.reshape(grid.points), padding))
        shape = [n + 2 * p for n, p in zip(grid.points, padding, strict=True)]
        nodes = grid.nodes(padding)
        rewards = self.reward(nodes, None)
        wrong = ~rewards.isfinite()
        if bool(wrong.any()):
            raise ValueError(
                f"reward at x = {nodes[wrong][0].tolist()} is {rewards[wrong][0]:g}: must be finite on the grid and "
                "beyond it, as far as the noise reaches"
            )
        return Smoothed.of(grid, std, rewards.reshape(shape))

    def values(self, t: int, smoothed: Smoothed, mean: Tensor, reference: Tensor) -> Tensor:
        """Return V_t (n,) where the policy's mean is `mean` and the reference's `reference`, (n, d) each."""
        price = self.strength[t - 1] / (2 * smoothed.std**2)
        return smoothed.value(mean) - price * (mean - reference).square().sum(1)


def _check_resolution(grid: Grid, std: float, t: int) -> None:
    if not std > 0:
        raise ValueError(f"std of step t = {t} is {std:g}: must be positive, or a controlled step has infinite KL")
    for axis, (h, n) in enumerate(zip(grid.spacing, grid.points, strict=True)):
        if h > COARSEST * std * (1 + 1e-9):
            raise ValueError(
                f"grid has spacing {h:.4g} on axis {axis}: must be <= {COARSEST} std = {COARSEST * std:.4g} of step "
                f"t = {t}, or Gaussian sums over its nodes are wrong; take at least "
                f"{math.ceil((n - 1) * h / (COARSEST * std)) + 1} points"
            )
        need = Smoothed.padding(grid, std)[axis]
        if n <= need:
            raise ValueError(
                f"grid spans {(n - 1) * h:.4g} on axis {axis}: must span >= {need * h:.4g}, the reach of the noise "
                f"of step t = {t}, or values beyond it cannot be extrapolated"
            )


Policy = Callable[[int, Smoothed, Tensor, Tensor], Tensor]  # (t, smoothed V_{t-1}, x, reference mean) -> mean


@dataclass(frozen=True, eq=False)
class Value:
    """The exact value functions V_0, ..., V_T of one policy, at any point.

    Attributes:
        nodes: (N, d), the grid's.
        node_values: T + 1 tensors (N,), entry t being V_t.
        node_means: T tensors (N, d), entry t - 1 being the means of step t.
        smoothed: T functions, entry t - 1 being z -> E V_{t-1}(z + std_t W).
    """

    problem: Problem
    policy: Policy
    nodes: Tensor
    node_values: tuple[Tensor, ...]
    node_means: tuple[Tensor, ...]
    smoothed: tuple[Smoothed, ...]

    def mean(self, t: int, x: Tensor) -> Tensor:
        """Return the policy's mean M_t(x), (n, d), for t = 1..T; differentiable in x."""
        self._check(t, x, first=1)
        return self.policy(t, self.smoothed[t - 1], x, self.problem.reference(t, x))

    def value(self, t: int, x: Tensor) -> Tensor:
        """Return V_t(x), (n,), for t = 0..T; differentiable in x."""
        self._check(t, x, first=0)
        if t == 0:
            return self.problem.reward(x, None)
        reference = self.problem.reference(t, x)
        smoothed = self.smoothed[t - 1]
        return self.problem.values(t, smoothed, self.policy(t, smoothed, x, reference), reference)

    def gradient(self, t: int, x: Tensor) -> Tensor:
        """Return the gradient of V_t at x, (n, d): through the means of the steps and all their iterations."""
        found = []
        for part in x.split(CHUNK // 4):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                found.append(torch.autograd.grad(self.value(t, leaf).sum(), leaf)[0])
        return torch.cat(found)

    def ripple(self, t: int) -> float:
        """Return the amplitude of V_t in the window at the highest frequency of the grid, for t = 0..T - 1.

        Its square, for smooth V_t, or a tenth of it, where V_t has kinks, is about the error that V_{t+1} has from
        sums over too few nodes.
        """
        if not 0 <= t < self.problem.chain.steps:
            raise ValueError(f"t = {t}: must lie in 0..{self.problem.chain.steps - 1}")
        return self.smoothed[t].ripple

    def objective(self, tolerance: float = 1e-9) -> float:
        """Return E V_T(x_T), what the policy earns less what it pays.

        By the trapezoidal rule in the initial noise, its spacing halved until the value moves by no more than
        `tolerance`, relative to it if it is larger than one.

        Raises:
            RuntimeError: if that takes more than a million points.
        """
        found, intervals, d = self._objective(36), 72, self.problem.grid.dimension
        before = found
        while (intervals + 1) ** d <= 1_000_000:
            found, before = self._objective(intervals), found
            if abs(found - before) <= tolerance * max(1.0, abs(found)):
                return found
            intervals *= 2
        raise RuntimeError(
            f"the average over the initial noise still moves by {abs(found - before):.3g} with {intervals // 2} "
            f"intervals an axis, tolerance = {tolerance:g}: the value is rough, see `ripple`"
        )

    def _objective(self, intervals: int) -> float:
        with torch.no_grad():
            d = self.problem.grid.dimension
            noise = Grid([-9.0] * d, [9.0] * d, [intervals + 1] * d).nodes()
            weight = torch.exp(-0.5 * noise.square().sum(1))
            values = self.value(self.problem.chain.steps, self.problem.chain.initial(noise))
            return float((weight * values).sum() / weight.sum())

    def _check(self, t: int, x: Tensor, first: int) -> None:
        if not first <= t <= self.problem.chain.steps:
            raise ValueError(f"t = {t}: must lie in {first}..{self.problem.chain.steps}")
        if x.dim() != 2 or x.shape[1] != self.problem.grid.dimension:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be (n, {self.problem.grid.dimension})")


def evaluate(
    chain: Chain,
    params: Params,
    reward: Reward,
    strength: float | Sequence[float],
    reference_params: Params,
    grid: Grid,
) -> Value:
    """Return the exact value functions (PI-FT, eq. 36) of the policy that `params` make of a chain.

    Args:
        strength: b_t of every step, or (T,) with entry t - 1 that of step t.
        reference_params: the parameters of the reference, from which the KL divergence is counted.

    Raises:
        ValueError: as `Problem`.
    """
    fixed = {name: value.detach().clone() for name, value in params.items()}
    problem = Problem(chain, reference_params, reward, strength, grid)

    def policy(t: int, smoothed: Smoothed, x: Tensor, reference: Tensor) -> Tensor:
        return chain.mean(fixed, x, t, None)

    return _backwards(problem, policy)


def _backwards(problem: Problem, policy: Policy) -> Value:
    with torch.no_grad():
        nodes = problem.grid.nodes()
        window = problem.grid.inside(nodes)
        values, means, smooth = [problem.reward(nodes, None)], [], []
        for t in range(1, problem.chain.steps + 1):
            smooth.append(problem.smoothed(t, values[-1]))
            _check_ripple(t - 1, smooth[-1], values[-1][window])
            reference = problem.reference(t, nodes)
            means.append(policy(t, smooth[-1], nodes, reference))
            values.append(problem.values(t, smooth[-1], means[-1], reference))
    return Value(problem, policy, nodes, tuple(values), tuple(means), tuple(smooth))


def _check_ripple(t: int, smoothed: Smoothed, values: Tensor) -> None:
    spread = float(values.max() - values.min())
    if smoothed.ripple > RIPPLE * spread + 1e-9 * abs(smoothed.level):
        warnings.warn(
            f"V_{t}{' (the reward)' if t == 0 else ''} ripples by {smoothed.ripple:.2g} from node to node, which is "
            f"above {RIPPLE:g} of its range {spread:.3g} in the window: sums over nodes lose accuracy; take a finer "
            "grid, and expect little from it if there are kinks",
            Unresolved,
            stacklevel=5,
        )


# --- policy iteration --------------------------------------------------------------------------------------------

Progress = Callable[[int, tuple[float, ...]], None]


@dataclass(frozen=True, eq=False)
class Solution(Value):
    """What policy iteration found: the policy after the given numbers of iterations, and its exact value functions.

    Attributes:
        iterations: (T,), m_t of each step, entry t - 1 that of step t; likewise below.
        damping: (T,), eta.
        history: (T,), sup |M^(k+1) - M^(k)| over the nodes in the window, k = 0..m_t - 1.
    """

    iterations: tuple[int, ...]
    damping: tuple[float, ...]
    history: tuple[tuple[float, ...], ...]

    def curvature(self, t: int) -> tuple[float, float]:
        """Return the extreme eigenvalues of std_t^2 grad h_t / b_t over the nodes in the window; the larger is < 1."""
        return _curvature(self.problem, t, self.smoothed[t - 1].bounds)

    def contraction(self, t: int) -> float:
        """Return std_t^2 sup |grad h_t| / b_t over the nodes in the window: the factor of undamped iteration.

        Between nodes it may be larger, by the square of the spacing.
        """
        return max(map(abs, self.curvature(t)))


@dataclass(frozen=True, eq=False)
class PolicyIteration:
    """PI-FT's Algorithm 1 on a grid, for a chain of one or two dimensions.

    Step t works on the value of the policy found for the steps below t, not on the optimal value: with few iterations
    errors add up as they do in the paper's algorithm.

    Attributes:
        damping: eta in (0, 1], 1 being the paper's iteration. "adaptive" takes 2 / (2 + r - p) but at most 1 at each
            step, the eigenvalues of std^2 grad h / b being at least -r (<= 0) on the whole grid and at most p (>= 0) in
            the window: 2 / (2 + rho) where V is concave, which contracts by rho / (2 + rho) however small the strength.

    Raises:
        ValueError: as `Problem`, and if damping is neither "adaptive" nor in (0, 1].
    """

    problem: Problem
    damping: float | Literal["adaptive"]

    def __init__(
        self,
        chain: Chain,
        params: Params,
        reward: Reward,
        strength: float | Sequence[float],
        grid: Grid,
        damping: float | Literal["adaptive"] = 1.0,
    ) -> None:
        if damping != "adaptive" and not (isinstance(damping, int | float) and 0 < damping <= 1):
            raise ValueError(f"damping = {damping!r}: must lie in (0, 1] or be 'adaptive'")
        object.__setattr__(self, "problem", Problem(chain, params, reward, strength, grid))
        object.__setattr__(self, "damping", damping)

    def solve(self, iterations: int | Sequence[int] = 30, progress: Progress | None = None) -> Solution:
        """Iterate m_t times at step t: `iterations` of every step, or (T,) with entry t - 1 that of step t.

        Args:
            progress: called with (t, movements of step t) when a step is done, t = 1..T.

        Raises:
            ValueError: if iterations are negative or not one number per step, or a one-step problem is not concave in
                the window.

        Warns:
            NotContracting: if the iteration need not converge with this damping.
        """
        steps = self.problem.chain.steps
        counts = (iterations,) * steps if isinstance(iterations, int) else tuple(map(int, iterations))
        if len(counts) != steps:
            raise ValueError(
                f"iterations has {len(counts)} entries: must have one for each of the chain's {steps} steps"
            )
        if min(counts) < 0:
            raise ValueError(f"iterations = {list(counts)}: must be >= 0")
        return self._solve(lambda t, moved: len(moved) >= counts[t - 1], progress)

    def solve_to(self, tolerance: float, most: int = 1000, progress: Progress | None = None) -> Solution:
        """Iterate every step until no mean in the window moves by more than `tolerance`; raises like `solve`.

        With a contraction rho the means are then within tolerance * rho / (1 - rho) of the one-step optimum, and the
        values, being flat there, within the square of that.

        Raises:
            ValueError: if tolerance is not positive.
            RuntimeError: if a step has not got there after `most` iterations.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance = {tolerance:g}: must be > 0")

        def enough(t: int, moved: list[float]) -> bool:
            if moved and moved[-1] <= tolerance:
                return True
            if len(moved) >= most:
                raise RuntimeError(
                    f"step t = {t}: means still move by {moved[-1] if moved else math.inf:.3g} after {most} "
                    f"iterations, tolerance = {tolerance:g}; allow more, or use damping='adaptive'"
                )
            return False

        return self._solve(enough, progress)

    def _solve(self, enough: Callable[[int, list[float]], bool], progress: Progress | None) -> Solution:
        problem, etas, history = self.problem, [], []
        window = problem.grid.inside(problem.grid.nodes())

        def improve(t: int, smoothed: Smoothed, x: Tensor, reference: Tensor) -> Tensor:
            etas.append(self._damping(t, smoothed))
            mean, moved = reference, []
            while not enough(t, moved):
                new = _update(problem, t, smoothed, mean, reference, etas[-1])
                moved.append(float((new - mean)[window].norm(dim=1).max()))
                mean = new
            history.append(tuple(moved))
            if progress is not None:
                progress(t, history[-1])
            return mean

        found = _backwards(problem, improve)

        def policy(t: int, smoothed: Smoothed, x: Tensor, reference: Tensor) -> Tensor:
            mean = reference
            for _ in history[t - 1]:
                mean = _update(problem, t, smoothed, mean, reference, etas[t - 1])
            return mean

        return Solution(
            problem,
            policy,
            found.nodes,
            found.node_values,
            found.node_means,
            found.smoothed,
            iterations=tuple(map(len, history)),
            damping=tuple(etas),
            history=tuple(history),
        )

    def _damping(self, t: int, smoothed: Smoothed) -> float:
        """Return eta of step t, having checked that the one-step problem is concave and the iteration contracts."""
        least, largest = _curvature(self.problem, t, smoothed.bounds)
        if largest >= 1:
            raise ValueError(
                f"strength of step t = {t} is {self.problem.strength[t - 1]:g}: std^2 lambda_max(grad h) / strength = "
                f"{largest:.4g} in the window, must be < 1, or the one-step problem is not concave and a stationary "
                "mean need not be optimal; raise the strength or narrow the window"
            )
        if self.damping == "adaptive":
            # The border must not run away either, though it need not be concave: there the values are not right anyway.
            low, _ = _curvature(self.problem, t, smoothed.everywhere)
            return min(1.0, 2.0 / (2.0 + max(0.0, -low) - max(0.0, largest)))
        eta = float(self.damping)
        if 1 - eta + eta * least <= -1:
            rho = -least
            warnings.warn(
                f"step t = {t}: std^2 sup|grad h| / strength = {rho:.4g} in the window: policy iteration with damping "
                f"{eta:g} contracts only if this is < {2 / eta - 1:.4g}, and may diverge; use damping <= "
                f"2 / (2 + {rho:.4g}) = {2 / (2 + rho):.4g}, or 'adaptive'",
                NotContracting,
                stacklevel=6,
            )
        return eta


def _update(problem: Problem, t: int, smoothed: Smoothed, mean: Tensor, reference: Tensor, eta: float) -> Tensor:
    """One iteration (PI-FT, eq. 35) in the means, damped."""
    target = reference + smoothed.std**2 / problem.strength[t - 1] * smoothed(mean)[1]
    return target if eta == 1 else (1 - eta) * mean + eta * target


def _curvature(problem: Problem, t: int, bounds: tuple[float, float]) -> tuple[float, float]:
    scale = problem.chain.std(t) ** 2 / problem.strength[t - 1]
    return scale * bounds[0], scale * bounds[1]


# --- the policy as a chain ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PolicyChain:
    """The chain that a policy makes of its reference: same start and noise, the policy's means; no parameters."""

    of: Value

    @property
    def steps(self) -> int:
        return self.of.problem.chain.steps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.problem.chain.shape

    def initial(self, noise: Tensor) -> Tensor:
        return self.of.problem.chain.initial(noise)

    def mean(self, params: Params, x: Tensor, t: int, condition: Condition) -> Tensor:
        """Return the policy's mean at x (n, d); parameters and condition are not used."""
        return self.of.mean(t, x)

    def std(self, t: int) -> float:
        return self.of.problem.chain.std(t)


def policy_chain(value: Value) -> PolicyChain:
    """Return the controlled chain, to be rolled out with parameters {}; its means are exact at any point."""
    return PolicyChain(value)
