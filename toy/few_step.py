"""DDPMs with few steps, as SFT-PG's toy experiments pre-train them: many seeds at once, as a `Chain`.

Source: SFT-PG, appendix D.1, and its released script for what the paper leaves open (schedule, scaling, embeddings).
Kept: 10 000 points, a 4-layer network of width 128 with softplus, told the step by embeddings that multiply its hidden
layers, the sampler's variance beta_t with noise at the last step too (so that every step has a density). Different:
batches are drawn with replacement, Adam's rate falls from 1e-2 to 0 along a cosine, and 16 000 updates are 102 epochs,
not 2000. Numbers are float32, for speed. Where T is many times the batch, the embeddings' Adam has epsilon 0, so that
they can be moved row by row (`toy.row_adam`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from algorithms.chain import Params
from theory.schedules import NoiseSchedule
from toy import data as clouds
from toy.row_adam import RowAdam
from verdicts.streams import Stream

POINTS = 10_000
LAYERS = 3  # hidden ones, each with its own embedding of the step
BLOCK = 64  # updates whose batches are drawn together
LANES = 16  # numbers that the processor treats at once, at most
SPARSE = 4  # steps for each sample of a batch, beyond which an update moves only the embeddings that it saw


def swiss_roll(samples: int, generator: np.random.Generator) -> np.ndarray:
    """A spiral arm as scikit-learn's, with noise 0.05, two of its axes, divided by 20: about [-0.5, 0.7]^2."""
    angle = 1.5 * np.pi * (1 + 2 * generator.random(samples))
    arm = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (arm + 0.05 * generator.standard_normal((samples, 2))) / 20


def two_moons(samples: int, generator: np.random.Generator) -> np.ndarray:
    """Two half circles of radius 1/2, around the origin, with noise of standard deviation 0.025."""
    return clouds.two_moons(samples, generator) / 2


DATA: dict[str, clouds.Sampler] = {"swiss_roll": swiss_roll, "two_moons": two_moons}


def training_set(data: str, stream: Stream, points: int = POINTS) -> Tensor:
    """Return the points (points, 2), float32, that a seed with this stream is trained on.

    Raises:
        ValueError: if `data` is unknown.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {sorted(DATA)}, got {data!r}")
    return torch.from_numpy(DATA[data](points, stream.child("data").generator())).float()


def schedule(steps: int) -> NoiseSchedule:
    """Return the released schedule: beta_t rises from 1e-5 to 1e-2 along a sigmoid, for every T.

    At T = 10 this leaves alpha_bar_T = 0.95, so that the sampler starts far from where training ended.

    Raises:
        ValueError: unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return NoiseSchedule(1e-5 + (1e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, steps))))


@dataclass(frozen=True, eq=False)
class StepConditionedChain:
    """Ancestral sampling with variance beta and the learned noise eps(x, t), t told by per-step embeddings.

    Layer l = 1, 2, 3 is softplus(scale[t, l] * (h w_l + b_l)), and layer 4 is linear. Parameters: w1 (2, width), w2 and
    w3 (width, width), w4 (width, 2), b1 to b4, and scale (T, 3, width); all may have one leading axis of seeds.

    Attributes:
        beta, alpha_bar: (T,), float64.
    """

    beta: Tensor
    alpha_bar: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> StepConditionedChain:
        return cls(torch.tensor(schedule.beta), torch.tensor(schedule.alpha_bar))

    @property
    def steps(self) -> int:
        return len(self.beta)

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def std(self, t: int) -> float:
        return math.sqrt(self.beta[t - 1].item())

    def check(self, params: Params) -> None:
        """Refuse parameters that were trained for another number of steps.

        Raises:
            ValueError: naming both numbers.
        """
        trained = params["scale"].shape[-3]
        if trained != self.steps:
            raise ValueError(f"params were trained with T = {trained} steps, but the chain has T = {self.steps}")

    def epsilon(self, params: Params, x: Tensor, t: int | Tensor) -> Tensor:
        """Return the predicted noise, shaped as the states x: (n, 2), or (seeds, n, 2) if the parameters have seeds.

        Args:
            t: the step of all states, or integers (n,) or (seeds, n), one step for each state.

        Raises:
            ValueError: if the parameters were trained with another number of steps.
        """
        self.check(params)
        h = x
        for layer, scale in enumerate(self._scales(params["scale"], t), 1):
            h = torch.nn.functional.softplus(scale * _affine(h, params[f"w{layer}"], params[f"b{layer}"]))
        return _affine(h, params["w4"], params["b4"])

    def mean(self, params: Params, x: Tensor, t: int | Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x, (n, 2); t may be one step, or integers (n,)."""
        if isinstance(t, Tensor):
            beta, level = self.beta[t - 1][..., None], self.alpha_bar[t - 1][..., None]
            shrink, weight = (1 - beta).rsqrt().to(x), (beta * (1 - level).rsqrt()).to(x)
        else:
            beta, level = self.beta[t - 1].item(), self.alpha_bar[t - 1].item()
            shrink, weight = 1 / math.sqrt(1 - beta), beta / math.sqrt(1 - level)
        return shrink * (x - weight * self.epsilon(params, x, t))

    def means(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
        """Return the means of x_{t-1} given x_t = x[i], t = steps[i] (k,), (k, n, 2) both."""
        return self.mean(params, x.flatten(0, 1), steps.repeat_interleave(x.shape[1])).unflatten(0, x.shape[:2])

    def _scales(self, scale: Tensor, t: int | Tensor) -> tuple[Tensor, ...]:
        """Return each hidden layer's scale, to be multiplied with (..., n, width)."""
        if not isinstance(t, Tensor):
            return scale[..., t - 1, :, None, :].unbind(-3)
        row = t - 1
        if scale.dim() == 4:
            row = row + self.steps * torch.arange(len(scale))[:, None]
        # One look-up for all layers and seeds; `embedding` has the faster backward pass.
        found = embedding(row, scale.reshape(-1, LAYERS * scale.shape[-1]))
        return found.unflatten(-1, (LAYERS, -1)).unbind(-2)


Progress = Callable[[int, int], None]
"""Called as progress(updates done, updates in all)."""


def pretrain(
    data: str,
    steps: int,
    seeds: Sequence[int],
    stream: Stream,
    cache: Path,
    updates: int = 16_000,
    batch: int = 64,
    rate: float = 1e-2,
    width: int = 128,
    progress: Progress | None = None,
    noise: NoiseSchedule | None = None,
) -> tuple[StepConditionedChain, list[Params]]:
    """Train one sampler for each seed by denoising score matching, or load those that were trained before.

    Seed s draws its points, weights, batches and noise from `stream.child(s)` alone, and `training_set(data,
    stream.child(s))` are its points. All seeds that are not in `cache` are trained at once. Which ones those
    are does not change a seed's result, bit for bit on one thread if the width is a multiple of 16, and up to float32
    rounding for other widths.

    Args:
        noise: the schedule, of `steps` steps; None for the released one.

    Returns:
        The chain, and one set of parameters for each seed, in the order of `seeds`.

    Raises:
        ValueError: if `data` is unknown, a size is below 1, or `noise` or a cached file has another number of steps.
    """
    for name, value in {"updates": updates, "batch": batch, "width": width}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    chain = StepConditionedChain.of(schedule(steps) if noise is None else noise)
    if chain.steps != steps:
        raise ValueError(f"noise must be of steps = {steps} steps, got {chain.steps}")
    if data not in DATA:
        raise ValueError(f"data must be one of {sorted(DATA)}, got {data!r}")
    own = [] if noise is None else chain.beta.tolist()
    own += ["row by row"] if _sparse(chain, batch) else []
    files = {
        seed: _file(cache, [data, steps, stream.child(seed).integer(), updates, batch, rate, width, *own])
        for seed in seeds
    }
    missing = [seed for seed, file in files.items() if not file.exists()]
    if missing:
        streams = [stream.child(seed) for seed in missing]
        points = torch.stack([training_set(data, s) for s in streams])
        for seed, params in zip(
            missing, fit(chain, points, streams, updates, batch, rate, width, progress), strict=True
        ):
            save(params, files[seed])
    return chain, [load(chain, files[seed]) for seed in seeds]


def load(chain: StepConditionedChain, file: Path) -> Params:
    """Load one seed's parameters.

    Raises:
        ValueError: if they were trained with another number of steps than the chain's.
    """
    params = torch.load(file, weights_only=True)
    chain.check(params)
    return params


def initial_parameters(chain: StepConditionedChain, width: int, stream: Stream) -> Params:
    """Draw one seed's untrained weights, float32; embeddings are uniform in [0, 1), as released."""
    generator = torch.Generator().manual_seed(stream.child("initial").integer())
    params: Params = {}
    sizes = [2, *[width] * LAYERS, 2]
    for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        params[f"w{layer}"] = torch.randn(fan_in, fan_out, generator=generator) / fan_in**0.5
        params[f"b{layer}"] = torch.zeros(fan_out)
    params["scale"] = torch.rand(chain.steps, LAYERS, width, generator=generator)
    return params


def fit(
    chain: StepConditionedChain,
    points: Tensor,
    streams: Sequence[Stream],
    updates: int,
    batch: int = 64,
    rate: float = 1e-2,
    width: int = 128,
    progress: Progress | None = None,
) -> list[Params]:
    """Train one sampler for each stream on its own points, (seeds, n, 2), all by one network call an update."""
    drawn = [initial_parameters(chain, width, stream) for stream in streams]
    shapes = {name: p.shape for name, p in drawn[0].items()}
    stacked = {name: torch.stack([p[name] for p in drawn]) for name in shapes}
    first_rows = chain.steps * torch.arange(len(streams))[:, None] - 1
    rates = [rate * (1 + math.cos(math.pi * update / updates)) / 2 for update in range(updates)]
    by_row = RowAdam(stacked["scale"].view(-1, LAYERS * width), rates) if _sparse(chain, batch) else None
    # Adam moves one vector, of which the parameters are parts: so small a network costs its book-keeping.
    parts = {name: _whole_lanes(p) for name, p in stacked.items() if by_row is None or name != "scale"}
    vector = torch.cat([part.flatten() for part in parts.values()])
    vector.grad = torch.zeros_like(vector)
    params, slopes = ({name: _shaped(p, shapes[name]) for name, p in _parts(v, parts)} for v in (vector, vector.grad))
    generators = [torch.Generator().manual_seed(stream.child("training").integer()) for stream in streams]
    optimizer = torch.optim.Adam([vector], lr=rate, fused=True)
    for begin in range(0, updates, BLOCK):
        block = min(BLOCK, updates - begin)
        for offset, (x, t, noise) in enumerate(zip(*_block(chain, points, generators, batch), strict=True)):
            if offset == block:
                break
            optimizer.param_groups[0]["lr"] = rates[begin + offset]
            rows = t + first_rows
            if by_row is None:
                table = params["scale"].reshape(-1, LAYERS * width)
                of_scales = _gradients(params, embedding(rows, table), x, noise, slopes)
                slopes["scale"].copy_(_summed(of_scales, rows, len(table)).view_as(slopes["scale"]))
            else:
                distinct, rows = torch.unique(rows, return_inverse=True)
                of_scales = _gradients(params, embedding(rows, by_row.read(distinct)), x, noise, slopes)
                by_row.step(_summed(of_scales, rows, len(distinct)))
            optimizer.step()
        if progress is not None:
            progress(begin + block, updates)
    if by_row is not None:
        by_row.finish()
        params["scale"] = stacked["scale"]
    return [{name: params[name][s].clone() for name in shapes} for s in range(len(streams))]


def _sparse(chain: StepConditionedChain, batch: int) -> bool:
    """Whether a batch sees so few of the steps that their embeddings are better moved row by row."""
    return chain.steps > SPARSE * batch


def _gradients(params: Params, scales: Tensor, x: Tensor, noise: Tensor, out: Params) -> Tensor:
    """Write the gradient of every seed's mean squared error to `out`; what autograd computes, in half the time.

    Args:
        scales: (seeds, batch, 3 width), the samples' embeddings of all layers.
        x, noise: (seeds, batch, 2).
        out: tensors like the parameters.

    Returns:
        The gradient in the scales.
    """
    layers = scales.unflatten(-1, (LAYERS, -1)).unbind(-2)
    hidden, affine, scaled = [x], [], []
    for layer, scale in enumerate(layers, 1):
        affine.append(_affine(hidden[-1], params[f"w{layer}"], params[f"b{layer}"]))
        scaled.append(scale * affine[-1])
        hidden.append(torch.nn.functional.softplus(scaled[-1]))
    error = _affine(hidden[-1], params["w4"], params["b4"]) - noise
    slope, of_scales = error.mul_(2 / noise[0].numel()), []
    for layer in range(LAYERS + 1, 0, -1):
        torch.bmm(hidden[layer - 1].transpose(1, 2), slope, out=out[f"w{layer}"])
        torch.sum(slope, 1, out=out[f"b{layer}"])
        if layer > 1:
            slope = torch.bmm(slope, params[f"w{layer}"].transpose(1, 2))
            slope = torch.ops.aten.softplus_backward(slope, scaled[layer - 2], 1, 20)
            of_scales.append(slope * affine[layer - 2])
            slope.mul_(layers[layer - 2])
    return torch.stack(of_scales[::-1], -2).flatten(-2)


def _summed(of_scales: Tensor, rows: Tensor, height: int) -> Tensor:
    """Sum the gradients in the samples' embeddings over the samples of each row: (height, 3 width)."""
    return torch.ops.aten.embedding_dense_backward(of_scales, rows, height, -1, False)


def _parts(vector: Tensor, like: Params) -> Iterator[tuple[str, Tensor]]:
    """Give the parts of a vector, by name, shaped as those it was made of."""
    pieces = vector.split([p.numel() for p in like.values()])
    return ((name, piece.view(p.shape)) for (name, p), piece in zip(like.items(), pieces, strict=True))


def _whole_lanes(values: Tensor) -> Tensor:
    """Fill each seed's numbers up to whole lanes, where they are not: (seeds, ...), or (seeds, m) if filled.

    Adam rounds the numbers beyond the last whole lane in another way. Without this, which ones those are would
    depend on how many seeds there are.
    """
    excess = -values[0].numel() % LANES
    return torch.nn.functional.pad(values.flatten(1), (0, excess)) if excess else values


def _shaped(leaf: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_whole_lanes`."""
    if leaf.shape[1:] == shape:
        return leaf
    return leaf[:, : shape.numel()].view(-1, *shape)


def _block(
    chain: StepConditionedChain, points: Tensor, generators: Sequence[torch.Generator], batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next batches: states (BLOCK, seeds, batch, 2), steps (BLOCK, seeds, batch), noise as the states."""
    states, steps, noises = [], [], []
    for cloud, generator in zip(points, generators, strict=True):
        clean = cloud[torch.randint(len(cloud), (BLOCK, batch), generator=generator)]
        t = torch.randint(1, chain.steps + 1, (BLOCK, batch), generator=generator)
        noise = torch.randn(BLOCK, batch, 2, generator=generator)
        level = chain.alpha_bar[t - 1][..., None]
        states.append(level.sqrt().float() * clean + (1 - level).sqrt().float() * noise)
        steps.append(t)
        noises.append(noise)
    return torch.stack(states, 1), torch.stack(steps, 1), torch.stack(noises, 1)


def _affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if h.dim() == 3:
        return torch.baddbmm(bias[:, None], h, weight)
    if len(bias) < LANES:  # with so few outputs, a product with rows of weights takes a third of the time
        return torch.nn.functional.linear(h, weight.T.contiguous(), bias)
    return torch.addmm(bias, h, weight)


def _file(cache: Path, recipe: list[str | int | float]) -> Path:
    return cache / f"few-step-{recipe[0]}-{recipe[1]}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.pt"


def save(content: dict[str, Any], file: Path) -> None:
    """Write atomically: another worker may train the same model at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    torch.save(content, temporary)
    os.replace(temporary, file)
