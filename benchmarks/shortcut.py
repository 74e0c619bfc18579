"""What SFT-PG's toy experiments cost here: pre-training by the batched network against a plain `torch.nn` loop.

The plain loop is the one that a reader of the paper would write: `nn.Linear` times `nn.Embedding`, one seed, every
batch drawn when it is needed, Adam as it comes. It computes the library's noise and gradients, which the tests check.
Both train the same network on batches of 64 and take turns in one process on one thread; seconds are the processor's,
medians over the turns.

Writes out/bench/shortcut.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from algorithms.chain import Params
from toy.few_step import StepConditionedChain, fit, schedule, training_set
from verdicts.streams import Stream

OUT = Path("out/bench")
STREAM = Stream(6).child("benchmarks", "shortcut")
BATCH = 64
WIDTH = 128
SEEDS = 5

Row = dict[str, float]


class ScaledLinear(nn.Module):
    """A linear layer, multiplied by an embedding of the step."""

    def __init__(self, size_in: int, size_out: int, steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size_in, size_out)
        self.scale = nn.Embedding(steps, size_out)
        nn.init.uniform_(self.scale.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale(t - 1) * self.linear(x)


class PlainNetwork(nn.Module):
    """The noise network of one seed, told the step t = 1..T of each state."""

    def __init__(self, steps: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = [(2, width), (width, width), (width, width)]
        self.hidden = nn.ModuleList([ScaledLinear(*size, steps) for size in sizes])
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.hidden:
            x = nn.functional.softplus(layer(x, t))
        return self.last(x)

    def load(self, params: Params) -> None:
        """Take over the parameters of one seed of a `StepConditionedChain`."""
        named = {"last.weight": params["w4"].T, "last.bias": params["b4"]}
        for i in range(len(self.hidden)):
            named[f"hidden.{i}.linear.weight"] = params[f"w{i + 1}"].T
            named[f"hidden.{i}.linear.bias"] = params[f"b{i + 1}"]
            named[f"hidden.{i}.scale.weight"] = params["scale"][:, i]
        self.load_state_dict(named)


def plain_training(
    chain: StepConditionedChain, points: Tensor, updates: int, generator: torch.Generator, rate: float = 1e-2
) -> PlainNetwork:
    """Train one seed on points (n, 2), the plain way."""
    network = PlainNetwork(chain.steps)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    alpha_bar = chain.alpha_bar.float()
    for _ in range(updates):
        x0 = points[torch.randint(len(points), (BATCH,), generator=generator)]
        t = torch.randint(1, chain.steps + 1, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        level = alpha_bar[t - 1][:, None]
        predicted = network(level.sqrt() * x0 + (1 - level).sqrt() * noise, t)
        loss = nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def pretraining(steps: int, updates: int, turns: int) -> Row:
    """Milliseconds an update and seed at T = steps, of the plain loop, of one seed, and of several seeds at once."""
    chain = StepConditionedChain.of(schedule(steps))
    streams = [STREAM.child(seed) for seed in range(SEEDS)]
    points = torch.stack([training_set("swiss_roll", stream) for stream in streams])
    generator = torch.Generator().manual_seed(STREAM.child("plain").integer())
    # Work, and the updates of a single seed in it.
    works: dict[str, tuple[Callable[[], object], int]] = {
        "plain": (lambda: plain_training(chain, points[0], updates, generator), updates),
        "one seed": (lambda: fit(chain, points[:1], streams[:1], updates, BATCH), updates),
        "batched": (lambda: fit(chain, points, streams, updates, BATCH), updates * SEEDS),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, (work, count) in works.items():
            spent = 1e3 * seconds(work) / count
            if turn:  # the first turn warms up
                times[name].append(spent)
    plain, one, batched = (statistics.median(times[name]) for name in works)
    return {
        "T": float(steps),
        "plain loop, ms": plain,
        "one seed, ms": one,
        f"{SEEDS} seeds at once, ms a seed": batched,
        "one seed / plain": one / plain,
        f"{SEEDS} seeds at once / one by one": batched / one,
    }


def shown(rows: Sequence[Row]) -> Table:
    table = Table(title=f"Pre-training: an update of batch {BATCH}, width {WIDTH}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*[f"{value:.3g}" if name != "T" else f"{value:.0f}" for name, value in row.items()])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of SFT-PG's toy experiments.")
    parser.add_argument("--quick", action="store_true", help="T = 10 only, short turns: some seconds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    console = Console()
    rows: list[Row] = []
    with console.status("") as status:
        for steps in (10,) if quick else (10, 100, 1000):
            status.update(f"pre-training, T = {steps}")
            rows.append(pretraining(steps, 64 if quick else 320, 3 if quick else 7))
    console.print(shown(rows))
    machine = (
        f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "quick": quick, "pretraining": rows}
    (OUT / "shortcut.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}\nwritten to {OUT}/shortcut.json", highlight=False)


if __name__ == "__main__":
    main()
