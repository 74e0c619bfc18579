"""What an audit computes on a model: gradients by other means than the sweep, directions, and measurements.

Everything here is independent of `algorithms.sweep`: one graph through the whole chain, the log-densities by autograd,
forward-mode derivatives of the whole roll-out. The claims of the chapter *At scale* hold the estimators against them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from algorithms.chain import Condition, Noise, Params, Redrawn, at_step, for_reward, step_log_prob
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from scale.config import Config, learns_from_data
from scale.config import Method as Choice
from scale.memory import LiveBytes, meta_copy, predict
from scale.methods import METHODS, make_estimator
from scale.network import NetworkChain
from scale.plan import Measured
from scale.reward import DecodedReward
from scale.stable_diffusion import LatentDecoder
from scale.task import Task, build

Cut = Callable[[Tensor, int], Tensor]
"""cut(network output of step t, t) -> the output that the graph continues from; the same numbers."""


REWARDED = {"sft": "first-order", "sft-pg": "policy-gradient"}
"""The estimators that shortcut fine-tuning follows, with its critic for a reward."""


def in_double(task: Task) -> Task:
    """Return the task with network, decoder and parameters in double precision (the modules themselves are changed)."""
    task.chain.network.double()
    if isinstance(task.decode, LatentDecoder):
        task.decode.vae.double()
    table = task.chain.table.double() if task.chain.table.is_floating_point() else task.chain.table
    chain = replace(task.chain, table=table)
    decode = replace(task.decode, chain=chain)
    assert isinstance(task.objective.reward, DecodedReward)
    objective = replace(task.objective, reward=replace(task.objective.reward, decode=decode))
    params = {name: p.double() for name, p in task.params.items()}
    return replace(task, chain=chain, decode=decode, objective=objective, params=params)


# --- gradients by other means -------------------------------------------------------------------------------------


def whole_rollout(
    chain: NetworkChain,
    params: Params,
    noise: Noise,
    condition: Condition,
    cut: Cut | None = None,
    recomputed: bool = False,
) -> Tensor:
    """Return x_0 (n, *shape) with a graph through all steps.

    Args:
        cut: may detach what it likes of the outputs.
        recomputed: keep the latents only, and let torch compute each step's activations again in the backward pass.
    """
    x = chain.initial(noise.initial)
    for t in range(chain.steps, 0, -1):
        mean = _recomputed if recomputed else _mean
        x = mean(chain, params, x, t, condition, cut) + chain.std(t) * noise.steps[t - 1]
    return x


def _mean(chain: NetworkChain, params: Params, x: Tensor, t: int, condition: Condition, cut: Cut | None) -> Tensor:
    seen = chain.sampler.network_input(x, t)
    output = chain.output(params, seen, chain.sampler.timesteps[t - 1], at_step(condition, t))
    return chain.sampler.mean(x, output if cut is None else cut(output, t), t)


def _recomputed(
    chain: NetworkChain, params: Params, x: Tensor, t: int, condition: Condition, cut: Cut | None
) -> Tensor:
    # The whole step is run again, its parameters put into the network anew: see scale.network.checkpoint_blocks.
    return checkpoint(lambda p, y: _mean(chain, p, y, t, condition, cut), params, x, use_reentrant=False)


def whole_graph_gradient(
    task: Task, params: Params, noise: Noise, condition: Condition, recomputed: bool = False
) -> Params:
    """Return the gradient of the batch's mean reward by one graph through sampler, decoder and reward."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    x0 = whole_rollout(task.chain, leaves, noise, condition, recomputed=recomputed)
    value = task.objective.reward(x0, for_reward(condition)).mean()
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def derivatives(
    task: Task, params: Params, noise: Noise, condition: Condition, direction: Params, cut: Cut | None = None
) -> Tensor:
    """Return each sample's derivative of the reward along `direction`, (n,).

    Forward mode carries the direction through the whole roll-out; the reward's own gradient meets it at x_0.
    """

    def rolled(p: Params) -> Tensor:
        return whole_rollout(task.chain, p, noise, condition, cut)

    x0, shift = torch.func.jvp(rolled, (params,), (direction,))[:2]
    leaf = x0.detach().requires_grad_()
    (slope,) = torch.autograd.grad(task.objective.reward(leaf, for_reward(condition)).sum(), leaf)
    return (slope * shift).flatten(1).sum(1)


def score_gradient(
    task: Task, params: Params, noise: Noise, condition: Condition, baseline: float, length: int = 1, mean: bool = False
) -> Params:
    """Return the half-order gradient over blocks of `length` steps by autograd of the log-densities of x.

    A block that ends at step k is one graph of its steps, whose last density is the one of x_{k-1} given x_k. With
    length = 1 this is sum over t of (R - baseline) grad log p(x_{t-1} | x_t).

    Args:
        mean: average the log-density over the latent's dimensions instead of summing it, as released code does.
    """
    chain = task.chain
    with torch.no_grad():
        latents = [chain.initial(noise.initial)]
        for t in range(chain.steps, 0, -1):
            step = chain.mean(params, latents[-1], t, at_step(condition, t)) + chain.std(t) * noise.steps[t - 1]
            latents.append(step)
        latents = latents[::-1]
        returns = task.objective.reward(latents[0], for_reward(condition)) - baseline
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for low in range(1, chain.steps + 1, length):
        x = latents[min(low + length - 1, chain.steps)]
        for t in range(min(low + length - 1, chain.steps), low, -1):
            x = chain.mean(leaves, x, t, at_step(condition, t)) + chain.std(t) * noise.steps[t - 1]
        log_prob = step_log_prob(chain, leaves, x, latents[low - 1], low, condition)
        if mean:
            log_prob = log_prob / latents[0][0].numel()
        grads = torch.autograd.grad((returns * log_prob).mean(), list(leaves.values()))
        total = {name: total[name] + g for name, g in zip(total, grads, strict=True)}
    return total


def accumulated(
    task: Task, estimator: Estimator, params: Params, noise: Noise, condition: Condition, micro_batch: int | None = None
) -> Params:
    """Return the estimator's batch mean by the sweep: what the fine-tuning loop is given."""
    from algorithms.division import Division

    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    estimator.accumulate(task.chain, leaves, task.objective, noise, condition, Division(micro_batch))
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def along(gradient: Params, direction: Params) -> float:
    """Return the inner product."""
    return float(sum((gradient[name] * direction[name]).sum().double() for name in direction))


def norm(gradient: Params) -> float:
    return along(gradient, gradient) ** 0.5


# --- directions ---------------------------------------------------------------------------------------------------


def moved(task: Task, generator: torch.Generator, size: float = 0.1) -> Params:
    """Return the parameters away from the start, where LoRA's second factors are zero and half of all slopes vanish."""
    return {
        name: p + size * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for name, p in task.params.items()
    }


def random_direction(params: Params, generator: torch.Generator) -> Params:
    """Return a direction of length one, uniform on the sphere."""
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for name, p in params.items()}
    length = norm(drawn)
    return {name: value / length for name, value in drawn.items()}


def natural_direction(estimates: Tensor, gradient: Tensor, ridge: float = 1.0) -> Tensor:
    """Return (C + r)^-1 g of length one, (p,): the direction in which an estimator tells most about the gradient g.

    C is the covariance of one sample's estimate, r its mean variance times `ridge` times p / n. Along v the
    signal-to-noise ratio is <g, v> / sqrt(<v, C v>), which C^-1 g makes largest. For the policy gradient that is the
    natural gradient; for estimators with noise on the parameters it is nearly g itself.

    Args:
        estimates: (n, p), of a pilot.
    """
    centred = estimates - estimates.mean(0)
    # By the identity of Woodbury: an n x n system instead of a p x p one.
    gram = centred @ centred.T
    level = ridge * gram.diagonal().mean()
    inner = torch.linalg.solve(gram + level * torch.eye(len(gram)).to(gram), centred @ gradient)
    v = gradient - centred.T @ inner
    return v / v.norm()


# --- measurements -------------------------------------------------------------------------------------------------


def measure(
    task: Task,
    choices: Sequence[Choice],
    samples: int,
    batch: int,
    on_done: Callable[[str], None] = lambda name: None,
) -> list[Measured]:
    """Measure variance, time and memory of estimators at the start of a run.

    The variance is that of one sample's gradient in all trained parameters, by batches of two halves: the mean squared
    difference of the two halves' means, which needs no per-sample gradients. |gradient|^2 is the mean product of
    different batches of the least noisy of the estimators.

    Args:
        samples: of each estimator, in batches of `batch` (an even number).
    """
    if learns_from_data(task.config):
        name = task.config.method.name
        raise ValueError(
            f"method.name must be a method that learns from the reward for an audit or plan, got {name}, whose critic "
            f"changes; its gradient with the settings' reward for a critic is that of method={{name: {REWARDED[name]}}}"
        )
    found: list[tuple[Choice, Estimator, Tensor, float, int, int]] = []
    for choice in choices:
        pilot = task.generator("audit", "pilot", choice.name)
        estimator = make_estimator(choice, task.chain, task.params, task.objective, pilot, task.condition(4096))
        means, seconds = _halves(task, estimator, samples, batch)
        peak, each = _bytes(task, estimator, batch)
        found.append((choice, estimator, means, seconds, peak, each))
        on_done(choice.name)
    variances = [_variance(means, batch) for *_, means, _, _, _ in found]
    unbiased = [i for i, (choice, *_) in enumerate(found) if METHODS[choice.name].unbiased]
    best = min(unbiased, key=lambda i: variances[i][0])
    square = _squared_mean(found[best][2])
    made = []
    for (choice, estimator, _, seconds, peak, each), (variance, error) in zip(found, variances, strict=True):
        entry = METHODS[choice.name]
        made.append(
            Measured(
                estimator=choice.name,
                relative_variance=variance / square,
                relative_variance_error=error / square,
                seconds=seconds,
                peak_bytes=peak,
                batch=batch,
                bytes_per_sample=each,
                calls=estimator.credit.calls() * 2 ** len(estimator.flips),
                bias="none" if entry.unbiased else "rows of its credit matrix do not sum to one",
                differentiable_reward=entry.differentiable,
            )
        )
    return made


def _halves(task: Task, estimator: Estimator, samples: int, batch: int) -> tuple[Tensor, float]:
    """Return the mean gradients of half batches, (batches, 2, p), and the seconds per sample."""
    half, means, spent = batch // 2, [], 0.0
    for i in range(max(2, samples // batch)):
        pair = []
        for j in range(2):
            source = task.generator("audit", "variance", estimator.name, i, j)
            noise = estimator.draw(task.chain, task.params, half, source)
            begun = time.perf_counter()
            gradient = accumulated(
                task, estimator, task.params, noise, task.condition(half, start=2 * i * half + j * half)
            )
            spent += (time.perf_counter() - begun) * (i > 0)  # the first batch warms up
            pair.append(torch.cat([g.flatten() for g in gradient.values()]).double().cpu())
        means.append(torch.stack(pair))
    return torch.stack(means), spent / (2 * half * (len(means) - 1))


def _variance(means: Tensor, batch: int) -> tuple[float, float]:
    """Return the trace of one sample's covariance with its standard error, from pairs of half batches' means."""
    each = (means[:, 0] - means[:, 1]).square().sum(1) / 2 * (batch // 2)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def _squared_mean(means: Tensor) -> float:
    """Return |gradient|^2 without bias: the mean product of different batches' means."""
    each = means.flatten(0, 1)
    total = each.sum(0)
    square = float(total @ total - each.square().sum()) / (len(each) * (len(each) - 1))
    return max(square, 1e-300)


def _bytes(task: Task, estimator: Estimator, batch: int) -> tuple[int, int]:
    """Return the most bytes alive at once in one gradient of `batch` samples, and those of each further sample."""
    standing = sum(p.nbytes for p in task.chain.network.parameters())

    def peak(samples: int) -> int:
        noise = estimator.draw(task.chain, task.params, samples, task.generator("audit", "memory"))
        with LiveBytes() as live:
            accumulated(task, estimator, task.params, noise, task.condition(samples))
        return live.peak

    small, large = peak(batch // 2), peak(batch)
    return standing + large, max(0, large - small) // (batch - batch // 2)


def predicted_bytes(config: Config, cache: Path, method: str, batch: int) -> int:
    """Predict on the meta device, without allocating, what `measure` measures as the peak of one gradient.

    Only the weights are loaded, for their shapes; no number of a latent or an activation is computed.
    """
    task = build(config, cache)
    chosen = next(c for c in (config.method, Choice(name=method)) if c.name == method)
    if METHODS[method].fit is not None:
        raise ValueError(f"method {method} is fitted on a pilot: its memory cannot be predicted before")
    estimator = make_estimator(chosen, task.chain, task.params, task.objective, task.generator("plan"))
    standing = sum(p.nbytes for p in task.chain.network.parameters())
    network = meta_copy(task.chain.network)
    table = meta_copy(task.chain.table)
    chain = replace(task.chain, network=network, table=table)
    decode = replace(task.decode, chain=chain)
    if isinstance(decode, LatentDecoder):
        decode = replace(decode, vae=meta_copy(decode.vae))
    params = meta_copy(task.params)
    noise = estimator.draw(task.chain, task.params, batch, task.generator("plan"))
    on_meta = Noise(
        noise.initial.to("meta"),
        noise.steps.to("meta"),
        noise.outcome,
        None if noise.parameters is None else {name: _unit_on_meta(xi) for name, xi in noise.parameters.items()},
    )
    objective = Objective(_DecodedMean(decode))
    condition = task.condition(batch)

    def step() -> None:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        estimator.accumulate(chain, leaves, objective, on_meta, condition)

    return standing + predict(step, reads=True)


def _unit_on_meta(xi: Any) -> Any:
    return replace(xi, like=xi.like.to("meta")) if isinstance(xi, Redrawn) else xi.to("meta")


@dataclass(frozen=True)
class _DecodedMean:
    """The mean of the decoded image: stands for rewards whose own memory is small beside the decoder's."""

    decode: Callable[[Tensor, Tensor | None], Tensor]
    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return self.decode(x0, condition).flatten(1).mean(1)
