"""Learning the noise schedule of handwritten digits (Generative bilevel, section 6.2, Table 3): measured, and not settled.

A table and figures without a verdict, which stand beside the claim on learned schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from algorithms import search
from claims.claim import Context
from claims.records import Column, Figure, Panel, Series, Table
from scale.digit_classifier import digit_classifier, digit_features
from scale.digits import digit_images, digit_split
from scale.learned_schedule import DEFAULT, LearnedSchedule, PixelMLP, Setting, Trained, learn, train
from scale.metrics import Interval, frechet_distance, frechet_floor
from verdicts.streams import Stream

SETTING = Setting(updates=80, first=300)
SEEDS = {"smoke": 2, "standard": 2, "full": 6}
CANDIDATES = 3  # of the random search, which then costs no more than a bilevel run
BOX = search.Box(("end", "tau", "epsilon"), (0.6, 0.51, 0.0), (1.0, 2.5, 0.2))
SETS, SET = 48, 100  # sets of samples that are judged, and samples in each
SHOWN = 10

Distances = np.ndarray


@dataclass(frozen=True, eq=False)
class Method:
    """A method on one seed: its network and schedule, distances of its samples to held-out digits, and its cost.

    Attributes:
        distances: Frechet distances of sets of samples to the held-out digits, (SETS,); the same noise for all.
        images: the first samples, (SHOWN, 8, 8).
        passed: images that went through the network.
        seconds: of the processor.
    """

    trained: Trained
    distances: Distances
    images: np.ndarray
    passed: int
    seconds: float


def problem(context: Context, seed: int) -> LearnedSchedule:
    """Digits with a network and batches of this seed's own."""
    stream = Stream(context.stream.seed).child("digits", "schedule", seed)
    classifier = digit_classifier(context.cache)
    with torch.random.fork_rng(devices=[]):  # torch's layers draw initial weights from the global generator only
        torch.manual_seed(stream.child("weights").integer())
        module = PixelMLP()
    images, _ = digit_split("train")
    return LearnedSchedule(images, lambda batch: digit_features(classifier, batch), module, SETTING, stream)


def judged(context: Context, made: LearnedSchedule, trained: Trained, passed: int, seconds: float) -> Method:
    held_out, _ = digit_split("test")
    source = Stream(context.stream.seed).child("digits", "schedule", "judged")
    noise = torch.randn(SETS * SET, 1, 8, 8, generator=torch.Generator().manual_seed(source.integer()))
    images = made.sample(trained, noise)
    reference, features = _numbers(made.features, held_out), _numbers(made.features, images)
    distances = np.array([frechet_distance(part, reference) for part in features.reshape(SETS, SET, -1)])
    return Method(trained, distances, images[:SHOWN, 0].numpy(), passed, seconds)


def _numbers(features: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return features(images).double().numpy()


@cache
def bilevel(context: Context, seed: int) -> Method:
    made = problem(context, seed)
    trained = learn(made)
    return judged(context, made, trained, trained.images, trained.seconds)


@cache
def default(context: Context, seed: int) -> Method:
    made = problem(context, seed)
    trained = train(made)
    return judged(context, made, trained, trained.images, trained.seconds)


@cache
def random_search(context: Context, seed: int = 0) -> Method:
    """The candidate with the smallest distance to the training images, each trained from scratch; and what all cost."""
    tried: list[Trained] = []
    made = problem(context, seed)

    def objective(point: search.Parameters, number: int) -> float:
        tried.append(train(made, point))
        return made.distance(tried[-1])

    generator = Stream(context.stream.seed).child("digits", "schedule", "search").generator()
    found = search.random(objective, BOX, CANDIDATES, generator)
    best = tried[found.trials.index(found.best)]
    looks = CANDIDATES * SETTING.S * SETTING.samples
    return judged(context, made, best, sum(t.images for t in tried) + looks, sum(t.seconds for t in tried))


@cache
def floor(context: Context) -> Interval:
    """What a perfect sampler scores: so many other digits against as many as are held out."""
    classifier = digit_classifier(context.cache)
    every, held_out = digit_images()[0], digit_split("test")[0]
    features = _numbers(lambda batch: digit_features(classifier, batch), every)
    stream = Stream(context.stream.seed).child("digits", "schedule", "floor")
    return frechet_floor(features, SET, stream, against=len(held_out))


def figures(context: Context) -> tuple[Figure, ...]:
    return _paths(context), _images(context)


def _paths(context: Context) -> Figure:
    seeds = range(SEEDS[context.profile.name])
    paths = [bilevel(context, i).trained.path for i in seeds]
    panels = tuple(
        Panel(
            name,
            tuple(Series(f"seed {i}", tuple(map(float, range(len(p[name])))), p[name]) for i, p in enumerate(paths)),
        )
        for name in DEFAULT
    )
    ends = "; ".join(", ".join(f"{name} {path[name][-1]:.3f}" for name in DEFAULT) for path in paths)
    return Figure(
        name="bilevel-digits-paths",
        title="The schedule's parameters along the run",
        caption=f"Algorithm 6 on digits, cosine family with start = 0; the first update is the initial epoch. Seeds need not agree: the distance is flat and the gradient noisy. They end at: {ends}.",
        alt="Three panels, end, tau and epsilon against updates, a line for each seed: end falls below its start of one, tau and epsilon change.",
        kind="panels",
        x_label="updates",
        y_label="parameter",
        panels=panels,
        shared_axes="none",
    )  # fmt: skip


def _images(context: Context) -> Figure:
    def line(name: str, images: np.ndarray) -> tuple[str, tuple[tuple[tuple[float, ...], ...], ...]]:
        return name, tuple(tuple(map(tuple, image)) for image in images.astype(float).round(3).tolist())

    return Figure(
        name="bilevel-digits-images",
        title=f"Samples of {SETTING.S} steps from the same noise",
        caption="Ten samples each of seed 0, from the same noise; the last line is held-out digits. By eye the schedules can hardly be told apart.",
        alt="Four lines of ten grey images of 8 by 8 pixels: blurred digits of three methods, which look alike, and real digits.",
        kind="images",
        images=(
            line("default", default(context, 0).images),
            line("bilevel", bilevel(context, 0).images),
            line("random search", random_search(context).images),
            line("held out", digit_split("test")[0][:SHOWN, 0].numpy()),
        ),
    )  # fmt: skip


def table(context: Context) -> Table:
    seeds = range(SEEDS[context.profile.name])
    per_seed = {
        "default schedule": [default(context, i) for i in seeds],
        "bilevel": [bilevel(context, i) for i in seeds],
        f"random search, {CANDIDATES} candidates": [random_search(context)],
    }
    trainings = {"default schedule": "1", "bilevel": "2, and the sampler"}
    base = per_seed["bilevel"][0]
    rows = []
    for name, methods in per_seed.items():
        distances = [f"{m.distances.mean():.1f}" for m in methods] + [""] * (len(seeds) - len(methods))
        won = [f"{int((m.distances < default(context, i).distances).sum())}" for i, m in enumerate(methods)]
        first = methods[0]
        rows.append(
            (
                name,
                *distances,
                "" if name == "default schedule" else ", ".join(won),
                trainings.get(name, str(CANDIDATES)),
                f"{first.passed}",
                f"{first.passed / base.passed:.2f}",
                f"{first.seconds / base.seconds:.2f}",
            )
        )
    limits = floor(context)
    return Table(
        name="bilevel-digits",
        title="Learning the schedule of digits, beside the default and a search: no verdict",
        caption=f"Fréchet distance of {SET} samples to held-out digits, mean over {SETS} sets; a perfect sampler scores {limits.mean:.0f} [{limits.low:.0f}, {limits.high:.0f}]. "
        "Seeds do not agree, so nothing is claimed. Costs are of seed 0; images are those that went forwards through the network, a ratio is to the bilevel run, and seconds are the processor's in this run.",
        columns=(
            Column("method", "left"),
            *(Column(f"seed {i}", group="Fréchet distance") for i in seeds),
            Column(f"sets of {SETS} below the default's"),
            Column("trainings"),
            Column("images"),
            Column("images, ratio"),
            Column("seconds, ratio"),
        ),
        rows=tuple(rows),
    )  # fmt: skip
