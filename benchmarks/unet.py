"""One gradient through the U-Net of Stable Diffusion 1.5, at its real size: seconds and peak memory of each estimator.

The weights are random, which changes neither; LoRA of rank 4 on the attention projections; DDIM steps with eta = 1; the
reward is minus the mean square of the latents. Memory is what comes on top of the weights and the LoRA parameters:

    counted     bytes of the tensors alive, by scale.memory.LiveBytes; the same run is timed
    predicted   the same count on the meta device, where nothing of the real size is built
    growth      of the process, which sees the kernels' scratch space too; two runs of its own

Writes a file named after the options to out/bench/, after every estimator. Real runs take about 5 GB for latents of
32 x 32 and 6 GB for 64 x 64, and minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from algorithms import estimators as named
from algorithms.chain import Params
from algorithms.credit import Credit
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from algorithms.stratified import length_law, survival
from algorithms.telescoped import band
from scale.lora import add_lora
from scale.memory import LiveBytes, fixed_and_per_sample, measured_peak, ordinary_heap, predict
from scale.methods import METHODS, make_baseline, read_options
from scale.network import NetworkChain, checkpoint_blocks
from scale.plan import in_bytes, predicted_peak
from scale.sampler import gaussian_steps
from scale.stable_diffusion import StableDiffusionChain

OUT = Path("out/bench")
LORA = ("to_q", "to_k", "to_v", "to_out.0")
TOKENS = 77  # of the text encoder's states
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MEASURES = ("predicted", "growth", "counted")
SECTIONS = {"activations kept": False, "with checkpoints in the U-Net": True}

# --- the problem -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The chain and its LoRA parameters."""

    chain: NetworkChain
    params: Params

    def condition(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.long, device=self.chain.table.device)


def problem(size: int, steps: int, guidance: float, checkpointing: bool, device: str) -> Problem:
    """Return the chain over latents of size x size, and its parameters; on meta nothing is allocated."""
    diffusers: Any = importlib.import_module("diffusers")
    with torch.random.fork_rng(devices=[]), torch.device(device):  # layers draw from the global generator only
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**UNET)
    params = add_lora(unet, rank=4, alpha=4, targets=LORA, seed=0)
    if checkpointing:
        checkpoint_blocks(unet)
    texts = torch.randn(2, TOKENS, UNET["cross_attention_dim"], generator=torch.Generator().manual_seed(1))
    chain = StableDiffusionChain(
        network=unet,
        sampler=gaussian_steps(diffusers.DDIMScheduler(**DDIM), steps),
        shape=(4, size, size),
        told="encoder_hidden_states",
        table=texts.to(device),
        guidance=guidance,
        unconditional=1,
    )
    return Problem(chain, params)


@dataclass(frozen=True)
class MeanSquare:
    """Minus the mean square of the latents, (n,)."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return -x0.square().flatten(1).mean(1)


# --- the estimators ----------------------------------------------------------------------------------------------


def of_table(name: str, steps: int, **options: Any) -> Estimator:
    """Return an estimator of scale's table of methods."""
    make = METHODS[name].make
    assert make is not None
    return make(read_options(name, options), steps, make_baseline("none"))


def srt(steps: int) -> Estimator:
    """SRT of expected length 3, its law as for tails whose standard deviation grows in proportion to their length."""
    return named.stratified_truncation(length_law(survival(np.arange(steps, 0, -1.0) ** 2, 3.0)))


def tho(steps: int) -> Estimator:
    """THO(2), each row's weight spread evenly over its band."""
    support = band(steps, 2).astype(float)
    return Estimator("THO(2)", Credit.of(np.pad(support / support.sum(1, keepdims=True), ((0, 0), (0, 1)))))


# Name, as in scale's table of methods; the fewest steps at which it is itself; the estimator at so many steps. SRT and
# THO get plain laws and weights instead of fitted ones: which they are changes neither time nor memory.
ESTIMATORS: dict[str, tuple[int, Callable[[int], Estimator]]] = {
    "policy-gradient": (1, partial(of_table, "policy-gradient")),
    "first-order": (1, partial(of_table, "first-order")),
    "truncated": (1, partial(of_table, "truncated", length=1)),
    "srt": (4, srt),
    "half-order": (2, partial(of_table, "half-order", length=2)),
    "tho": (2, tho),
    "zeroth-order": (1, partial(of_table, "zeroth-order")),
    "rlr": (3, partial(of_table, "rlr", h=1, reading="II")),
}
ONE_GRAPH = "one-graph"


@dataclass(frozen=True)
class Workload:
    """One gradient to be measured.

    Attributes:
        calls: evaluations of the network on average over its law, a backward pass into parameters being two.
        forwards: forward passes of `run`.
        run: (problem, batch) -> its mean return; leaves no gradients behind.
    """

    title: str
    calls: float
    forwards: int
    run: Callable[[Problem, int], float]


def workloads(names: Sequence[str], steps: int) -> dict[str, Workload]:
    """Return the workloads of these names that a chain of so many steps has; too short a chain leaves some out."""
    return {name: workload(name, steps) for name in names if name == ONE_GRAPH or steps >= ESTIMATORS[name][0]}


def workload(name: str, steps: int) -> Workload:
    if name == ONE_GRAPH:
        return Workload("one graph through all steps", 3.0 * steps, steps, one_graph)
    estimator = named.with_redrawn_noise(ESTIMATORS[name][1](steps))  # as verifine trains them
    credit, outcome = estimator.credit, typical(estimator.credit)
    roll_outs = 2 ** len(estimator.flips)
    forwards = roll_outs * (steps + int(credit.visits()[outcome].sum()))
    return Workload(estimator.name, roll_outs * credit.calls(), forwards, partial(by_sweep, estimator, outcome))


def typical(credit: Credit) -> int:
    """Return the outcome of the law whose work is nearest to the law's mean: one run then stands for many."""
    calls = [Credit.of(matrix).calls() for matrix in credit.matrices]
    return int(np.abs(np.array(calls) - credit.calls()).argmin())


def by_sweep(estimator: Estimator, outcome: int, problem: Problem, batch: int) -> float:
    """Take one gradient by the sweep, every sample with this outcome of the estimator's law."""
    chain, params = problem.chain, problem.params
    noise = estimator.draw(chain, params, batch, torch.Generator().manual_seed(2))
    noise = replace(noise, outcome=torch.full_like(noise.outcome, outcome))
    returns = estimator.accumulate(chain, params, Objective(MeanSquare()), noise, problem.condition(batch))
    return finished(params, returns)


def one_graph(problem: Problem, batch: int) -> float:
    """Take first order's gradient by plain back-propagation, all steps in one graph, for comparison."""
    chain, params, condition = problem.chain, leaves(problem.params), problem.condition(batch)
    noise = named.first_order(chain.steps).draw(chain, params, batch, torch.Generator().manual_seed(2))
    x = chain.initial(noise.initial)
    for t in range(chain.steps, 0, -1):
        x = chain.mean(params, x, t, condition) + chain.std(t) * noise.steps[t - 1]
    returns = MeanSquare()(x, condition)
    returns.mean().backward()
    return finished(params, returns.detach())


def leaves(params: Params) -> Params:
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def finished(params: Params, returns: Tensor) -> float:
    """Drop the gradients, which must have arrived."""
    if all(p.grad is None for p in params.values()):
        raise RuntimeError("the run left no gradient")
    for p in params.values():
        p.grad = None
    return float("nan") if returns.is_meta else float(returns.mean())


# --- measuring ---------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def predicted(work: Workload, meta: Problem, batch: int) -> Row:
    """Return the predicted peak at `batch` and the bytes of each further sample."""
    fixed, each = fixed_and_per_sample(
        lambda n: predict(lambda: work.run(meta, n), reads=True), batches=(batch, batch + 1)
    )
    return {"predicted": predicted_peak(fixed, each, batch), "per further sample": each}


def growth(work: Workload, real: Problem, batch: int) -> Row:
    """Return by how much the process grows; the first of two runs makes the libraries' own buffers."""
    with measured_peak("cpu"):
        work.run(real, batch)
    with measured_peak("cpu") as peak:
        work.run(real, batch)
    return {"growth": peak.bytes, "how": peak.how}


def counted(work: Workload, real: Problem, batch: int) -> Row:
    """Return the seconds of one run, and the peak of its tensors.

    Counting takes about 4 % of the seconds. Those of the processor do not depend on what else the machine does.
    """
    begun, busy = time.perf_counter(), time.process_time()
    with LiveBytes() as count:
        mean_return = work.run(real, batch)
    seconds = {"seconds": time.perf_counter() - begun, "cpu seconds": time.process_time() - busy}
    return {**seconds, "counted": count.peak, "return": mean_return}


MEASURE: dict[str, Callable[[Workload, Problem, int], Row]] = {
    "predicted": predicted,
    "growth": growth,
    "counted": counted,
}


def warm_up(real: Problem, batch: int) -> None:
    """Pass through the network once in both directions: the first time, the libraries make their own buffers."""
    x = torch.zeros(batch, *real.chain.shape)
    params = leaves(real.params)
    real.chain.mean(params, x, 1, real.condition(batch)).square().mean().backward()
    finished(params, x)


def measurements(
    options: argparse.Namespace, works: dict[str, Workload], progress: Progress
) -> Iterator[tuple[str, str, Row]]:
    """Yield (section, name, what was found) one by one. The growth of the process comes first, see `measured_peak`."""
    sections = {title: on for title, on in SECTIONS.items() if options.checkpointed or not on}
    for measure in (m for m in MEASURES if m in options.measure):
        for title, checkpointing in sections.items():
            real, runs = measure != "predicted", 1 if measure == "counted" else 2
            task = progress.add_task(f"{title}: building", total=None)
            at = (options.size, options.steps, options.guidance, checkpointing)
            built = problem(*at, device="cpu" if real else "meta")
            if measure == "counted":
                warm_up(built, options.batch)
            progress.remove_task(task)
            for name, work in works.items():
                if name == "rlr" and not real:  # on meta none can see which steps have noise on their parameters
                    continue
                with evaluations(progress, f"{work.title}: {measure}", built, work.forwards * runs):
                    yield title, name, MEASURE[measure](work, built, options.batch)
            del built
        if measure == "growth":
            ordinary_heap()


@contextmanager
def evaluations(progress: Progress, description: str, built: Problem, total: int) -> Iterator[None]:
    """Show how many of the network's forward passes have been made."""
    task = progress.add_task(description, total=total)
    hook = built.chain.network.register_forward_pre_hook(lambda *_: progress.advance(task))
    try:
        yield
    finally:
        hook.remove()
        progress.remove_task(task)


# --- showing -----------------------------------------------------------------------------------------------------


def described(row: Row) -> str:
    """Say in one line what has been found so far."""
    texts = [f"{row['seconds']:.1f} s ({row['cpu seconds']:.1f} s of the processor)"] if "seconds" in row else []
    return ", ".join(texts + [f"{in_bytes(row[m])} {m}" for m in MEASURES if m in row])


def shown(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of a section; the ratio is of the processor's seconds to the policy gradient's."""
    table = Table(title=title, title_justify="left")
    unit = next((row.get("cpu seconds") for row in rows if row["name"] == "policy-gradient"), None)
    memory = [name for name in (*MEASURES, "per further sample") if any(name in row for row in rows)]
    for name in ("estimator", "calls", "seconds", "cpu seconds", "ratio", *memory):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for row in rows:
        seconds, busy = row.get("seconds"), row.get("cpu seconds")
        table.add_row(
            row["estimator"],
            f"{row['calls']:g}",
            f"{seconds:.1f}" if seconds else "",
            f"{busy:.1f}" if busy else "",
            f"{busy / unit:.2f}" if busy and unit else "",
            *(in_bytes(row[name]) if name in row else "" for name in memory),
        )
    return table


def file_of(options: argparse.Namespace) -> Path:
    """Return the file for the results, named after the options."""
    parts = ["unet", f"{8 * options.size}px", f"{options.steps}-steps"]
    for name, ordinary in (("batch", 1), ("guidance", 1.0), ("threads", 1)):
        if getattr(options, name) != ordinary:
            parts.append(f"{name}-{getattr(options, name):g}")
    parts += options.estimators if options.estimators != list(ESTIMATORS) else []
    parts += ["checkpointed"] if options.checkpointed else []
    return OUT / ("-".join([*parts, *(m for m in MEASURES if m in options.measure)]) + ".json")


def save(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of the latents, a multiple of 8 (default 32)")
    parser.add_argument("--batch", type=int, default=1, help="samples of one gradient (default 1)")
    parser.add_argument("--steps", type=int, default=5, help="steps of the chain (default 5)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (default 1, none)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=[*ESTIMATORS, ONE_GRAPH],
        default=list(ESTIMATORS),
        help="by default all that the chain is long enough for, but not one-graph",
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        default=["counted"],
        help="memory predicted on meta, growth of the process, or tensors counted, with seconds (default)",
    )
    parser.add_argument("--checkpointed", action="store_true", help="measure with checkpoints in the U-Net, too")
    options = parser.parse_args(arguments)
    for name in ("size", "batch", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.size % 8:
        parser.error(f"--size must be a multiple of 8, got {options.size}")
    short = {name: ESTIMATORS[name][0] for name in options.estimators if name != ONE_GRAPH}
    if options.steps < min(short.values(), default=1):
        parser.error(f"--steps must be >= {min(short.values())} for {', '.join(short)}, got {options.steps}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options, console = parsed(arguments), Console()
    torch.set_num_threads(options.threads)
    file, works = file_of(options), workloads(options.estimators, options.steps)
    for name in sorted(set(options.estimators) - set(works)):
        console.print(f"{name} left out: it needs {ESTIMATORS[name][0]} steps or more", highlight=False)
    machine = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}"
    sections: dict[str, dict[str, Row]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress:
            for title, name, found in measurements(options, works, progress):
                work = works[name]
                row = sections.setdefault(title, {}).setdefault(
                    name, {"name": name, "estimator": work.title, "calls": work.calls}
                )
                row |= found
                tables = {key: list(rows.values()) for key, rows in sections.items()}
                save(file, {"machine": machine, "options": vars(options), "sections": tables})
                progress.console.print(f"{title}: {work.title}: {described(row)}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("stopped; what was measured so far is kept", highlight=False)
    for title, rows in sections.items():
        console.print(shown(f"T = {options.steps}, batch {options.batch}: {title}", list(rows.values())))
    console.print(f"{machine}, {options.threads} threads\nwritten to {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
