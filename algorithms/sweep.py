"""The one backward sweep that serves every credit matrix (derivation: docs/credit-matrix.md).

After a roll-out without a graph, steps t = 1..T are revisited from the sample back to the noise. Step t's mean is
computed again with a graph; the costates in hand are mixed by row t of the matrix and back-propagated into the
parameters; each costate that a later row still needs is pulled back to x_t, the others are dropped. Peak memory is
one step's activations plus the latents, whatever T is.

A *costate* of column k at step t is the gradient of what column k knows of the return with respect to step t's mean.
It is born at k: as the reward's gradient (k = 0, at step 1), or as (return after k - baseline) * eps_k / std_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from algorithms.baselines import Baseline
from algorithms.chain import Chain, Condition, Noise, Params, Perturbation, positive_std, rollout, step_mean
from algorithms.credit import Credit
from algorithms.objective import Objective


@dataclass(frozen=True, eq=False)
class Step:
    """Step t of a batch of roll-outs, as a function of the parameters."""

    chain: Chain
    objective: Objective
    t: int
    x: Tensor
    condition: Condition
    perturbation: Perturbation | None

    def __call__(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the batch's means (n, *shape) and running costs (n,)."""
        mean = step_mean(self.chain, params, x, self.t, self.condition, self.perturbation)
        return mean, self.objective.cost(self.chain, mean, x, self.t, self.condition)


Costates = dict[int, Tensor]


class Readout(Protocol):
    """What is made of the gradient of sum_i <cotangent_i, mean_i> - direct_i * cost_i in the parameters of a step."""

    def step(self, step: Step, cotangent: Tensor, direct: Tensor, wanted: Costates) -> Costates:
        """Take in a step, and return the costates `wanted` by later rows pulled back to x_t."""
        ...

    def noise(self, coefficient: Tensor, unit: Params) -> None:
        """Add sum_i coefficient_i * unit_i, the parameter-noise column's share."""
        ...


class Accumulate:
    """Gradient of the batch mean, `total`: one tensor per parameter. The form that scales."""

    def __init__(self, params: Params, samples: int) -> None:
        self.total = {name: torch.zeros_like(p) for name, p in params.items()}
        self._params, self._samples = params, samples

    def step(self, step: Step, cotangent: Tensor, direct: Tensor, wanted: Costates) -> Costates:
        leaves = {name: p.detach().requires_grad_() for name, p in self._params.items()}
        x = step.x.detach().requires_grad_()
        with torch.enable_grad():
            mean, cost = step(leaves, x)
            value = (cotangent * mean).sum() - (0 if cost is None else (direct * cost).sum())
        # A costate that is the row's cotangent is pulled by the same backward pass as the parameters' gradient.
        same = [k for k, costate in wanted.items() if costate is cotangent]
        others = {k: costate for k, costate in wanted.items() if costate is not cotangent}
        inputs = [*leaves.values(), *([x] if same else [])]
        grads = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=bool(others))
        for name, grad in zip(leaves, grads, strict=False):
            if grad is not None:
                self.total[name] += grad / self._samples
        return {k: grads[-1] for k in same} | _pull(mean, cost, x, others)

    def noise(self, coefficient: Tensor, unit: Params) -> None:
        for name, xi in unit.items():
            self.total[name] += torch.tensordot(coefficient, xi, 1) / self._samples


class PerSample:
    """Each sample's own gradient, `total`: (n, *parameter shape) per parameter. For statistics on toys."""

    def __init__(self, params: Params, samples: int, chunk: int | None = None) -> None:
        self.total = {name: p.new_zeros(samples, *p.shape) for name, p in params.items()}
        self._params, self._chunk = params, chunk

    def step(self, step: Step, cotangent: Tensor, direct: Tensor, wanted: Costates) -> Costates:
        own = None if step.perturbation is None else 0  # perturbed parameters differ from sample to sample
        params = self._params if step.perturbation is None else step.perturbation.at(self._params, step.t)
        conditioned = None if step.condition is None else 0

        def value(p: Params, x: Tensor, condition: Condition, costate: Tensor, weight: Tensor) -> Tensor:
            c = None if condition is None else condition[None]
            mean = step.chain.mean(p, x[None], step.t, c)
            cost = step.objective.cost(step.chain, mean, x[None], step.t, c)
            return (costate * mean[0]).sum() - (0 if cost is None else weight * cost[0])

        in_dims = (own, 0, conditioned, 0, 0)
        per_sample = torch.func.vmap(torch.func.grad(value), in_dims=in_dims, chunk_size=self._chunk)
        for name, grad in per_sample(params, step.x, step.condition, cotangent, direct).items():
            self.total[name] += grad
        return _pulled(step, self._params, wanted)

    def noise(self, coefficient: Tensor, unit: Params) -> None:
        for name, xi in unit.items():
            self.total[name] += coefficient.reshape(-1, *[1] * (xi.dim() - 1)) * xi


class Directional:
    """Each sample's gradient along one direction of the parameters, `total`: (n,). No per-sample gradient is kept."""

    def __init__(self, params: Params, samples: int, direction: Params) -> None:
        self.total = next(iter(params.values())).new_zeros(samples)
        self._params, self._direction = params, direction

    def step(self, step: Step, cotangent: Tensor, direct: Tensor, wanted: Costates) -> Costates:
        def outputs(params: Params) -> tuple[Tensor, Tensor]:
            mean, cost = step(params, step.x)
            return mean, mean.new_zeros(len(mean)) if cost is None else cost

        mean, cost = torch.func.jvp(outputs, (self._params,), (self._direction,))[1]
        self.total += (cotangent * mean).flatten(1).sum(1) - direct * cost
        return _pulled(step, self._params, wanted)

    def noise(self, coefficient: Tensor, unit: Params) -> None:
        along = sum((self._direction[name] * xi).flatten(1).sum(1) for name, xi in unit.items())
        self.total += coefficient * along


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
) -> Tensor:
    """Feed the gradient of every step to `readout`; return the samples' returns (n,).

    Raises:
        ValueError: if the matrix and the chain disagree on T, if a credited noise column has std = 0, or if column 0
            is used with a reward that is not differentiable.
    """
    _check(chain, objective, credit)
    perturbation = _perturbation(credit, parameter_std, noise)

    def cost(mean: Tensor, x: Tensor, t: int) -> Tensor | None:
        return objective.cost(chain, mean, x, t, condition)

    roll = rollout(chain, params, noise, condition, perturbation, cost)
    reward, costates = _reward(objective, credit, roll.latents[0], condition)
    weights = torch.from_numpy(credit.matrices).to(reward)
    # Costs of the steps below k, which the noise of step k still moves: returns[k] = R - sum_{s < k} cost_s.
    spent = torch.cat([roll.costs.new_zeros(1, noise.samples), roll.costs.cumsum(0)])
    lives = {k: credit.last_row(k) for k in credit.columns}

    for t in range(1, chain.steps + 1):
        x = roll.latents[t]
        if t in lives:
            after = reward - spent[t - 1]
            costates[t] = _columnwise(after - baseline(after, x, t), noise.steps[t - 1]) / positive_std(chain, t)
        row = weights[noise.outcome, t - 1]  # (n, T + 2)
        step = Step(chain, objective, t, x, condition, perturbation)
        if costates:
            wanted = {k: value for k, value in costates.items() if t < lives[k]}
            pulled = readout.step(step, _mixed(row, costates), row[:, :-1].sum(1), wanted)
        else:
            pulled = {}
        if perturbation is not None and bool(perturbation.active[t - 1].any()):
            after = reward - spent[t]
            share = row[:, -1] * (after - baseline(after, x, t)) / parameter_std
            readout.noise(share, {name: xi[t - 1] for name, xi in perturbation.unit.items()})
        costates = pulled
    return reward - spent[-1]


def _mixed(row: Tensor, costates: Costates) -> Tensor:
    """Return the costates weighted by their entries of `row` (n, T + 2); the costate itself where that is all."""
    if len(costates) == 1:
        ((k, only),) = costates.items()
        if bool((row[:, k] == 1).all()):
            return only
    return torch.stack([_columnwise(row[:, k], value) for k, value in costates.items()]).sum(0)


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
    active = torch.from_numpy(credit.matrices[:, :, -1] != 0)[noise.outcome].T.to(noise.initial)
    return Perturbation(std, noise.parameters, active)


def _reward(objective: Objective, credit: Credit, x0: Tensor, condition: Condition) -> tuple[Tensor, Costates]:
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
