"""Gradients that are not credit matrices: surrogate losses on fixed trajectories, and re-noised last steps.

All are `Method`s of the fine-tuning loop (algorithms/training.py): `updates` leaves the gradient of ascent of one
optimizer update in the parameters' `.grad`, then gives the batch's returns. As in the sweep, step t is charged for the
running costs of the steps below it, which its noise still moves, and for the gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from algorithms.baselines import Baseline, Constant, LeaveOneOut
from algorithms.chain import (
    Chain,
    Condition,
    Noise,
    Params,
    Rollout,
    at_step,
    for_reward,
    of_samples,
    positive_std,
    rollout,
    step_mean,
)
from algorithms.division import WHOLE, Division
from algorithms.estimators import policy_gradient, truncated
from algorithms.objective import Objective


@runtime_checkable
class AnyStep(Chain, Protocol):
    """A chain that can take every step at once; a small network is then called once instead of T times."""

    def means(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
        """Return the means of x_{t-1} given x_t = x[i], t = steps[i] (k,), (k, n, *shape) both; without a condition."""
        ...


# Keeps a batch of equal returns from a division by zero; DDPO's released value.
STD_FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Roll-outs of one setting of the parameters, to be gone over again with others; this process's share of a batch.

    Attributes:
        rewards: (n,).
        log_probs: (T, n), `log_probs[t - 1]` is the log-density of x_{t-1} given x_t at the setting that drew them,
            summed over the latent's dimensions, up to a constant that no parameter moves.
    """

    chain: Chain
    objective: Objective
    condition: Condition
    roll: Rollout
    rewards: Tensor
    log_probs: Tensor
    division: Division

    @classmethod
    def of(
        cls,
        chain: Chain,
        params: Params,
        objective: Objective,
        noise: Noise,
        condition: Condition,
        division: Division = WHOLE,
    ) -> Trajectories:
        """Roll out a share of a batch's noise, without a graph.

        The log-densities come from the roll-out's own means, at no further evaluation of the network.

        Raises:
            ValueError: if a step has std = 0, so that it has no density.
        """
        stds = [positive_std(chain, t) for t in range(1, chain.steps + 1)]
        fixed = {name: p.detach() for name, p in params.items()}
        share = division.own(noise.samples)
        noise, condition = noise.of(share), of_samples(condition, share)
        rolls, rewards, log_probs = [], [], []
        for part in division.pieces(noise.samples):
            own = of_samples(condition, part)
            roll, means = charged_rollout(chain, fixed, objective, noise.of(part), own)
            with torch.no_grad():
                rewards.append(objective.reward(roll.latents[0], for_reward(own)))
            densities = [_log_density(m, x, s) for m, x, s in zip(means, roll.latents, stds, strict=False)]
            log_probs.append(torch.stack(densities))
            rolls.append(roll)
        return cls(
            chain, objective, condition, Rollout.join(rolls), torch.cat(rewards), torch.cat(log_probs, 1), division
        )

    @property
    def returns_after(self) -> Tensor:
        """(T, n): row t - 1 is the reward less the costs of the steps below t, all that the noise of step t moves."""
        return self.rewards - self.roll.costs.cumsum(0) + self.roll.costs

    @property
    def returns(self) -> Tensor:
        """(n,): the reward less all costs."""
        return self.rewards - self.roll.costs.sum(0)

    def ascend(self, params: Params, samples: Tensor | None, value: Value, count: int) -> None:
        """Set the `.grad`s to the gradient of 1 / count * sum over `samples` and t of value, over all processes.

        Steps, and micro-batches of a step, are taken one at a time, so memory is one step's activations, whatever T is.
        An `AnyStep` chain without running costs and condition takes all steps of a micro-batch in one call.

        Args:
            samples: which of this process's samples; None for all of them.
        """
        pieces = self.division.pieces(len(self.rewards) if samples is None else len(samples))
        parts = pieces if samples is None else [samples[piece] for piece in pieces]
        if self._at_once:
            steps, latents = torch.arange(1, self.chain.steps + 1), self.roll.latents
            for part in parts:
                self._ascend_blocks(
                    params, slice(None), part, steps, latents[1:, part], latents[:-1, part], value, count
                )
        else:
            for t in range(1, self.chain.steps + 1):
                for part in parts:
                    self._ascend_step(params, t, part, value, count)
        self.division.add_gradients(params)

    def ascend_pairs(self, params: Params, rows: Tensor, value: Value, count: int) -> None:
        """Do as `ascend` does, but for one step of each sample only: t = rows + 1, rows (n,) integers in 0..T - 1.

        Of rows that are drawn uniformly, T times the result has the mean of `ascend`'s.
        """
        if self._at_once:
            for piece in self.division.pieces(len(rows)):
                row, part = rows[piece, None], torch.arange(len(rows), device=rows.device)[piece, None]
                x, x_next = self.roll.latents[row + 1, part], self.roll.latents[row, part]
                self._ascend_blocks(params, row, part, rows[piece] + 1, x, x_next, value, count)
        else:
            for t in range(1, self.chain.steps + 1):
                chosen = torch.nonzero(rows == t - 1)[:, 0]
                for piece in self.division.pieces(len(chosen)):
                    self._ascend_step(params, t, chosen[piece], value, count)
        self.division.add_gradients(params)

    @property
    def _at_once(self) -> bool:
        return isinstance(self.chain, AnyStep) and self.condition is None and not self.objective.running_costs

    def _ascend_step(self, params: Params, t: int, part: slice | Tensor, value: Value, count: int) -> None:
        x, x_next, leaves = self.roll.latents[t][part], self.roll.latents[t - 1][part], _leaves(params)
        own, std = at_step(self.condition, t), positive_std(self.chain, t)
        told = None if own is None else own[part]
        with torch.enable_grad():
            mean = step_mean(self.chain, leaves, x, t, told)
            log_prob = _log_density(mean, x_next, std)
            each = value(t - 1, part, log_prob, self.objective.cost(self.chain, mean, x, t, told))
        _add_gradient(params, leaves, each.sum() / count)

    def _ascend_blocks(
        self,
        params: Params,
        row: Tensor | slice,
        part: Tensor | slice,
        steps: Tensor,
        x: Tensor,
        x_next: Tensor,
        value: Value,
        count: int,
    ) -> None:
        """Add the gradient of states x, x_next (k, m, *shape), block i at step `steps[i]`, by one call."""
        assert isinstance(self.chain, AnyStep)
        asked, leaves = steps.tolist(), _leaves(params)
        known = {t: positive_std(self.chain, t) for t in sorted(set(asked))}
        stds = x.new_tensor([known[t] for t in asked])[:, None]
        with torch.enable_grad():
            gap = (x_next - self.chain.means(leaves, x, steps)).flatten(2)
            each = value(row, part, -0.5 * (gap.square().sum(2) / stds.square()), None)
        _add_gradient(params, leaves, each.sum() / count)


Value = Callable[["int | slice | Tensor", "slice | Tensor", Tensor, "Tensor | None"], Tensor]
"""value(t - 1, samples, log-density of x_{t-1} given x_t, running cost) -> (len(samples),); or for several t."""


@dataclass(frozen=True, eq=False)
class Scored:
    """The plain policy gradient's surrogate: advantage times log-density, less the running cost.

    Attributes:
        advantages: (T, n).
    """

    advantages: Tensor

    def __call__(
        self, row: int | slice | Tensor, part: slice | Tensor, log_prob: Tensor, cost: Tensor | None
    ) -> Tensor:
        gain = self.advantages[row, part] * log_prob
        return gain if cost is None else gain - cost


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return min(rho A, clip(rho, 1 - clip, 1 + clip) A) with rho = exp(log_ratio) (Schulman et al. 2017, eq. 7)."""
    ratio = torch.exp(log_ratio)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True)
class PPO:
    """Clipped importance-weighted policy gradient along the chain, DDPO-IS (Black et al. 2023; Schulman et al. 2017).

    A batch is drawn once; each of `epochs` x `minibatches` updates ascends the mean over samples of

        sum over t of  min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) - cost_t / scale,

    with rho_t the ratio of the densities of x_{t-1} given x_t, now and when drawn. Before the first update rho_t = 1
    (exactly with one minibatch, else to rounding), and the gradient is the one of `policy_gradient` with the same
    baseline, divided by the scale. Gradients are summed over t and log-densities over dimensions; the released DDPO
    code takes the mean of both, so its clip range is that of a ratio to the power 1 / dimension.

    Attributes:
        clip: c, the half-width of the range of ratios that is still rewarded.
        advantage: "standardised": (return after t - mean) / (std of the whole return + 1e-8), as DDPO does, whose
            mean includes the sample itself, which costs a factor 1 - 1 / group even before the scale;
            "leave-one-out": return after t less the others' mean, scale one: unbiased in the first update.
        group: consecutive samples that share mean and std (one prompt's, say); None for the whole batch.

    Raises:
        ValueError: if a setting is out of range; by `updates`, if the batch cannot be split as asked or a step has
            std = 0.
    """

    clip: float
    epochs: int = 1
    minibatches: int = 1
    advantage: Literal["standardised", "leave-one-out"] = "standardised"
    group: int | None = None
    division: Division = WHOLE

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie in (0, 1), got {self.clip}")
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"epochs and minibatches must be >= 1, got {self.epochs} and {self.minibatches}")
        if self.advantage not in ("standardised", "leave-one-out"):
            raise ValueError(f"advantage must be 'standardised' or 'leave-one-out', got {self.advantage!r}")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group must be >= 2, got {self.group}")

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give each update's gradient of ascent in the `.grad`s, and the batch's returns (n,)."""
        size = self.group or samples
        if size < 2 or samples % size:
            raise ValueError(f"samples must be whole groups of >= 2, got {samples} in groups of {size}")
        if self.minibatches > samples:
            raise ValueError(f"minibatches must be <= samples = {samples}, got {self.minibatches}")
        noise = policy_gradient(chain.steps).draw(chain, params, samples, generator)
        batch = Trajectories.of(chain, params, objective, noise, condition, self.division)
        advantages, scale = self._advantages(batch, samples, size)
        returns = self.division.gather(batch.returns)

        def surrogate(row: int | slice | Tensor, part: slice | Tensor, log_prob: Tensor, cost: Tensor | None) -> Tensor:
            gain = clipped(log_prob - batch.log_probs[row, part], advantages[row, part], self.clip)
            return gain if cost is None else gain - cost / scale[part]

        for _ in range(self.epochs):
            for part, count in self._parts(samples, generator):
                batch.ascend(params, part, surrogate, count)
                yield returns

    def _parts(self, samples: int, generator: torch.Generator) -> list[tuple[Tensor | None, int]]:
        """Return the minibatches: which of this process's samples are in it, and how many of all processes'."""
        if self.minibatches == 1:
            return [(None, samples)]  # in the order drawn: the means are then recomputed to the last bit
        own, order = self.division.own(samples), torch.randperm(samples, generator=generator, device=generator.device)
        parts = order.tensor_split(self.minibatches)
        return [(part[(part >= own.start) & (part < own.stop)] - own.start, len(part)) for part in parts]

    def _advantages(self, batch: Trajectories, samples: int, size: int) -> tuple[Tensor, Tensor]:
        """Return the advantages (T, n), and each sample's scale (n,), which its running costs are divided by too."""
        after = batch.returns_after
        if self.advantage == "leave-one-out":
            baseline = self.division.baseline(LeaveOneOut(size))
            others = [
                baseline(row, x, t) for t, (row, x) in enumerate(zip(after, batch.roll.latents[1:], strict=True), 1)
            ]
            return after - torch.stack(others), torch.ones_like(batch.rewards)
        own, everyone = self.division.own(samples), self.division.gather(after.T).T
        mean = everyone.reshape(len(after), -1, size).mean(2).repeat_interleave(size, 1)[:, own]
        returns = self.division.gather(batch.returns)
        std = returns.reshape(-1, size).std(1, correction=0).repeat_interleave(size)[own]
        return (after - mean) / (std + STD_FLOOR), std + STD_FLOOR


@dataclass(frozen=True)
class DPOK:
    """DPOK's gradient (Fan et al. 2023, section 4): the score pays for the reward alone, the costs for themselves.

    For an objective with running costs, above all `kl_regularised(objective, strength, reference)`, the batch mean of

        sum over t of  (reward - baseline) * grad log p(x_{t-1} | x_t) - grad cost_t at the fixed state x_t.

    It leaves out that the parameters also move the states at which later costs are charged. The whole gradient is
    `with_baseline(policy_gradient(T), baseline)` on the same objective, and sample by sample, for equal baselines,

        whole - DPOK = - sum over t of  (sum over s < t of cost_s) * grad log p(x_{t-1} | x_t).

    Both agree where the chain is the reference, all costs being zero there. The released code replaces the KL by the
    squared difference of the noise predictions and re-uses a batch with clamped importance ratios; this does neither.
    """

    baseline: Baseline = Constant(0.0)
    division: Division = WHOLE

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradient of ascent in the `.grad`s, and the batch's returns (n,)."""
        noise = policy_gradient(chain.steps).draw(chain, params, samples, generator)
        batch = Trajectories.of(chain, params, objective, noise, condition, self.division)
        baseline = self.division.baseline(self.baseline)
        advantages = [batch.rewards - baseline(batch.rewards, x, t) for t, x in enumerate(batch.roll.latents[1:], 1)]

        batch.ascend(params, None, Scored(torch.stack(advantages)), samples)
        yield self.division.gather(batch.returns)


@runtime_checkable
class Renoising(Chain, Protocol):
    """A chain that knows how to noise a sample back to where its last step starts."""

    def renoise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Map x_0 (n, *shape) and standard normal noise of its shape to x_1 (n, *shape)."""
        ...


@dataclass(frozen=True, eq=False)
class RenoisedNoise:
    """Randomness of DRaFT-LV: the roll-out's, and (copies, n, *shape) for the copies' x_1 and for their last step."""

    chain: Noise
    renoise: Tensor
    last: Tensor

    def of(self, samples: slice) -> RenoisedNoise:
        """Return the noise of some of the roll-outs."""
        return RenoisedNoise(self.chain.of(samples), self.renoise[:, samples], self.last[:, samples])


@dataclass(frozen=True)
class DraftLV:
    """DRaFT-LV (Clark et al. 2023): back-propagation through the last step, averaged over more starts of that step.

    After a roll-out without a graph, the last step is taken again with a graph from x_1^0 = x_1, and from
    x_1^j = renoise(x_0, fresh noise), j = 1..copies, with fresh noise of its own. The gradient is the batch mean of

        1 / (copies + 1) * sum over j = 0..copies of  grad [reward(x_0^j) - cost_1(x_1^j)],  all x_1^j held fixed.

    The paper adds the terms up instead of averaging. It is not a credit matrix: the copies are no states of the
    roll-out. A copy's mean is step 1's gradient g_1 where a re-noised x_0 has the law of x_1, else it is not, and the
    steps t > 1 get nothing, as in `truncated(T, 1)`, which `copies = 0` is. A copy costs one evaluation and its
    backward pass, not a roll-out.

    Raises:
        ValueError: if copies is negative; by `updates`, if the reward is not differentiable or the chain cannot
            renoise.
    """

    copies: int
    division: Division = WHOLE

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise ValueError(f"copies must be >= 0, got {self.copies}")

    def draw(self, chain: Chain, params: Params, samples: int, generator: torch.Generator) -> RenoisedNoise:
        """Draw all randomness of `samples` roll-outs."""
        noise = truncated(chain.steps, 1).draw(chain, params, samples, generator)
        like, shape = noise.initial, (self.copies, *noise.initial.shape)
        options = {"generator": generator, "dtype": like.dtype, "device": generator.device}
        renoise, last = (torch.randn(shape, **options).to(like.device) for _ in range(2))
        return RenoisedNoise(noise, renoise, last)

    def accumulate(
        self, chain: Chain, params: Params, objective: Objective, noise: RenoisedNoise, condition: Condition = None
    ) -> Tensor:
        """Add this process's share of the batch mean's gradient to the `.grad`s; return its roll-outs' returns (n,)."""
        if not objective.reward.differentiable:
            raise ValueError("DRaFT-LV needs a differentiable reward; this one is not")
        if not isinstance(chain, Renoising):
            raise ValueError(f"chain must have renoise(x0, noise) for DRaFT-LV, {type(chain).__name__} has not")
        samples = noise.chain.samples
        share = self.division.own(samples)
        noise, condition = noise.of(share), of_samples(condition, share)
        pieces = self.division.pieces(noise.chain.samples)
        arguments = ((noise.of(piece), of_samples(condition, piece)) for piece in pieces)
        return torch.cat([self._piece(chain, params, objective, n, c, samples) for n, c in arguments])

    def _piece(
        self,
        chain: Renoising,
        params: Params,
        objective: Objective,
        noise: RenoisedNoise,
        condition: Condition,
        samples: int,
    ) -> Tensor:
        """Do what `accumulate` does for some of the batch's `samples` samples."""
        fixed, own = {name: p.detach() for name, p in params.items()}, at_step(condition, 1)

        def cost(mean: Tensor, x: Tensor, t: int) -> Tensor | None:
            return objective.cost(chain, mean, x, t, at_step(condition, t))

        roll = rollout(chain, fixed, noise.chain, condition, cost=cost)
        x0 = roll.latents[0]
        starts = [roll.latents[1], *(chain.renoise(x0, z) for z in noise.renoise)]
        rewards = []
        for x, eps in zip(starts, [noise.chain.steps[0], *noise.last], strict=True):
            leaves = _leaves(params)
            with torch.enable_grad():
                mean = step_mean(chain, leaves, x, 1, own)
                reward = objective.reward(mean + chain.std(1) * eps, for_reward(condition))
                charged = objective.cost(chain, mean, x, 1, own)
                value = reward if charged is None else reward - charged
            rewards.append(reward.detach())
            _add_gradient(params, leaves, value.sum() / (samples * len(starts)))
        return rewards[0] - roll.costs.sum(0)

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradient of ascent in the `.grad`s, and the batch's returns (n,)."""
        noise = self.draw(chain, params, samples, generator)
        returns = self.accumulate(chain, params, objective, noise, condition)
        self.division.add_gradients(params)
        yield self.division.gather(returns)


def charged_rollout(
    chain: Chain, params: Params, objective: Objective, noise: Noise, condition: Condition
) -> tuple[Rollout, list[Tensor]]:
    """Run the chain without a graph, charged the objective's running costs; return the means of steps t = 1..T too."""
    means = []

    def cost(mean: Tensor, x: Tensor, t: int) -> Tensor | None:
        means.append(mean)
        return objective.cost(chain, mean, x, t, at_step(condition, t))

    return rollout(chain, params, noise, condition, cost=cost), means[::-1]


def _log_density(mean: Tensor, x: Tensor, std: float) -> Tensor:
    """Return the log-density of x (n, *shape) less its constant, which cancels in ratios and has no gradient."""
    return -0.5 * ((x - mean) / std).flatten(1).square().sum(1)


def _leaves(params: Params) -> Params:
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _add_gradient(params: Params, leaves: Params, value: Tensor) -> None:
    """Add the gradient of `value` in the leaves to the parameters' `.grad`."""
    grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    for p, grad in zip(params.values(), grads, strict=True):
        p.grad = grad if p.grad is None else p.grad + grad
