"""One gradient through the U-Net of Stable Diffusion 1.5, at its real size: seconds, and memory predicted and measured.

The weights are random, which changes neither; LoRA of rank 4 on the attention projections; DDIM steps with eta = 1; the
reward is minus the mean square of the latents. Memory is what comes on top of the weights. It is predicted on the meta
device, before anything of the real size is built, and then measured as the growth of the process.

Writes out/bench/unet.json. Takes about 5 GB for latents of 32 x 32, and a few minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from algorithms import estimators as named
from algorithms.chain import Chain, Noise, Params
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from scale.lora import add_lora
from scale.memory import fixed_and_per_sample, measured_peak, ordinary_heap, predict
from scale.network import checkpoint_blocks
from scale.plan import in_bytes, predicted_peak, prediction_error
from scale.sampler import gaussian_steps
from scale.stable_diffusion import StableDiffusionChain

OUT = Path("out/bench")
LORA = ("to_q", "to_k", "to_v", "to_out.0")
TOKENS, WIDTH = 77, 768  # of the text encoder's states
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

Problem = tuple[Chain, Params]


def problem(size: int, steps: int, guidance: float, checkpointing: bool, device: str) -> Problem:
    """Return the chain and its LoRA parameters; on meta nothing is allocated."""
    diffusers: Any = importlib.import_module("diffusers")
    with torch.random.fork_rng(devices=[]), torch.device(device):  # layers draw from the global generator only
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**UNET)
    params = add_lora(unet, rank=4, alpha=4, targets=LORA, seed=0)
    if checkpointing:
        checkpoint_blocks(unet)
    chain = StableDiffusionChain(
        network=unet,
        sampler=gaussian_steps(diffusers.DDIMScheduler(**DDIM), steps),
        shape=(4, size, size),
        told="encoder_hidden_states",
        table=torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device),
        guidance=guidance,
        unconditional=1,
    )
    return chain, params


@dataclass(frozen=True)
class MeanSquare:
    """Minus the mean square of the latents, (n,)."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -x0.square().flatten(1).mean(1)


ESTIMATORS: dict[str, Callable[[int], Estimator]] = {
    "first order": named.first_order,
    "truncated(1)": lambda steps: named.truncated(steps, 1),
    "policy gradient": named.policy_gradient,
}


def gradient(problem: Problem, estimator: Estimator, batch: int) -> Callable[[], None]:
    """Return one gradient of `batch` samples, by the sweep, as a function; its noise is drawn now."""
    chain, params = problem
    noise = estimator.draw(chain, params, batch, torch.Generator().manual_seed(2))
    device = next(iter(params.values())).device
    condition = torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        estimator.accumulate(chain, params, Objective(MeanSquare()), noise, condition)
        for p in params.values():
            p.grad = None

    return step


def one_graph(problem: Problem, noise: Noise) -> Callable[[], None]:
    """Return the gradient by plain back-propagation, all steps in one graph, for comparison."""
    chain, params = problem
    device = next(iter(params.values())).device
    condition = torch.zeros(noise.samples, dtype=torch.long, device=device)

    def step() -> None:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        x = chain.initial(noise.initial)
        for t in range(chain.steps, 0, -1):
            x = chain.mean(leaves, x, t, condition) + chain.std(t) * noise.steps[t - 1]
        MeanSquare()(x, condition).mean().backward()

    return step


Row = dict[str, Any]


def predictions(meta: Problem, batch: int) -> dict[str, Row]:
    """Predict the peak of each estimator, and of plain back-propagation, at `batch` and for each further sample."""
    rows: dict[str, Row] = {}

    def add(name: str, step: Callable[[int], Callable[[], None]], calls: float | None) -> None:
        def peak(samples: int) -> int:
            return predict(step(samples), reads=True)

        fixed, per_sample = fixed_and_per_sample(peak, (batch, batch + 1))
        predicted = predicted_peak(fixed, per_sample, batch)
        rows[name] = {"estimator": name, "calls": calls, "predicted": predicted, "per further sample": per_sample}

    for name, make in ESTIMATORS.items():
        estimator = make(meta[0].steps)
        add(name, lambda n, e=estimator: gradient(meta, e, n), estimator.credit.calls())
    draw = named.first_order(meta[0].steps).draw
    add("one graph", lambda n: one_graph(meta, draw(*meta, n, torch.Generator().manual_seed(2))), None)
    return rows


def measure(real: Problem, batch: int, rows: dict[str, Row]) -> None:
    """Add to the rows the memory that each estimator took; the first run of each makes the libraries' own buffers."""
    for name, make in ESTIMATORS.items():
        step = gradient(real, make(real[0].steps), batch)
        with measured_peak("cpu"):
            step()
        with measured_peak("cpu") as peak:
            step()
        rows[name] |= {"measured": peak.bytes, "how": peak.how}
        rows[name]["error"] = prediction_error(rows[name]["predicted"], peak.bytes)


def clock(real: Problem, batch: int, repeats: int, rows: dict[str, Row]) -> None:
    """Add to the rows the seconds of each estimator's fastest run, the first left aside."""
    for name, make in ESTIMATORS.items():
        step = gradient(real, make(real[0].steps), batch)
        seconds = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
        rows[name]["seconds"] = min(seconds[1:])


def shown(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = ("estimator", "calls", "seconds", "predicted", "measured", "error", "per further sample")
    for name in columns:
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for row in rows:
        table.add_row(
            row["estimator"],
            "" if row["calls"] is None else f"{row['calls']:g}",
            f"{row['seconds']:.1f}" if "seconds" in row else "",
            in_bytes(row["predicted"]),
            in_bytes(row["measured"]) if "measured" in row else "",
            f"{100 * row['error']:+.1f} %" if "error" in row else "",
            in_bytes(row["per further sample"]),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of the latents, a multiple of 8 (default 32)")
    parser.add_argument("--batch", type=int, default=1, help="samples of one gradient (default 1)")
    parser.add_argument("--steps", type=int, default=2, help="steps of the chain (default 2)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (default 1, none)")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs, of which the fastest counts (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--predict-only", action="store_true", help="no real network: seconds instead of minutes")
    options = parser.parse_args()
    for name in ("size", "batch", "steps", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.size % 8:
        parser.error(f"--size must be a multiple of 8, got {options.size}")
    torch.set_num_threads(options.threads)
    console = Console()
    sections: dict[str, dict[str, Row]] = {}
    settings = {"activations kept": False, "with checkpoints in the U-Net": True}
    where = (options.size, options.steps, options.guidance)
    for title, checkpointing in settings.items():
        console.print(f"{title}: predicting", highlight=False)
        sections[title] = predictions(problem(*where, checkpointing, "meta"), options.batch)
    if not options.predict_only:
        for title, checkpointing in settings.items():  # before anything is timed, see measured_peak
            console.print(f"{title}: measuring memory", highlight=False)
            measure(problem(*where, checkpointing, "cpu"), options.batch, sections[title])
        ordinary_heap()
        for title, checkpointing in settings.items():
            console.print(f"{title}: timing", highlight=False)
            clock(problem(*where, checkpointing, "cpu"), options.batch, options.repeats, sections[title])
    for title, rows in sections.items():
        console.print(shown(f"T = {options.steps}, batch {options.batch}: {title}", list(rows.values())))
    machine = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}"
    OUT.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine,
        "options": vars(options),
        "sections": {title: list(rows.values()) for title, rows in sections.items()},
    }
    (OUT / "unet.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}, {options.threads} threads\nwritten to {OUT}/unet.json", highlight=False)


if __name__ == "__main__":
    main()
