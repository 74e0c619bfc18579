"""Learning a noise schedule of digits: Algorithm 6 beside searches that train a network for each candidate.

All methods train the same network, on the same batches, for the same number of steps; the bilevel run starts from the
default schedule. A search minimises the Frechet distance to the training images, as the run does; the numbers here are
distances to held-out digits, from the same noise for all methods. Images are those that went forwards through the
network; seconds are the processor's, on one thread.

Writes out/bench/schedules.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from algorithms import search
from scale.digit_classifier import digit_classifier, digit_features
from scale.digits import digit_split
from scale.learned_schedule import DEFAULT, LearnedSchedule, PixelMLP, Setting, Trained, learn, train
from scale.metrics import frechet_distance
from verdicts.streams import Stream

OUT = Path("out/bench")
CACHE = Path("out/cache")
STREAM = Stream(8).child("benchmarks", "schedules")
BOX = search.Box(("end", "tau", "epsilon"), (0.6, 0.51, 0.0), (1.0, 2.5, 0.2))
GRID = {"end": (0.7, 0.8, 0.9, 1.0), "tau": (0.7, 1.0, 1.5, 2.0), "epsilon": (0.008, 0.05, 0.1, 0.2)}
ORDER = ("end", "tau", "epsilon")
SETS, SET = 20, 100

Row = dict[str, float | str]
Objective = Callable[[search.Parameters, int], float]


def problem(setting: Setting, seed: int, cache: Path) -> LearnedSchedule:
    stream, classifier = STREAM.child(seed), digit_classifier(cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream.child("weights").integer())
        module = PixelMLP()
    return LearnedSchedule(digit_split("train")[0], lambda x: digit_features(classifier, x), module, setting, stream)


def held_out_distance(made: LearnedSchedule, trained: Trained) -> float:
    noise = torch.randn(SETS * SET, 1, 8, 8, generator=torch.Generator().manual_seed(STREAM.child("judged").integer()))
    with torch.no_grad():
        reference, features = made.features(digit_split("test")[0]), made.features(made.sample(trained, noise))
    return float(np.mean([frechet_distance(part, reference) for part in features.split(SET)]))


def searched(made: LearnedSchedule, run: Callable[[Objective], search.Search]) -> tuple[Trained, int, int, float]:
    """The best candidate's network, how many were trained, the images and the seconds of all."""
    tried: list[Trained] = []

    def objective(point: search.Parameters, number: int) -> float:
        tried.append(train(made, point))
        return made.distance(tried[-1])

    found, looks = run(objective), made.setting.S * made.setting.samples
    best = tried[found.trials.index(found.best)]
    return best, len(tried), sum(t.images + looks for t in tried), sum(t.seconds for t in tried)


def methods(made: LearnedSchedule, seed: int, trials: int) -> dict[str, tuple[Trained, int, int, float]]:
    alone, learned = train(made), learn(made)
    return {
        "bilevel": (learned, 2, learned.images, learned.seconds),
        "default": (alone, 1, alone.images, alone.seconds),
        "random": searched(made, lambda of: search.random(of, BOX, trials, seed)),
        "greedy grid": searched(made, lambda of: search.greedy_grid(of, GRID, ORDER, DEFAULT)),
        "Bayesian": searched(made, lambda of: search.bayesian(of, BOX, trials, seed, DEFAULT, min(5, trials))),
    }


def compare(setting: Setting, seed: int, trials: int, cache: Path = CACHE) -> list[Row]:
    """A row for each method of one seed, with costs as ratios to the bilevel run's."""
    made = problem(setting, seed, cache)
    found = methods(made, seed, trials)
    _, _, images, seconds = found["bilevel"]
    return [
        {
            "method": name,
            "seed": seed,
            "distance": held_out_distance(made, trained),
            **{n: float(v) for n, v in trained.x.items()},
            "trainings": trainings,
            "images": passed,
            "images / bilevel": passed / images,
            "seconds / bilevel": spent / seconds,
        }
        for name, (trained, trainings, passed, spent) in found.items()
    ]


def shown(rows: Sequence[Row]) -> Table:
    table = Table(title="Learning the schedule of digits", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Algorithm 6 on digits beside searches.")
    parser.add_argument("--quick", action="store_true", help="one seed, short trainings, four trials: half a minute")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    setting = Setting(updates=30, first=100) if quick else Setting()
    console = Console(width=110)
    rows: list[Row] = []
    with console.status("") as status:
        for seed in range(1 if quick else 3):
            status.update(f"seed {seed}")
            rows += compare(setting, seed, 4 if quick else 10)
    console.print(shown(rows))
    machine = (
        f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, one thread; torch {torch.__version__}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "quick": quick, "rows": rows}
    (OUT / "schedules.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"{machine}\nwritten to {OUT}/schedules.json", highlight=False)


if __name__ == "__main__":
    main()
