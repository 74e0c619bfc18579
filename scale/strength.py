"""Which entropy strength? Five ways to choose the lambda of guided sampling, and what each costs (Tables 1 and 2).

Generative bilevel, sections 4.1 and 6.1: samples are guided, without training, to a high lower reward r2 (`reward`),
the more the smaller lambda is, and lambda is to make their upper reward r1 (`strength.upper`) high.

    bilevel                  Algorithm 2: descent on the penalty function, from re-weighted pre-trained samples
    grid, random, bayesian   guided samples at each lambda tried, and the one with the best upper reward
    weighted-sum             guidance to r2 + w r1 at the start's lambda, and the best of the weights w

Each prompt gets its own lambda, as in the paper's Figure 4. A try's noise is the same for all tries, so that they
differ by lambda alone; the images in the table are of other noise, the same for all methods.

tune(config, folder, cache) writes strength.json, strength.md and images/METHOD.png. Every try is kept in journal.jsonl
as soon as it is done: a run that was stopped and is resumed makes none of them again.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import search
from algorithms.bilevel import PenaltyBilevel
from algorithms.chain import Around, Params, StepConditions, for_reward, of_samples
from algorithms.guidance import Predicting, guided_sampling
from algorithms.tilting import STRENGTH, Gate, MinusUpper, Regularised, Tilt, uniform
from scale.checkpoints import write_atomically
from scale.config import (
    STRENGTH_METHODS,
    Config,
    Strength,
    differences,
    load_config,
    nearest,
    print_config,
    read_prompts,
)
from scale.evaluation import extractor_of, image_shape, reference_images
from scale.grids import save_grid
from scale.journal import Journal
from scale.metrics import Array, extract, frechet_distance, frechet_floor
from scale.reward import DecodedReward
from scale.rewards import make_scorer
from scale.strength_table import Choice, Cost, Row, Try, Tuned, markdown
from scale.task import Task, build

JSON, MARKDOWN, JOURNAL, CONFIG = "strength.json", "strength.md", "journal.jsonl", "config.yaml"
BASE = "pre-trained"
"""The row of the model without guidance."""
REFERENCE = "reference"
"""Other samples of the model without guidance, for Frechet distances where there are no real images."""
SHOWN = 16
"""Images of a method's grid."""


OnStep = Callable[[str], None]
"""Called with a line on what was done, after each of the steps that were announced."""


def tune(
    config: Config,
    folder: Path,
    cache: Path,
    methods: Sequence[str] = (),
    resume: bool = False,
    progress: bool = False,
    on_start: Callable[[Task, int], None] = lambda task, steps: None,
    on_step: OnStep = lambda line: None,
) -> Tuned:
    """Choose the strength by each method, sample with it, and write the table.

    Args:
        cache: folder of models that are made here, and of downloads.
        methods: instead of those of the settings. With `resume`, what other methods have left is kept, and shown.
        resume: go on with what the folder holds.
        on_start: called with the task and the number of steps to come.

    Raises:
        ValueError: if the folder holds another run, or one and `resume` is not asked for; if a method is unknown, a
            reward has no gradient where one is needed, or the model's own samples have no finite rewards.
    """
    asked = _asked(config, methods)
    count = len(read_prompts(config.prompts.train))
    if config.evaluation.samples < count:
        raise ValueError(f"evaluation.samples must be >= the prompts, {count}, got {config.evaluation.samples}")
    again = _check_folder(config, folder, resume)
    task = build(config, cache, progress)
    bench = _bench(task, cache, Journal(folder / JOURNAL), on_step)
    _check_rewards(bench, asked)
    shape = image_shape(task)
    extractor, features = extractor_of(config.evaluation.features, shape, cache)
    real, source = reference_images(task, shape, torch.arange(config.evaluation.samples) % bench.prompts)
    if not again:
        write_atomically(folder / CONFIG, print_config(config).encode())
    held = [name for name in STRENGTH_METHODS if name in asked or (folder / "samples" / f"{name}.npz").exists()]
    own = [BASE] if real is not None else [BASE, REFERENCE]
    on_start(task, _steps(config, [*own, *held], bench.prompts))

    choices: dict[str, tuple[Choice, ...]] = {}
    made: dict[str, Samples] = {}
    for name in [*own, *held]:
        choices[name] = tuple(_choose(bench, name, prompt) for prompt in range(bench.prompts))
        made[name] = _made(bench, folder, name, choices[name], extractor)
    reference = made.pop(REFERENCE).features if real is None else extract(extractor, real)
    tuned = _compare(bench, choices, made, features, reference, source if real is not None else None)
    write_atomically(folder / JSON, (json.dumps(asdict(tuned), indent=2, allow_nan=False) + "\n").encode())
    write_atomically(folder / MARKDOWN, (markdown(tuned) + "\n").encode())
    return tuned


# --- the parts of a run -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Counted(Around):
    """A chain that counts its network's calls, see `Cost`."""

    chain: Predicting
    each: int
    calls: int = 0
    gradients: int = 0

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        self._count(x)
        return self.chain.mean(params, x, t, condition)

    def predict(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        self._count(x)
        return self.chain.predict(params, x, t, condition)

    def denoised(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        return self.chain.denoised(x, epsilon, t)

    def step(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        return self.chain.step(x, epsilon, t)

    def noise_level(self, t: int) -> float:
        return self.chain.noise_level(t)

    def _count(self, x: Tensor) -> None:
        self.calls += self.each * len(x)
        self.gradients += self.each * len(x) * x.requires_grad


@dataclass(frozen=True, eq=False)
class Bench:
    """What all methods work with."""

    task: Task
    upper: DecodedReward
    chain: Counted
    journal: Journal
    on_step: OnStep

    @property
    def prompts(self) -> int:
        return self.task.training

    def text(self, prompt: int) -> str:
        return self.task.prompts.texts[prompt]

    def condition(self, prompt: int, samples: int) -> StepConditions:
        return self.task.of_prompts(torch.full((samples,), prompt, device=self.task.device))

    def rewards(self, x0: Tensor, condition: StepConditions) -> tuple[list[float], list[float]]:
        """Return upper and lower rewards of samples, a batch at a time."""
        told, size, found = for_reward(condition), self.task.config.evaluation.batch, ([], [])
        with torch.no_grad():
            for first in range(0, len(x0), size):
                part = x0[first : first + size], None if told is None else told[first : first + size]
                for into, reward in zip(found, (self.upper, self.task.objective.reward), strict=True):
                    into.extend(reward(*part).double().tolist())
        return found

    def timed(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `compute` returns, and its cost."""
        before, start = (self.chain.calls, self.chain.gradients), time.perf_counter()
        value = compute()
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        cost = Cost(self.chain.calls - before[0], self.chain.gradients - before[1], time.perf_counter() - start)
        return value | {"cost": asdict(cost)}

    def kept(self, name: str, line: Callable[[Any], str], compute: Callable[[], dict[str, Any]]) -> Any:
        """Return what the journal holds under the name, or compute it, with its cost; either way it is a step done."""
        value = self.journal(name, lambda: self.timed(compute))
        self.on_step(line(value))
        return value


def _bench(task: Task, cache: Path, journal: Journal, on_step: OnStep) -> Bench:
    settings = task.config.strength
    try:
        scorer = make_scorer(settings.upper, settings.upper_options, cache, task.device)
    except ValueError as fault:
        raise ValueError(f"strength.upper: {fault}") from None
    each = 1 if task.chain.guidance == 1 else 2
    return Bench(
        task, DecodedReward(task.decode, scorer, task.prompts.texts), Counted(task.chain, each), journal, on_step
    )


def _asked(config: Config, methods: Sequence[str]) -> tuple[str, ...]:
    for name in methods:
        if name not in STRENGTH_METHODS:
            raise ValueError(f"method {name!r} is unknown{nearest(name, STRENGTH_METHODS)}")
    return tuple(dict.fromkeys(methods)) or config.strength.methods


def _check_folder(config: Config, folder: Path, resume: bool) -> bool:
    file = folder / CONFIG
    if not file.exists():
        if (folder / JOURNAL).exists():
            raise ValueError(f"{folder} holds a {JOURNAL} and no {CONFIG}: name another folder")
        return False
    if not resume:
        raise ValueError(f"{folder} holds a run already: resume it, or name another folder")
    free = (
        "strength.methods",
        "device",
        "logging.",
        "training.",
        "audit.",
        "evaluation.batch",
        "model.checkpointing",
        "prompts.held_out",
    )
    differ = [key for key in differences(load_config(file), config) if not key.startswith(free)]
    # Of the training's settings, the seed is the one that samples depend on.
    differ += ["training.seed"] * (load_config(file).training.seed != config.training.seed)
    if differ:
        raise ValueError(f"{folder} holds a run with other settings: {', '.join(differ)} differ")
    return True


def _check_rewards(bench: Bench, methods: Iterable[str]) -> None:
    config = bench.task.config
    if not bench.task.objective.reward.differentiable:
        raise ValueError(f"reward.name must have a gradient, which guides the samples, got {config.reward.name}")
    if "weighted-sum" in methods and not bench.upper.differentiable:
        upper = config.strength.upper
        raise ValueError(f"strength.upper must have a gradient for weighted-sum, which is guided by it, got {upper}")


def _steps(config: Config, methods: Iterable[str], prompts: int) -> int:
    s = config.strength
    tries = {"grid": len(s.grid), "random": s.trials, "bayesian": s.trials, "weighted-sum": len(s.weights)}
    return prompts + sum(prompts * (tries.get(name, 0) + 1) for name in methods)


# --- choosing ---------------------------------------------------------------------------------------------------------


def _choose(bench: Bench, method: str, prompt: int) -> Choice:
    s = bench.task.config.strength
    if method in (BASE, REFERENCE):
        _pool(bench, prompt, announce=method == BASE)
        return Choice(bench.text(prompt), None, 0.0, (), (), None, Cost())
    if method == "bilevel":
        return _bilevel(bench, prompt)
    tries: list[Try] = []
    inside, start_of_search = 0.0, time.perf_counter()

    def objective(parameters: search.Parameters, number: int) -> float:
        nonlocal inside
        began = time.perf_counter()
        strength, weight = parameters.get("lambda", s.start), parameters.get("weight", 0.0)
        found = _try(bench, prompt, f"{method}/{prompt}/{number}", strength, weight)
        tries.append(found)
        inside += time.perf_counter() - began
        if found.upper is None or found.lower is None:
            raise ValueError(found.error)
        return -(found.upper + s.lower_weight * found.lower)

    box = search.Box(("lambda",), (s.low,), (s.high,), log=("lambda",))
    stream = bench.task.stream.child("strength", method, prompt)
    if method == "grid":
        done = search.grid(objective, {"lambda": s.grid})
    elif method == "random":
        done = search.random(objective, box, s.trials, stream.generator())
    elif method == "bayesian":
        seed, start = stream.integer() % 2**32, {"lambda": s.start}
        done = search.bayesian(objective, box, s.trials, seed, start, s.startup, noisy=False)
    else:
        done = search.grid(objective, {"weight": s.weights})
    # The tries' own seconds may be those of a run before; the search's are what is left of this one's.
    cost = sum((t.cost for t in tries), Cost(seconds=time.perf_counter() - start_of_search - inside))
    best = None if done.failed == len(done.trials) else done.best.parameters
    strength = None if best is None else best.get("lambda", s.start)
    weight = 0.0 if best is None else best.get("weight", 0.0)
    return Choice(bench.text(prompt), strength, weight, tuple(tries), (), None, cost)


def _bilevel(bench: Bench, prompt: int) -> Choice:
    """Algorithm 2: all its samples are pre-trained ones, made once; an update re-weights them."""
    s = bench.task.config.strength
    pool = _pool(bench, prompt)
    upper, lower = (torch.tensor(pool[name], dtype=torch.float64) for name in ("upper", "lower"))
    began = time.perf_counter()
    found = bilevel(upper, lower, s)
    cost = Cost(**pool["cost"]) + Cost(seconds=time.perf_counter() - began)
    if found is None:
        return Choice(bench.text(prompt), None, 0.0, (), (), None, cost)
    path, floor = found
    return Choice(bench.text(prompt), path[-1], 0.0, (), path, floor, cost)


def bilevel(upper: Tensor, lower: Tensor, settings: Strength) -> tuple[tuple[float, ...], float] | None:
    """Return lambda after each update of Algorithm 2 on rewards (n,) of pre-trained samples, and how low it may go.

    The gate turns into a lower limit, as fewer samples carry the weight the smaller lambda is: below it, n samples say
    nothing of the tilt. None where the gate refuses the largest lambda, too.

    Raises:
        ValueError: if a reward is not finite.
    """
    tilt, gate = Tilt(lambda update: (upper, lower)), Gate(settings.gate)
    even = uniform(upper.new_tensor(1.0), len(upper))

    def admitted(strength: float) -> bool:
        x = {STRENGTH: upper.new_tensor(strength)}
        return bool(gate(x, tilt.solve(x, even, None, 0), tilt.solve(x, even, settings.gamma, 0)))

    floor = _smallest(admitted, settings.low, settings.high)
    if floor is None:
        return None
    path: list[float] = []
    run = PenaltyBilevel(
        MinusUpper(),
        Regularised(),
        tilt,
        {STRENGTH: upper.new_tensor(max(settings.start, floor))},
        even,
        gamma=settings.gamma,
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=settings.step_size),
        project=lambda x: {STRENGTH: x[STRENGTH].clamp(floor, settings.high)},
        gate=gate,
        callback=lambda update, record: path.append(float(record.x[STRENGTH])),
    )
    run.run(settings.updates)
    return tuple(path), floor


def _smallest(admitted: Callable[[float], bool], low: float, high: float) -> float | None:
    """Return the smallest admitted value of [low, high] to 1e-9 of its logarithm, where all above one are admitted."""
    if not admitted(high):
        return None
    if admitted(low):
        return low
    while math.log(high / low) > 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if admitted(middle) else (middle, high)
    return high


def _pool(bench: Bench, prompt: int, announce: bool = False) -> Any:
    """Return both rewards of the pre-trained samples of a prompt, and what these cost."""
    samples = bench.task.config.strength.pool

    def compute() -> dict[str, Any]:
        condition = bench.condition(prompt, samples)
        x0 = _unguided(bench, condition, bench.task.generator("strength", "pool", prompt))
        upper, lower = bench.rewards(x0, condition)
        return {"upper": upper, "lower": lower}

    name = f"pool/{prompt}"
    if not announce:
        return bench.journal(name, lambda: bench.timed(compute))
    return bench.kept(name, lambda value: f"{samples} pre-trained samples of {bench.text(prompt)!r}", compute)


def _try(bench: Bench, prompt: int, name: str, strength: float, weight: float) -> Try:
    samples = bench.task.config.strength.samples

    def compute() -> dict[str, Any]:
        condition = bench.condition(prompt, samples)
        found: dict[str, Any] = {"strength": strength, "weight": weight, "upper": None, "lower": None, "error": None}
        try:
            x0 = _guided(bench, prompt, condition, strength, weight, ("strength", "try", prompt))
            upper, lower = bench.rewards(x0, condition)
        except ValueError as fault:  # what diverges has no finite image
            return found | {"error": str(fault)}
        return found | {"upper": sum(upper) / samples, "lower": sum(lower) / samples}

    def line(value: Any) -> str:
        got = value["error"] or f"upper {value['upper']:.4g}, lower {value['lower']:.4g}"
        return f"{name}: lambda {strength:.4g}{f', weight {weight:.4g}' if weight else ''}: {got}"

    # With its numbers in its name, a try that another machine's rounding led elsewhere is not taken for this one.
    value = bench.kept(f"{name}: {strength!r}, {weight!r}", line, compute)
    return Try(**value | {"cost": Cost(**value["cost"])})


def _guided(
    bench: Bench, prompt: int, condition: StepConditions, strength: float, weight: float, address: tuple[str | int, ...]
) -> Tensor:
    """Return samples (n, *shape) guided to r = r2 + weight r1, towards targets that rise from the pre-trained mean.

    With strength c / (lambda s), s the pre-trained reward's standard deviation, a sample that misses its target by m is
    given the tilt's own score grad r / lambda, times c m / s.
    """
    task, s = bench.task, bench.task.config.strength
    lower = task.objective.reward

    def reward(x0: Tensor, told: Tensor | None) -> Tensor:
        return lower(x0, told) + weight * bench.upper(x0, told) if weight else lower(x0, told)

    pool = _pool(bench, prompt)
    before = np.array(pool["lower"]) + weight * np.array(pool["upper"])
    mean, spread = float(before.mean()), float(before.std(ddof=1))
    if not spread > 0:
        raise ValueError(f"reward must differ between samples of {bench.text(prompt)!r}, all {len(before)} are {mean}")
    targets = [mean + (k + 1) * s.rise * spread for k in range(s.rounds)]
    assert condition.reward is not None  # of a task's own condition
    x0, _ = guided_sampling(
        bench.chain,
        task.params,
        reward,
        strength=s.scale / (strength * spread),
        targets=targets,
        samples=len(condition.reward),
        generator=task.generator(*address),
        condition=condition,
        gradient=s.gradient,
        batch=task.config.evaluation.batch,
    )
    return x0


@torch.no_grad()
def _unguided(bench: Bench, condition: StepConditions, generator: torch.Generator) -> Tensor:
    """Return samples (n, *shape) of the model itself; all noise is drawn before, and a batch is made at a time."""
    chain, size = bench.chain, bench.task.config.evaluation.batch
    assert condition.reward is not None  # of a task's own condition
    n = len(condition.reward)
    initial = torch.randn(n, *chain.shape, generator=generator)
    noise = torch.randn(chain.steps, n, *chain.shape, generator=generator)
    ends = []
    for first in range(0, n, size):
        part = slice(first, first + size)
        own = of_samples(condition, part)
        assert isinstance(own, StepConditions)
        x = chain.initial(initial[part].to(bench.task.device))
        for t in range(chain.steps, 0, -1):
            fresh = noise[t - 1, part].to(x)
            x = chain.mean(bench.task.params, x, t, own.steps[t - 1]) + chain.std(t) * fresh
        ends.append(x)
    return torch.cat(ends)


# --- sampling with what was chosen, and the table ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """A method's images of all prompts: features (n, d), rewards (n,), the first images; and why there are none."""

    features: Array
    upper: Array
    lower: Array
    images: Tensor
    cost: Cost
    error: str = ""


def _made(bench: Bench, folder: Path, method: str, choices: Sequence[Choice], extractor: Any) -> Samples:
    """Return the samples of a method, made now if the folder does not hold them."""
    file = folder / "samples" / f"{method}.npz"
    asked = json.dumps([[c.strength, c.weight] for c in choices])
    if file.exists():
        with np.load(file) as held:
            if str(held["asked"]) != asked:
                raise ValueError(f"{file}: holds samples of other strengths: remove it, or name another folder")
            fields = {name: held[name] for name in ("features", "upper", "lower")}
            images = torch.from_numpy(held["images"]).float() / 255
            cost, error = Cost(**json.loads(str(held["cost"]))), str(held["error"])
        samples = Samples(**fields, images=images, cost=cost, error=error)
    else:
        samples = _sampled(bench, method, choices, extractor)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            features=samples.features,
            upper=samples.upper,
            lower=samples.lower,
            images=(255 * samples.images).round().byte().numpy(),
            asked=asked,
            cost=json.dumps(asdict(samples.cost)),
            error=samples.error,
        )
        write_atomically(file, buffer.getvalue())
    if len(samples.images):
        save_grid(folder / "images" / f"{method}.png", samples.images)
    for choice in choices:
        bench.on_step(f"{method}: images of {choice.prompt!r}, {_lambda(choice.strength)}")
    return samples


def _lambda(strength: float | None) -> str:
    return "no lambda" if strength is None else f"lambda {strength:.4g}"


def _sampled(bench: Bench, method: str, choices: Sequence[Choice], extractor: Any) -> Samples:
    settings, prompts = bench.task.config.evaluation, bench.prompts
    rows: list[Array] = []
    upper: list[float] = []
    lower: list[float] = []
    images: list[Tensor] = []

    def compute() -> dict[str, Any]:
        try:
            make()
        except ValueError as fault:
            if method in (BASE, REFERENCE):
                raise
            return {"error": str(fault)}
        return {"error": ""}

    def make() -> None:
        for prompt, choice in enumerate(choices):
            n = settings.samples // prompts + (prompt < settings.samples % prompts)
            condition, address = bench.condition(prompt, n), ("strength", "table", prompt)
            if method == REFERENCE:
                x0 = _unguided(bench, condition, bench.task.generator("strength", REFERENCE, prompt))
            elif method == BASE:
                x0 = _unguided(bench, condition, bench.task.generator(*address))
            elif choice.strength is None:
                why = choice.tries[0].error if choice.tries else "strength.pool is too small for strength.gate"
                raise ValueError(f"no lambda was found for {choice.prompt!r}: {why}")
            else:
                x0 = _guided(bench, prompt, condition, choice.strength, choice.weight, address)
            for into, values in zip((upper, lower), bench.rewards(x0, condition), strict=True):
                into.extend(values)
            told = for_reward(condition)
            for first in range(0, n, settings.batch):
                part = slice(first, first + settings.batch)
                with torch.no_grad():
                    seen = bench.task.decode(x0[part], None if told is None else told[part]).float().cpu()
                rows.append(extract(extractor, seen, len(seen)))
                images.append(seen[: max(math.ceil(SHOWN / prompts) - first, 0)])

    found = bench.timed(compute)
    cost = Cost(**found["cost"])
    if found["error"]:
        return Samples(np.zeros((0, 1)), np.zeros(0), np.zeros(0), torch.zeros(0, 3, 1, 1), cost, found["error"])
    return Samples(np.concatenate(rows), np.array(upper), np.array(lower), torch.cat(images), cost)


def _compare(
    bench: Bench,
    choices: dict[str, tuple[Choice, ...]],
    made: dict[str, Samples],
    features: str,
    reference: Array,
    source: str | None,
) -> Tuned:
    task = bench.task
    notes: list[str] = []
    n, dimension = task.config.evaluation.samples, reference.shape[1]
    floor = None
    if min(n, len(reference)) <= dimension:
        notes.append(
            f"no Frechet distance: {features} has {dimension} features, which needs more than {dimension} samples and "
            f"reference images, got {n} and {len(reference)}"
        )
    elif len(reference) - n > dimension:
        floor = frechet_floor(reference, n, task.stream.child("strength"))
    rows = [_row(method, choices[method], samples, reference) for method, samples in made.items()]
    against = next((row for row in rows if row.method == "bilevel" and not row.note), None)
    if against is not None:
        total = against.choosing + against.sampling
        for i, row in enumerate(rows):
            spent = row.choosing + row.sampling
            if row.method != BASE:
                rows[i] = replace(
                    row, calls_ratio=spent.calls / total.calls, seconds_ratio=spent.seconds / total.seconds
                )
    for choice in choices.get("bilevel", ()):
        if choice.strength is not None and choice.floor == choice.strength > task.config.strength.low:
            notes.append(
                f"bilevel's lambda for {choice.prompt!r} is the smallest that {task.config.strength.pool} pre-trained "
                "samples can tell: the optimum may lie below"
            )
        early = choice.path[-1 - len(choice.path) // 10] if choice.path else 1.0
        if choice.strength is not None and abs(choice.strength / early - 1) > 0.01:
            notes.append(
                f"bilevel's lambda for {choice.prompt!r} still moved ({early:.4g} to {choice.strength:.4g}) in "
                "the last tenth of its updates: raise strength.updates, they cost no calls"
            )
    if source is None:
        notes.append("the Frechet distances are to the pre-trained model's own samples: they measure change, not truth")
    return Tuned(
        model=task.describe(),
        device=str(task.device),
        upper=task.config.strength.upper,
        lower=task.config.reward.name,
        prompts=tuple(bench.text(i) for i in range(bench.prompts)),
        features=features,
        reference=source or f"{BASE} samples of other noise",
        floor=floor,
        rows=tuple(rows),
        choices={method: found for method, found in choices.items() if method not in (BASE, REFERENCE)},
        notes=tuple(notes),
    )


def _row(method: str, choices: Sequence[Choice], samples: Samples, reference: Array) -> Row:
    enough = min(len(samples.features), len(reference)) > reference.shape[1]
    return Row(
        method=method,
        strengths=tuple(c.strength for c in choices),
        weights=tuple(c.weight for c in choices),
        samples=len(samples.features),
        frechet=frechet_distance(samples.features, reference) if enough and not samples.error else None,
        upper=None if samples.error else _mean(samples.upper),
        lower=None if samples.error else _mean(samples.lower),
        choosing=sum((c.cost for c in choices), Cost()),
        sampling=samples.cost,
        note=samples.error,
    )


def _mean(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
