"""Ancestral sampling of a Gaussian mixture with its exact score, plus a small trainable control.

The step is DDPM's reverse step with the exact score of the noised mixture and a control u added to it,

    mean(x, t) = (x + beta_t (score(x, t) + u(x))) / sqrt(1 - beta_t),     std(t)^2 = beta_t,
    u(x) = bias + gain * tanh(x),

so that the chain is nonlinear in x and in how its Jacobians depend on the parameters, and at zero control samples
the mixture up to discretisation. Every step has noise, the last one too, so that every step has a density.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.chain import Condition, Params
from theory.mixture import GaussianMixture
from theory.schedules import NoiseSchedule


@dataclass(frozen=True, eq=False)
class MixtureChain:
    """Reverse DDPM chain of an isotropic Gaussian mixture; parameters {"bias": (d,), "gain": (d,)}."""

    log_weights: Tensor  # (m,)
    means: Tensor  # (m, d)
    variances: Tensor  # (m,), isotropic
    beta: Tensor  # (T,)
    alpha_bar: Tensor  # (T,)

    @classmethod
    def of(cls, mixture: GaussianMixture, schedule: NoiseSchedule) -> MixtureChain:
        """Return the chain of an exact mixture.

        Raises:
            ValueError: if a component's covariance is not isotropic.
        """
        d = mixture.means.shape[1]
        variances = torch.tensor([float(cov[0, 0]) for cov in mixture.covs], dtype=torch.float64)
        covs = torch.tensor(mixture.covs)
        if not torch.allclose(covs, variances[:, None, None] * torch.eye(d, dtype=torch.float64)):
            raise ValueError(f"covs = {mixture.covs.tolist()}: must be multiples of the identity for MixtureChain")
        return cls(
            torch.tensor(mixture.weights).log(),
            torch.tensor(mixture.means),
            variances,
            torch.tensor(schedule.beta),
            torch.tensor(schedule.alpha_bar),
        )

    @property
    def steps(self) -> int:
        return len(self.beta)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.means.shape[1],)

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def parameters(self) -> Params:
        """Return the zero control."""
        zero = torch.zeros(self.shape, dtype=torch.float64)
        return {"bias": zero.clone(), "gain": zero.clone()}

    def score(self, x: Tensor, t: int) -> Tensor:
        """Return the gradient of log p_t at x (n, d), p_t the mixture noised to step t."""
        alpha_bar = self.alpha_bar[t - 1]
        variances = alpha_bar * self.variances + 1 - alpha_bar
        means = alpha_bar.sqrt() * self.means
        # Points last: a softmax, or a sum, over the last axis of a few numbers takes several times as long.
        squares = (means[..., None] - x.T.contiguous()).square().sum(1)  # (m, n)
        weights = self.log_weights - 0.5 * self.means.shape[1] * variances.log()
        pulls = torch.softmax(weights[:, None] - 0.5 * squares / variances[:, None], 0) / variances[:, None]
        return pulls.T @ means - pulls.sum(0)[:, None] * x

    def mean(self, params: Params, x: Tensor, t: int, condition: Condition) -> Tensor:
        beta = self.beta[t - 1]
        control = params["bias"] + params["gain"] * torch.tanh(x)
        return (x + beta * (self.score(x, t) + control)) / (1 - beta).sqrt()

    def std(self, t: int) -> float:
        return float(self.beta[t - 1].sqrt())
