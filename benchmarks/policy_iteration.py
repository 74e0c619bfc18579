"""What policy iteration on a grid costs, and how accurate it is: time and error against the grid.

The problem is a Gaussian mixture fine-tuned for a smooth reward. The error of a grid is the largest difference from the
finest and widest grid of its case, over points of the window, at the noisiest step, where all steps' errors have added
up. Seconds are the processor's, on one thread.

Writes out/bench/policy_iteration.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from algorithms.policy_iteration import Grid, PolicyIteration, Solution, Unresolved
from theory import schedules
from theory.mixture import GaussianMixture
from toy.mixture_chain import MixtureChain

OUT = Path("out/bench")
WINDOW = 3.0  # answers are wanted in [-3, 3] or its square
ITERATIONS = 15
STRENGTH = 1.0


@dataclass(frozen=True)
class Tilt:
    """log cosh plus tanh of a direction: smooth, Lipschitz, neither concave nor convex."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        first, last = x0[:, 0], x0[:, -1]
        return 0.6 * torch.log(torch.cosh(first - 0.3)) + 0.7 * torch.tanh(0.3 * first + 0.9 * last)


@dataclass(frozen=True, eq=False)
class Case:
    """A chain, and grids by (half-width, points on an axis); the first is the reference."""

    name: str
    chain: MixtureChain
    grids: tuple[tuple[float, int], ...]

    @property
    def dimension(self) -> int:
        return self.chain.shape[0]

    def grid(self, half_width: float, points: int) -> Grid:
        d = self.dimension
        return Grid([-half_width] * d, [half_width] * d, [points] * d, ([-WINDOW] * d, [WINDOW] * d))


def mixture(dimension: int, steps: int, variance: float) -> MixtureChain:
    """Two components at a distance of 2, with least standard deviation of a step 0.17."""
    means = np.array([[-1.0, -0.4], [1.0, 0.6]])[:, :dimension]
    covs = np.stack([variance * np.eye(dimension)] * 2)
    return MixtureChain.of(GaussianMixture([0.4, 0.6], means, covs), schedules.linear(steps, 0.03, 0.3))


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("1-D, T = 4", mixture(1, 4, 0.5), ((9, 181), (9, 145))),
            Case("2-D, T = 2", mixture(2, 2, 0.5), ((5.5, 97), (5.5, 87))),
        ]
    line = (14, 801), (14, 401), (14, 217), (8, 321), (8, 129), (6, 241), (5, 201)
    plane = (9, 181), (9, 141), (7, 141), (7, 109), (6, 95), (5, 79)
    return [
        Case("1-D, T = 10", mixture(1, 10, 0.5), line),
        Case("1-D, T = 50", mixture(1, 50, 0.5), line),
        Case("1-D, T = 10, narrow modes", mixture(1, 10, 0.05), ((8, 1281), (8, 641), (8, 321), (8, 161), (8, 129))),
        Case("2-D, T = 4", mixture(2, 4, 0.5), plane),
        Case("2-D, T = 10", mixture(2, 10, 0.5), plane),
    ]


def solved(case: Case, grid: Grid) -> tuple[Solution, float]:
    """Return the solution and its seconds; grids too coarse for the values are part of the comparison."""
    problem = PolicyIteration(case.chain, case.chain.parameters(), Tilt(), STRENGTH, grid)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unresolved)
        found = problem.solve(ITERATIONS)
    return found, time.process_time() - begun


Row = dict[str, str | float | None]


def measure(case: Case, tick: Callable[[str], None]) -> list[Row]:
    """One row per grid: its size, seconds, and errors of V_T, of the means of step T and of the gradient of V_T."""
    steps = case.chain.steps
    points = torch.cartesian_prod(*[torch.linspace(-WINDOW, WINDOW, 13, dtype=torch.float64)] * case.dimension)
    points = points.reshape(-1, case.dimension)
    least = min(case.chain.std(t) for t in range(1, steps + 1))
    rows: list[Row] = []
    reference: list[Tensor] = []
    for half_width, size in case.grids:
        grid = case.grid(half_width, size)
        tick(f"{case.name}: {size} points in [-{half_width:g}, {half_width:g}]")
        found, seconds = solved(case, grid)
        answers = [found.value(steps, points), found.mean(steps, points), found.gradient(steps, points)]
        reference = reference or answers
        errors = [float((a - b).abs().max()) for a, b in zip(answers, reference, strict=True)]
        names = ("error of V", "error of the mean", "error of grad V")
        rows.append(
            {
                "case": case.name,
                "half-width": float(half_width),
                "points per axis": size,
                "spacing / least std": grid.spacing[0] / least,
                "seconds": seconds,
                **(dict.fromkeys(names) if reference is answers else dict(zip(names, errors, strict=True))),
                "ripple": max(found.ripple(t) for t in range(steps)),
            }
        )
    return rows


def text(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.0e}" if 0 < value < 1e-2 else f"{value:.3g}"
    return "" if value is None else str(value)


def shown(rows: Sequence[Row]) -> Table:
    title = f"{ITERATIONS} iterations a step: seconds, and error against the first grid of the case"
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(*map(text, row.values()))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and error of policy iteration on a grid.")
    parser.add_argument("--quick", action="store_true", help="two small cases: some seconds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    console = Console()
    with console.status("") as status:
        rows = [row for case in cases(quick) for row in measure(case, status.update)]
    console.print(shown(rows))
    machine = (
        f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "quick": quick, "rows": rows}
    (OUT / "policy_iteration.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}\nwritten to {OUT}/policy_iteration.json", highlight=False)


if __name__ == "__main__":
    main()
