"""The one backward sweep that serves every credit matrix (derivation: docs/credit-matrix.md).

After a roll-out without a graph, steps t = 1..T are revisited from the sample back to the noise. Step t's mean is
computed again with a graph; the costates in hand are mixed by row t of the matrix and back-propagated into the
parameters; each costate that a later row still needs is pulled back to x_t, the others are dropped. Peak memory is
one step's activations plus the latents, whatever T is.

A batch may be worked off in micro-batches: roll-out, reward and every step take a few samples at a time, while the
baselines see all of them.

A batch whose samples have different matrices (random truncation, a random block) visits a step with those samples only
that need it: the cost is the one of the matrices, `Credit.calls`.

A *costate* of column k at step t is the gradient of what column k knows of the return with respect to step t's mean.
It is born at k: as the reward's gradient (k = 0, at step 1), or as (return after k - baseline) * eps_k / std_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from algorithms.baselines import Baseline
from algorithms.chain import (
    Chain,
    Condition,
    Noise,
    Params,
    Perturbation,
    Rollout,
    at_step,
    for_reward,
    of_samples,
    positive_std,
    rollout,
    step_mean,
)
from algorithms.credit import Credit
from algorithms.division import WHOLE, Division
from algorithms.objective import Objective


@dataclass(frozen=True, eq=False)
class Step:
    """Step t of some of a batch's roll-outs, as a function of the parameters.

    Attributes:
        samples: which of the batch they are, an index of its first axis.
    """

    chain: Chain
    objective: Objective
    t: int
    x: Tensor
    condition: Tensor | None
    perturbation: Perturbation | None
    samples: slice | Tensor

    def __call__(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the means (n, *shape) and running costs (n,)."""
        mean = step_mean(self.chain, params, x, self.t, self.condition, self.perturbation)
        return mean, self.objective.cost(self.chain, mean, x, self.t, self.condition)


Costates = dict[int, Tensor]


class Readout(Protocol):
    """What is made of the gradients of <costate_i, mean_i> - cost_i in the parameters of a step."""

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        """Take in a step, whose samples have the rows `row` (n, T + 2) of their credit matrices.

        Returns the costates of the columns `wanted` by later rows, pulled back to x_t.
        """
        ...

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        """Add sum_i coefficient_i * unit_i, the parameter-noise column's share of these samples."""
        ...


class Accumulate:
    """Gradient of the batch mean, `total`: one tensor per parameter. The form that scales."""

    def __init__(self, params: Params, samples: int) -> None:
        self.total = {name: torch.zeros_like(p) for name, p in params.items()}
        self._params, self._samples = params, samples

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        cotangent, direct = mixed(row, costates)
        leaves = {name: p.detach().requires_grad_() for name, p in self._params.items()}
        x = step.x.detach().requires_grad_()
        with torch.enable_grad():
            mean, cost = step(leaves, x)
            value = (cotangent * mean).sum() - (0 if cost is None else (direct * cost).sum())
        # Where one costate is the whole row, the backward pass into the parameters pulls it too, times its weight.
        fused = len(wanted) == len(costates) == 1 and bool((direct != 0).all())
        inputs = [*leaves.values(), *([x] if fused else [])]
        grads = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=bool(wanted) and not fused)
        for name, grad in zip(leaves, grads, strict=False):
            if grad is not None:
                self.total[name] += grad / self._samples
        if fused:
            return {wanted[0]: _columnwise(1 / direct, grads[-1])}
        return _pull(mean, cost, x, {k: costates[k] for k in wanted})

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        for name, xi in unit.items():
            self.total[name] += torch.tensordot(coefficient, xi, 1) / self._samples


class PerSample:
    """Each sample's own gradient, `total`: (n, *parameter shape) per parameter. For statistics on toys."""

    def __init__(self, params: Params, samples: int) -> None:
        self.total = {name: p.new_zeros(samples, *p.shape) for name, p in params.items()}
        self._params = params

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        for name, grad in _per_sample(step, self._params, *mixed(row, costates)).items():
            self.total[name][step.samples] += grad
        return _pulled(step, self._params, {k: costates[k] for k in wanted})

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        for name, xi in unit.items():
            self.total[name][samples] += coefficient.reshape(-1, *[1] * (xi.dim() - 1)) * xi


class PerSource:
    """Each sample's h[t, k] by itself, `total[t, k]`: (n, p), the parameters flattened. For fitting credit matrices."""

    def __init__(self, params: Params, samples: int) -> None:
        self.total: dict[tuple[int, int], Tensor] = {}
        self._params, self._samples = params, samples

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        for k, costate in costates.items():
            each = _per_sample(step, self._params, costate, torch.ones_like(row[:, 0]))
            flat = torch.cat([each[name].flatten(1) for name in self._params], 1)
            total = self.total.setdefault((step.t, k), flat.new_zeros(self._samples, flat.shape[1]))
            total[step.samples] = flat
        return _pulled(step, self._params, {k: costates[k] for k in wanted})

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        raise ValueError("the parameter-noise column has no source of its own to be read out")


class DirectionalSources:
    """Each sample's h[t, k] along one direction, `total[t, k]`: (n,), of which any estimate is a sum."""

    def __init__(self, params: Params, samples: int, direction: Params) -> None:
        self.total: dict[tuple[int, int], Tensor] = {}
        self._params, self._samples, self._direction = params, samples, direction

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        mean, cost = _along(step, self._params, self._direction)
        for k, costate in costates.items():
            total = self.total.setdefault((step.t, k), costate.new_zeros(self._samples))
            total[step.samples] = (costate * mean).flatten(1).sum(1) - cost
        return _pulled(step, self._params, {k: costates[k] for k in wanted})

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        raise ValueError("the parameter-noise column has no source of its own to be read out")


Derivatives = dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor, Tensor]]
"""Of steps that all samples visited, by t and which running costs they are: states, derivatives of means and costs."""


class Directional:
    """Each sample's gradient along one direction of the parameters, `total`: (n,). No per-sample gradient is kept.

    Args:
        known: derivatives of the steps along this direction at these parameters, kept for other sweeps over the same
            roll-outs: steps that it holds are not differentiated again.
    """

    def __init__(self, params: Params, samples: int, direction: Params, known: Derivatives | None = None) -> None:
        self.total = next(iter(params.values())).new_zeros(samples)
        self._params, self._direction, self._known = params, direction, known

    def step(self, step: Step, costates: Costates, row: Tensor, wanted: list[int]) -> Costates:
        cotangent, direct = mixed(row, costates)
        mean, cost = self._derivatives(step)
        self.total[step.samples] += (cotangent * mean).flatten(1).sum(1) - direct * cost
        return _pulled(step, self._params, {k: costates[k] for k in wanted})

    def _derivatives(self, step: Step) -> tuple[Tensor, Tensor]:
        if self._known is None or step.perturbation is not None:
            return _along(step, self._params, self._direction)
        key = step.t, tuple(map(id, step.objective.running_costs))
        if key in self._known:
            x, mean, cost = (each[step.samples] for each in self._known[key])
            if torch.equal(x, step.x):
                return mean, cost
        mean, cost = _along(step, self._params, self._direction)
        if len(step.x) == len(self.total):
            self._known[key] = step.x, mean, cost
        return mean, cost

    def noise(self, coefficient: Tensor, unit: Params, samples: slice) -> None:
        along = sum((self._direction[name] * xi).flatten(1).sum(1) for name, xi in unit.items())
        self.total[samples] += coefficient * along


def _along(step: Step, params: Params, direction: Params) -> tuple[Tensor, Tensor]:
    """Return the derivatives of a step's means (n, *shape) and running costs (n,) along a direction."""

    def outputs(p: Params) -> tuple[Tensor, Tensor]:
        mean, cost = step(p, step.x)
        return mean, mean.new_zeros(len(mean)) if cost is None else cost

    return torch.func.jvp(outputs, (params,), (direction,))[1]


def sweep(
    chain: Chain,
    params: Params,
    objective: Objective,
    credit: Credit,
    baseline: Baseline,
    parameter_std: float,
    noise: Noise,
    condition: Condition,
    readout: Readout,
    division: Division = WHOLE,
    roll: Rollout | None = None,
) -> Tensor:
    """Feed the gradient of every step to `readout`; return the samples' returns (n,).

    All arguments are those of this process's share of the batch; `division` says how it goes through it, and how it
    learns what the baseline takes from the others'.

    Args:
        roll: roll-outs of the same noise that other parameters made, whose latents the steps are revisited at. Their
            noise has no score at these parameters, so the matrix may use column 0 only.

    Raises:
        ValueError: if the matrix and the chain disagree on T, if a credited noise column has std = 0, if column 0
            is used with a reward that is not differentiable, or another one with a given roll-out.
    """
    _check(chain, objective, credit)
    if roll is not None and not credit.by_reward_alone:
        raise ValueError("the credit matrix must use column 0 alone for roll-outs that other parameters made")
    perturbation = _perturbation(credit, parameter_std, noise)
    baseline = division.baseline(baseline)
    pieces = division.pieces(noise.samples)

    if roll is None:
        roll = Rollout.join([_roll(chain, params, objective, noise, condition, perturbation, part) for part in pieces])
    rewarded = [_reward(objective, credit, roll.latents[0, p], for_reward(of_samples(condition, p))) for p in pieces]
    reward = torch.cat([value for value, _ in rewarded])
    costates = {k: torch.cat([held[k] for _, held in rewarded]) for k in rewarded[0][1]}
    weights = torch.from_numpy(credit.matrices).to(reward)
    visits = torch.from_numpy(credit.visits()).to(noise.outcome.device)
    # Costs of the steps below k, which the noise of step k still moves: returns[k] = R - sum_{s < k} cost_s.
    spent = torch.cat([roll.costs.new_zeros(1, noise.samples), roll.costs.cumsum(0)])
    lives = {k: credit.last_row(k) for k in credit.columns}

    for t in range(1, chain.steps + 1):
        x = roll.latents[t]
        if t in lives:
            after = reward - spent[t - 1]
            costates[t] = _columnwise(after - baseline(after, x, t), noise.steps[t - 1]) / positive_std(chain, t)
        row, own = weights[noise.outcome, t - 1], at_step(condition, t)  # (n, T + 2), (n, ...)
        wanted = [k for k in costates if t < lives[k]]
        pulled: Costates = {}
        for part in _parts(visits[noise.outcome, t - 1], division):
            # Samples that visit a step are seldom moved there; where none is, no noise is copied.
            moved = None
            if perturbation is not None and bool(perturbation.active[t - 1, part].any()):
                moved = perturbation.of(part)
            step = Step(chain, objective, t, x[part], None if own is None else own[part], moved, part)
            found = readout.step(step, {k: value[part] for k, value in costates.items()}, row[part], wanted)
            for k, value in found.items():
                if len(value) == noise.samples:
                    pulled[k] = value
                else:
                    pulled.setdefault(k, torch.zeros_like(x))[part] = value
        # Asked of the law, not of the samples drawn: every process must come to the baseline, which gathers.
        if perturbation is not None and (credit.matrices[:, t - 1, -1] != 0).any():
            after = reward - spent[t]
            share = row[:, -1] * (after - baseline(after, x, t)) / parameter_std
            for part in pieces:
                readout.noise(share[part], {k: xi[:, part][t - 1] for k, xi in perturbation.unit.items()}, part)
        costates = pulled
    return reward - spent[-1]


def mixed(row: Tensor, costates: Costates) -> tuple[Tensor, Tensor]:
    """Return the costates weighted by their entries of `row` (n, T + 2), and the sum of these entries (n,)."""
    weighted = [_columnwise(row[:, k], value) for k, value in costates.items()]
    return torch.stack(weighted).sum(0), row[:, :-1].sum(1)


def _parts(wanted: Tensor, division: Division) -> Sequence[slice | Tensor]:
    """Return the samples that are wanted (n,), as indices of micro-batches."""
    if bool(wanted.all()):
        return division.pieces(len(wanted))
    some = wanted.nonzero().flatten()
    return [some[piece] for piece in division.pieces(len(some))]


def _roll(
    chain: Chain,
    params: Params,
    objective: Objective,
    noise: Noise,
    condition: Condition,
    perturbation: Perturbation | None,
    part: slice,
) -> Rollout:
    own = of_samples(condition, part)

    def cost(mean: Tensor, x: Tensor, t: int) -> Tensor | None:
        return objective.cost(chain, mean, x, t, at_step(own, t))

    moved = None if perturbation is None else perturbation.of(part)
    return rollout(chain, params, noise.of(part), own, moved, cost)


def _per_sample(step: Step, params: Params, cotangent: Tensor, direct: Tensor) -> Params:
    """Return each sample's gradient of <cotangent_i, mean_i> - direct_i * cost_i, (n, *parameter shape)."""
    own = None if step.perturbation is None else 0  # perturbed parameters differ from sample to sample
    at = params if step.perturbation is None else step.perturbation.at(params, step.t)
    conditioned = None if step.condition is None else 0

    def value(p: Params, x: Tensor, condition: Tensor | None, costate: Tensor, weight: Tensor) -> Tensor:
        c = None if condition is None else condition[None]
        mean = step.chain.mean(p, x[None], step.t, c)
        cost = step.objective.cost(step.chain, mean, x[None], step.t, c)
        return (costate * mean[0]).sum() - (0 if cost is None else weight * cost[0])

    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(own, 0, conditioned, 0, 0))
    return per_sample(at, step.x, step.condition, cotangent, direct)


def _check(chain: Chain, objective: Objective, credit: Credit) -> None:
    if credit.steps != chain.steps:
        raise ValueError(f"the credit matrix is for T = {credit.steps} steps, the chain has {chain.steps}")
    for k in credit.columns:
        if k:
            positive_std(chain, k)
    if 0 in credit.columns and not objective.reward.differentiable:
        raise ValueError("column 0 of the credit matrix needs a differentiable reward; this one is not")


def _perturbation(credit: Credit, std: float, noise: Noise) -> Perturbation | None:
    if not credit.uses_parameter_noise:
        return None
    if noise.parameters is None:
        raise ValueError("the credit matrix uses its parameter-noise column, but the noise holds none for it")
    # Stays where the outcomes are: whether a step is perturbed is asked without waiting for the latents' device.
    active = torch.from_numpy(credit.matrices[:, :, -1] != 0)[noise.outcome].T.to(noise.initial.dtype)
    return Perturbation(std, noise.parameters, active)


def _reward(objective: Objective, credit: Credit, x0: Tensor, condition: Tensor | None) -> tuple[Tensor, Costates]:
    if 0 not in credit.columns:
        with torch.no_grad():
            return objective.reward(x0, condition), {}
    leaf = x0.detach().requires_grad_()
    with torch.enable_grad():
        reward = objective.reward(leaf, condition)
        (costate,) = torch.autograd.grad(reward.sum(), leaf)
    return reward.detach(), {0: costate}


def _pulled(step: Step, params: Params, costates: Costates) -> Costates:
    """Pull costates on step t's mean back to x_t, which is step t + 1's mean plus noise."""
    if not costates:
        return {}
    x = step.x.detach().requires_grad_()
    with torch.enable_grad():
        mean, cost = step({name: p.detach() for name, p in params.items()}, x)
    return _pull(mean, cost, x, costates)


def _pull(mean: Tensor, cost: Tensor | None, x: Tensor, costates: Costates) -> Costates:
    """Pull costates back through the graph of a step, whose running cost they pay."""
    pulled = {}
    for left, (k, costate) in zip(range(len(costates) - 1, -1, -1), costates.items(), strict=True):
        value = (costate * mean).sum() - (0 if cost is None else cost.sum())
        (pulled[k],) = torch.autograd.grad(value, x, retain_graph=left > 0)
    return pulled


def _columnwise(scale: Tensor, value: Tensor) -> Tensor:
    """Multiply each sample of `value` (n, *shape) by its entry of `scale` (n,)."""
    return scale.reshape(-1, *[1] * (value.dim() - 1)) * value
