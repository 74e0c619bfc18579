"""Learning the noise schedule of handwritten digits while the network is trained (Generative bilevel, Algorithm 6).

    lower level: v-prediction on batches of the training images        upper level: Frechet distance of S DDIM steps

Both are the objectives of `algorithms.schedule_learning`, and `learn` is a run of `algorithms.bilevel`. `train` is the
baseline: the same updates of y alone, on the same batches, under a schedule that stays. A search over schedules pays
one `train` for each of its candidates; so does Table 3 of the paper.

The schedules are of the family's form "released". In Chen's form alpha_bar_T = 0, where its square root has no
derivative: the lower level's gradient in the schedule is NaN on batches that hold the time T.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from algorithms.bilevel import Descent, Draw, Level, PenaltyBilevel, Record, Smooth, Split, ZerothOrder
from algorithms.chain import Params
from algorithms.schedule_learning import Quality, ScoreMatching
from algorithms.schedules import Family
from verdicts.streams import Stream

Features = Callable[[Tensor], Tensor]
"""Maps images (n, 1, size, size) in [0, 1] to features (n, d), differentiably."""

DEFAULT = {"end": 1.0, "tau": 1.0, "epsilon": 0.008}
"""Nichol and Dhariwal's cosine schedule, where a run starts; start = 0 stays."""

SCALES = {"end": 0.03, "tau": 0.2, "epsilon": 0.01}
"""Standard deviations of the perturbations of the schedule's parameters, and the units of its steps."""

WEIGHT_SCALE = 1e-3
"""Standard deviation of the perturbations of the network's weights, where the pull is estimated by zeroth order."""

NO_PULL = 1e12
"""The penalty in the initial epoch: z is y there, to rounding, as the gradient of f at a raw network says nothing."""

WARM = 0.1
"""Share of the updates over which the schedule's rate rises: Adam's first steps are long, whatever the gradient."""

WAVES = 16  # of the embedding of the time


class PixelMLP(nn.Module):
    """A small network on pixels: images (n, 1, size, size) and times (n,) in (0, 1] to images of the same shape."""

    def __init__(self, size: int = 8, width: int = 128) -> None:
        super().__init__()
        pixels = size * size
        self.first = nn.Linear(pixels + 2 * WAVES, width)
        self.hidden = nn.Linear(width, width)
        self.last = nn.Linear(width, pixels)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(torch.linspace(0, math.log(100), WAVES))
        h = nn.functional.silu(self.first(torch.cat([images.flatten(1), angles.sin(), angles.cos()], 1)))
        h = h + nn.functional.silu(self.hidden(h))
        return self.last(h).reshape(images.shape)


class FrechetTo:
    """The squared Frechet distance of features to a fixed set of them, as a torch number with a gradient.

    The numbers are those of `scale.metrics.frechet_distance`.

    Args:
        reference: features (m, d).

    Raises:
        ValueError: here and in a call, if there are fewer than d + 1 samples: their covariance is singular.
    """

    def __init__(self, reference: Tensor) -> None:
        self.mean, covariance = _moments("reference", reference.detach())
        values, vectors = torch.linalg.eigh(covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        self.trace = covariance.trace()

    def __call__(self, features: Tensor) -> Tensor:
        """Return the distance, a float64 scalar, of features (n, d)."""
        mean, covariance = _moments("features", features)
        # The eigenvalues' own gradients are finite; those of their roots are not at 0.
        values = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=1e-12)
        return (mean - self.mean).square().sum() + covariance.trace() + self.trace - 2 * values.sqrt().sum()


def _moments(name: str, features: Tensor) -> tuple[Tensor, Tensor]:
    n, d = features.shape
    if n <= d:
        raise ValueError(f"{name} has {n} samples, must have at least d + 1 = {d + 1}, else the covariance is singular")
    x = features.double()
    return x.mean(0), x.T.cov()


@dataclass(frozen=True)
class Setting:
    """A run of Algorithm 6, and the training in it.

    Attributes:
        T, S: training times; steps of the sampler.
        updates: of the schedule, after the initial epoch.
        first: steps of the network in the first update, the initial epoch, which leaves the schedule where it is.
        inner: steps of the network, y and z each, in every other update.
        batch: images in such a step.
        wide: images in the batch of the lower level's gradient in the schedule.
        samples: n, of the sampler's calls; more than there are features.
        gamma: the penalty.
        rate: step of the schedule's Adam in units of `SCALES`; falls to 0 along a cosine.
        learning_rate: of the network's Adam.
        average: decay in an update of the moving average of y, which the final samples are drawn with.
        pull: how the upper level's gradient in the network is made: by autograd through the sampler, or from pairs of
            calls, whose second moment is (weights + 2) |grad|^2. In the schedule it is always made from pairs.

    Raises:
        ValueError: if an attribute is out of range.
    """

    T: int = 1000
    S: int = 10
    updates: int = 150
    first: int = 400
    inner: int = 5
    batch: int = 64
    wide: int = 256
    samples: int = 64
    gamma: float = 3e4
    rate: float = 0.5
    learning_rate: float = 2e-3
    average: float = 0.8
    pull: Literal["pathwise", "zeroth-order"] = "pathwise"

    def __post_init__(self) -> None:
        for name in ("updates", "first", "inner", "batch", "wide", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 2 <= self.S <= self.T:
            raise ValueError(f"S must lie in [2, T = {self.T}], got {self.S}")
        for name in ("gamma", "rate", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must lie in [0, 1), got {self.average}")
        if self.pull not in ("pathwise", "zeroth-order"):
            raise ValueError(f"pull must be 'pathwise' or 'zeroth-order', got {self.pull!r}")

    @property
    def family(self) -> Family:
        return Family("cosine", self.T, "released", {"start": 0.0})

    @property
    def steps(self) -> int:
        """Of the network's optimizer, in all."""
        return self.first + self.updates * self.inner


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with its schedule.

    Attributes:
        x: the schedule's parameters.
        u: the moving average of the network's weights.
        path: name -> the parameter before the first update and after each, (updates + 2,).
        images: how many images went through the network, forwards, until here.
        seconds: of the processor.
    """

    x: Params
    u: Params
    path: dict[str, tuple[float, ...]]
    images: int
    seconds: float


@dataclass(eq=False)
class LearnedSchedule:
    """The problem: training images, features to judge samples by, and a network.

    Attributes:
        images: (m, 1, size, size) in [0, 1]; more than there are features.
        module: called as module(images in [-1, 1], times (n,) in (0, 1]); its own weights are where training starts.
        stream: of the batches, noise and directions. Equal streams give `train` and `learn` the same batches.
        passed: images that went through the network so far.

    Raises:
        ValueError: if there are too few training images, or `samples` of the setting, for the features.
    """

    images: Tensor
    features: Features
    module: nn.Module
    setting: Setting
    stream: Stream
    passed: int = 0
    lower: ScoreMatching = field(init=False)
    upper: Quality = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            reference = self.features(self.images)
        self._distance, s = FrechetTo(reference), self.setting
        if s.samples <= reference.shape[1]:
            raise ValueError(
                f"samples is {s.samples}, must be at least d + 1 = {reference.shape[1] + 1} for a distance"
            )
        self._data = 2 * self.images.float() - 1
        self.lower = ScoreMatching(s.family, self.network, self._batch)
        self.upper = Quality(s.family, self.network, lambda images, _: self._score(images), self._noise, s.S)

    def network(self, u: Params, x: Tensor, times: Tensor) -> Tensor:
        self.passed += len(x)
        return functional_call(self.module, u, (x.float(), times / self.setting.T))

    def source(self, *names: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(self.stream.child(*names).integer())

    def initial(self) -> Params:
        """The module's weights."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def sample(self, trained: Trained, noise: Tensor) -> Tensor:
        """Return the images (n, 1, size, size) in [0, 1] that S steps of DDIM make of noise of that shape."""
        with torch.no_grad():
            return _to_unit(self.upper.sample(trained.x, trained.u, noise))

    def distance(self, trained: Trained) -> float:
        """The distance to the training images of one more call of the sampler: what a search minimises."""
        with torch.no_grad():
            return float(self.upper(trained.x, trained.u, (0,)))

    def _batch(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        source, n = self.source("batch", *draw), self.setting.batch if len(draw) == 2 else self.setting.wide
        data = self._data[torch.randint(len(self._data), (n,), generator=source)]
        noise = torch.randn(data.shape, generator=source)
        return data, noise, torch.randint(1, self.setting.T + 1, (n,), generator=source)

    def _noise(self, draw: Draw) -> Tensor:
        return torch.randn(self.setting.samples, *self._data.shape[1:], generator=self.source("noise", *draw))

    def _score(self, samples: Tensor) -> Tensor:
        # The weights' precision, which differences of it are multiplied by.
        return self._distance(self.features(_to_unit(samples))).float()


def _to_unit(images: Tensor) -> Tensor:
    return ((images.float() + 1) / 2).clamp(0, 1)


def learn(
    problem: LearnedSchedule, start: dict[str, float] | None = None, callback: Callable[[int], None] | None = None
) -> Trained:
    """Run Algorithm 6, from the cosine schedule or from `start` on.

    Raises:
        ValueError: if the schedule or the network's samples cease to be finite.
    """
    begun, passed, s = time.process_time(), problem.passed, problem.setting
    f = _upper(problem)
    x = _schedule(start)
    made: list[torch.optim.Optimizer] = []
    path = {name: [float(v)] for name, v in x.items()}

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 0.0} for p in tensors]
        made.append(torch.optim.Adam(groups, betas=(0.9, 0.99)))
        return made[0]

    def on_update(update: int, record: Record) -> None:
        share = update / s.updates
        warmth = min(1.0, share / WARM) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for group, name in zip(made[0].param_groups, x, strict=True):
            group["lr"] = s.rate * SCALES[name] * warmth
        for name, v in record.x.items():
            path[name].append(float(v))
        if callback is not None:
            callback(update)

    solver = _descent(f, problem)
    run = PenaltyBilevel(
        f,
        solver.lower,
        solver,
        x,
        problem.initial(),
        gamma=lambda update: s.gamma if update > 1 else NO_PULL,
        optimizer=optimizer,
        project=s.family.valid,
        average=s.average,
        callback=on_update,
    )
    run.run(s.updates + 1)
    seconds = time.process_time() - begun
    return Trained(run.x, run.averaged, {n: tuple(v) for n, v in path.items()}, problem.passed - passed, seconds)


def train(problem: LearnedSchedule, schedule: dict[str, float] | None = None) -> Trained:
    """Train the network alone, as `learn` trains y, under a schedule that stays; by default the cosine schedule.

    Raises:
        ValueError: if the schedule is out of range.
    """
    begun, passed, s = time.process_time(), problem.passed, problem.setting
    x, u = _schedule(schedule), problem.initial()
    averaged = problem.initial()
    solver = _descent(_upper(problem), problem)
    for update in range(1, s.updates + 2):
        u = solver.solve(x, u, None, update)
        for name, p in averaged.items():
            p.lerp_(u[name], 1 - s.average)
    path = {name: (float(v),) * (s.updates + 2) for name, v in x.items()}
    return Trained(x, averaged, path, problem.passed - passed, time.process_time() - begun)


def _schedule(values: dict[str, float] | None) -> Params:
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in (DEFAULT | (values or {})).items()}


def _upper(problem: LearnedSchedule) -> Level:
    valid = problem.setting.family.valid
    pairs = ZerothOrder(
        problem.upper,
        SCALES | {name: WEIGHT_SCALE for name, _ in problem.module.named_parameters()},
        lambda draw: problem.source("directions", *draw),
        lambda p, of: valid(p) if of == "x" else p,
    )
    return Split(pairs, Smooth(problem.upper)) if problem.setting.pull == "pathwise" else pairs


def _descent(upper: Level, problem: LearnedSchedule) -> Descent:
    s = problem.setting
    steps: Callable[[int], int] = lambda update: s.first if update == 1 else s.inner  # noqa: E731
    return Descent(
        upper,
        Smooth(problem.lower),
        lambda tensors: torch.optim.Adam(tensors, lr=s.learning_rate),
        (steps, steps),
    )
