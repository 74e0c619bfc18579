"""Implicit Diffusion: sampling and optimisation in one loop, for samplers that do not end (Marion et al. 2024).

    potential V(params, x);  pi(params) = exp(-V) / Z;  l(params) = F(pi(params)) is minimised
    sampling step       x <- x - gamma grad_x V + sqrt(2 gamma) z                      (unadjusted Langevin)
    optimisation step   params <- params - eta Gamma(p, params),   Gamma(pi(params), params) = grad l

    loop = ImplicitDiffusion(Langevin(potential, 0.1), MinusReward(reward), params, particles, sgd, generator_for)
    loop.run(5000)

Algorithm 1 makes one sampling step an update and never starts the particles again. More steps an update, with or
without a restart, are the nested loop; a path-wise gradient through the last of them is the unrolling that the paper
compares with; no loss at all is plain sampling, of a guided potential too.

The first axis of every tensor is that of r independent repetitions: particles are (r, n, *shape), a parameter is
(r, *its shape). One call advances all of them, and the numbers of one do not depend on the others. Losses are summed
over the repetitions, so an optimizer must treat the entries of a parameter each by itself, as SGD and Adam do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from algorithms.chain import Params

BLOCK = 50  # steps whose noise is drawn together
FAR = 1e6  # particles this far out have left: the potential is not integrable, or gamma beyond stability

Reward = Callable[[Tensor], Tensor]
"""(r, n, *shape) -> (r, n)."""

Callback = Callable[[int, Params, Tensor], None]
"""Called as callback(update, params, particles), before the first update (as update 0) and after each; not copies."""

Source = Callable[[int, int], torch.Generator]
"""Called as generator_for(repetition, block): one for every `BLOCK` sampling steps of a repetition."""


class Potential(Protocol):
    """V: (r, n, *shape) -> (r, n), up to a constant in x and params together; samples do not interact."""

    def __call__(self, params: Params, x: Tensor) -> Tensor: ...


@runtime_checkable
class Derived(Protocol):
    """A potential that has its first derivatives in closed form; they are taken instead of autograd's."""

    def slope(self, params: Params, x: Tensor) -> Tensor:
        """Return grad_x V, (r, n, *shape); autograd can differentiate it again, in x and in the parameters."""
        ...

    def pull(self, params: Params, x: Tensor, weight: Tensor) -> Params:
        """Return the gradient in the parameters of sum_i weight_i V(params, x_i), for weights (r, n)."""
        ...


@runtime_checkable
class Curved(Protocol):
    """A potential whose largest curvature in x is known."""

    def curvature(self, params: Params) -> float:
        """Return an upper bound of the eigenvalues of V's Hessian in x, over x and repetitions.

        Raises:
            ValueError: if exp(-V) is not integrable at these parameters.
        """
        ...


@dataclass(frozen=True, eq=False)
class Guided:
    """V(params, x) - strength * reward(x): what guidance by a differentiable reward samples (section A.1)."""

    potential: Potential
    reward: Reward
    strength: float

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return self.potential(params, x) - self.strength * self.reward(x)


@dataclass(frozen=True, eq=False)
class Langevin:
    """Unadjusted Langevin with step gamma; its invariant law is not pi, but tends to it with gamma.

    Raises:
        ValueError: if gamma is not positive and finite.
    """

    potential: Potential
    gamma: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite, got {self.gamma}")

    def check(self, params: Params) -> None:
        """Raise a ValueError if the potential knows that these steps cannot settle.

        Where the curvature is L they diverge from gamma = 2 / L on.
        """
        if isinstance(self.potential, Curved):
            largest = self.potential.curvature(params)
            if self.gamma * largest >= 2:
                raise ValueError(f"gamma must be < 2 / L = {2 / largest:g} for this potential, got {self.gamma:g}")

    def step(self, params: Params, x: Tensor, noise: Tensor, graph: bool = False) -> Tensor:
        """Return the particles after one step, (r, n, *shape), with a graph in x and the parameters if asked for."""
        if isinstance(self.potential, Derived):
            with torch.set_grad_enabled(graph):
                slope = self.potential.slope(params, x)
        else:
            with torch.enable_grad():
                leaf = x if x.requires_grad else x.detach().requires_grad_()
                energy = self.potential(params, leaf).sum()
                (slope,) = torch.autograd.grad(energy, leaf, create_graph=graph)
        return torch.add(x, slope, alpha=-self.gamma).add(noise, alpha=math.sqrt(2 * self.gamma))


class ImplicitLoss(Protocol):
    """A loss (r,) whose gradient in the parameters, at given particles, estimates Gamma.

    Attributes:
        unrolled: how many of the last sampling steps it wants a graph of.
    """

    @property
    def unrolled(self) -> int: ...

    def __call__(self, potential: Potential, params: Params, x: Tensor, update: int) -> Tensor: ...


@runtime_checkable
class Explicit(Protocol):
    """A loss that is linear in the potential: its gradient takes no autograd where the potential is `Derived`."""

    def gradient(self, potential: Derived, params: Params, x: Tensor, update: int) -> Params:
        """Return the gradients of the losses, (r, *its shape) for each parameter."""
        ...


@dataclass(frozen=True, eq=False)
class MinusReward:
    """F(p) = -E_p R: Gamma = Cov_p(R, grad_params V), from values of the reward alone.

    Attributes:
        unbiased: divide by n - 1; the released code divides by n, which leaves 1 - 1 / n of the covariance.
    """

    reward: Reward
    unbiased: bool = True

    @property
    def unrolled(self) -> int:
        return 0

    def __call__(self, potential: Potential, params: Params, x: Tensor, update: int) -> Tensor:
        x = x.detach()  # a sum with an unrolled loss brings a graph
        return (self._weight(x) * potential(params, x)).sum(-1)

    @torch.no_grad()
    def gradient(self, potential: Derived, params: Params, x: Tensor, update: int) -> Params:
        return potential.pull(params, x, self._weight(x))

    @torch.no_grad()
    def _weight(self, x: Tensor) -> Tensor:
        reward = self.reward(x)
        n = reward.shape[-1]
        if n < 2:
            raise ValueError(f"particles must be >= 2 a repetition for a covariance, got {n}")
        return (reward - reward.mean(-1, keepdim=True)) * (1 / (n - 1 if self.unbiased else n))


@dataclass(frozen=True, eq=False)
class KLFromReference:
    """F(p) = KL(p_ref || p): Gamma = E_ref grad_params V - E_p grad_params V.

    Attributes:
        reference: points of p_ref for an update, (r, m, *shape).
    """

    reference: Callable[[int], Tensor]

    @property
    def unrolled(self) -> int:
        return 0

    def __call__(self, potential: Potential, params: Params, x: Tensor, update: int) -> Tensor:
        return potential(params, self.reference(update)).mean(-1) - potential(params, x.detach()).mean(-1)

    @torch.no_grad()
    def gradient(self, potential: Derived, params: Params, x: Tensor, update: int) -> Params:
        there, here = (potential.pull(params, y, _equal(y)) for y in (self.reference(update), x))
        return {name: there[name] - here[name] for name in params}


@dataclass(frozen=True, eq=False)
class UnrolledReward:
    """F(p) = -E_p R, differentiated through the last steps of sampling instead of through pi.

    It needs a differentiable reward, and does not see that the law before these steps depends on the parameters too.

    Raises:
        ValueError: if unrolled is < 1.
    """

    reward: Reward
    unrolled: int = 1

    def __post_init__(self) -> None:
        if self.unrolled < 1:
            raise ValueError(f"unrolled must be >= 1, got {self.unrolled}")

    def __call__(self, potential: Potential, params: Params, x: Tensor, update: int) -> Tensor:
        return -self.reward(x).mean(-1)


@dataclass(frozen=True, eq=False)
class Weighted:
    """A weighted sum of losses, such as lambda times `MinusReward` and beta times a KL divergence."""

    losses: tuple[tuple[float, ImplicitLoss], ...]

    @property
    def unrolled(self) -> int:
        return max(loss.unrolled for _, loss in self.losses)

    def __call__(self, potential: Potential, params: Params, x: Tensor, update: int) -> Tensor:
        return sum((w * loss(potential, params, x, update) for w, loss in self.losses), start=torch.zeros(()))


class ImplicitDiffusion:
    """A run of Algorithm 1 or of its relatives; it can be stopped after any update, saved, and resumed.

    Args:
        loss: what is minimised; None to sample only.
        params, particles: where it starts; copied.
        optimizer: makes a torch optimizer of a list of tensors.
        inner: sampling steps of an update.
        order: "printed": the gradient is taken at the particles that an update begins with, as in Algorithm 1;
            "released": at those it ends with, as in the released code and in nested loops.
        restart: begin every update from the initial particles: the nested loop in the strict sense.
        callback: see `Callback`.

    Raises:
        ValueError: if a setting is out of range, the sampler knows that it cannot settle, or the loss is unrolled over
            more steps than an update has.
    """

    def __init__(
        self,
        sampler: Langevin,
        loss: ImplicitLoss | None,
        params: Params,
        particles: Tensor,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None,
        generator_for: Source,
        inner: int = 1,
        order: Literal["printed", "released"] = "printed",
        restart: bool = False,
        callback: Callback | None = None,
    ) -> None:
        if not params:
            raise ValueError("params must hold at least one tensor, got none")
        if inner < 1:
            raise ValueError(f"inner must be >= 1, got {inner}")
        if order not in ("printed", "released"):
            raise ValueError(f"order must be 'printed' or 'released', got {order!r}")
        if (loss is None) != (optimizer is None):
            raise ValueError("optimizer must be given exactly with loss")
        if order == "printed" and (restart or (loss is not None and loss.unrolled)):
            raise ValueError("order must be 'released' for a restarted or unrolled loop: it needs what an update made")
        if loss is not None and loss.unrolled > inner:
            raise ValueError(f"inner must be >= the loss's {loss.unrolled} unrolled steps, got {inner}")
        for name, p in params.items():
            if p.dim() == 0 or len(p) != len(particles):
                raise ValueError(
                    f"params must have as many repetitions first as the particles, {len(particles)}, "
                    f"{name} is {tuple(p.shape)}"
                )
        sampler.check(params)
        self.sampler, self.loss, self.inner, self.order, self.restart = sampler, loss, inner, order, restart
        self.params = {name: p.detach().clone().requires_grad_(loss is not None) for name, p in params.items()}
        self.particles, self.done = particles.detach().clone(), 0
        self._start = self.particles
        self._optimizer = None if optimizer is None else optimizer(list(self.params.values()))
        self._generator_for, self._callback = generator_for, callback
        self._noise, self._block = self.particles, -1  # nothing drawn yet

    def run(self, updates: int) -> None:
        """Make so many more updates.

        Raises:
            FloatingPointError: if particles or parameters are not finite or have left for infinity.
        """
        if self.done == 0:
            self._report()
        for _ in range(updates):
            self._update()
            self._report()
            if self.done % BLOCK == 0:
                self._refuse_divergence()
        self._refuse_divergence()

    def _update(self) -> None:
        self.done += 1
        before = self.particles
        x = self._start if self.restart else before
        if self.loss is not None and self.order == "printed":
            self._descend(before)  # leaves the gradient; the parameters move at the end of the update
        unrolled = 0 if self.loss is None else self.loss.unrolled
        for i in range(self.inner):
            graph = i >= self.inner - unrolled
            x = self.sampler.step(self.params, x, self._draw((self.done - 1) * self.inner + i), graph)
        self.particles = x.detach()
        if self.loss is not None and self.order == "released":
            self._descend(x)
        if self._optimizer is not None:
            self._optimizer.step()

    def _descend(self, x: Tensor) -> None:
        """Set the `.grad`s at particles x."""
        assert self.loss is not None
        assert self._optimizer is not None
        potential = self.sampler.potential
        if isinstance(self.loss, Explicit) and isinstance(potential, Derived):
            for name, gradient in self.loss.gradient(potential, self.params, x, self.done).items():
                self.params[name].grad = gradient
            return
        self._optimizer.zero_grad()
        self.loss(potential, self.params, x, self.done).sum().backward()

    def _draw(self, step: int) -> Tensor:
        """Return the noise (r, n, *shape) of a sampling step, counted from 0 through all updates."""
        block, at = divmod(step, BLOCK)
        if self._block != block:
            repetitions, *shape = self.particles.shape
            drawn = []
            for repetition in range(repetitions):
                source = self._generator_for(repetition, block)
                options = {"generator": source, "device": source.device, "dtype": self.particles.dtype}
                drawn.append(torch.randn(BLOCK, *shape, **options))
            self._noise, self._block = torch.stack(drawn, 1).to(self.particles.device), block
        return self._noise[at]

    def _report(self) -> None:
        if self._callback is not None:
            with torch.no_grad():
                self._callback(self.done, self.params, self.particles)

    def _refuse_divergence(self) -> None:
        """Particles that are not finite stay so: looking at them now and then finds them too."""
        largest = float(self.particles.abs().max())
        bad = [name for name, p in self.params.items() if not bool(p.isfinite().all())]
        if not largest < FAR or bad:
            what = (
                f"params {', '.join(bad)} are not finite" if bad else f"the particles have left: max |x| = {largest:g}"
            )
            raise FloatingPointError(
                f"update {self.done}: {what}; gamma = {self.sampler.gamma:g} is beyond stability, the potential not "
                "integrable, or the learning rate too large"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state as copies: tensors, numbers, strings; torch.load(weights_only=True) reads it back."""
        return copy.deepcopy(
            {
                "done": self.done,
                "params": {name: p.detach() for name, p in self.params.items()},
                "particles": self.particles,
                "start": self._start,
                "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        Raises:
            ValueError: if the shapes of the particles or of the parameters differ.
        """
        mine = {"particles": self.particles.shape, **{name: p.shape for name, p in self.params.items()}}
        theirs = {"particles": state["particles"].shape, **{name: p.shape for name, p in state["params"].items()}}
        if mine != theirs:
            raise ValueError(f"state must have the shapes of this run, {_shown(mine)}, got {_shown(theirs)}")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["params"][name])
        self.particles, self._start = state["particles"].clone(), state["start"].clone()
        self.done = state["done"]
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def _equal(x: Tensor) -> Tensor:
    """Return equal weights of particles x, (r, n)."""
    return x.new_full(x.shape[:2], 1 / x.shape[1])


def _shown(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
