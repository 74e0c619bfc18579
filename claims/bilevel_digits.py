"""Chapter *Generative bilevel*, continued: learning the noise schedule of handwritten digits (section 6.2, Table 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from algorithms import search
from claims.bilevel import CHAPTER, PAPER
from claims.claim import Check, Claim, Context
from claims.records import Column, Figure, Panel, Series, Table
from claims.training import Wins, shared
from scale.digit_classifier import digit_classifier, digit_features
from scale.digits import digit_images, digit_split
from scale.learned_schedule import DEFAULT, LearnedSchedule, PixelMLP, Setting, Trained, learn, train
from scale.metrics import Interval, frechet_distance, frechet_floor
from verdicts.streams import Stream

SETTING = Setting(updates=80, first=300)
SEEDS = {"smoke": 2, "standard": 2, "full": 6}
JUDGED = 2  # of the seeds, by the check
CANDIDATES = 3  # of the random search, which then costs no more than a bilevel run
TENTH = 0.1  # of the distance with the default schedule
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


Of = Callable[[Context, int], Method]
Pairs = Callable[[Context], list[tuple[np.ndarray, np.ndarray]]]


@cache
def halfway(context: Context, seed: int) -> Method:
    """A training under a schedule that ends halfway, at alpha_bar = 1/2, while the sampler starts from pure noise."""
    made = problem(context, seed)
    trained = train(made, {"end": 0.5})
    return judged(context, made, trained, trained.images, trained.seconds)


def comparable(learned: Of) -> Pairs:
    """Its distance below 1.1 times the default's, and above 0.9 times, set by set, for each seed."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        found = [(learned(context, i).distances, default(context, i).distances) for i in range(JUDGED)]
        return [pair for a, b in found for pair in (((1 + TENTH) * b, a), (a, (1 - TENTH) * b))]

    return of


DIGITS = Claim(
    id="generative-bilevel.digits-schedule",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, section 6.2, Table 3, Figures 6 and 7; Algorithm 6",
    title="On digits a short run of Algorithm 6 changes the distance by less than a tenth, at the price of several trainings",
    statement=f"A network of {SETTING.steps} training steps that learns its cosine schedule by the way (Algorithm 6) makes samples in {SETTING.S} DDIM steps whose Fréchet distance to held-out digits is within a tenth of the default schedule's after the same training.",
    printed="holds",
    why="The paper finds performance “comparable” to the searches' “with only the training time of a single-level diffusion model”, and better than the default's. In pilots of other root seeds (80 to 150 updates) such a run ended between 5 % better and 1 % worse than the default, "
    "so an improvement is not claimed here; at root seed 0 it was looked for once, with a larger step, and refuted. The run is no single training: both lower variables are trained, and the sampler is called three times an update. Searches of ten candidates, at about twice the seconds, found better schedules (benchmarks/README.md). All distances stay far above a perfect sampler's: networks and trainings are small.",
    derivation="bilevel.md#learning-the-schedule-of-digits",
    checks=(
        Check(
            "within a tenth of the default",
            "statistical",
            f"Is the Fréchet distance of {SET} samples to the held-out digits with the learned schedule below 1.1 times, and above 0.9 times, that with the default one, on the same noise, for more than half of all noise?",
            tuple(f"seed {i}, {side}" for i in range(JUDGED) for side in ("below 1.1", "above 0.9")),
            Wins(looks=2),
            comparable(bilevel),
            {"a schedule that ends halfway": comparable(halfway)},
            margin_from=f"a sign test over {SETS} sets of samples of each seed's two networks: no margin; the statement is about these networks, and the tenth was set after pilots on the root seeds 0, 1 and 101 to 108. At root seed 0 “better than the default” was looked at first, with a larger step: one network better, one worse; the interval pays for both looks",
        ),
    ),
    figures=lambda context: (_paths(shared(context)), _images(shared(context))),
    tables=lambda context: (_table(shared(context)),),
)  # fmt: skip


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


def _table(context: Context) -> Table:
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
        first = methods[0]
        rows.append(
            (
                name,
                *distances,
                trainings.get(name, str(CANDIDATES)),
                f"{first.passed}",
                f"{first.passed / base.passed:.2f}",
                f"{first.seconds / base.seconds:.2f}",
            )
        )
    limits = floor(context)
    return Table(
        name="bilevel-digits",
        title="Learning the schedule of digits, beside the default and a search",
        caption=f"Fréchet distance of {SET} samples to held-out digits, mean over {SETS} sets; a perfect sampler scores {limits.mean:.0f} [{limits.low:.0f}, {limits.high:.0f}]. "
        "Costs are of seed 0; images are those that went forwards through the network, a ratio is to the bilevel run, and seconds are the processor's in this run.",
        columns=(
            Column("method", "left"),
            *(Column(f"seed {i}", group="Fréchet distance") for i in seeds),
            Column("trainings"),
            Column("images"),
            Column("images, ratio"),
            Column("seconds, ratio"),
        ),
        rows=tuple(rows),
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (DIGITS,)
