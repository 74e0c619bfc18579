"""A small nonlinear chain, reward and running cost that excite every term of the sweep."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tanh:
    """mean = 0.8 x + tanh(W x + t b + 0.3 condition); two parameters of different shapes; std grows with t."""

    steps: int = 5
    shape: tuple = (3,)
    eta: float = 1.0

    def initial(self, noise):
        return 0.5 + 1.5 * noise

    def mean(self, params, x, t, condition):
        drive = x @ params["W"].T + t * params["b"]
        return 0.8 * x + torch.tanh(drive if condition is None else drive + 0.3 * condition)

    def std(self, t):
        return self.eta * (0.2 + 0.1 * t)


@dataclass(frozen=True)
class Smooth:
    differentiable: bool = True

    def __call__(self, x0, condition):
        return torch.sin(x0).sum(1) + 0.3 * x0[:, 0] * x0[:, 1] ** 2


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "W": 0.4 * torch.randn(3, 3, generator=g, dtype=torch.float64),
        "b": 0.2 * torch.randn(3, generator=g, dtype=torch.float64),
    }


def generator(seed=1):
    return torch.Generator().manual_seed(seed)
