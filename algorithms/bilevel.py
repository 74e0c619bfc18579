"""Bilevel optimisation by a penalty, with first-order information only (Kwon et al. 2023; Generative bilevel, Alg. 1).

    min_x f(x, u)   where u minimises g(x, .)
    F_gamma(x) = min_u f(x, u) + gamma (g(x, u) - min_v g(x, v))
    grad F_gamma(x) = grad_x f(x, z) + gamma (grad_x g(x, z) - grad_x g(x, y)),
    y = argmin_u g(x, u),   z = argmin_u f(x, u) / gamma + g(x, u)                            (eqs. 2 to 4, 17 and 18)

    method = PenaltyBilevel(upper, lower, Descent(upper, lower, optimizer), x, u, gamma=100.0, optimizer=optimizer)
    method.run(500)

f and g are `Level`s, which give gradients and not values: by autograd (`Smooth`), or from two values where back-
propagation is too dear (`ZerothOrder`, eq. 14). The solver brings y and z up to date: by some steps of descent from
where they were (`Descent`, a warm start), or in closed form.

x and u are dicts of tensors. Objectives may be values of many independent problems at once, (*batch,); every tensor
then starts with these axes, and no problem's numbers depend on another's, if the optimizers treat each entry by itself.
Random numbers are addressed by a draw: an objective at the same draw uses the same ones. y and z see the same batches,
so that their difference, which gamma multiplies, holds no noise of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from algorithms.chain import Params

Draw = tuple[int, ...]
"""An address of random numbers: (update,) or (update, step)."""

Objective = Callable[[Params, Params, Draw], Tensor]
"""(x, u, draw) -> values (*batch,)."""

Variable = Literal["x", "u"]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Count = int | Callable[[int], int]


class Level(Protocol):
    """An objective of the two, by its gradients."""

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        """Return the gradient in x or in u, or an estimate of it, at detached x and u."""
        ...


@dataclass(frozen=True, eq=False)
class Smooth:
    """A level that autograd can differentiate."""

    objective: Objective

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        with torch.enable_grad():
            moved = {name: p.detach().requires_grad_() for name, p in (x if of == "x" else u).items()}
            value = self.objective(moved, u, draw) if of == "x" else self.objective(x, moved, draw)
            if not value.requires_grad:  # the objective does not depend on this variable at all
                return {n: torch.zeros_like(p.detach()) for n, p in moved.items()}
            grads = torch.autograd.grad(value.sum(), list(moved.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(moved.items(), grads, strict=True)}


@dataclass(eq=False)
class ZerothOrder:
    """A level whose gradients are estimated from two values, eq. (14): ((f(p + s v) - f(p - s v)) / 2s) v, v normal.

    Both values use the random numbers of one draw. Its mean is the gradient of the objective smoothed by N(0, s^2), and
    its second moment on a quadratic (n + 2) |grad|^2 in n dimensions, with one s.

    Attributes:
        std: s, one for all tensors, or by name.
        generator_for: makes the generator of the directions of a draw, to which 0 is appended for those of x and 1 for
            those of u: z depends on the latter, and the gradient in x must not be correlated with that.
        valid: maps a perturbed point back to where the objective is defined, x if `of` is "x" and u else. Where it
            moves a point, the difference is taken along the segment d that is left, and on a linear objective s^2 times
            the estimate is (grad . d) d / 4: smaller, but still against no descent.
        calls: how often the objective has been evaluated by this object; not part of a saved state.

    Raises:
        ValueError: if a std is not positive and finite; in `gradient`, if a tensor has none.
    """

    objective: Objective
    std: float | Mapping[str, float]
    generator_for: Callable[[Draw], torch.Generator]
    valid: Callable[[Params, Variable], Params] = lambda p, of: p
    calls: int = 0

    def __post_init__(self) -> None:
        for std in self.std.values() if isinstance(self.std, Mapping) else (self.std,):
            if not 0 < std < math.inf:
                raise ValueError(f"std of the perturbation must be positive and finite, got {std}")

    @torch.no_grad()
    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        at, source = (x, self.generator_for((*draw, 0))) if of == "x" else (u, self.generator_for((*draw, 1)))
        shift = {n: self._std(n) * torch.randn(p.shape, generator=source, dtype=p.dtype).to(p) for n, p in at.items()}
        ends = [self.valid({n: p + sign * shift[n] for n, p in at.items()}, of) for sign in (1, -1)]
        up, down = (self.objective(end, u, draw) if of == "x" else self.objective(x, end, draw) for end in ends)
        self.calls += 2
        difference = up - down
        return {
            n: difference.reshape(difference.shape + (1,) * (p.ndim - difference.ndim)).to(p)
            * (ends[0][n] - ends[1][n])
            / (2 * self._std(n)) ** 2
            for n, p in at.items()
        }

    def _std(self, name: str) -> float:
        if not isinstance(self.std, Mapping):
            return self.std
        if name not in self.std:
            raise ValueError(f"std must name every tensor that is perturbed, got {sorted(self.std)} without {name!r}")
        return self.std[name]


@dataclass(frozen=True)
class Split:
    """A level whose gradients in x and in u are made by two."""

    of_x: Level
    of_u: Level

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        return (self.of_x if of == "x" else self.of_u).gradient(x, u, draw, of)


class Solver(Protocol):
    """Brings a lower variable up to date."""

    def solve(self, x: Params, u: Params, gamma: float | None, update: int) -> Params:
        """Return z, or y where gamma is None, from the last one u."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(eq=False)
class Descent:
    """Some steps of an optimizer from the last u, on g for y and on f / gamma + g for z.

    The gradient of f is taken once an update, at z's start: z stays within O(1 / gamma) of y, where it hardly changes,
    and it is the dear one.

    Attributes:
        optimizer: makes the optimizer of y and that of z, each kept through all updates: one `Descent` for one run.
        steps: S_y and S_z, the numbers of steps in an update; may depend on the update.

    Raises:
        ValueError: in `solve`, if a number of steps is < 1, or a level's gradient has other names or shapes than u.
    """

    upper: Level
    lower: Level
    optimizer: MakeOptimizer
    steps: tuple[Count, Count] = (1, 1)
    _running: dict[bool, tuple[Params, torch.optim.Optimizer]] = field(default_factory=dict)

    def solve(self, x: Params, u: Params, gamma: float | None, update: int) -> Params:
        steps = _count("steps", self.steps[gamma is not None], update)
        held, optimizer = self._held(u, gamma is not None)
        with torch.no_grad():
            for name, p in held.items():
                p.copy_(u[name])
        pull = {} if gamma is None else _gradient("upper", self.upper, x, u, (update,), "u")
        for step in range(steps):
            draw = (update, steps - step)  # from the last one, which y and z share whatever their numbers of steps
            at = {n: p.detach() for n, p in held.items()}
            grads = _gradient("lower", self.lower, x, at, draw, "u")
            for name, p in held.items():
                p.grad = grads[name] if gamma is None else grads[name] + pull[name] / gamma
            optimizer.step()
        return {n: p.detach().clone() for n, p in held.items()}

    def _held(self, u: Params, penalty: bool) -> tuple[Params, torch.optim.Optimizer]:
        if penalty not in self._running:
            held = {n: p.detach().clone().requires_grad_() for n, p in u.items()}
            self._running[penalty] = held, self.optimizer(list(held.values()))
        return self._running[penalty]

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "penalty" if penalty else "lower": {
                    "held": {n: p.detach() for n, p in held.items()},
                    "optimizer": optimizer.state_dict(),
                }
                for penalty, (held, optimizer) in self._running.items()
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running.clear()
        for name, saved in copy.deepcopy(state).items():
            _, optimizer = self._held(saved["held"], name == "penalty")
            optimizer.load_state_dict(saved["optimizer"])


@dataclass(frozen=True)
class Record:
    """What an update did.

    Attributes:
        x: where it ended.
        gradient: of F_gamma, as estimated where it began.
        refused: (*batch,) whether the gate refused the estimate, and x stayed; None without a gate.
    """

    x: Params
    gradient: Params
    refused: Tensor | None = None


class PenaltyBilevel:
    """A run of Algorithm 1; it can be stopped after any update, saved, and resumed.

    Args:
        upper, lower: f and g.
        solver: of both lower problems.
        x, u: where it starts; copied. y and z both start from u.
        gamma: the penalty, > 0; may depend on the update.
        optimizer: makes the optimizer of x of a list of tensors.
        project: maps x to the nearest admissible point, after each update.
        gate: (x, y, z) -> (*batch,) of bools, which estimates are good enough; where one is not, x stays.
        average: decay of the moving average of y from u on, which `averaged` returns: for sampling in the end.
        callback: called as callback(update, record) after each update, numbered from 1.

    Raises:
        ValueError: if average is not in [0, 1); in `run`, if gamma is not positive and finite, if a level's gradient,
            the solver's answer or the projection has other names or shapes than x or u, or if x is no longer finite.
    """

    def __init__(
        self,
        upper: Level,
        lower: Level,
        solver: Solver,
        x: Params,
        u: Params,
        *,
        gamma: float | Callable[[int], float],
        optimizer: MakeOptimizer,
        project: Callable[[Params], Params] | None = None,
        gate: Callable[[Params, Params, Params], Tensor] | None = None,
        average: float = 0.0,
        callback: Callable[[int, Record], None] | None = None,
    ) -> None:
        if not 0 <= average < 1:
            raise ValueError(f"average must lie in [0, 1), got {average}")
        self._upper, self._lower, self._solver = upper, lower, solver
        self._gamma, self._project, self._gate, self._decay, self._callback = gamma, project, gate, average, callback
        self._x = {n: p.detach().clone().requires_grad_() for n, p in x.items()}
        self._optimizer = optimizer(list(self._x.values()))
        self._y, self._z, self._averaged = _copied(u), _copied(u), _copied(u)
        self._update = 0

    @property
    def updates(self) -> int:
        """How many have been made."""
        return self._update

    @property
    def x(self) -> Params:
        return _copied(self._x)

    @property
    def y(self) -> Params:
        """The lower solution, as far as it has come."""
        return _copied(self._y)

    @property
    def z(self) -> Params:
        """The penalty problem's solution, as far as it has come."""
        return _copied(self._z)

    @property
    def averaged(self) -> Params:
        """The moving average of y."""
        return _copied(self._averaged)

    def run(self, updates: int) -> None:
        """Make so many updates more."""
        for _ in range(updates):
            record = self._step()
            if self._callback is not None:
                self._callback(self._update, record)

    def _step(self) -> Record:
        update = self._update + 1
        gamma = self._gamma(update) if callable(self._gamma) else self._gamma
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite, got {gamma}")
        x, draw = self.x, (update,)
        self._y = _matching("the solver's y", self._solver.solve(x, self._y, None, update), self._y)
        self._z = _matching("the solver's z", self._solver.solve(x, self._z, gamma, update), self._z)
        direct = _gradient("upper", self._upper, x, self._z, draw, "x")
        at_z, at_y = (_gradient("lower", self._lower, x, u, draw, "x") for u in (self._z, self._y))
        gradient = {n: direct[n] + gamma * (at_z[n] - at_y[n]) for n in x}
        kept = None if self._gate is None else self._gate(x, self._y, self._z)
        self._move(x, gradient, kept)
        for n, p in self._averaged.items():
            p.lerp_(self._y[n], 1 - self._decay)
        self._update = update
        return Record(self.x, gradient, None if kept is None else ~kept)

    @torch.no_grad()
    def _move(self, before: Params, gradient: Params, kept: Tensor | None) -> None:
        for n, p in self._x.items():
            g = gradient[n]
            p.grad = g if kept is None else torch.where(_spread(kept, g), g, torch.zeros_like(g))
        self._optimizer.step()
        after = self.x if self._project is None else _matching("the projection of x", self._project(self.x), before)
        for n, p in after.items():
            # An optimizer with momentum moves what has no gradient, too.
            self._x[n].copy_(p if kept is None else torch.where(_spread(kept, p), p, before[n]))
            if not bool(torch.isfinite(self._x[n]).all()):
                raise ValueError(f"x must stay finite, {n} is not after update {self._update + 1}")

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, tensors included."""
        return copy.deepcopy(
            {
                "update": self._update,
                "x": self.x,
                "y": self._y,
                "z": self._z,
                "averaged": self._averaged,
                "optimizer": self._optimizer.state_dict(),
                "solver": self._solver.state_dict(),
            }
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if its x or u has other names or shapes.
        """
        state = copy.deepcopy(state)
        _matching("the state's x", state["x"], self._x)
        _matching("the state's y", state["y"], self._y)
        for n, p in state["x"].items():
            self._x[n].copy_(p)
        self._y, self._z, self._averaged = state["y"], state["z"], state["averaged"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._solver.load_state_dict(state["solver"])
        self._update = state["update"]


def _gradient(name: str, level: Level, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
    return _matching(f"the {name} level's gradient in {of}", level.gradient(x, u, draw, of), x if of == "x" else u)


def _matching(what: str, found: Params, like: Params) -> Params:
    for n in sorted({*found, *like}):
        got, wanted = (f"shape {tuple(p[n].shape)}" if n in p else "no such tensor" for p in (found, like))
        if got != wanted:
            raise ValueError(f"{what} must have names and shapes of {sorted(like)}: {n!r} has {got}, not {wanted}")
    return found


def _copied(params: Params) -> Params:
    return {n: p.detach().clone() for n, p in params.items()}


def _count(name: str, count: Count, update: int) -> int:
    number = count(update) if callable(count) else count
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number} in update {update}")
    return number


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
