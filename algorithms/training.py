"""The fine-tuning loop: one for toys and for large models, for every estimator and every surrogate loss.

An *update* is one batch of fresh roll-outs and the optimizer's steps on it: one step for an estimator, several for
PPO. Updates are numbered 1, 2, ...; update u draws from `generator_for(u)` alone, so a run that is stopped after any
update and resumed equals the uninterrupted run bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from algorithms.chain import Chain, Condition, Params
from algorithms.division import WHOLE, Division
from algorithms.estimators import Estimator
from algorithms.objective import Objective

Callback = Callable[[int, Params, Params | None], None]
"""Called as callback(update, params, ema) with copies, before the first update (as update 0) and after each."""


class Method(Protocol):
    """A way to turn roll-outs into updates."""

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition,
    ) -> Iterator[Tensor]:
        """Give one item per optimizer step on one batch: the batch's returns (n,).

        When it is given, the parameters' `.grad`, None before, hold the gradient of ascent. The loop then moves the
        parameters in place before it asks for the next item.
        """
        ...


@runtime_checkable
class Remembering(Protocol):
    """A method that carries something from one update to the next, which a saved run must hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class FromEstimator:
    """Ascent along an estimator's batch mean; gradient accumulation and data parallelism are its `division`."""

    estimator: Estimator
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
        """Give the gradient of ascent in the `.grad`s, and the returns of all roll-outs, antithetic copies too."""
        noise = self.estimator.draw(chain, params, samples, generator)
        returns = self.estimator.accumulate(chain, params, objective, noise, condition, self.division)
        self.division.add_gradients(params)
        yield self.division.gather(returns)


@dataclass(frozen=True)
class Settings:
    """Settings of the loop.

    Attributes:
        updates: batches of fresh roll-outs.
        samples: roll-outs in a batch, all micro-batches and processes together.
        learning_rate, betas, weight_decay: of AdamW; the decay is decoupled, so zero gives Adam.
        clip: largest global norm of the gradient, to which a longer one is scaled down; None for no clipping.
        ema: decay of the exponential moving average of the parameters, which starts at their initial values; None for
            no average.

    Raises:
        ValueError: if a setting is out of range.
    """

    updates: int
    samples: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        for name in ("updates", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be > 0 or None, got {self.clip}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1) or be None, got {self.ema}")


@dataclass(eq=False)
class History:
    """What each update saw: lists with one entry per update.

    Attributes:
        mean_return: mean return of its roll-outs, drawn before its first step.
        gradient_norm: global norm of the gradient before clipping, the largest of the update's steps.
        samples: roll-outs drawn so far.
    """

    mean_return: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class FineTuned:
    """Result of a run: the parameters, their moving average where asked for, and the history."""

    params: Params
    ema: Params | None
    history: History


class Trainer:
    """A run of the loop that can be stopped after any update, saved, and resumed.

    The caller's parameters are copied, never changed. `condition` is every batch's, or gives that of update u.

    Raises:
        ValueError: if params is empty or holds no floating-point tensor under some name.
    """

    def __init__(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        method: Method,
        settings: Settings,
        generator_for: Callable[[int], torch.Generator],
        condition: Condition | Callable[[int], Condition] = None,
        callback: Callback | None = None,
    ) -> None:
        if not params:
            raise ValueError("params must hold at least one tensor, got none")
        for name, p in params.items():
            if not p.is_floating_point():
                raise ValueError(f"params must be floating-point tensors, {name!r} is {p.dtype}")
        self.settings, self.history = settings, History()
        self._chain, self._objective, self._method, self._condition = chain, objective, method, condition
        self._generator_for, self._callback = generator_for, callback
        self._leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        self._ema = None if settings.ema is None else _copies(params)
        self._optimizer = torch.optim.AdamW(
            self._leaves.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            maximize=True,
            fused=True,  # a third of the time for a small network
        )

    @property
    def done(self) -> int:
        """Updates made so far."""
        return len(self.history.samples)

    def result(self) -> FineTuned:
        """Return copies of the parameters, their moving average, and the history."""
        ema = None if self._ema is None else _copies(self._ema)
        return FineTuned(_copies(self._leaves), ema, copy.deepcopy(self.history))

    def run(self, updates: int | None = None) -> None:
        """Make up to `updates` more updates, by default all that the settings ask for.

        Raises:
            FloatingPointError: if a gradient is not finite; the parameters are left as they were before its step.
        """
        left = self.settings.updates - self.done
        if self.done == 0:
            self._report()
        for _ in range(left if updates is None else min(updates, left)):
            self._update(self.done + 1)
            self._report()

    def _update(self, update: int) -> None:
        items = self._method.updates(
            self._chain,
            self._leaves,
            self._objective,
            self.settings.samples,
            self._generator_for(update),
            self._condition(update) if callable(self._condition) else self._condition,
        )
        self._optimizer.zero_grad()
        steps = [(returns, self._step(update)) for returns in items]
        if not steps:
            raise ValueError(f"method {type(self._method).__name__} gave no gradient in update {update}")
        returns = steps[-1][0]
        self.history.mean_return.append(float(returns.mean()))
        self.history.gradient_norm.append(max(norm for _, norm in steps))
        self.history.samples.append(len(returns) + (self.history.samples[-1] if self.history.samples else 0))

    def _step(self, update: int) -> float:
        """Make one step of the optimizer on the gradients at hand; return their norm before clipping."""
        grads = {name: p.grad for name, p in self._leaves.items() if p.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(grads.values()))
        if not math.isfinite(norm):
            bad = [name for name, g in grads.items() if not bool(g.isfinite().all())]
            raise FloatingPointError(
                f"the gradient of update {update} is not finite, in {', '.join(bad) or 'its norm'}"
            )
        if self.settings.clip is not None and norm > self.settings.clip:
            for g in grads.values():
                g.mul_(self.settings.clip / norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema is not None and self.settings.ema is not None:
            with torch.no_grad():
                for name, average in self._ema.items():
                    average.lerp_(self._leaves[name], 1 - self.settings.ema)
        return norm

    def _report(self) -> None:
        if self._callback is not None:
            now = self.result()
            self._callback(self.done, now.params, now.ema)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state as copies: tensors, numbers, strings; torch.load(weights_only=True) reads it back."""
        state = {
            "settings": asdict(self.settings),
            "params": _copies(self._leaves),
            "ema": None if self._ema is None else _copies(self._ema),
            "optimizer": self._optimizer.state_dict(),
            "history": asdict(self.history),
        }
        if isinstance(self._method, Remembering):
            state["method"] = self._method.state_dict()
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the settings may differ in the number of updates only.

        Raises:
            ValueError: if settings other than `updates`, or the names or shapes of the parameters, differ.
        """
        mine, theirs = asdict(self.settings), state["settings"]
        differing = [key for key in mine if key != "updates" and mine[key] != theirs[key]]
        if differing:
            key = differing[0]
            raise ValueError(f"settings must be those of the saved run, {key} = {mine[key]} was {theirs[key]}")
        shapes = {name: tuple(p.shape) for name, p in self._leaves.items()}
        saved = {name: tuple(p.shape) for name, p in state["params"].items()}
        if shapes != saved:
            raise ValueError(f"params must have the names and shapes of the saved run, {saved}, got {shapes}")
        with torch.no_grad():
            for name, p in self._leaves.items():
                p.copy_(state["params"][name])
            if self._ema is not None:
                for name, average in self._ema.items():
                    average.copy_(state["ema"][name])
        if isinstance(self._method, Remembering):
            self._method.load_state_dict(copy.deepcopy(state["method"]))
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.history = History(**copy.deepcopy(state["history"]))


def fine_tune(
    chain: Chain,
    params: Params,
    objective: Objective,
    method: Method,
    settings: Settings,
    generator_for: Callable[[int], torch.Generator],
    condition: Condition | Callable[[int], Condition] = None,
    callback: Callback | None = None,
) -> FineTuned:
    """Fine-tune `params` by ascent of E[return], and return the result; see `Trainer` to stop and resume.

    result = fine_tune(chain, params, objective, FromEstimator(policy_gradient(chain.steps)), settings, generator_for)

    Raises:
        FloatingPointError: if a gradient is not finite.
    """
    trainer = Trainer(chain, params, objective, method, settings, generator_for, condition, callback)
    trainer.run()
    return trainer.result()


def _copies(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}
