"""How fast the library is, as ratios: samples per second, memory, and the time of exact moments.

Every ratio compares two workloads that ran side by side, in turns, in this process; it is the median over the turns.
The references are the naive loops below: plain autograd through the chain, one sample at a time, each estimator by
its own definition. They are first checked to give the library's numbers, so that equal work is compared.

Writes out/bench/results.json and out/bench/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms.chain import Chain, Noise, Params
from algorithms.estimators import Estimator, antithetic
from algorithms.objective import Objective
from theory import chains, instances, schedules
from theory.credit import Engine, credit_moments
from toy.ddpm import MLPChain, initial_parameters
from toy.linear_gaussian import Problem
from toy.memory import peak_saved_bytes
from toy.rewards import Bump
from verdicts.streams import Stream

OUT = Path("out/bench")
STD = 0.25  # of the parameter noise

# --- what is estimated -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A chain, its parameters and objective; `samples` a batch of the library, `loop` samples of the naive loop."""

    name: str
    chain: Chain
    params: Params
    objective: Objective
    samples: int
    loop: int


def linear_gaussian() -> Case:
    """The additive toy: T = 4, two dimensions, two parameters."""
    problem = Problem.of(instances.additive_instance())
    return Case("linear-Gaussian", problem.chain, problem.params, problem.objective, samples=1024, loop=16)


def mlp(steps: int = 10) -> Case:
    """The MLP sampler of the toys with untrained weights: 2690 parameters."""
    chain = MLPChain.of(schedules.linear(steps, 0.02, 0.2))
    params = initial_parameters(chain, 48, Stream(0).child("benchmark"))
    return Case("MLP sampler", chain, params, Objective(Bump(0.5, 1.0)), samples=256, loop=8)


def draw(case: Case, estimator: Estimator, samples: int) -> Noise:
    return estimator.draw(case.chain, case.params, samples, torch.Generator().manual_seed(0))


# --- the naive loops ---------------------------------------------------------------------------------------------


def back_propagation(case: Case, noise: Noise, rows: slice, weights: Sequence[float]) -> Params:
    """Gradient of the reward through one graph, summed over `rows`; step t's share counts weights[t - 1] times.

    Steps with weight zero run without a graph, which is what truncation saves.
    """
    leaves = _leaves(case)
    x = case.chain.initial(noise.initial[rows])
    for t in range(case.chain.steps, 0, -1):
        w = weights[t - 1]
        used = leaves if w == 1 else {k: w * p + (1 - w) * p.detach() if w else p.detach() for k, p in leaves.items()}
        x = case.chain.mean(used, x, t, None) + case.chain.std(t) * noise.steps[t - 1, rows]
    return _gradient(case.objective.reward(x, None).sum(), leaves)


def score_function(case: Case, noise: Noise, i: int, length: int) -> Params:
    """Return times the score of one noise per block of `length` steps, the means of a block composed by the graph."""
    leaves, log_prob = _leaves(case), torch.zeros((), dtype=torch.float64)
    x = case.chain.initial(noise.initial[i : i + 1])
    for t in range(case.chain.steps, 0, -1):
        mean, std = case.chain.mean(leaves, x, t, None), case.chain.std(t)
        x = mean + std * noise.steps[t - 1, i : i + 1]
        if (t - 1) % length == 0:
            x = x.detach()
            log_prob = log_prob - ((x - mean) / std).square().sum() / 2
    return _gradient(case.objective.reward(x, None).sum() * log_prob, leaves)


def parameter_noise(case: Case, noise: Noise, i: int, signs: Sequence[int]) -> Params:
    """Return times the noise put on each step's parameters, averaged over the signs of that noise."""
    assert noise.parameters is not None
    total = {name: torch.zeros_like(p) for name, p in case.params.items()}
    for sign in signs:
        x = case.chain.initial(noise.initial[i : i + 1])
        for t in range(case.chain.steps, 0, -1):
            moved = {name: p + sign * STD * noise.parameters[name][t - 1, i] for name, p in case.params.items()}
            x = case.chain.mean(moved, x, t, None) + case.chain.std(t) * noise.steps[t - 1, i : i + 1]
        reward = case.objective.reward(x, None).sum()
        for name, xi in noise.parameters.items():
            total[name] += sign * reward * xi[:, i].sum(0) / (STD * len(signs))
    return total


def _leaves(case: Case) -> Params:
    return {name: p.clone().requires_grad_() for name, p in case.params.items()}


def _gradient(value: Tensor, leaves: Params) -> Params:
    grads = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


Naive = Callable[[Case, Noise, int], Params]


def pairs(steps: int) -> dict[str, tuple[Estimator, Naive]]:
    """Return each named estimator of a chain with `steps` steps beside its naive form for one sample."""
    half = steps // 2

    def truncated_at(last: int, noise: Noise, i: int, case: Case, debiased: bool = False) -> Params:
        weights = [(steps / (steps - t + 1) if debiased else 1.0) if t <= last else 0.0 for t in range(1, steps + 1)]
        return back_propagation(case, noise, slice(i, i + 1), weights)

    def at_random(case: Case, noise: Noise, i: int) -> Params:
        return truncated_at(int(noise.outcome[i]) + 1, noise, i, case, debiased=True)

    zeroth = named.zeroth_order(steps, STD)
    return {
        "first order": (named.first_order(steps), lambda case, noise, i: truncated_at(steps, noise, i, case)),
        "truncated": (named.truncated(steps, half), lambda case, noise, i: truncated_at(half, noise, i, case)),
        "debiased random truncation": (
            named.random_truncation(np.full(steps, 1 / steps), debiased=True),
            at_random,
        ),
        "half order": (named.half_order(steps, half), lambda case, noise, i: score_function(case, noise, i, half)),
        "policy gradient": (named.policy_gradient(steps), lambda case, noise, i: score_function(case, noise, i, 1)),
        "zeroth order": (zeroth, lambda case, noise, i: parameter_noise(case, noise, i, (1,))),
        "antithetic zeroth order": (
            antithetic(zeroth, "parameters"),
            lambda case, noise, i: parameter_noise(case, noise, i, (1, -1)),
        ),
    }


def readouts(case: Case, estimator: Estimator, noise: Noise) -> dict[str, Callable[[], Params]]:
    """The three read-outs of the library, each as a dict of tensors."""
    direction = {name: torch.ones_like(p) for name, p in case.params.items()}

    def accumulate() -> Params:
        leaves = _leaves(case)
        estimator.accumulate(case.chain, leaves, case.objective, noise)
        return {name: p.grad for name, p in leaves.items() if p.grad is not None}

    return {
        "per_sample": lambda: estimator.per_sample(case.chain, case.params, case.objective, noise),
        "directional": lambda: {
            "": estimator.directional(case.chain, case.params, case.objective, noise, direction),
        },
        "accumulate": accumulate,
    }


def check(case: Case, name: str, samples: int = 3) -> None:
    """Raise AssertionError unless all three read-outs give the naive loop's numbers."""
    estimator, naive = pairs(case.chain.steps)[name]
    noise = draw(case, estimator, samples)
    rows = [naive(case, noise, i) for i in range(samples)]
    each = {key: torch.stack([row[key] for row in rows]) for key in case.params}
    expected = {
        "per_sample": each,
        "directional": {"": torch.stack([value.flatten(1).sum(1) for value in each.values()]).sum(0)},
        "accumulate": {key: value.mean(0) for key, value in each.items()},
    }
    for readout, run in readouts(case, estimator, noise).items():
        torch.testing.assert_close(run(), expected[readout], rtol=1e-9, atol=1e-10)


# --- measuring ---------------------------------------------------------------------------------------------------

Tick = Callable[[str], None]


def in_turns(workloads: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return each workload's seconds, run A B C A B C ..., after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in workloads}
    for turn in range(repeats + 1):
        for name, run in workloads.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    """Median over the turns of one time over another of the same turn."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


Row = dict[str, str | float | None]


def throughput(cases: Sequence[Case], repeats: int, tick: Tick) -> list[Row]:
    """Samples per second of the three read-outs over those of the naive loop."""
    rows: list[Row] = []
    for case in cases:
        for name, (estimator, naive) in pairs(case.chain.steps).items():
            tick(f"{case.name}: {name}")
            check(case, name)
            noise = draw(case, estimator, case.samples)

            def loop(naive: Naive = naive, noise: Noise = noise, case: Case = case) -> None:
                for i in range(case.loop):
                    naive(case, noise, i)

            seconds = in_turns({"loop": loop, **readouts(case, estimator, noise)}, repeats)
            scale = case.samples / case.loop
            gains = {key: scale * ratio(seconds["loop"], seconds[key]) for key in seconds if key != "loop"}
            rows.append({"problem": case.name, "estimator": name, **gains})
    return rows


def memory(lengths: Sequence[int], repeats: int, tick: Tick) -> list[Row]:
    """Peak bytes saved for backward over those of the sweep at the least T, and the sweep's time over the graph's."""
    rows: list[Row] = []
    unit = peak_saved_bytes(lengths[0], "sweep")
    for steps in lengths:
        tick(f"memory, T = {steps}")
        case, estimator = mlp(steps), named.first_order(steps)
        noise = draw(case, estimator, case.samples)
        seconds = in_turns(
            {
                "sweep": readouts(case, estimator, noise)["accumulate"],
                "graph": lambda case=case, noise=noise, steps=steps: back_propagation(
                    case, noise, slice(None), [1.0] * steps
                ),
            },
            repeats,
        )
        latents = (steps + 1) * 32 * 2 * 8  # of peak_saved_bytes' 32 samples in two dimensions, float64
        rows.append(
            {
                "T": steps,
                "sweep": peak_saved_bytes(steps, "sweep") / unit,
                "sweep and latents": (peak_saved_bytes(steps, "sweep") + latents) / unit,
                "stored graph": peak_saved_bytes(steps, "stored graph") / unit,
                "sweep's time / graph's": ratio(seconds["sweep"], seconds["graph"]),
            }
        )
    return rows


def exact_problem(steps: int, dim: int) -> tuple[chains.LinearGaussianChain, chains.QuadraticReward]:
    """A stable additive chain with random matrices, as many parameters as dimensions."""
    rng = Stream(0).child("exact", steps, dim).generator()
    chain = chains.LinearGaussianChain(
        A=0.9 * np.linalg.qr(rng.normal(size=(steps, dim, dim)))[0],
        B=rng.normal(size=(steps, dim, dim)) / dim,
        c=rng.normal(size=(steps, dim)),
        std=rng.uniform(0.3, 0.6, steps),
        theta=rng.normal(size=dim),
        mean_T=np.zeros(dim),
        cov_T=np.eye(dim),
    )
    return chain, chains.QuadraticReward(1.0, rng.normal(size=dim), -np.eye(dim))


POLYNOMIAL_UP_TO = 40  # T times d: the engine of polynomials is for small instances
WICK_CALLS = 10  # per turn: one call takes a millisecond, less than a cold cache costs it


def exact(steps: Sequence[int], dims: Sequence[int], repeats: int, tick: Tick) -> list[Row]:
    """Time of the exact mean and covariance of half order(2), by both engines, over that of wick on the least case."""

    def moments(problem: tuple[chains.LinearGaussianChain, chains.QuadraticReward], engine: Engine) -> np.ndarray:
        chain, reward = problem
        return credit_moments(chain, reward, credits.half_order(chain.steps, 2).matrices[0], engine=engine).cov

    def wick(problem: tuple[chains.LinearGaussianChain, chains.QuadraticReward]) -> None:
        for _ in range(WICK_CALLS):
            moments(problem, "wick")

    least = exact_problem(steps[0], dims[0])
    rows: list[Row] = []
    for T, d in itertools.product(steps, dims):
        tick(f"exact moments, T = {T}, d = {d}")
        problem = exact_problem(T, d)
        seconds = in_turns({"wick": partial(wick, problem), "least": partial(wick, least)}, repeats)
        row: Row = {"T": T, "d": d, "wick": ratio(seconds["wick"], seconds["least"])}
        row |= {"polynomial": None, "polynomial / wick": None}
        if T * d <= POLYNOMIAL_UP_TO:
            np.testing.assert_allclose(moments(problem, "polynomial"), moments(problem, "wick"), rtol=1e-9, atol=1e-9)
            seconds = in_turns(
                {
                    "polynomial": partial(moments, problem, "polynomial"),
                    "wick": partial(wick, problem),
                    "least": partial(wick, least),
                },
                repeats,
            )
            row["polynomial"] = WICK_CALLS * ratio(seconds["polynomial"], seconds["least"])
            row["polynomial / wick"] = WICK_CALLS * ratio(seconds["polynomial"], seconds["wick"])
        rows.append(row)
    return rows


# --- showing -----------------------------------------------------------------------------------------------------


def machine() -> str:
    return f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"


def text(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def table(title: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in rows[0]:
        shown.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        shown.add_row(*map(text, row.values()))
    return shown


def markdown(title: str, rows: Sequence[Row]) -> str:
    head = "| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0])
    body = ("| " + " | ".join(map(text, row.values())) + " |" for row in rows)
    return "\n".join([f"## {title}", "", head, *body, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the library against naive loops; the results are ratios.")
    parser.add_argument("--quick", action="store_true", help="fewer turns and sizes: about 20 seconds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    repeats = 3 if quick else 15
    cases = (linear_gaussian(), mlp())
    lengths = (5, 20) if quick else (5, 10, 20, 40, 80)
    steps, dims = ((5, 10, 20), (2, 8)) if quick else ((5, 10, 20, 50), (2, 8, 16))
    rounds = sum(len(pairs(case.chain.steps)) for case in cases) + len(lengths) + len(steps) * len(dims)
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds, completed=-1)  # a tick tells what begins

        def tick(description: str) -> None:
            progress.update(task, description=description, advance=1)

        sections = {
            "Samples per second, as multiples of the naive loop's": throughput(cases, repeats, tick),
            "First order: peak bytes saved for backward, over the sweep's at the least T": memory(
                lengths, repeats, tick
            ),
            f"Exact moments of half order(2): time over that of wick at T = {steps[0]}, d = {dims[0]}": exact(
                steps, dims, 2 if quick else 7, tick
            ),
        }
    for title, rows in sections.items():
        console.print(table(title, rows))
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "quick": quick, "turns": repeats, "sections": sections}
    (OUT / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    pages = "\n".join(markdown(title, rows) for title, rows in sections.items())
    (OUT / "results.md").write_text(f"# Benchmarks\n\n{machine()}\n\n{pages}", encoding="utf-8")
    console.print(f"{machine()}\nwritten to {OUT}/results.json and {OUT}/results.md", highlight=False)


if __name__ == "__main__":
    main()
