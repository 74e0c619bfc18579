"""A small DDPM learned on two-dimensional data: a time-conditioned MLP, trained in seconds, as a `Chain`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.chain import Params
from theory.schedules import NoiseSchedule
from toy.data import DATA
from verdicts.streams import Stream


@dataclass(frozen=True, eq=False)
class MLPChain:
    """Ancestral sampling with variance beta and the learned noise eps(x, t); all weights are the chain's parameters.

    The network sees (x, sin and cos of pi t / T, the prompt) and has two softplus layers: parameters
    w1 (4 + prompt -> width), w2, w3.

    Attributes:
        prompt: numbers in the condition that the network is told; with none, conditions are for the reward alone.
    """

    beta: Tensor
    alpha_bar: Tensor
    prompt: int = 0

    @classmethod
    def of(cls, schedule: NoiseSchedule, prompt: int = 0) -> MLPChain:
        return cls(torch.tensor(schedule.beta), torch.tensor(schedule.alpha_bar), prompt)

    @property
    def steps(self) -> int:
        return len(self.beta)

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def renoise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 (n, 2) to where the last step starts, as the forward process does."""
        return self.alpha_bar[0].sqrt() * x0 + (1 - self.alpha_bar[0]).sqrt() * noise

    def epsilon(self, params: Params, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Return the predicted noise, (n, 2), for states x (n, 2) at steps t (n,), told the prompt (n, prompt).

        Raises:
            ValueError: if the sampler takes a prompt and gets none, or one of another size.
        """
        angle = torch.pi * t[:, None] / self.steps
        return self._network(params, [x, angle.sin(), angle.cos()], prompt)

    def _network(self, params: Params, seen: list[Tensor], prompt: Tensor | None) -> Tensor:
        """Return the predicted noise for states, and sin and cos of the time, in columns."""
        if self.prompt:
            if prompt is None or prompt.shape[1:] != (self.prompt,):
                got = "none" if prompt is None else f"shape {tuple(prompt.shape)}"
                raise ValueError(f"condition must have shape (n, {self.prompt}) for this sampler, got {got}")
            seen = [*seen, prompt]
        h = torch.cat(seen, 1)
        h = torch.nn.functional.softplus(torch.addmm(params["b1"], h, params["w1"]))
        h = torch.nn.functional.softplus(torch.addmm(params["b2"], h, params["w2"]))
        return torch.addmm(params["b3"], h, params["w3"])

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        beta, alpha_bar, angle = self.beta[t - 1].item(), self.alpha_bar[t - 1].item(), math.pi * t / self.steps
        time = x.new_tensor([[math.sin(angle), math.cos(angle)]]).expand(len(x), 2)
        epsilon = self._network(params, [x, time], condition)
        return (x - beta / math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(1 - beta)

    def std(self, t: int) -> float:
        return math.sqrt(self.beta[t - 1].item())


def train(
    data: str, schedule: NoiseSchedule, stream: Stream, cache: Path, width: int = 48, updates: int = 2000
) -> tuple[MLPChain, Params]:
    """Train on a data set of `toy.data` by denoising score matching, or load what an earlier call trained.

    The result depends on the arguments and the stream only; `cache` holds one file per combination.

    Raises:
        ValueError: if `data` is not a known data set.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {sorted(DATA)}, got {data!r}")
    chain = MLPChain.of(schedule)
    recipe = [data, schedule.beta.tolist(), stream.integer(), width, updates]
    file = _file(cache, data, recipe)
    if file.exists():
        return chain, torch.load(file, weights_only=True)
    params = _fit(chain, DATA[data](8192, stream.child("data").generator()), stream, width, updates)
    _save(params, file)
    return chain, params


def train_prompted(
    points: np.ndarray,
    prompts: np.ndarray,
    schedule: NoiseSchedule,
    stream: Stream,
    cache: Path,
    width: int = 48,
    updates: int = 2000,
) -> tuple[MLPChain, Params]:
    """Train on points (n, 2) with prompts (n, c), ordered from coarse to fine, or load what an earlier call trained.

    In training a prompt keeps its first 0..c entries, each number as often, and is 0 in the others: unknown.

    Raises:
        ValueError: unless there is one prompt per point.
    """
    if prompts.ndim != 2 or len(prompts) != len(points):
        raise ValueError(f"prompts must have shape ({len(points)}, c), one for each point, got {prompts.shape}")
    chain = MLPChain.of(schedule, prompts.shape[1])
    told = hashlib.sha256(points.tobytes() + prompts.tobytes()).hexdigest()
    file = _file(cache, "prompted", [told, schedule.beta.tolist(), stream.integer(), width, updates])
    if file.exists():
        return chain, torch.load(file, weights_only=True)
    params = _fit(chain, points, stream, width, updates, prompts)
    _save(params, file)
    return chain, params


def initial_parameters(chain: MLPChain, width: int, stream: Stream) -> Params:
    """Draw untrained weights."""
    generator = torch.Generator().manual_seed(stream.child("initial").integer())
    sizes = {"1": (4 + chain.prompt, width), "2": (width, width), "3": (width, 2)}
    params: Params = {}
    for name, (fan_in, fan_out) in sizes.items():
        params[f"w{name}"] = torch.randn(fan_in, fan_out, generator=generator, dtype=torch.float64) / fan_in**0.5
        params[f"b{name}"] = torch.zeros(fan_out, dtype=torch.float64)
    return params


def _file(cache: Path, name: str, recipe: list[Any]) -> Path:
    return cache / f"ddpm-{name}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.pt"


def _fit(
    chain: MLPChain, points: np.ndarray, stream: Stream, width: int, updates: int, prompts: np.ndarray | None = None
) -> Params:
    generator = torch.Generator().manual_seed(stream.child("training").integer())
    params = {name: p.requires_grad_() for name, p in initial_parameters(chain, width, stream).items()}
    clean = torch.from_numpy(points)
    optimizer = torch.optim.Adam(params.values(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        drawn = torch.randint(len(clean), (512,), generator=generator)
        x0 = clean[drawn]
        t = torch.randint(1, chain.steps + 1, (512,), generator=generator)
        noise = torch.randn(512, 2, generator=generator, dtype=torch.float64)
        alpha_bar = chain.alpha_bar[t - 1][:, None]
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        known = None if prompts is None else _shortened(torch.from_numpy(prompts)[drawn], generator)
        loss = (chain.epsilon(params, x, t.double(), known) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return {name: p.detach() for name, p in params.items()}


def _shortened(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Keep the first entries of each prompt, 0 to all of them with equal probability; the others become 0."""
    entries = prompts.shape[1]
    kept = torch.randint(entries + 1, (len(prompts), 1), generator=generator)
    return prompts * (torch.arange(entries) < kept)


def _save(params: Params, file: Path) -> None:
    """Write atomically: another worker may train the same model at the same time, to the same numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    torch.save(params, temporary)
    os.replace(temporary, file)
