"""PI-FT's system as a `Chain`: an exact score, and a control added to it that starts at zero.

Step t = T, ..., 1 of the chain is the step of index i = T - t of a `theory.control.ControlSchedule`, which counts
forwards from the noise:

    mean(x, t) = (x + (1 - alpha_i) (s_i(x) + control_i(x))) / sqrt(alpha_i),     std(t) = sigma_i.

At zero control it is the pre-trained model. Everything is float64. Source: PI-FT (Han, Razaviyayn, Xu 2025), eqs. (1)
and (3), and section 4.1 for the control that is linear in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from algorithms.chain import Condition, Params
from theory.control import ControlSchedule
from theory.mixture import GaussianMixture
from verdicts.streams import Stream

Score = Callable[[Tensor, int], Tensor]
"""score(x, i): (n, d) -> (n, d), for the schedule's index i."""

Features = Literal["affine", "tanh"]


class Control(Protocol):
    """What is added to the score: nothing, as long as the parameters are the initial ones."""

    def parameters(self) -> Params: ...

    def __call__(self, params: Params, x: Tensor, i: int) -> Tensor:
        """Return the control (n, d) at states x (n, d), for the schedule's index i."""
        ...


@dataclass(frozen=True, eq=False)
class MixtureScore:
    """The score of a Gaussian mixture noised to each step's level, (T, m, ...); the covariances may be full."""

    means: Tensor  # (T, m, d)
    precisions: Tensor  # (T, m, d, d)
    logits: Tensor  # (T, m): log weight - log det / 2

    @classmethod
    def of(cls, mixture: GaussianMixture, schedule: ControlSchedule) -> MixtureScore:
        """Return the scores of Y_0, ..., Y_{T-1}, Y_i being the mixture noised to alpha_bar_i.

        Raises:
            ValueError: if a noised covariance is singular.
        """
        laws = [mixture.noised(float(level)) for level in schedule.alpha_bar]
        covs = np.stack([law.covs for law in laws])
        sign, log_det = np.linalg.slogdet(covs)
        if (sign <= 0).any():
            raise ValueError(f"covs = {mixture.covs.tolist()}: must be positive definite once noised")
        return cls(
            torch.tensor(np.stack([law.means for law in laws])),
            torch.tensor(np.linalg.inv(covs)),
            torch.tensor(np.log(mixture.weights) - 0.5 * log_det),
        )

    def __call__(self, x: Tensor, i: int) -> Tensor:
        gaps = self.means[i] - x[:, None]  # (n, m, d)
        pulls = torch.einsum("kij,nkj->nki", self.precisions[i], gaps)
        logits = self.logits[i] - 0.5 * (gaps * pulls).sum(2)
        return (torch.softmax(logits, 1)[..., None] * pulls).sum(1)


@dataclass(frozen=True, eq=False)
class AffineScore:
    """s_i(x) = slope_i x + offset_i: a Gaussian's score, or any affine drift in its place."""

    slope: Tensor  # (T, d, d)
    offset: Tensor  # (T, d)

    @classmethod
    def of(cls, slope: ArrayLike, offset: ArrayLike) -> AffineScore:
        """Take slope (T, d, d) and offset (T, d).

        Raises:
            ValueError: if the shapes disagree.
        """
        a, b = (torch.tensor(np.asarray(v, dtype=np.float64)) for v in (slope, offset))
        if b.ndim != 2 or a.shape != (*b.shape, b.shape[1]):
            raise ValueError(
                f"slope, offset have shapes {tuple(a.shape)}, {tuple(b.shape)}: must be (T, d, d) and (T, d)"
            )
        return cls(a, b)

    @classmethod
    def gaussian(cls, law: GaussianMixture, schedule: ControlSchedule) -> AffineScore:
        """Return the score of a single Gaussian, noised to each step's level.

        Raises:
            ValueError: if the mixture has more than one component.
        """
        if len(law.weights) != 1:
            raise ValueError(f"law has {len(law.weights)} components: must have one for its score to be affine")
        laws = [law.noised(float(level)) for level in schedule.alpha_bar]
        slope = np.stack([-np.linalg.inv(noised.covs[0]) for noised in laws])
        means = np.stack([noised.means[0] for noised in laws])
        return cls.of(slope, -np.einsum("tij,tj->ti", slope, means))

    def __call__(self, x: Tensor, i: int) -> Tensor:
        return x @ self.slope[i].T + self.offset[i]


@dataclass(frozen=True)
class LinearControl:
    """K_i phi(x), each step having its own K: parameters {"K": (T, d, p)} (PI-FT, section 4.1).

    Attributes:
        features: phi(x) = (x, 1) for "affine", p = d + 1; (x, tanh x, 1) for "tanh", p = 2 d + 1.

    Raises:
        ValueError: if the features are unknown.
    """

    steps: int
    dim: int
    features: Features = "affine"

    def __post_init__(self) -> None:
        if self.features not in ("affine", "tanh"):
            raise ValueError(f"features must be 'affine' or 'tanh', got {self.features!r}")

    def parameters(self) -> Params:
        size = self.dim * (2 if self.features == "tanh" else 1) + 1
        return {"K": torch.zeros(self.steps, self.dim, size, dtype=torch.float64)}

    def phi(self, x: Tensor) -> Tensor:
        """Return the features (n, p) of states x (n, d)."""
        bent = [torch.tanh(x)] if self.features == "tanh" else []
        return torch.cat([x, *bent, torch.ones_like(x[:, :1])], 1)

    def __call__(self, params: Params, x: Tensor, i: int) -> Tensor:
        return self.phi(x) @ params["K"][i].T


@dataclass(frozen=True)
class MLPControl:
    """A tanh layer that sees (x, i / T) and a linear layer without an offset, zero at first, shared by all steps.

    Parameters "w1" (d + 1, width), "b1" (width,) and "w2" (width, d); the first two are drawn from the stream.
    """

    steps: int
    dim: int
    width: int
    stream: Stream

    def parameters(self) -> Params:
        generator = torch.Generator().manual_seed(self.stream.child("initial").integer())
        fan_in = self.dim + 1
        return {
            "w1": torch.randn(fan_in, self.width, generator=generator, dtype=torch.float64) / math.sqrt(fan_in),
            "b1": torch.randn(self.width, generator=generator, dtype=torch.float64),
            "w2": torch.zeros(self.width, self.dim, dtype=torch.float64),
        }

    def __call__(self, params: Params, x: Tensor, i: int) -> Tensor:
        seen = torch.cat([x, torch.full_like(x[:, :1], i / self.steps)], 1)
        return torch.tanh(seen @ params["w1"] + params["b1"]) @ params["w2"]


@dataclass(frozen=True, eq=False)
class ControlledChain:
    """The controlled chain; its parameters are the control's, and Y_0 = x_T is standard normal."""

    schedule: ControlSchedule
    score: Score
    control: Control
    dim: int

    @classmethod
    def of(
        cls, schedule: ControlSchedule, law: GaussianMixture | AffineScore, control: Control | None = None
    ) -> ControlledChain:
        """Return the chain with the exact scores of a mixture (or with affine ones).

        The control is linear in (x, 1) by default.

        Raises:
            ValueError: if affine scores are for another number of steps.
        """
        if isinstance(law, AffineScore):
            steps, dim = law.offset.shape
            if steps != schedule.steps:
                raise ValueError(f"law has scores of {steps} steps: must have one for each of the {schedule.steps}")
            score: Score = law
        else:
            score, dim = MixtureScore.of(law, schedule), law.dim
        return cls(schedule, score, LinearControl(schedule.steps, dim) if control is None else control, dim)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def parameters(self) -> Params:
        """Return the parameters of zero control: the pre-trained model."""
        return self.control.parameters()

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def mean(self, params: Params, x: Tensor, t: int, condition: Condition) -> Tensor:
        i = self.steps - t
        alpha = float(self.schedule.alpha[i])
        return (x + (1 - alpha) * (self.score(x, i) + self.control(params, x, i))) / math.sqrt(alpha)

    def std(self, t: int) -> float:
        return float(self.schedule.sigma[self.steps - t])
