"""Implicit Diffusion's Langevin experiments (sections 5.1, A.1): six ways to sample a mixture that earns more reward.

Two settings. `RELEASED` is that of the code which made the figures. `PRINTED` is that of the text, which leaves open
the radius of the hexagon, the step and the learning rate: as in the code, here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from algorithms.chain import Params
from algorithms.implicit import (
    Guided,
    ImplicitDiffusion,
    ImplicitLoss,
    KLFromReference,
    Langevin,
    MinusReward,
    UnrolledReward,
)
from toy.potentials import HalfPlaneBump, SoftmaxMixture, hexagon
from verdicts.streams import Stream


@dataclass(frozen=True)
class Setting:
    """A hexagon of Gaussians whose weights are learned, a reward, and step sizes.

    Attributes:
        start: theta_0, seven numbers where the origin is a well too.
        target: theta of the mixture that is learned from samples, in the training from scratch.
        gamma, rate: the steps of sampling and of plain gradient descent.
    """

    radius: float
    variance: float
    reward: HalfPlaneBump
    start: tuple[float, ...]
    target: tuple[float, ...] = ()
    gamma: float = 0.2
    rate: float = 0.1

    @property
    def mixture(self) -> SoftmaxMixture:
        return SoftmaxMixture(hexagon(self.radius, len(self.start) == 7).float(), self.variance)

    def params(self, repetitions: int) -> Params:
        return {"theta": torch.tensor([self.start]).repeat(repetitions, 1)}


RELEASED = Setting(4.0, 1.0, HalfPlaneBump((4.0, 3.8), 20.0, 2.5), (1.5, 0.0, 1.5, 0.0, 1.5, 0.0))
PRINTED = Setting(4.0, 0.5, HalfPlaneBump((1.0, 0.95), 1.0, 1.0), (1.0, 0.0, 1.0, 0.0, 1.0, 0.0))
# The text's rate is unknown; five times the released one, so that runs are short.
SCRATCH = replace(RELEASED, start=(-7.0,) * 6 + (11.0,), target=(1.5, 0.0, 1.5, 0.0, 1.5, 0.0, 0.0), rate=0.5)
SMOOTH = 0.5  # length over which the guidance's reward rises


@dataclass(frozen=True)
class Way:
    """One of the six, but for its length.

    Attributes:
        inner: sampling steps of an update, 1 for Implicit Diffusion.
        gradient: "implicit" by covariance, "unrolled" through the last step, "reference" for the KL divergence from
            samples of the setting's target, or None for sampling alone.
        guidance: strength of the reward in the potential, or None.
        sign: of the gradient; -1 for the planted error.
    """

    inner: int = 1
    gradient: str | None = "implicit"
    guidance: float | None = None
    sign: float = 1.0


@dataclass(frozen=True, eq=False)
class Course:
    """What a run passed through, at m of its updates.

    Attributes:
        updates: (m,).
        thetas: (m, r, k).
        rewards: the batches' mean rewards, (m, r).
        likelihoods: the batches' mean log-densities under the mixture whose weights are asked for, (m, r).
        particles: of the first repetition, (m, n, 2).
    """

    updates: np.ndarray
    thetas: np.ndarray
    rewards: np.ndarray
    likelihoods: np.ndarray
    particles: np.ndarray


def run(
    setting: Setting,
    way: Way,
    updates: int,
    stream: Stream,
    cache: Path,
    repetitions: int = 10,
    particles: int = 1000,
    points: int = 100,
    start: np.ndarray | None = None,
    judged: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Course:
    """Run one of the ways from N(0, I), all repetitions at once, or load the run if it was made before.

    The particles go on from update to update in the nested loops too. Unrolling descends with rate 2 rate / gamma
    (section A.1), as its gradient is of order gamma.

    Args:
        points: how often it is looked at, equally spaced in updates, after the start; it divides updates.
        start: theta_0 (r, k), instead of the setting's.
        judged: theta (r, k) of the mixture whose log-density is reported; the run's own last one if None.
        progress: called as progress(updates done, updates in all).
    """
    if points < 1 or updates % points:
        raise ValueError(f"points must be >= 1 and divide updates = {updates}, got {points}")
    recipe = [repr(setting), repr(way), updates, stream.integer(), repetitions, particles, points]
    recipe += [None if theta is None else theta.tolist() for theta in (start, judged)]
    file = cache / f"implicit-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.npz"
    if file.exists():
        with np.load(file) as held:
            return Course(**held)
    made = _run(setting, way, updates, stream, repetitions, particles, points, start, judged, progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
        np.savez(unfinished, **asdict(made))
    os.replace(unfinished.name, file)  # whole or not at all
    return made


def _run(
    setting: Setting,
    way: Way,
    updates: int,
    stream: Stream,
    repetitions: int,
    particles: int,
    points: int,
    start: np.ndarray | None,
    judged: np.ndarray | None,
    progress: Callable[[int, int], None] | None,
) -> Course:
    kept: list[tuple[int, Tensor, Tensor]] = []

    def keep(update: int, params: Params, x: Tensor) -> None:
        if update % (updates // points) == 0:
            kept.append((update, params["theta"].detach().clone(), x.clone()))
            if progress is not None:
                progress(update, updates)

    mixture = setting.mixture
    potential = mixture
    if way.guidance is not None:
        potential = Guided(mixture, replace(setting.reward, smooth=SMOOTH), way.guidance)
    loss, rate = _loss(setting, way, stream, (repetitions, particles))
    source = torch.Generator().manual_seed(stream.child("start").integer())
    loop = ImplicitDiffusion(
        Langevin(potential, setting.gamma),
        loss,
        setting.params(repetitions) if start is None else {"theta": torch.from_numpy(start).float()},
        torch.randn(repetitions, particles, 2, generator=source),
        None if loss is None else lambda tensors: torch.optim.SGD(tensors, lr=rate, maximize=way.sign < 0),
        lambda repetition, block: torch.Generator().manual_seed(stream.child(repetition, block).integer()),
        way.inner,
        "released",
        callback=keep,
    )
    loop.run(updates)
    thetas = torch.stack([theta for _, theta, _ in kept])
    under = {"theta": thetas[-1] if judged is None else torch.from_numpy(judged).float()}
    return Course(
        np.array([update for update, _, _ in kept]),
        thetas.numpy(),
        torch.stack([setting.reward(x).mean(-1) for _, _, x in kept]).numpy(),
        torch.stack([mixture.log_density(under, x).mean(-1) for _, _, x in kept]).numpy(),
        torch.stack([x[0] for _, _, x in kept]).numpy(),
    )


def _loss(setting: Setting, way: Way, stream: Stream, shape: tuple[int, int]) -> tuple[ImplicitLoss | None, float]:
    """Return the loss and its learning rate; `shape` is that of a batch, (r, n)."""
    if way.gradient is None:
        return None, 0.0
    if way.gradient == "unrolled":
        return UnrolledReward(setting.reward), 2 * setting.rate / setting.gamma
    if way.gradient == "implicit":
        return MinusReward(setting.reward, unbiased=False), setting.rate
    centres = setting.mixture.centres
    below = torch.tensor(setting.target).softmax(-1).cumsum(-1)[:-1]

    def reference(update: int) -> Tensor:
        source = torch.Generator().manual_seed(stream.child("reference", update).integer())
        component = torch.searchsorted(below, torch.rand(shape, generator=source))
        noise = torch.randn(*shape, 2, generator=source)
        return centres[component] + math.sqrt(setting.variance) * noise

    return KLFromReference(reference), setting.rate
