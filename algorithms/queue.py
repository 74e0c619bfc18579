"""Implicit Diffusion's queue for chains that end: many batches in flight, one gradient an update (Marion et al. 2024).

    method = Queue(first_order(chain.steps), length=4)
    fine_tune(chain, params, objective, method, settings, generator_for)

The queue holds `length` = M batches. At every update the oldest, which has reached x_0, gives the gradient, and every
other moves on by T / M steps with the parameters of now; a new batch starts. So the M batches need M * (T / M) = T
evaluations of the network an update, as many as one full roll-out: what is gained is depth. Those evaluations are
independent of each other but for T / M in a row, so an update is as long as T / M of them where they fit side by side.
The price is a delay: x_0 was made by the parameters of the last M updates.

The gradient is any estimator's, at the roll-out that is there and the parameters of now. For `first_order` that is the
discrete adjoint: what back-propagation through the steps gives at these latents. Its own T steps in a row remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algorithms.chain import (
    Chain,
    Condition,
    Noise,
    Params,
    Rollout,
    StepConditions,
    advance,
    at_step,
    of_samples,
)
from algorithms.division import WHOLE, Division
from algorithms.estimators import Estimator
from algorithms.losses import AnyStep
from algorithms.objective import Objective


@dataclass(eq=False)
class Flight:
    """A batch on its way: this process's share of x_T, ..., x_t and of the costs so far.

    Attributes:
        noise: of the whole batch.
        condition: of the share.
        latents: x_T first.
    """

    noise: Noise
    condition: Condition
    latents: list[Tensor]
    costs: list[Tensor]

    def rolled(self) -> Rollout:
        """Return what a roll-out returns, once x_0 is there."""
        return Rollout(torch.stack(self.latents[::-1]), torch.stack(self.costs[::-1]))


class Queue:
    """A `Method` of the training loop (algorithms/training.py): Algorithm 2.

    Before its first update all M batches are brought to their places with the initial parameters.

    Args:
        estimator: of the gradient, by the reward's gradient alone (column 0): a score would be that of other
            parameters than those that drew the noise.
        length: M; it must divide the chain's T. M = 1 makes whole roll-outs, one update late.

    Raises:
        ValueError: if length is < 1, or the estimator uses scores or antithetic copies.
    """

    def __init__(self, estimator: Estimator, length: int, division: Division = WHOLE) -> None:
        if length < 1:
            raise ValueError(f"length must be >= 1, got {length}")
        if not estimator.credit.by_reward_alone or estimator.flips:
            raise ValueError(f"estimator must use the reward's gradient alone, without copies, got {estimator.name!r}")
        self.estimator, self.length, self.division = estimator, length, division
        self._flights: list[Flight] = []  # the youngest first

    def updates(
        self,
        chain: Chain,
        params: Params,
        objective: Objective,
        samples: int,
        generator: torch.Generator,
        condition: Condition = None,
    ) -> Iterator[Tensor]:
        """Give the gradient of ascent at the oldest batch in the `.grad`s, and its returns; move the others on."""
        if chain.steps % self.length:
            raise ValueError(f"length of the queue must divide the chain's T = {chain.steps} steps, got {self.length}")
        fixed = {name: p.detach() for name, p in params.items()}

        def new() -> Flight:
            noise = self.estimator.draw(chain, params, samples, generator)
            share = self.division.own(samples)
            own = of_samples(condition, share)
            return Flight(noise, own, [chain.initial(noise.initial[share])], [])

        if not self._flights:
            for _ in range(self.length):
                self._flights.insert(0, new())
                self._move(chain, fixed, objective)
        oldest = self._flights.pop()
        returns = self.estimator.accumulate(
            chain, params, objective, oldest.noise, oldest.condition, self.division, oldest.rolled()
        )
        self._flights.insert(0, new())
        self._move(chain, fixed, objective)
        self.division.add_gradients(params)
        yield self.division.gather(returns)

    def _move(self, chain: Chain, params: Params, objective: Objective) -> None:
        """Take every flight T / M steps further."""
        for _ in range(chain.steps // self.length):
            plain = not objective.running_costs and all(flight.condition is None for flight in self._flights)
            if plain and isinstance(chain, AnyStep) and self.division.micro_batch is None:
                self._step_at_once(chain, params)
            else:
                for flight in self._flights:
                    self._step(chain, params, objective, flight)

    def _step_at_once(self, chain: AnyStep, params: Params) -> None:
        """Take one step of all flights in one call of the network: the parallelism that the queue is for."""
        share = self.division.own(self._flights[0].noise.samples)
        at = [chain.steps + 1 - len(flight.latents) for flight in self._flights]
        with torch.no_grad():
            x = torch.stack([flight.latents[-1] for flight in self._flights])
            means = chain.means(params, x, torch.tensor(at, device=x.device))
        for flight, t, mean in zip(self._flights, at, means, strict=True):
            flight.latents.append(mean + chain.std(t) * flight.noise.steps[t - 1, share])
            flight.costs.append(mean.new_zeros(len(mean)))

    def _step(self, chain: Chain, params: Params, objective: Objective, flight: Flight) -> None:
        noise = flight.noise.of(self.division.own(flight.noise.samples))
        t = chain.steps + 1 - len(flight.latents)
        latents, costs = [], []
        for part in self.division.pieces(noise.samples):
            own = of_samples(flight.condition, part)

            def cost(mean: Tensor, x: Tensor, t: int, own: Condition = own) -> Tensor | None:
                return objective.cost(chain, mean, x, t, at_step(own, t))

            moved = advance(chain, params, flight.latents[-1][part], noise.of(part), [t], own, cost=cost)
            latents += moved[0]
            costs += moved[1]
        flight.latents.append(torch.cat(latents))
        flight.costs.append(torch.cat(costs))

    def state_dict(self) -> dict[str, Any]:
        """Return the flights as tensors, for `Trainer.state_dict`."""
        return {"length": self.length, "flights": [_packed(flight) for flight in self._flights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: if the saved queue has another length.
        """
        if state["length"] != self.length:
            raise ValueError(f"length must be that of the saved queue, {state['length']}, got {self.length}")
        self._flights = [_unpacked(flight) for flight in state["flights"]]


def _packed(flight: Flight) -> dict[str, Any]:
    condition = flight.condition
    held: Any = condition
    if isinstance(condition, StepConditions):
        held = {"steps": condition.steps, "reward": condition.reward}
    return {
        "noise": (flight.noise.initial, flight.noise.steps, flight.noise.outcome),
        "condition": held,
        "latents": list(flight.latents),
        "costs": list(flight.costs),
    }


def _unpacked(state: dict[str, Any]) -> Flight:
    held = state["condition"]
    condition = StepConditions(held["steps"], held["reward"]) if isinstance(held, dict) else held
    return Flight(Noise(*state["noise"]), condition, list(state["latents"]), list(state["costs"]))
