"""Learning the noise schedule of Gaussian data, where the best one is known (Generative bilevel, Algorithm 6).

Data N(mean, diag(std^2)) and a predictor that is affine at each of the S times that the sampler visits, and so can be
exact: v = slope_t x_t + offset_t in each coordinate. Other times have no say. The lower level is the mean over these
times of the expected loss, in closed form: a batch without end. The upper level is the squared 2-Wasserstein distance
of Gaussians with the sample's mean and standard deviations, from n samples.

The first axis of every tensor is that of independent runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from algorithms.bilevel import Descent, Draw, Level, PenaltyBilevel, Record, Smooth, Split, Variable, ZerothOrder
from algorithms.chain import Params
from algorithms.schedule_learning import Quality, root
from algorithms.schedules import Family, ddim_times
from verdicts.streams import Stream

MEAN, STD = (1.0, -0.5), (0.5, 2.0)
Gradient = Literal["zeroth-order", "mixed", "pathwise", "released"]
SCALES = {"end": 0.03, "tau": 0.3, "epsilon": 0.01}
"""Units of the schedule's parameters: how far a step of rate 1 goes."""
PERTURBED = {"end": 0.03, "tau": 0.3, "epsilon": 0.01}
"""Standard deviations of their perturbations, where gradients are taken from two values."""
PREDICTOR_SCALE = 0.005
BETAS = (0.9, 0.99)
START = {"end": 1.0, "tau": 1.0, "epsilon": 0.008}  # Nichol and Dhariwal's cosine schedule


@dataclass(frozen=True, eq=False)
class GaussianData:
    """The problem's exact side in torch: the best predictor, and the lower level without sampling."""

    family: Family
    S: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    _last: list[tuple[Params, Tensor]] = field(default_factory=list)

    @cached_property
    def times(self) -> Tensor:
        return ddim_times(self.family.T, self.S)

    @cached_property
    def places(self) -> dict[int, int]:
        return {int(t): i for i, t in enumerate(self.times)}

    def levels(self, x: Params) -> Tensor:
        """alpha_bar at the sampler's times, (runs, S, 1)."""
        if self._last and self._last[0][0] is x:  # every inner step of an update asks for the same
            return self._last[0][1]
        levels = self.family(x)[..., self.times, None]
        if not levels.requires_grad:
            self._last[:] = [(x, levels)]
        return levels

    def best(self, x: Params) -> Params:
        """The predictor that minimises the lower level: slope and offset (runs, S, d)."""
        a, m, s2 = self.levels(x), torch.tensor(self.mean).double(), torch.tensor(self.std).double() ** 2
        of_data, of_noise = root(a), root(1 - a)
        slope = of_data * of_noise * (1 - s2) / (a * s2 + 1 - a)
        return {"slope": slope, "offset": -(of_noise + slope * of_data) * m}

    def loss(self, x: Params, u: Params, draw: Draw) -> Tensor:
        """E |v_t - slope x_t - offset|^2, mean over times and coordinates, (runs,)."""
        a, m, s = self.levels(x), torch.tensor(self.mean).double(), torch.tensor(self.std).double()
        alpha, sigma = root(a), root(1 - a)
        of_noise, of_data = alpha - u["slope"] * sigma, -sigma - u["slope"] * alpha
        error = of_noise**2 + (of_data * s) ** 2 + (of_data * m - u["offset"]) ** 2
        return error.flatten(-2).mean(-1)

    def slope(self, x: Params, u: Params) -> Params:
        """The gradient of the loss in u, by hand: it is asked for twenty times an update."""
        a, m, s2 = self.levels(x), torch.tensor(self.mean).double(), torch.tensor(self.std).double() ** 2
        alpha, sigma = root(a), root(1 - a)
        of_noise, of_data = alpha - u["slope"] * sigma, -sigma - u["slope"] * alpha
        miss = of_data * m - u["offset"]
        share = 2 / (a.shape[1] * len(self.mean))
        return {"slope": -share * (sigma * of_noise + alpha * (s2 * of_data + m * miss)), "offset": -share * miss}

    def value(self, x: Params) -> Tensor:
        """F: the squared 2-Wasserstein distance of the exact output law, with the best predictor, (runs,)."""
        mean, spread = self.law(x)
        m, s = torch.tensor(self.mean).double(), torch.tensor(self.std).double()
        return ((mean - m) ** 2 + (spread - s) ** 2).sum(-1)

    def law(self, x: Params) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the exact output law, with the best predictor, each (runs, d)."""
        a, u = self.levels(x), self.best(x)
        mean, spread = torch.zeros_like(a[:, 0] * u["slope"][:, 0]), torch.ones_like(u["slope"][:, 0])
        for i in range(self.S - 1, -1, -1):
            level = a[:, i]
            below = torch.ones_like(level) if i == 0 else a[:, i - 1]
            # v to x: x' = sqrt(a') x0 + sqrt(1 - a') eps with x0 = sqrt(a) x - sqrt(1 - a) v, eps = sqrt(a) v + ...
            own = root(below) * root(level) + root(1 - below) * root(1 - level)
            pull = root(1 - below) * root(level) - root(below) * root(1 - level)
            mean = own * mean + pull * (u["slope"][:, i] * mean + u["offset"][:, i])
            spread = (own + pull * u["slope"][:, i]) * spread
        return mean, spread.abs()

    def network(self, u: Params, x: Tensor, times: Tensor) -> Tensor:
        """The predictor at one time; states (runs, n, d)."""
        place = self.places[int(times[0])]
        return u["slope"][:, place, None] * x + u["offset"][:, place, None]

    def distance(self, samples: Tensor, draw: Draw) -> Tensor:
        """Squared 2-Wasserstein distance of the Gaussian with the samples' means and standard deviations, (runs,)."""
        m, s = torch.tensor(self.mean).double(), torch.tensor(self.std).double()
        return ((samples.mean(1) - m) ** 2 + (samples.std(1) - s) ** 2).sum(-1)


@dataclass(frozen=True, eq=False)
class Lower:
    """The lower level of the problem: by autograd in x, by hand in u."""

    problem: GaussianData

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        return self.problem.slope(x, u) if of == "u" else Smooth(self.problem.loss).gradient(x, u, draw, of)


@dataclass(frozen=True)
class Learned:
    """Runs of Algorithm 6.

    Attributes:
        x: the schedules' parameters in the end, each (runs,).
        path: name -> (updates + 1, runs).
        calls: sampler calls of a run.
    """

    x: Params
    path: dict[str, Tensor]
    calls: int


def learn(
    problem: GaussianData,
    stream: Stream,
    runs: int,
    updates: int,
    *,
    samples: int = 512,
    gamma: float = 1e4,
    rate: float | None = None,
    inner: int = 10,
    gradient: Gradient = "pathwise",
    standardised: bool = False,
    start: dict[str, float] | None = None,
    callback: Callable[[int], None] | None = None,
) -> Learned:
    """Run Algorithm 6, from the cosine schedule and its best predictor on.

    Args:
        samples: n, of a sampler call.
        rate: of Adam on the schedule's parameters, in units of `SCALES`; it falls to 0 along a cosine. None is 5 / S:
            the more steps, the steeper the valley.
        inner: descent steps of y and of z in an update.
        gradient: how f's gradients are made: from pairs of calls (eq. 14), two for x and two for u; those in u by
            autograd through the sampler ("mixed": three calls an update); or both ("pathwise": two). "released" has
            none in u: z is y, and the penalty's term is zero, as in the released code, where z is never trained.
        standardised: shift and scale a call's initial noise to mean 0 and standard deviation 1: an affine sampler's
            distance is then free of sampling noise.
    """
    family, scales = problem.family, {**PERTURBED, "slope": PREDICTOR_SCALE, "offset": PREDICTOR_SCALE}

    def source(*names: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(stream.child(*names).integer())

    def noise(draw: Draw) -> Tensor:
        z = torch.randn(runs, samples, len(problem.mean), generator=source("noise", *draw), dtype=torch.float64)
        return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) if standardised else z

    upper = Quality(family, problem.network, problem.distance, noise, problem.S)
    f: Level = Smooth(upper)
    if gradient == "released":
        f = Split(Smooth(upper), Smooth(lambda x, u, draw: torch.zeros(())))
    elif gradient != "pathwise":
        two_point = ZerothOrder(
            upper,
            scales,
            lambda draw: source("directions", *draw),
            lambda p, of: family.valid(p) if of == "x" else p,
        )
        f = two_point if gradient == "zeroth-order" else Split(two_point, Smooth(upper))
    x = {n: torch.full((runs,), v, dtype=torch.float64) for n, v in (start or START).items()}
    u, g = problem.best(x), Lower(problem)
    numbers = u["slope"].shape[1] * u["slope"].shape[2]
    rates = {n: (5 / problem.S if rate is None else rate) * SCALES[n] for n in x}
    made: list[torch.optim.Optimizer] = []
    path = {n: [v.clone()] for n, v in x.items()}

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": lr} for p, lr in zip(tensors, rates.values(), strict=True)]
        made.append(torch.optim.Adam(groups, betas=BETAS))
        return made[0]

    def on_update(update: int, record: Record) -> None:
        for group, lr in zip(made[0].param_groups, rates.values(), strict=True):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * update / updates))
        for n, v in record.x.items():
            path[n].append(v)
        if callback is not None:
            callback(update)

    solver = Descent(f, g, lambda tensors: torch.optim.SGD(tensors, lr=0.15 * numbers), (inner, inner))
    run = PenaltyBilevel(f, g, solver, x, u, gamma=gamma, optimizer=optimizer, project=family.valid, callback=on_update)
    run.run(updates)
    return Learned(run.x, {n: torch.stack(v) for n, v in path.items()}, upper.calls)
