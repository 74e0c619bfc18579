"""Chain: a finite-horizon Markov chain with Gaussian steps, and its roll-out.

Notation, fixed for this room. Steps run t = T, ..., 1 and

    x_{t-1} = mean(params, x_t, t, condition) + std(t) * eps_t,      eps_t ~ N(0, I),

x_T comes from `initial`. `params` is a dict of tensors, shared by all steps; the gradient of step t's own copy is
written g_t, and the gradient of the objective is their sum over t. Batches have shape (n, *shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class StepConditions:
    """A condition that changes along the chain, as the multi-scale prompts of RLR's diffusive chain-of-thought do.

    Attributes:
        steps: (T, n, ...); `steps[t - 1]` is step t's condition.
        reward: (n, ...), what the reward is conditioned on, or None.
    """

    steps: Tensor
    reward: Tensor | None = None


Condition = Tensor | StepConditions | None


def at_step(condition: Condition, t: int) -> Tensor | None:
    """Return the condition of step t, (n, ...) or None.

    Raises:
        ValueError: if the condition changes along the chain and holds none for step t.
    """
    if not isinstance(condition, StepConditions):
        return condition
    if not 1 <= t <= len(condition.steps):
        raise ValueError(f"condition has {len(condition.steps)} steps, but the chain asks for step t = {t}")
    return condition.steps[t - 1]


def for_reward(condition: Condition) -> Tensor | None:
    """Return what the reward is conditioned on."""
    return condition.reward if isinstance(condition, StepConditions) else condition


def of_samples(condition: Condition, samples: slice | Tensor) -> Condition:
    """Return the condition of some of the samples."""
    if isinstance(condition, StepConditions):
        reward = None if condition.reward is None else condition.reward[samples]
        return StepConditions(condition.steps[:, samples], reward)
    return None if condition is None else condition[samples]


class Chain(Protocol):
    """A Markov chain with Gaussian steps, functional in its parameters.

    Attributes:
        steps: T, the number of steps.
        shape: shape of one latent, without the batch.
    """

    @property
    def steps(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def initial(self, noise: Tensor) -> Tensor:
        """Map standard normal noise (n, *shape) to x_T (n, *shape)."""
        ...

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x, (n, *shape); samples must not influence each other."""
        ...

    def std(self, t: int) -> float:
        """Return the standard deviation of step t's noise; 0 for a deterministic step."""
        ...


class Around:
    """Of a chain that changes another's means: steps, shape, start and noise are the other's.

    Attributes:
        chain: the other.
    """

    chain: Any

    @property
    def steps(self) -> int:
        return self.chain.steps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.chain.shape

    def initial(self, noise: Tensor) -> Tensor:
        return self.chain.initial(noise)

    def std(self, t: int) -> float:
        return self.chain.std(t)


@dataclass(frozen=True)
class ParameterNoise:
    """Perturbation theta_t + std * xi_t of the parameters, drawn afresh for every step and sample.

    Attributes:
        redrawn: keep seeds instead of the noise, and draw it again whenever it is used: the noise of a large network is
            T x n times its trained parameters.

    Raises:
        ValueError: if std is not positive or the kind is unknown.
    """

    std: float
    kind: Literal["gaussian", "rademacher"] = "gaussian"
    redrawn: bool = False

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std of the parameter noise must be > 0, got {self.std}")
        if self.kind not in ("gaussian", "rademacher"):
            raise ValueError(f"kind of the parameter noise must be 'gaussian' or 'rademacher', got {self.kind!r}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
        """Draw unit-variance noise of the given shape."""
        options = {"generator": generator, "dtype": like.dtype, "device": generator.device}
        if self.kind == "gaussian":
            return torch.randn(shape, **options).to(like.device)
        return (2.0 * torch.randint(0, 2, shape, **options) - 1.0).to(like.device)


@dataclass(frozen=True, eq=False)
class Redrawn:
    """Unit noise (T, n, *shape) on one parameter, drawn again from its seeds at every use.

    It offers what is asked of a stored tensor: step t's noise `[t - 1]`, that of some samples `[:, samples]`, and `-`.

    Attributes:
        seeds: (T, n), one for every step and sample.
        like: the parameter, for its shape, dtype and device.
    """

    source: ParameterNoise
    seeds: Tensor
    like: Tensor
    sign: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept: the seeds'."""
        return self.seeds.nbytes

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return replace(self, seeds=self.seeds[index])
        generator = torch.Generator()
        drawn = []
        for seed in self.seeds[index].tolist():
            drawn.append(self.source.draw(tuple(self.like.shape), generator.manual_seed(seed), self.like))
        return self.sign * torch.stack(drawn)

    def __neg__(self) -> Redrawn:
        return replace(self, sign=-self.sign)


UnitNoise = Mapping[str, Tensor] | Mapping[str, Redrawn]


@dataclass(frozen=True)
class Noise:
    """All randomness of n roll-outs, drawn before anything is computed.

    Attributes:
        initial: (n, *shape), mapped to x_T by the chain.
        steps: (T, n, *shape); `steps[t - 1]` is eps_t.
        outcome: (n,) index of each sample's credit matrix.
        parameters: unit noise xi, one (T, n, *parameter shape) tensor (or `Redrawn`) per parameter, or None.
    """

    initial: Tensor
    steps: Tensor
    outcome: Tensor
    parameters: UnitNoise | None = None

    @property
    def samples(self) -> int:
        return self.initial.shape[0]

    def of(self, samples: slice | Tensor) -> Noise:
        """Return the noise of some of the roll-outs."""
        unit = None if self.parameters is None else {k: xi[:, samples] for k, xi in self.parameters.items()}
        return Noise(self.initial[samples], self.steps[:, samples], self.outcome[samples], unit)

    def flip(self, over: Literal["parameters", "chain"]) -> Noise:
        """Return the antithetic copy: the sign of the parameter noise, or of all of the chain's noise, reversed."""
        if over == "chain":
            return replace(self, initial=-self.initial, steps=-self.steps)
        if self.parameters is None:
            raise ValueError("antithetic over 'parameters' needs an estimator with parameter noise")
        return replace(self, parameters={name: -xi for name, xi in self.parameters.items()})


@dataclass(frozen=True)
class Rollout:
    """n roll-outs, without a graph: `latents[t]` is x_t (n, *shape), t = 0..T; `costs[t - 1]` (n,) is step t's."""

    latents: Tensor
    costs: Tensor

    @classmethod
    def join(cls, parts: list[Rollout]) -> Rollout:
        """Return the roll-outs of all parts as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.latents for p in parts], 1), torch.cat([p.costs for p in parts], 1))


StepCost = Callable[[Tensor, Tensor, int], Tensor | None]
"""cost(mean, x_t, t): the running cost of a step, (n,), or None."""


def rollout(
    chain: Chain,
    params: Params,
    noise: Noise,
    condition: Condition = None,
    perturbation: Perturbation | None = None,
    cost: StepCost = lambda mean, x, t: None,
) -> Rollout:
    """Run the chain without a graph, keeping the latents and the running costs `cost(mean, x_t, t)` only."""
    x = chain.initial(noise.initial)
    latents, costs = advance(chain, params, x, noise, range(chain.steps, 0, -1), condition, perturbation, cost)
    return Rollout(torch.stack([x, *latents][::-1]), torch.stack(costs[::-1]))


def advance(
    chain: Chain,
    params: Params,
    x: Tensor,
    noise: Noise,
    steps: Iterable[int],
    condition: Condition = None,
    perturbation: Perturbation | None = None,
    cost: StepCost = lambda mean, x, t: None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Take steps t, t - 1, ... from x = x_t without a graph; return the latents x_{t-1}, ... and the steps' costs."""
    latents, costs = [], []
    with torch.no_grad():
        for t in steps:
            mean = step_mean(chain, params, x, t, condition, perturbation)
            charged = cost(mean, x, t)
            costs.append(x.new_zeros(len(x)) if charged is None else charged)
            x = mean + chain.std(t) * noise.steps[t - 1]
            latents.append(x)
    return latents, costs


@dataclass(frozen=True)
class Perturbation:
    """Parameter offsets std * xi_t of each sample, and a mask (T, n) of the steps at which they are applied."""

    std: float
    unit: UnitNoise
    active: Tensor

    def at(self, params: Params, t: int) -> Params:
        """Return the parameters of step t, one set per sample: (n, *parameter shape); `params` may be so already."""
        on = self.active[t - 1] * self.std
        moved = {}
        for name, p in params.items():
            xi = self.unit[name][t - 1]
            moved[name] = p + on.to(p).reshape(-1, *[1] * (xi.dim() - 1)) * xi
        return moved

    def of(self, samples: slice | Tensor) -> Perturbation:
        """Return the perturbation of some of the samples."""
        return Perturbation(self.std, {k: xi[:, samples] for k, xi in self.unit.items()}, self.active[:, samples])


@runtime_checkable
class OwnParameters(Protocol):
    """A chain that gives its samples different parameters also where no noise moves them, as their condition says."""

    def split_by_sample(self, params: Params, condition: Tensor | None) -> tuple[Chain, Params]:
        """Return the chain of one sample, and each sample's parameters, (n, *parameter shape)."""
        ...


def step_mean(
    chain: Chain, params: Params, x: Tensor, t: int, condition: Condition, perturbation: Perturbation | None = None
) -> Tensor:
    """Return mean(params, x_t, t, condition), with each sample's own parameters where they are perturbed."""
    own = at_step(condition, t)
    if perturbation is None or not bool(perturbation.active[t - 1].any()):
        return chain.mean(params, x, t, own)

    if isinstance(chain, OwnParameters):
        (chain, params), own = chain.split_by_sample(params, own), None

    def one(p: Params, y: Tensor, c: Tensor | None) -> Tensor:
        return chain.mean(p, y[None], t, None if c is None else c[None])[0]

    in_dims = (0, 0, None if own is None else 0)
    return torch.func.vmap(one, in_dims=in_dims)(perturbation.at(params, t), x, own)


def step_log_prob(
    chain: Chain, params: Params, x: Tensor, x_next: Tensor, t: int, condition: Condition = None
) -> Tensor:
    """Return log p(x_{t-1} = x_next | x_t = x), (n,): the *sum* over the dimensions of the latent.

    Raises:
        ValueError: if step t has no noise, so that the density does not exist.
    """
    std = positive_std(chain, t)
    z = (x_next - chain.mean(params, x, t, at_step(condition, t))) / std
    dimensions = z[0].numel()
    half_log_two_pi = 0.5 * math.log(2 * math.pi)
    return -0.5 * z.flatten(1).square().sum(1) - dimensions * (half_log_two_pi + math.log(std))


def positive_std(chain: Chain, t: int) -> float:
    """Return std(t), refusing a step without noise, whose score does not exist."""
    std = float(chain.std(t))
    if not std > 0:
        raise ValueError(
            f"step t = {t} has std = {std:g} (eta = 0?): its noise has no score; sample with eta > 0 or give the "
            "step's credit to another column"
        )
    return std
