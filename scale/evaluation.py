"""Is the fine-tuned model better than the one it came from, and what did that cost? Both on the same noise and prompts.

evaluate(task, tuned, folder) writes evaluation.json and evaluation.png; print(summary(...)) shows the numbers. Noise is
addressed sample by sample, so sample i is the same whatever the batch and the number of samples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.chain import Noise, Params, StepConditions, at_step, for_reward, rollout
from algorithms.objective import KLToReference
from scale.checkpoints import write_atomically
from scale.config import digest, learns_from_data
from scale.grids import before_after, save_grid
from scale.lora import load
from scale.metrics import (
    Array,
    Estimate,
    Extractor,
    Interval,
    diversity,
    extract,
    frechet_distance,
    frechet_floor,
    mean_interval,
    named,
    one_more,
    per_prompt,
)
from scale.task import Task
from verdicts.streams import Stream

JSON, PNG = "evaluation.json", "evaluation.png"
POOLED = 4
"""Side of the image that `pooled` reduces to."""
FLOORS = 20
"""Draws from what was learned from, for the floor of a distance to what was held out."""
ROWS = 12
"""Prompts that the summary shows; the file has them all."""


@dataclass(frozen=True)
class PromptRow:
    """The samples of one prompt: mean rewards, and the mean of the paired difference with its standard error."""

    prompt: str
    samples: int
    base: float
    tuned: float
    difference: float
    error: float | None


@dataclass(frozen=True)
class Frechet:
    """Squared Frechet distances of `samples` samples to `against` rows of the reference.

    Attributes:
        features: what distances are measured in.
        reference: what the samples are held against; without data of its own, the base model's other samples.
        dimension: of the features.
        base, tuned: the distances; None where there are too few samples, and the base's where it is the reference.
        floor: what as many draws of the reference itself score: a distance within it is no worse than a perfect
            sampler's. Where the reference is held out of what was learned from, draws of what was learned from.
    """

    features: str
    reference: str
    dimension: int
    samples: int
    against: int
    base: float | None
    tuned: float | None
    floor: Interval | None


@dataclass(frozen=True)
class Evaluation:
    """A model before ("base") and after ("tuned") fine-tuning, on the same noise and prompts; intervals are of 95 %.

    Student's intervals take the samples as independent. Prompts are spread evenly, not drawn, so they are, if anything,
    too wide for these prompts, and say nothing about others.

    Attributes:
        config: digest of the settings that decide the parameters.
        update: updates made, where known.
        model: one line on it.
        held_out: whether the prompts were held out of the training.
        samples: of each model.
        reward: the reward's name.
        base, tuned: mean rewards.
        difference: mean of the paired differences, tuned - base.
        prompts: by prompt, in the order of the settings.
        base_diversity, tuned_diversity: mean distance between two samples in the features, and its standard error; None
            for fewer than 3 samples.
        kl: path KL divergence of the tuned model from the base, in nats: the sum over the steps of
            |mean - mean_base|^2 / (2 std^2) along the tuned model's roll-outs; at least the KL of the samples. None if
            no step has a density.
        kl_steps: steps in that sum.
        left_out: steps without noise, hence without a density, which are not.
        notes: what a reader must know, one line each.
    """

    config: str
    update: int | None
    model: str
    held_out: bool
    samples: int
    reward: str
    base: Interval
    tuned: Interval
    difference: Interval
    prompts: tuple[PromptRow, ...]
    base_diversity: Estimate | None
    tuned_diversity: Estimate | None
    kl: Interval | None
    kl_steps: int
    left_out: int
    frechet: Frechet
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Samples:
    """What is kept of n samples, on the CPU: rewards (n,), KL (n,), features (n, d), and the first few images."""

    reward: Tensor
    kl: Tensor
    features: Array
    images: Tensor

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        return cls(
            torch.cat([p.reward for p in parts]),
            torch.cat([p.kl for p in parts]),
            np.concatenate([p.features for p in parts]),
            torch.cat([p.images for p in parts]),
        )


def evaluate(
    task: Task,
    tuned: Params,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    update: int | None = None,
    cache: Path | None = None,
) -> Evaluation:
    """Compare tuned parameters with the task's own, and write evaluation.json and evaluation.png to the folder.

    Each sample of the one model has its twin of the other, of equal noise and prompt. Images of the settings'
    `training.grid` first samples are shown. The network is left with the task's own parameters.

    Args:
        on_progress: called as on_progress(done, samples) after each batch.
        update: updates made, for the file.
        cache: folder of the digit classifier; by default below `folder`.

    Raises:
        ValueError: if tuned has other names or shapes than the task's parameters or gives what is not finite, or if
            `evaluation.features` or `evaluation.reference` cannot be used; the last two before anything is sampled.
    """
    settings = task.config.evaluation
    tuned = _like(task.params, tuned, task.device)
    # Writing adapters leaves the tuned ones in the network, and a frozen last step is made with what is in there.
    load(task.chain.network, task.params)
    shape, prompts = image_shape(task), _prompts(task, settings.samples)
    extractor, features = extractor_of(settings.features, shape, cache or folder / "cache")
    reference, name = reference_images(task, shape, prompts)
    rows = None if reference is None else extract(extractor, reference)
    own = _learned_from(task, prompts)

    parts: list[tuple[Samples, Samples]] = []
    for first in range(0, settings.samples, settings.batch):
        numbers = range(first, min(first + settings.batch, settings.samples))
        condition, noise = task.of_prompts(prompts[first : numbers.stop]), _noise(task, numbers)
        shown = max(task.config.training.grid - first, 0)
        parts.append(
            (
                _sample(task, task.params, noise, condition, extractor, shown, first),
                _sample(task, tuned, noise, condition, extractor, shown, first),
            )
        )
        if on_progress is not None:
            on_progress(numbers.stop, settings.samples)
    before, after = (Samples.join(side) for side in zip(*parts, strict=True))

    sides = (before.features, after.features)
    if own is None or rows is None:
        frechet, too_few = _frechet(*sides, rows, features, name, task.stream)
    else:
        frechet, too_few = _frechet_beside(*sides, rows, extract(extractor, own), features, name, task.stream)
    found = _compare(task, prompts, before, after, frechet, too_few, update)
    shown = len(before.images)
    rewards = before.reward[:shown].tolist(), after.reward[:shown].tolist()
    sheet = before_after(before.images, after.images, titles=("base model", "fine-tuned"), rewards=rewards)
    save_grid(folder / PNG, sheet)
    write_atomically(folder / JSON, (json.dumps(_plain(found), indent=2, allow_nan=False) + "\n").encode())
    return found


def read_evaluation(file: Path) -> Evaluation:
    """Read an evaluation.json, or the one of a folder.

    Raises:
        ValueError: if there is none, or it is not one.
    """
    from pydantic import TypeAdapter, ValidationError

    file = file / JSON if file.is_dir() else file
    try:
        return TypeAdapter(Evaluation).validate_json(file.read_bytes())
    except OSError as fault:
        raise ValueError(f"{file}: cannot be read ({fault.strerror})") from None
    except ValidationError as fault:
        first = fault.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file}: is no evaluation: {key} {first['msg']}") from None


def pooled(images: Tensor) -> Tensor:
    """Map images (n, C, H, W) to features (n, 16 C): their means over a grid of 4 x 4 parts.

    They see layout and colour and nothing finer; they need no weights, so they are the same everywhere.
    """
    return torch.nn.functional.adaptive_avg_pool2d(images, POOLED).flatten(1)


def digits_like(asked: Sequence[int], part: Literal["train", "test"] | None = None) -> Tensor:
    """Return real digits (n, 1, 8, 8) in which the digits have the shares that they have in `asked`.

    They are as many as there are of one part of `digit_split`, or of scikit-learn's whole set, four fifths of which
    the digits' model was trained on.
    """
    from scale.digits import digit_images, digit_split

    images, labels = digit_images() if part is None else digit_split(part)
    places = {digit: (labels == digit).nonzero().flatten() for digit in sorted(set(asked))}
    counts = Counter(asked)
    # In whole numbers, so that the scarcest digit is used up to its last image.
    scarce = min(counts, key=lambda digit: len(places[digit]) / counts[digit])
    kept = [p[: counts[digit] * len(places[scarce]) // counts[scarce]] for digit, p in places.items()]
    return images[torch.cat(kept)]


def _like(base: Params, tuned: Params, device: torch.device) -> Params:
    """Return tuned parameters on the device, refused where the network would silently use its own instead."""
    for name in {**base, **tuned}:
        if name not in tuned or name not in base:
            raise ValueError(f"tuned must have the parameters of the task, {name} is in one of them only")
        if tuned[name].shape != base[name].shape:
            raise ValueError(
                f"tuned[{name!r}] has shape {tuple(tuned[name].shape)}, must have {tuple(base[name].shape)}"
            )
    return {name: tuned[name].detach().to(device) for name in base}


def _prompts(task: Task, samples: int) -> Tensor:
    """Return the samples' prompts (n,)."""
    chosen = for_reward(task.condition(samples, held_out=True))
    assert chosen is not None  # of a task's own condition
    return chosen


def _noise(task: Task, numbers: Sequence[int]) -> Noise:
    """Return the noise of samples with these numbers: each from a stream of its own, whatever the batch."""
    shape = (task.chain.steps + 1, *task.chain.shape)
    drawn = [torch.randn(shape, generator=task.generator("evaluation", "noise", i)) for i in numbers]
    noise = torch.stack(drawn, 1).to(task.device)
    return Noise(noise[0], noise[1:], torch.zeros(len(drawn), dtype=torch.long))


@torch.no_grad()
def image_shape(task: Task) -> tuple[int, int, int]:
    """Return channels, height and width."""
    x0 = torch.zeros(1, *task.chain.shape, device=task.device)
    channels, height, width = task.decode(x0, torch.zeros(1, dtype=torch.long)).shape[1:]
    return channels, height, width


def extractor_of(name: str, shape: tuple[int, int, int], cache: Path) -> tuple[Extractor, str]:
    """Return the extractor of features, and what to call it."""
    if name != "auto":
        try:
            return named(name), name
        except ValueError as fault:
            raise ValueError(f"evaluation.features: {fault}") from None
    if shape != (1, 8, 8):
        return pooled, f"means over {POOLED} x {POOLED} parts"
    from scale.digit_classifier import digit_classifier, digit_features

    classifier = digit_classifier(cache)
    return lambda images: digit_features(classifier, images), "digit classifier"


def reference_images(task: Task, shape: tuple[int, int, int], prompts: Tensor) -> tuple[Tensor | None, str]:
    """Return real images to compare with, and what to call them."""
    learned = task.config.data.folder
    folder = task.config.evaluation.reference or learned
    key = "evaluation.reference" if task.config.evaluation.reference else "data.folder"
    channels, height, width = shape
    if folder is not None:
        from scale.digits import image_folder

        if height != width:
            raise ValueError(f"{key} must be null for images that are not square, {height} x {width}")
        try:
            return image_folder(Path(folder), height, channels)[0], folder
        except ValueError as fault:
            raise ValueError(f"{key}: {fault}") from None
    if task.config.model.kind != "digits":
        return None, "base model"
    if learns_from_data(task.config):
        return digits_like(_asked(task, prompts), "test"), "held-out digits"
    return digits_like(_asked(task, prompts)), "real digits"


def _asked(task: Task, prompts: Tensor) -> list[int]:
    """Return the digits that these prompts (n,) ask for; each once, where the network is told none."""
    if not task.config.prompts.conditional:
        return list(range(10))
    return [int(task.prompts.texts[i]) for i in prompts.tolist()]


def _learned_from(task: Task, prompts: Tensor) -> Tensor | None:
    """Return what a model learned from that is evaluated on other images of the same source, for the floor."""
    config = task.config
    own = config.model.kind == "digits" and config.data.folder is None and config.evaluation.reference is None
    return digits_like(_asked(task, prompts), "train") if own and learns_from_data(config) else None


@torch.no_grad()
def _sample(
    task: Task,
    params: Params,
    noise: Noise,
    condition: StepConditions,
    extractor: Extractor,
    shown: int,
    first: int,
) -> Samples:
    """Sample with these parameters, along with the path KL to the task's own; number `first` is the first sample's."""
    to_base = KLToReference(1.0, task.params)

    def cost(mean: Tensor, x: Tensor, t: int) -> Tensor | None:
        if params is task.params or not task.chain.std(t) > 0:
            return None
        return to_base(task.chain, mean, x, t, at_step(condition, t))

    made = rollout(task.chain, params, noise, condition, cost=cost)
    x0, kl, prompts = made.latents[0], made.costs.double().sum(0), for_reward(condition)
    bad = ~(x0.flatten(1).isfinite().all(1) & kl.isfinite())
    if bool(bad.any()):
        which = "base" if params is task.params else "tuned"
        number = first + int(bad.nonzero()[0, 0])
        raise ValueError(f"{which} parameters must give finite samples and a finite KL, sample {number} is not")
    images = task.decode(x0, prompts).float().cpu()
    reward = task.objective.reward(x0, prompts).double().cpu()
    return Samples(reward, kl.cpu(), extract(extractor, images, len(images)), images[:shown])


def _frechet(
    base: Array, tuned: Array, reference: Array | None, features: str, name: str, root: Stream
) -> tuple[Frechet, list[str]]:
    """Return the distances to the reference, and a note where there are too few samples for them.

    At most half of the reference's number of samples are used, since the floor needs as many rows beside the others.
    """
    rows = base if reference is None else reference
    n, dimension = min(len(tuned), len(rows) // 2), tuned.shape[1]
    against = len(rows) - n
    if n <= dimension:
        least = dimension + 1
        need = f"{2 * least} samples" if reference is None else f"{least} samples and {2 * least} reference images"
        note = (
            f"no Frechet distance: {features} has {dimension} features, which needs {need}, got {len(tuned)}"
            f"{'' if reference is None else f' and {len(rows)}'}"
        )
        return Frechet(features, name, dimension, n, against, None, None, None), [note]
    stream = root.child("evaluation", "frechet")

    def order(size: int) -> NDArray[np.int64]:
        return stream.generator().permutation(size)

    # Without a reference of its own, both orders are one: the base's rows then have other noise than the tuned ones, as
    # the two sides of the floor have.
    chosen, others = order(len(tuned))[:n], rows[order(len(rows))[n:]]
    of_base = None if reference is None else frechet_distance(base[chosen], others)
    of_tuned = frechet_distance(tuned[chosen], others)
    floor = frechet_floor(rows, n, stream, against=against)
    return Frechet(features, name, dimension, n, against, of_base, of_tuned, floor), []


def _frechet_beside(
    base: Array, tuned: Array, reference: Array, own: Array, features: str, name: str, root: Stream
) -> tuple[Frechet, list[str]]:
    """Return the distances to the whole of a reference that neither model has seen.

    A perfect sampler has the law that the model learned from, so the floor is that of as many draws from `own`, with
    replacement. Its repeats share the reference, as base and tuned do.
    """
    n, dimension, against = len(tuned), tuned.shape[1], len(reference)
    if min(n, against) <= dimension:
        need = f"more than {dimension} samples and reference images"
        note = f"no Frechet distance: {features} has {dimension} features, which needs {need}, got {n} and {against}"
        return Frechet(features, name, dimension, n, against, None, None, None), [note]
    scores = []
    for i in range(FLOORS):
        order = root.child("evaluation", "frechet", i).generator().integers(len(own), size=n)
        scores.append(frechet_distance(own[order], reference))
    of_base, of_tuned = frechet_distance(base, reference), frechet_distance(tuned, reference)
    return Frechet(features, name, dimension, n, against, of_base, of_tuned, one_more(scores)), []


def _compare(
    task: Task,
    prompts: Tensor,
    base: Samples,
    tuned: Samples,
    frechet: Frechet,
    too_few: Sequence[str],
    update: int | None,
) -> Evaluation:
    config, samples = task.config, len(prompts)
    held_out = len(task.prompts) > task.training
    difference = tuned.reward - base.reward
    tables = (per_prompt(values, prompts.numpy()) for values in (base.reward, tuned.reward, difference))
    kl_steps = sum(task.chain.std(t) > 0 for t in range(1, task.chain.steps + 1))
    left_out = task.chain.steps - kl_steps
    spread = [diversity(side.features) if samples >= 3 else None for side in (base, tuned)]
    return Evaluation(
        config=digest(config),
        update=update,
        model=task.describe(),
        held_out=held_out,
        samples=samples,
        reward=config.reward.name,
        base=mean_interval(base.reward),
        tuned=mean_interval(tuned.reward),
        difference=mean_interval(difference),
        prompts=tuple(
            PromptRow(task.prompts.texts[b.prompt], b.samples, b.mean, t.mean, d.mean, d.error)
            for b, t, d in zip(*tables, strict=True)
        ),
        base_diversity=spread[0],
        tuned_diversity=spread[1],
        kl=mean_interval(tuned.kl) if kl_steps else None,
        kl_steps=kl_steps,
        left_out=left_out,
        frechet=frechet,
        notes=tuple([*_notes(task, samples, held_out, kl_steps, left_out), *too_few]),
    )


def _notes(task: Task, samples: int, held_out: bool, kl_steps: int, left_out: int) -> list[str]:
    notes = []
    if not held_out:
        notes.append("no prompts are held out: these are those of the training, with fresh noise")
    count = len(task.prompts) - task.training if held_out else task.training
    if samples < count:
        notes.append(f"{samples} samples show only the first {samples} of {count} prompts")
    elif samples % count:
        notes.append(f"{samples} samples are no multiple of {count} prompts: the first ones weigh more")
    if left_out and kl_steps:
        notes.append(f"the KL leaves out {left_out} of {kl_steps + left_out} steps, which have no noise: no density")
    elif left_out:
        notes.append("no KL: no step has noise, hence none a density")
    if samples < 3:
        notes.append(f"no diversity: it needs 3 samples, got {samples}")
    if task.config.data.folder is not None and task.config.evaluation.reference is None:
        notes.append("the Frechet distances are to the images that were learned from; none were held out")
    return notes


def _plain(value: Any) -> Any:
    """Return dataclasses and named tuples as mappings, for JSON."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in zip(value._fields, value, strict=True)}  # type: ignore[attr-defined]
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def summary(evaluation: Evaluation) -> str:
    """Return the evaluation as short aligned tables for a terminal."""
    e, f = evaluation, evaluation.frechet
    made = "" if e.update is None else f" after update {e.update}"
    kind = "held-out" if e.held_out else "training"
    head = (
        f"Fine-tuned against base{made}: {e.samples} samples of each, the same noise and {len(e.prompts)} {kind} "
        f"prompt{'s' * (len(e.prompts) != 1)}"
    )
    measures = [
        ("", "base", "fine-tuned", "difference"),
        (f"reward {e.reward}", _interval(e.base), _interval(e.tuned), _interval(e.difference, "+")),
        ("KL to base, nats", "0", _interval(e.kl), ""),
        ("diversity", _estimate(e.base_diversity), _estimate(e.tuned_diversity), ""),
        (f"Frechet to {f.reference}", _number(f.base), _number(f.tuned), ""),
        ("  its floor", _interval(f.floor), "", ""),
    ]
    rows = [
        (
            _short(row.prompt),
            str(row.samples),
            _number(row.base),
            _number(row.tuned),
            _estimate((row.difference, row.error), "+"),
        )
        for row in e.prompts[:ROWS]
    ]
    more = [f"... and {len(e.prompts) - ROWS} more in {JSON}"] if len(e.prompts) > ROWS else []
    lines = [head, "", *aligned(measures), "", "[95 % interval], ± standard error", ""]
    lines += [*aligned([("prompt", "samples", "base", "fine-tuned", "difference"), *rows]), *more]
    lines += [""] * bool(e.notes) + [f"Note: {note}." for note in e.notes]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.4g}"


def _interval(value: Interval | None, sign: str = "") -> str:
    if value is None:
        return "none"
    return f"{_number(value.mean, sign)} [{_number(value.low, sign)}, {_number(value.high, sign)}]"


def _estimate(value: tuple[float, float | None] | None, sign: str = "") -> str:
    if value is None or value[1] is None:
        return _number(None if value is None else value[0], sign)
    return f"{_number(value[0], sign)} ± {value[1]:.2g}"


def _short(text: str, width: int = 32) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
