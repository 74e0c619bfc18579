"""How many bytes autograd holds at once: the memory of back-propagation, counted and not timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from algorithms.chain import Chain, Params
from algorithms.estimators import first_order
from algorithms.objective import Objective
from theory import schedules
from toy.ddpm import MLPChain, initial_parameters
from toy.rewards import Bump
from verdicts.streams import Stream


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the tensors that are saved for backward and not yet released; `peak` is their maximum."""

    def __init__(self) -> None:
        self.current = self.peak = 0
        super().__init__(self._pack, lambda packed: packed.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)


class _Held:
    """A saved tensor that gives its bytes back when autograd drops it."""

    def __init__(self, count: SavedBytes, tensor: Tensor) -> None:
        self.count, self.tensor = count, tensor
        self.bytes = tensor.numel() * tensor.element_size()
        count.current += self.bytes
        count.peak = max(count.peak, count.current)

    def __del__(self) -> None:
        self.count.current -= self.bytes


def peak_saved_bytes(steps: int, method: str, samples: int = 32) -> int:
    """Return the peak of saved bytes for the first-order gradient of an untrained MLP sampler with `steps` steps.

    `method` is "sweep" (ours), "stored graph" (one graph through the chain), or "stored, every second step" (the other
    steps stand behind torch's checkpoint; what that computes again is not counted). Latents that are kept outside of
    autograd, as the sweep's are, do not count either.

    Raises:
        ValueError: if the method is unknown.
    """
    chain = MLPChain.of(schedules.linear(steps, 0.02, 0.2))
    params = initial_parameters(chain, 48, Stream(0).child("memory"))
    objective = Objective(Bump(0.5, 1.0))
    noise = first_order(steps).draw(chain, params, samples, torch.Generator().manual_seed(0))
    count = SavedBytes()
    with count:
        if method == "sweep":
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            first_order(steps).accumulate(chain, leaves, objective, noise)
        elif method in ("stored graph", "stored, every second step"):
            _stored(chain, params, objective, noise, every=1 if method == "stored graph" else 2)
        else:
            raise ValueError(f"method must be 'sweep', 'stored graph' or 'stored, every second step', got {method!r}")
    return count.peak


def _stored(chain: Chain, params: Params, objective: Objective, noise: Any, every: int) -> None:
    """Plain back-propagation through the whole chain; only `every` so many steps store their activations."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}

    def step(x: Tensor, t: int) -> Tensor:
        return chain.mean(leaves, x, t, None) + chain.std(t) * noise.steps[t - 1]

    x = chain.initial(noise.initial)
    for t in range(chain.steps, 0, -1):
        x = checkpoint(step, x, t, use_reentrant=False) if t % every else step(x, t)
    objective.reward(x, None).mean().backward()
