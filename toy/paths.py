"""Forward diffusion paths of data, and their log-likelihood ratio to a sampler's paths."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from algorithms.chain import Chain, Params, step_log_prob
from theory.schedules import NoiseSchedule
from toy.experiments import Block, Sampler, generator
from verdicts.streams import Stream


def log_normal(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    """Log-density of N(mean, variance I) at x (n, d), summed over d: (n,)."""
    return -0.5 * ((x - mean).square() / variance + math.log(2 * math.pi * variance)).sum(1)


def forward_path(x0: Tensor, schedule: NoiseSchedule, noise: torch.Generator) -> list[Tensor]:
    """Noise x_0 (n, d) step by step; return [x_0, x_1, ..., x_T]."""
    path = [x0]
    for beta in schedule.beta.tolist():
        eps = torch.randn(x0.shape, generator=noise, dtype=x0.dtype)
        path.append(math.sqrt(1 - beta) * path[-1] + math.sqrt(beta) * eps)
    return path


def path_log_ratio(
    chain: Chain, params: Params, schedule: NoiseSchedule, mean: float, variance: float, size: int = 1 << 14
) -> Sampler:
    """Sample log q(x_{0:T}) - log p(x_{0:T}) along forward paths of data N(mean, variance), blocks (size, 1).

    q is the forward process, p the chain started from N(0, I); the mean is the path KL divergence.
    """

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            source = generator(stream, index)
            x0 = mean + math.sqrt(variance) * torch.randn(size, 1, generator=source, dtype=torch.float64)
            path = forward_path(x0, schedule, source)
            ratio = log_normal(x0, mean, variance) - log_normal(path[-1], 0.0, 1.0)
            for t, beta in enumerate(schedule.beta.tolist(), start=1):
                ratio += log_normal(path[t], math.sqrt(1 - beta) * path[t - 1], beta)
                ratio -= step_log_prob(chain, params, path[t], path[t - 1], t)
            return ratio[:, None].numpy()

        return block

    return sampler
