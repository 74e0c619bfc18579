"""Shortcut fine-tuning (SFT and SFT-PG, Fan and Lee 2023): a sampler against a critic, in all published arms.

    adversary = Adversary(critic, critic.initial(g), value, value.initial(g))
    method = ShortcutFineTuning("policy", "baseline", critic_steps=5, generator_steps=1, strength=0.1)      # SFT-PG (B)
    trainer = ShortcutTrainer(chain, params, data, adversary, method, Settings(300, 128, 5e-5), generator_for)
    trainer.run()

An update is `critic_steps` ascents of  g(p, f, q) - strength * penalty  in the critic (and the baseline), each on fresh
roll-outs and data, then `generator_steps` ascents of E[-f(x_0)] in the sampler, the critic held fixed: algorithm 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms.baselines import Baseline, LeaveOneOut
from algorithms.chain import Chain, Condition, Noise, Params, Rollout, of_samples
from algorithms.critics import (
    Critic,
    CriticReward,
    KernelCritic,
    MLPCritic,
    MLPValue,
    Value,
    ValueBaseline,
    baseline_gradients,
    baseline_penalty,
    continuations,
    evaluate,
    gradient_penalty,
    spectrally_normalised,
)
from algorithms.division import Division
from algorithms.estimators import Estimator, first_order, policy_gradient, with_baseline
from algorithms.losses import Scored, Trajectories, charged_rollout, clipped
from algorithms.objective import Objective, RunningCost
from algorithms.training import Callback, FromEstimator, Settings, Trainer

GRADIENTS = ("pathwise", "policy")
REGULARISERS = ("gradient penalty", "baseline", "conditional baseline", "spectral", None)
BATCHES = ("fresh", "clipped", "buffer", "pairs")


@dataclass(frozen=True)
class ShortcutFineTuning:
    """Which arm, and how many steps of each player; the generator's own optimizer is the `Settings`'.

    Attributes:
        gradient: of the generator: "pathwise" (SFT, eq. 15) or "policy" (SFT-PG, eq. 21).
        regulariser: "gradient penalty" (eq. 23); "baseline", (B) as released: the baseline's squared error against
            f(x_0) itself, through which f is pulled too; "conditional baseline", (B) as printed in eq. 22: against
            E[f(x_0) | x_t], estimated by a second end of every roll-out from every x_t, T (T + 1) / 2 further steps a
            sample; a baseline that fits removes it, so it limits no critic; "spectral": weights of norm one instead
            of a penalty; None: for `KernelCritic` alone, which needs none.
        critic_steps: n_critic. With `KernelCritic`, batches pooled into the witness.
        generator_steps: n_generator.
        strength: eta of the gradient penalty, or lambda of (B), which multiplies the *sum* over t. The released code
            takes the mean with weight one: strength = 1 / T.
        batches: what the generator's steps are taken on. "fresh": new roll-outs for every step: each gradient is
            unbiased for E[-f] with f given. "clipped" (policy only): one new batch for all steps, with importance
            ratios clipped to 1 +- ratio_clip as in PPO; the first step is that of "fresh". "buffer" (policy only):
            algorithm 1: roll-outs that the critic and the baseline were trained on, without importance ratios;
            it saves a roll-out and is biased. "pairs" (policy only): of that buffer one step t for each sample, T times
            its term for the sum, as the released script does up to the factor T.
        ratio_clip: for "clipped".
        critic_learning_rate, critic_betas: of Adam, for critic and baseline.

    Raises:
        ValueError: if a setting is out of range or unknown.
    """

    gradient: Literal["pathwise", "policy"]
    regulariser: Literal["gradient penalty", "baseline", "conditional baseline", "spectral"] | None
    critic_steps: int = 5
    generator_steps: int = 1
    strength: float = 0.1
    batches: Literal["fresh", "clipped", "buffer", "pairs"] = "fresh"
    ratio_clip: float = 0.2
    critic_learning_rate: float = 1e-3
    critic_betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name, known in (("gradient", GRADIENTS), ("regulariser", REGULARISERS), ("batches", BATCHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        for name in ("critic_steps", "generator_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be >= 0 and finite, got {self.strength}")
        if self.gradient == "pathwise" and self.batches != "fresh":
            raise ValueError(f"batches must be 'fresh' for the pathwise gradient, got {self.batches!r}")
        if not 0 < self.ratio_clip < 1:
            raise ValueError(f"ratio_clip must lie in (0, 1), got {self.ratio_clip}")
        if not 0 < self.critic_learning_rate < float("inf"):
            raise ValueError(f"critic_learning_rate must be positive and finite, got {self.critic_learning_rate}")
        if len(self.critic_betas) != 2 or not all(0 <= beta < 1 for beta in self.critic_betas):
            raise ValueError(f"critic_betas must be two numbers in [0, 1), got {self.critic_betas}")

    @property
    def needs_value(self) -> bool:
        """Whether the regulariser is made of a baseline network."""
        return self.regulariser in ("baseline", "conditional baseline")

    def estimator(self, steps: int, baseline: Baseline) -> Estimator:
        """Return the estimator of the generator's gradient; `baseline` is used by the policy gradient only."""
        return first_order(steps) if self.gradient == "pathwise" else with_baseline(policy_gradient(steps), baseline)


@dataclass(frozen=True, eq=False)
class Adversary:
    """The critic and the baseline with their parameters: the initial ones, or those of a result.

    Attributes:
        params: of the critic; none for `KernelCritic`, whose witness the run fills in.
        value: the baseline network; None for the other samples' mean return, where no regulariser needs a network.

    Raises:
        ValueError: if a trained critic has no parameters, `KernelCritic` other than samples, or only one of value and
            value_params is given.
    """

    critic: Critic
    params: Params = field(default_factory=dict)
    value: Value | None = None
    value_params: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.critic, KernelCritic):
            if self.params and set(self.params) != {"generated", "data"}:
                raise ValueError(f"params of KernelCritic must be empty or its samples, got {sorted(self.params)}")
        elif not self.params:
            raise ValueError("params of a trained critic must hold at least one tensor, got none")
        if (self.value is None) != (not self.value_params):
            raise ValueError(f"value_params must be given exactly with value, got {sorted(self.value_params)}")


@dataclass(eq=False)
class ShortcutHistory:
    """What each update saw: lists with one entry per update.

    Attributes:
        critic_value: g = mean f(generated) - mean f(data) on the last critic step's batch, before that step; for
            `KernelCritic` the unbiased MMD^2 of the witness's samples.
        penalty: the regulariser there, before `strength`; 0 for "spectral" and `KernelCritic`.
        generator_return: mean return of the last generator step's roll-outs: -f less running costs.
        gradient_norm: of the generator before clipping, the largest of the update's steps.
        samples: roll-outs drawn so far for both players, continuations of roll-outs not counted.
    """

    critic_value: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    generator_return: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class ShortcutResult:
    """Result of a run: the sampler's parameters, their moving average if asked for, the adversary, the history."""

    params: Params
    ema: Params | None
    adversary: Adversary
    history: ShortcutHistory


class ShortcutTrainer:
    """A run of shortcut fine-tuning that can be stopped after any update, saved, and resumed.

    Update u draws from `generator_for(u)` alone. The caller's tensors are copied or only read.

    Args:
        data: (N, *chain.shape), of which batches are drawn uniformly with replacement.
        settings: the generator's: updates, samples (of every batch, of either player), Adam, and `clip`, gamma of
            section 4.2.
        condition: the chain's, for every batch of the update; the critic does not see it.
        running_costs: charged to the generator along the way, say the KL divergence to the pretrained sampler.
        micro_batch: samples that pass through the chain at once; None for all.

    Raises:
        ValueError: if data do not fit the chain or are fewer than the batch, the critic is not scalar, or the critic,
            the baseline and the regulariser do not go together.
    """

    def __init__(
        self,
        chain: Chain,
        params: Params,
        data: Tensor,
        adversary: Adversary,
        method: ShortcutFineTuning,
        settings: Settings,
        generator_for: Callable[[int], torch.Generator],
        condition: Condition | Callable[[int], Condition] = None,
        running_costs: tuple[RunningCost, ...] = (),
        micro_batch: int | None = None,
        callback: Callback | None = None,
    ) -> None:
        _check(chain, data, adversary, method, settings.samples)
        self._rounds = _Rounds(method, adversary, data, Division(micro_batch))
        objective = Objective(CriticReward(adversary.critic, adversary.params), running_costs)
        self._trainer = Trainer(
            chain, params, objective, self._rounds, settings, generator_for, condition=condition, callback=callback
        )

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self._trainer.done

    def run(self, updates: int | None = None) -> None:
        """Make up to `updates` more updates, by default all that the settings ask for.

        Raises:
            FloatingPointError: if a gradient of either player is not finite; its step is not made.
        """
        self._trainer.run(updates)

    def result(self) -> ShortcutResult:
        """Return copies of everything there is."""
        generator, rounds = self._trainer.result(), self._rounds
        method, samples = rounds.method, self._trainer.settings.samples
        drawn = {"fresh": method.generator_steps, "clipped": 1}.get(method.batches, 0) + method.critic_steps
        history = ShortcutHistory(
            list(rounds.critic_value),
            list(rounds.penalty),
            generator.history.mean_return,
            generator.history.gradient_norm,
            [u * samples * drawn for u in range(1, self.done + 1)],
        )
        return ShortcutResult(generator.params, generator.ema, rounds.adversary(), history)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state as copies: tensors, numbers, strings; torch.load(weights_only=True) reads it back."""
        return {"generator": self._trainer.state_dict(), "adversary": self._rounds.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the settings may differ in the number of updates only.

        Raises:
            ValueError: if method, settings other than `updates`, or names or shapes of parameters differ.
        """
        self._rounds.check_state_dict(state["adversary"])
        self._trainer.load_state_dict(state["generator"])
        self._rounds.load_state_dict(state["adversary"])


class _Rounds:
    """The adversary at play: a `Method` of the training loop that trains the critic before it gives a gradient."""

    def __init__(self, method: ShortcutFineTuning, adversary: Adversary, data: Tensor, division: Division) -> None:
        self.method, self.critic_value, self.penalty = method, [], []
        self._initial, self._division, self._data = adversary, division, data.detach()
        kernel = isinstance(adversary.critic, KernelCritic)
        self._witness = _copies(adversary.params) if kernel else {}
        networks = ({} if kernel else adversary.params, adversary.value_params)
        self._vector, (self._critic, self._value) = _packed(*networks)
        self._vector.grad, self._slopes = _packed(*networks, leaves=False)
        rate, betas = method.critic_learning_rate, method.critic_betas
        self._optimizer = (
            torch.optim.Adam([self._vector], lr=rate, betas=betas, fused=True) if len(self._vector) else None
        )

    def adversary(self) -> Adversary:
        """Return copies of the networks."""
        return Adversary(
            self._initial.critic, _copies(self._witness or self._critic), self._initial.value, _copies(self._value)
        )

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Train the critic, then give the generator's gradients of ascent in the `.grad`s, and returns (n,)."""
        fixed = {name: p.detach() for name, p in params.items()}
        steps, seen = self.method.critic_steps, (0.0, 0.0)
        # The generator stands still meanwhile, so the batches of all critic steps are rolled out together.
        everyone = of_samples(condition, torch.arange(steps * samples) % samples)
        noise = policy_gradient(chain.steps).draw(chain, fixed, steps * samples, generator)
        buffer = self._roll(chain, fixed, objective, noise, everyone)
        picks = torch.randint(len(self._data), (steps * samples,), generator=generator, device=generator.device)
        data = self._data[picks.to(self._data.device)].to(buffer.latents)
        if isinstance(self._initial.critic, KernelCritic):
            seen = self._fit_witness(buffer, data, samples)
        else:
            for part in _batches(len(data), samples):
                seen = self._critic_step(chain, fixed, buffer.latents[:, part], data[part], generator, condition)
        self.critic_value.append(seen[0])
        self.penalty.append(seen[1])
        reward = CriticReward(self._initial.critic, {k: p.detach() for k, p in self._effective().items()})
        against = Objective(reward, objective.running_costs)
        if self.method.batches == "fresh":
            yield from self._fresh(chain, params, against, samples, generator, condition)
        elif self.method.batches == "clipped":
            yield from self._clipped(chain, params, against, samples, generator, condition)
        else:
            yield from self._buffered(chain, params, against, buffer, samples, generator, everyone)

    # -- the generator's steps

    def _baseline(self) -> Baseline:
        if self._initial.value is None:
            return LeaveOneOut()
        return ValueBaseline(self._initial.value, {k: p.detach() for k, p in self._value.items()})

    def _fresh(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition,
    ) -> Iterator[Tensor]:
        method = FromEstimator(self.method.estimator(chain.steps, self._baseline()), self._division)
        for _ in range(self.method.generator_steps):
            yield from method.updates(chain, params, objective, samples, generator, condition)

    def _clipped(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition,
    ) -> Iterator[Tensor]:
        noise = policy_gradient(chain.steps).draw(chain, params, samples, generator)
        batch = Trajectories.of(chain, params, objective, noise, condition, self._division)
        advantages = self._advantages(batch)

        def value(row: int | slice | Tensor, part: slice | Tensor, log_prob: Tensor, cost: Tensor | None) -> Tensor:
            gain = clipped(log_prob - batch.log_probs[row, part], advantages[row, part], self.method.ratio_clip)
            return gain if cost is None else gain - cost

        for _ in range(self.method.generator_steps):
            batch.ascend(params, None, value, samples)
            yield batch.returns

    def _buffered(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        buffer: Rollout,
        samples: int,
        generator: torch.Generator,
        condition: Condition,
    ) -> Iterator[Tensor]:
        total, pairs = buffer.latents.shape[1], self.method.batches == "pairs"
        for _ in range(self.method.generator_steps):
            order = torch.randperm(total * (chain.steps if pairs else 1), generator=generator, device=generator.device)
            picks = order[:samples].to(buffer.latents.device)
            rows, picks = picks // total, picks % total
            roll = Rollout(buffer.latents[:, picks], buffer.costs[:, picks])
            with torch.no_grad():
                rewards = objective.reward(roll.latents[0], None)
            unused = torch.zeros_like(roll.costs)  # densities at drawing: there are no importance ratios
            told = of_samples(condition, picks)
            batch = Trajectories(chain, objective, told, roll, rewards, unused, self._division)
            if pairs:
                batch.ascend_pairs(params, rows, Scored(chain.steps * self._advantages(batch, rows)), samples)
            else:
                batch.ascend(params, None, Scored(self._advantages(batch)), samples)
            yield batch.returns

    def _advantages(self, batch: Trajectories, rows: Tensor | None = None) -> Tensor:
        """Return (T, n): what remains of the return after step t, less the baseline.

        With rows (n,), sample i's number is right in row rows[i] alone: the baseline is then asked n times, not T n.
        """
        network = self._initial.value
        if network is not None:
            with torch.no_grad():  # the baseline of -f is -V
                if rows is None:
                    return batch.returns_after + self._values(batch.roll.latents)
                x = batch.roll.latents[rows + 1, torch.arange(len(rows), device=rows.device)]
                return batch.returns_after + network(self._value, x[:, None], rows + 1)[:, 0]
        others = LeaveOneOut()
        states = enumerate(zip(batch.returns_after, batch.roll.latents[1:], strict=True), 1)
        return torch.stack([row - others(row, x, t) for t, (row, x) in states])

    # -- the critic's steps

    def _roll(self, chain: Chain, params: Params, objective: Objective, noise: Noise, condition: Condition) -> Rollout:
        pieces = self._division.pieces(noise.samples)
        parts = ((noise.of(piece), of_samples(condition, piece)) for piece in pieces)
        return Rollout.join([charged_rollout(chain, params, objective, n, told)[0] for n, told in parts])

    def _effective(self) -> Params:
        """Return the parameters with which the critic is evaluated."""
        if self.method.regulariser == "spectral":
            return spectrally_normalised(self._critic)
        return self._witness or self._critic

    def _values(self, latents: Tensor) -> Tensor:
        """Return V_t(x_t), (T, n), in one call."""
        assert self._initial.value is not None
        return self._initial.value(self._value, latents[1:], torch.arange(1, len(latents), device=latents.device))

    def _critic_step(
        self,
        chain: Chain,
        params: Params,
        latents: Tensor,
        data: Tensor,
        generator: torch.Generator,
        condition: Condition,
    ) -> tuple[float, float]:
        """Ascend g - strength * penalty on roll-outs (T + 1, n, *shape); return both terms as they were before."""
        kind, generated, effective = self.method.regulariser, latents[0], self._effective()
        critic, network = self._initial.critic, self._initial.value
        if kind == "baseline" and type(critic) is MLPCritic and type(network) is MLPValue:
            strength, out = self.method.strength, (self._slopes[0], self._slopes[1])
            seen = baseline_gradients(critic, self._critic, network, self._value, latents, data, strength, out)
            self._step()
            return float(seen[0]), float(seen[1])

        def score(x: Tensor) -> Tensor:
            return evaluate(self._initial.critic, effective, x)

        of_generated, of_data = score(torch.cat([generated, data])).split(len(data))
        value, penalty, fit = of_generated.mean() - of_data.mean(), torch.zeros_like(of_data[0]), 0.0
        if kind == "gradient penalty":
            options = {"generator": generator, "dtype": data.dtype, "device": generator.device}
            penalty = gradient_penalty(score, generated, data, torch.rand(len(data), **options).to(data.device))
        elif kind == "baseline":
            penalty = baseline_penalty(self._values(latents), of_generated)
        elif kind == "conditional baseline":
            ends = continuations(chain, params, latents, generator, condition)
            again = score(ends.flatten(0, 1)).reshape(ends.shape[:2])
            penalty = baseline_penalty(self._values(latents), of_generated, again)
        if self._initial.value is not None and not self.method.needs_value:
            fit = baseline_penalty(self._values(latents), of_generated.detach())
        self._descend(self.method.strength * penalty - value + fit)
        return float(value.detach()), float(penalty.detach())

    def _fit_witness(self, buffer: Rollout, data: Tensor, samples: int) -> tuple[float, float]:
        """Make the samples the kernel critic's, fit the baseline to it, and return the estimate of MMD^2 and 0."""
        critic, generated = self._initial.critic, buffer.latents[0]
        assert isinstance(critic, KernelCritic)
        self._witness = {"generated": generated, "data": data}
        if self._initial.value is not None:
            for part in _batches(len(data), samples):
                values = self._values(buffer.latents[:, part])
                self._descend(baseline_penalty(values, critic(self._witness, generated[part])))
        return float(critic.distance(generated, data)), 0.0

    def _descend(self, loss: Tensor) -> None:
        leaves = [*self._critic.values(), *self._value.values()]
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        torch.cat([grad.flatten() for grad in grads], out=self._vector.grad)
        self._step()

    def _step(self) -> None:
        """Move critic and baseline against the gradient at hand."""
        assert self._optimizer is not None
        assert self._vector.grad is not None
        if not math.isfinite(torch.linalg.vector_norm(self._vector.grad).item()):
            slopes = [*self._slopes[0].items(), *self._slopes[1].items()]
            bad = [name for name, slope in slopes if not bool(slope.isfinite().all())]
            where = ", ".join(bad) or "its norm"
            raise FloatingPointError(f"the gradient of the critic or the baseline is not finite, in {where}")
        self._optimizer.step()

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        state = {
            "method": asdict(self.method),
            "witness": _copies(self._witness),
            "critic": _copies(self._critic),
            "value": _copies(self._value),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "history": {"critic_value": self.critic_value, "penalty": self.penalty},
        }
        return copy.deepcopy(state)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        mine, theirs = asdict(self.method), state["method"]
        for key in mine:
            if mine[key] != theirs[key]:
                raise ValueError(f"method must be that of the saved run, {key} = {mine[key]!r} was {theirs[key]!r}")
        for name, own in (("critic", self._critic), ("value", self._value)):
            shapes, saved = ({k: tuple(p.shape) for k, p in params.items()} for params in (own, state[name]))
            if shapes != saved:
                raise ValueError(f"{name} must have the names and shapes of the saved run, {saved}, got {shapes}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for own, saved in ((self._critic, state["critic"]), (self._value, state["value"])):
                for name, p in own.items():
                    p.copy_(saved[name])
        self._witness = _copies(state["witness"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.critic_value, self.penalty = (list(state["history"][key]) for key in ("critic_value", "penalty"))


def _batches(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _check(chain: Chain, data: Tensor, adversary: Adversary, method: ShortcutFineTuning, samples: int) -> None:
    if tuple(data.shape[1:]) != tuple(chain.shape):
        raise ValueError(f"data must be (N, *chain.shape) with shape {tuple(chain.shape)}, got {tuple(data.shape)}")
    if len(data) < samples:
        raise ValueError(f"data must be at least a batch of {samples}, got {len(data)}")
    if not data.is_floating_point() or not bool(data.isfinite().all()):
        raise ValueError(f"data must be finite floating-point numbers, got {data.dtype}")
    if isinstance(adversary.value, MLPValue) and adversary.value.steps != chain.steps:
        raise ValueError(f"value must be for T = {chain.steps} steps as the chain is, got {adversary.value.steps}")
    for name, network in (("critic", adversary.critic), ("value", adversary.value)):
        if isinstance(network, MLPCritic | MLPValue) and network.dimension != data[0].numel():
            raise ValueError(f"{name} must be of the data's dimension {data[0].numel()}, got {network.dimension}")
    if adversary.value is None:
        if method.needs_value:
            raise ValueError(f"value must be a network for the regulariser {method.regulariser!r}, got None")
        if method.gradient == "policy" and samples < 2:
            raise ValueError(f"samples must be >= 2 without a baseline network, got {samples}")
    if isinstance(adversary.critic, KernelCritic):
        if method.regulariser is not None:
            raise ValueError(f"regulariser must be None for KernelCritic, got {method.regulariser!r}")
        if method.batches in ("buffer", "pairs"):
            raise ValueError(
                f"batches must not be {method.batches!r} for KernelCritic: the samples would be its witness's own"
            )
        if samples * method.critic_steps < 2:
            raise ValueError(f"samples must be >= 2 for KernelCritic with one critic step, got {samples}")
        return
    if method.regulariser is None:
        raise ValueError("regulariser must be given for a trained critic, got None")
    kinds = {(p.dtype, p.device) for p in [*adversary.params.values(), *adversary.value_params.values()]}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"params of critic and value must be of one dtype and device, got {found}")
    like = next(iter(adversary.params.values()))
    with torch.no_grad():
        evaluate(adversary.critic, adversary.params, data[:2].to(like))


def _packed(*networks: Params, leaves: bool = True) -> tuple[Tensor, list[Params]]:
    """Copy parameters into one vector, and return it and its parts, as leaves.

    Adam moves the vector: going over the leaves of a small network costs it more than the arithmetic.
    """
    every = [p.detach() for params in networks for p in params.values()]
    vector = torch.cat([p.flatten() for p in every]) if every else torch.empty(0)
    parts = iter(vector.split([p.numel() for p in every]))
    return vector, [
        {k: next(parts).view(p.shape).requires_grad_(leaves) for k, p in params.items()} for params in networks
    ]


def _copies(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}
