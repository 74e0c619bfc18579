"""Chapter *Implicit Diffusion*, continued: reward training of a pixel model with the queue (section 5.2), on digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.chain import Params
from algorithms.estimators import first_order
from algorithms.losses import charged_rollout
from algorithms.objective import KLToReference, Objective, kl_regularised
from algorithms.queue import Queue
from algorithms.training import Settings, Trainer
from claims.claim import Check, Claim, Context
from claims.implicit import CHAPTER, PAPER
from claims.records import Figure, Panel, Series
from claims.training import Wins, shared
from scale.config import load_config
from scale.digits import digits_model
from scale.task import Task, build
from verdicts.streams import Stream

NETWORK = 600  # updates of the pre-training: half a minute
STEPS, LENGTH, BATCH, RATE = 16, 4, 16, 1e-2
UPDATES, LOOKS = 12, 4
SAMPLES, SHOWN = 96, 10
RISE = 0.01  # of the brightness, which is about 0.31
NATS = 3.0  # of the path KL
CASES = {"λ/β = 300": (1.0, 1 / 300), "λ/β = 100": (1.0, 0.01), "λ/β = 10": (1.0, 0.1), "λ/β = -100": (-1.0, 0.01)}
STRONG, MIDDLE, WEAK, DARK = CASES


@dataclass(frozen=True, eq=False)
class Times:
    """A reward times a number."""

    reward: Any
    factor: float

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return self.factor * self.reward(x0, condition)


@dataclass(frozen=True, eq=False)
class Run:
    """What a training passed through, judged on the same noise at every look.

    Attributes:
        updates: (m,).
        brightness, kl: of every sample, (m, n); the KL divergence is that of its path to the pre-trained model.
        images: the first samples, (m, SHOWN, 8, 8).
    """

    updates: np.ndarray
    brightness: np.ndarray
    kl: np.ndarray
    images: np.ndarray


@cache
def task(context: Context) -> Task:
    """The digits' model, trained for this run's cache at first use, with LoRA."""
    folder = digits_model(context.cache, Stream(context.stream.seed).child("digits").integer() % 2**32, NETWORK)
    options = [f"model={{kind: pixel, path: {folder}}}", f"sampler.steps={STEPS}", "device=cpu", "kl=0"]
    return build(load_config("digits-implicit", [*options, f"method.options.length={LENGTH}"]), context.cache)


@cache
def trained(context: Context, name: str) -> Run:
    """One training: brighter or darker, with one of the coefficients."""
    made, (sign, kl) = task(context), CASES[name]
    stream = Stream(context.stream.seed).child("digits", "implicit")
    objective = kl_regularised(Objective(Times(made.objective.reward, sign)), kl, made.params)
    trainer = Trainer(
        made.chain,
        made.params,
        objective,
        Queue(first_order(STEPS), LENGTH),
        Settings(UPDATES, BATCH, RATE),
        lambda update: torch.Generator().manual_seed(stream.child("update", update).integer()),
        lambda update: made.condition(BATCH, start=(update - 1) * BATCH),
    )
    looks = [untrained(context)]
    for _ in range(LOOKS):
        trainer.run(UPDATES // LOOKS)
        looks.append(judged(context, trainer.result().params))
    brightness, divergences, images = (np.stack(found) for found in zip(*looks, strict=True))
    return Run(np.arange(LOOKS + 1) * (UPDATES // LOOKS), brightness, divergences, images)


@cache
def untrained(context: Context) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first look of every training."""
    return judged(context, task(context).params)


def judged(context: Context, params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brightness and path KL of samples from the same noise for all, and the images of the first."""
    made = task(context)
    source = Stream(context.stream.seed).child("digits", "judged")
    noise = first_order(STEPS).draw(made.chain, made.params, SAMPLES, torch.Generator().manual_seed(source.integer()))
    condition = made.condition(SAMPLES)
    objective = Objective(made.objective.reward, (KLToReference(1.0, made.params),))
    roll, _ = charged_rollout(made.chain, params, objective, noise, condition)
    with torch.no_grad():
        reward = made.objective.reward(roll.latents[0], condition.reward)
        images = made.decode(
            roll.latents[0][:SHOWN], condition.reward[:SHOWN] if condition.reward is not None else None
        )
    return reward.numpy(), roll.costs.sum(0).numpy(), images[:, 0].numpy()


Pairs = Callable[[Context], list[tuple[np.ndarray, np.ndarray]]]


def last(name: str, what: str = "brightness") -> Callable[[Context], np.ndarray]:
    return lambda context: getattr(trained(context, name), what)[-1]


def before(context: Context) -> np.ndarray:
    return trained(context, STRONG).brightness[0]


def moved(brighter: str, darker: str) -> Pairs:
    """Brightness after against before, with a rise asked for; the divergence against its limit; and the dark run's."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        start = before(context)
        return [
            (last(brighter)(context), start + RISE),
            (np.full(SAMPLES, NATS), last(brighter, "kl")(context)),
            (start - RISE, last(darker)(context)),
        ]

    return of


def ordered(*names: str) -> Pairs:
    """Brightness, then divergences, of each coefficient against the next weaker."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        steps = list(zip(names, names[1:], strict=False))
        return [(last(a, what)(context), last(b, what)(context)) for what in ("brightness", "kl") for a, b in steps]

    return of


DIGITS = Claim(
    id="implicit-diffusion.digits",
    chapter=CHAPTER,
    paper=PAPER,
    source="Implicit Diffusion, section 5.2, A.2 and Figures 6, 13 to 15",
    title="On digits the queue makes images brighter or darker, and the reward competes with the divergence",
    statement=f"With a queue of {LENGTH} batches of {BATCH} and {STEPS} sampling steps, {UPDATES} updates at λ/β = 100 raise the brightness of digits by more than {RISE:g}, at a path KL divergence below {NATS:g} nats; λ/β = -100 lowers it by as much; "
    "and a larger λ/β means more reward and more divergence.",
    printed="holds",
    why="“We observe the competition between the reward and the divergence with respect to the distribution after pretraining.” The paper's ratios are 30 at most on MNIST; images, model and number of updates here are smaller. "
    "The divergence is that of the paths, by Girsanov's theorem, which bounds the one of the images from above.",
    derivation="implicit.md#girsanov-the-kl-between-paths",
    checks=(
        Check(
            "brighter and darker",
            "statistical",
            f"Is a sample more than {RISE:g} brighter than the pre-trained model's from the same noise, its path KL below the limit, and the other run's as much darker, for more than half of all noise?",
            ("brighter", "within the divergence", "darker"),
            Wins(),
            moved(MIDDLE, DARK),
            {"the reward's sign reversed": moved(DARK, MIDDLE), "a tenth of the ratio": moved(WEAK, DARK)},
            margin_from=f"a sign test over {SAMPLES} samples of one run's models, on noise of their own; {RISE:g} and the limit were set after pilots of other root seeds",
        ),
        Check(
            "competition",
            "statistical",
            "Have the same samples more brightness, and a larger path KL, at each larger ratio?",
            ("brightness, 300 above 100", "brightness, 100 above 10", "KL, 300 above 100", "KL, 100 above 10"),
            Wins(),
            ordered(STRONG, MIDDLE, WEAK),
            {"the order reversed": ordered(WEAK, MIDDLE, STRONG)},
            margin_from=f"a sign test over {SAMPLES} samples: no margin; the direction is the paper's",
        ),
    ),
    figures=lambda context: (_curves(shared(context)), _images(shared(context))),
)  # fmt: skip


def _curves(context: Context) -> Figure:
    def lines(what: str) -> tuple[Series, ...]:
        made = []
        for name in CASES:
            found = trained(context, name)
            values = getattr(found, what)
            values = values - values[0]  # sample by sample, on the same noise
            mean, error = values.mean(1), 2 * values.std(1, ddof=1) / np.sqrt(SAMPLES)
            x, y, low, high = (tuple(map(float, v)) for v in (found.updates, mean, mean - error, mean + error))
            made.append(Series(name, x, y, low, high))
        return tuple(made)

    strong, dark = trained(context, MIDDLE), trained(context, DARK)
    return Figure(
        name="implicit-digits",
        title="Reward training of digits with a queue of four batches",
        caption=f"Mean of {SAMPLES} samples from the same noise at every look, with two standard errors. At λ/β = 100 brightness goes from {strong.brightness[0].mean():.3f} to {strong.brightness[-1].mean():.3f} at {strong.kl[-1].mean():.1f} nats, "
        f"at -100 to {dark.brightness[-1].mean():.3f} at {dark.kl[-1].mean():.1f} nats.",
        alt="Two panels: brightness rises with the ratio of reward to divergence and falls where it is negative; the path divergence grows with its size and stays near zero at ratio ten.",
        kind="panels",
        x_label="updates",
        y_label="mean difference",
        panels=(Panel("brightness, above before", lines("brightness")), Panel("path KL, nats", lines("kl"))),
        panel_columns=2,
        shared_axes="none",
    )


def _images(context: Context) -> Figure:
    def line(name: str, look: int) -> tuple[str, tuple[tuple[tuple[float, ...], ...], ...]]:
        found = trained(context, name)
        images = found.images[look].astype(float).round(3).tolist()
        label = f"{name}, {found.updates[look]}" if look else "before"
        return label, tuple(tuple(map(tuple, image)) for image in images)

    return Figure(
        name="implicit-digits-images",
        title="The same noise, before and after the training",
        caption="Ten samples re-drawn from the same noise, with the ratio and the updates made: darker above the line “before”, brighter below it. Strokes become thinner or thicker; the background stays dark.",
        alt="Five lines of ten grey digits of 8 by 8 pixels: the same digits with thinner strokes above, unchanged in the second line, thicker and brighter below.",
        kind="images",
        images=(line(DARK, LOOKS), line(MIDDLE, 0), line(MIDDLE, LOOKS), line(STRONG, LOOKS // 2), line(STRONG, LOOKS)),
    )


CLAIMS: tuple[Claim, ...] = (DIGITS,)
