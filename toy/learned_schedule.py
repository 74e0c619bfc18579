"""Learning the noise schedule of clouds in the plane while the network is trained (Generative bilevel, Algorithm 6).

A small network predicts v; the sampler takes a few deterministic DDIM steps. The lower level is score matching on
batches, the upper level the squared sliced 2-Wasserstein distance of samples from the training points. Gradients of f
are made by autograd through the sampler; or that in the schedule from a pair of calls (eq. 14), which is noisier.

The first axis of every tensor is that of independent runs; numbers are float32, for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from algorithms.bilevel import Descent, Draw, PenaltyBilevel, Record, Smooth, ZerothOrder
from algorithms.chain import Params
from algorithms.schedule_learning import Quality, ScoreMatching
from algorithms.schedules import Family
from toy.few_step import training_set
from toy.schedule_learning import SCALES, START, Split
from verdicts.streams import Stream

FREQUENCIES = 6  # cosines of the time that the network is told
PROJECTIONS = 16
BOX = {"end": (0.5, 1.0), "tau": (0.51, 3.0), "epsilon": (0.0, 0.1)}  # of the random search


@dataclass(frozen=True)
class Plan:
    """Sizes of runs.

    Attributes:
        updates: of the schedule.
        initial: network updates before the first; inner: of y and of z in an update.
        batch: states of a network update; readings: of g's gradients in the schedule, whose difference gamma
            multiplies; samples: of a sampler call.
        rate: Adam's for the networks, step the schedule's in units of SCALES; both fall to 0 along a cosine.
        average: decay of the moving average of the weights.
    """

    updates: int = 60
    inner: int = 8
    initial: int = 300
    T: int = 1000
    S: int = 5
    width: int = 32
    points: int = 4096
    batch: int = 64
    readings: int = 512
    samples: int = 128
    gamma: float = 10.0
    rate: float = 1e-2
    step: float = 0.4
    average: float = 0.9

    def size(self, draw: Draw) -> int:
        """Of a batch: that of an update's gradient in x is a draw without a step."""
        return self.batch if len(draw) > 1 else self.readings

    @property
    def network_updates(self) -> int:
        """Of y and z together."""
        return self.initial + 2 * self.inner * self.updates


def network(u: Params, x: Tensor, times: Tensor, T: int) -> Tensor:
    """Predict v at states (runs, n, 2) and times (n,), by two hidden layers that are both told the time."""
    told = torch.cos(math.pi * (times / T)[:, None] * torch.arange(1, FREQUENCIES + 1))
    h = softplus(x @ u["w1"] + told @ u["t1"] + u["b1"])
    h = softplus(h @ u["w2"] + told @ u["t2"] + u["b2"])
    return h @ u["w3"] + u["b3"]


def initial_network(runs: int, width: int, stream: Stream) -> Params:
    """Draw untrained weights of so many runs."""
    generator = torch.Generator().manual_seed(stream.child("initial").integer())
    shapes = {
        "w1": (2, width), "t1": (FREQUENCIES, width), "b1": (1, width), "w2": (width, width),
        "t2": (FREQUENCIES, width), "b2": (1, width), "w3": (width, 2), "b3": (1, 2),
    }  # fmt: skip
    return {
        n: torch.zeros(runs, *s) if n[0] == "b" else torch.randn(runs, *s, generator=generator) / s[0] ** 0.5
        for n, s in shapes.items()
    }


class Clouds:
    """The two levels on a set of points of each run.

    Attributes:
        points: (runs, N, 2), what is trained on.
        initial: untrained networks.
        lower, upper: g and f, objectives for `algorithms.bilevel`.
    """

    def __init__(self, data: str, runs: int, plan: Plan, stream: Stream) -> None:
        self.plan, self.stream = plan, stream
        # In this form alpha_bar stays above 0, so that its root has a derivative at every time.
        self.family = Family("cosine", plan.T, "released")
        self.points = torch.stack([training_set(data, stream.child("run", i), plan.points) for i in range(runs)])
        angles = math.pi * torch.arange(PROJECTIONS) / PROJECTIONS
        self.directions = torch.stack([angles.cos(), angles.sin()])
        self.quantiles = self._quantiles()
        self.initial = initial_network(runs, plan.width, stream)
        self.lower = ScoreMatching(self.family, self.network, self.batch)
        self.upper = Quality(self.family, self.network, self.distance, self.noise, plan.S)

    def network(self, u: Params, x: Tensor, times: Tensor) -> Tensor:
        return network(u, x, times, self.plan.T)

    def generator(self, *names: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(self.stream.child(*names).integer())

    def batch(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Points, noise, each (runs, batch, 2), and times (batch,), one in each of as many equal parts of 1..T."""
        source, (runs, known, d), n = self.generator("batch", *draw), self.points.shape, self.plan.size(draw)
        chosen = torch.randint(known, (runs, n, 1), generator=source).expand(-1, -1, d)
        noise = torch.randn(runs, n, d, generator=source)
        times = 1 + (self.plan.T * (torch.arange(n) + torch.rand(n, generator=source)) / n).long()
        return self.points.gather(1, chosen), noise, times.clamp(max=self.plan.T)  # a sum may round up

    def noise(self, draw: Draw) -> Tensor:
        return torch.randn(len(self.points), self.plan.samples, 2, generator=self.generator("noise", *draw))

    def distance(self, samples: Tensor, draw: Draw) -> Tensor:
        """The squared sliced 2-Wasserstein distance from the points, over fixed directions, (runs,)."""
        return ((samples @ self.directions).sort(1).values - self.quantiles).square().mean((1, 2))

    def _quantiles(self) -> Tensor:
        """The mean over blocks of points of their order statistics, (runs, samples, directions)."""
        whole = self.points.shape[1] // self.plan.samples * self.plan.samples
        blocks = (self.points[:, :whole] @ self.directions).unflatten(1, (-1, self.plan.samples))
        return blocks.sort(2).values.mean(1)


@dataclass(frozen=True)
class Trained:
    """Runs in the end.

    Attributes:
        x: the schedules' parameters, each (runs,); u: the networks, their moving average.
        network_updates: of a run, z's among them; sampler_calls: of a run, both of a pair.
        path: name -> (updates + 1, runs), of a schedule that was learned.
    """

    x: Params
    u: Params
    network_updates: int
    sampler_calls: int = 0
    path: dict[str, Tensor] = field(default_factory=dict)


def schedule(runs: int, **changed: float) -> Params:
    """Nichol and Dhariwal's cosine schedule for all runs, with some parameters changed."""
    return {n: torch.full((runs,), v) for n, v in {**START, **changed}.items()}


def learn(
    problem: Clouds,
    x: Params,
    gradient: Literal["pathwise", "mixed"] = "pathwise",
    callback: Callable[[int, Record], None] | None = None,
) -> Trained:
    """Run Algorithm 6 from these schedules on; the networks are trained alone for the first `initial` updates.

    Args:
        gradient: how f's gradient in the schedule is made, "mixed" from a pair of calls.
    """
    plan, family = problem.plan, problem.family
    two_point = ZerothOrder(
        problem.upper, SCALES, lambda draw: problem.generator("directions", *draw), lambda p, of: family.valid(p)
    )
    pathwise, g = Smooth(problem.upper), Smooth(problem.lower)
    f = pathwise if gradient == "pathwise" else Split(two_point, pathwise)
    networks, schedules = Rates(plan.rate, plan.updates), Rates(plan.step, plan.updates)
    path = {n: [v.clone()] for n, v in x.items()}

    def on_update(update: int, record: Record) -> None:
        networks.fall(update)
        schedules.fall(update)
        for n, v in record.x.items():
            path[n].append(v)
        if callback is not None:
            callback(update, record)

    before = problem.upper.calls
    run = PenaltyBilevel(
        f,
        g,
        Descent(f, g, networks.adam, (plan.inner, plan.inner)),
        x,
        warm(problem, x),
        gamma=plan.gamma,
        optimizer=lambda tensors: schedules.adam(tensors, [SCALES[n] for n in x]),
        project=family.valid,
        average=plan.average,
        callback=on_update,
    )
    run.run(plan.updates)
    calls = problem.upper.calls - before
    return Trained(run.x, run.averaged, plan.network_updates, calls, {n: torch.stack(v) for n, v in path.items()})


def warm(problem: Clouds, x: Params, part: int = 1) -> Params:
    """Train the networks from the start: samples of untrained ones say nothing about a schedule."""
    g = Smooth(problem.lower)
    adam = Rates(problem.plan.rate, problem.plan.updates).adam
    return Descent(g, g, adam, (problem.plan.initial // part, 1)).solve(x, problem.initial, None, 0)


def train(problem: Clouds, x: Params, part: int = 1) -> Trained:
    """Train the networks alone, with one part of so many of the updates that `learn` makes of y and z."""
    plan, g = problem.plan, Smooth(problem.lower)
    rates = Rates(plan.rate, plan.updates)
    y = averaged = warm(problem, x, part)
    solver = Descent(g, g, rates.adam, (2 * plan.inner // part, 1))
    for update in range(1, plan.updates + 1):
        y = solver.solve(x, y, None, update)
        averaged = {n: averaged[n].lerp(y[n], 1 - plan.average) for n in y}
        rates.fall(update)
    return Trained(x, averaged, plan.network_updates // part)


def search(problem: Clouds, candidates: int, part: int) -> Trained:
    """Take the best of random schedules, each with a network trained by one part of the updates that `learn` makes."""
    runs, calls = len(problem.points), problem.upper.calls
    found: list[tuple[Tensor, Trained]] = []
    for number in range(candidates):
        draws = torch.rand(len(BOX), runs, generator=problem.generator("candidate", number))
        x = {n: low + (high - low) * v for (n, (low, high)), v in zip(BOX.items(), draws, strict=True)}
        trained = train(problem, x, part)
        found.append((quality(problem, trained), trained))
    best = torch.stack([value for value, _ in found]).argmin(0)

    def pick(of: list[Tensor]) -> Tensor:
        return torch.stack(of)[best, torch.arange(runs)]

    x = {n: pick([t.x[n] for _, t in found]) for n in BOX}
    u = {n: pick([t.u[n] for _, t in found]) for n in problem.initial}
    updates = sum(t.network_updates for _, t in found)
    return Trained(x, u, updates, problem.upper.calls - calls)


@torch.no_grad()
def quality(problem: Clouds, trained: Trained, calls: int = 16) -> Tensor:
    """The upper level, mean over so many calls, (runs,)."""
    return torch.stack([problem.upper(trained.x, trained.u, (0, i)) for i in range(calls)]).mean(0)


@torch.no_grad()
def samples(problem: Clouds, trained: Trained, n: int) -> Tensor:
    """Draw n points of each run's sampler, (runs, n, 2); the initial noise is the same for all samplers."""
    noise = torch.randn(len(problem.points), n, 2, generator=problem.generator("fresh"))
    return problem.upper.sample(trained.x, trained.u, noise)


@dataclass
class Rates:
    """Adam optimizers whose rates fall to 0 along a cosine."""

    rate: float
    updates: int
    _made: list[tuple[dict[str, Any], float]] = field(default_factory=list)

    def adam(self, tensors: list[Tensor], units: Sequence[float] | None = None) -> torch.optim.Optimizer:
        rates = [self.rate * unit for unit in units or [1.0] * len(tensors)]
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": r} for p, r in zip(tensors, rates, strict=True)], fused=True
        )
        self._made += zip(optimizer.param_groups, rates, strict=True)
        return optimizer

    def fall(self, update: int) -> None:
        """Set the rates that follow this update."""
        for group, rate in self._made:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * update / self.updates))
