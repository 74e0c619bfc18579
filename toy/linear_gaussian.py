"""The torch twin of `theory.chains.LinearGaussianChain`, and its quadratic reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.chain import Condition, Params
from algorithms.objective import Objective
from theory import chains as theory


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """x_{t-1} = (A_t + sum_i theta_i N_{t,i}) x_t + B_t theta + c_t + std_t eps_t, parameters {"theta": (p,)}."""

    slope: Tensor  # (T, d, d)
    turn: Tensor  # (T, p, d, d)
    push: Tensor  # (T, d, p)
    offset: Tensor  # (T, d)
    stds: tuple[float, ...]
    mean_T: Tensor  # (d,)
    root_T: Tensor  # (d, d), a square root of the covariance of x_T

    @classmethod
    def of(cls, chain: theory.LinearGaussianChain) -> LinearGaussian:
        """Return the twin of an exact chain."""
        steps, d, p = chain.B.shape
        turn = torch.zeros(steps, p, d, d, dtype=torch.float64) if chain.N is None else torch.tensor(chain.N)
        values, vectors = torch.linalg.eigh(torch.tensor(chain.cov_T))
        return cls(
            torch.tensor(chain.A),
            turn,
            torch.tensor(chain.B),
            torch.tensor(chain.c),
            tuple(chain.std.tolist()),
            torch.tensor(chain.mean_T),
            vectors * values.clamp(min=0).sqrt(),
        )

    @property
    def steps(self) -> int:
        return len(self.stds)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.offset.shape[1],)

    def initial(self, noise: Tensor) -> Tensor:
        return self.mean_T + noise @ self.root_T.T

    def mean(self, params: Params, x: Tensor, t: int, condition: Condition) -> Tensor:
        theta = params["theta"]
        matrix = self.slope[t - 1] + torch.tensordot(theta, self.turn[t - 1], 1)
        return x @ matrix.T + self.push[t - 1] @ theta + self.offset[t - 1]

    def std(self, t: int) -> float:
        return self.stds[t - 1]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """R(x) = constant + linear . x + x' quadratic x / 2."""

    constant: float
    linear: Tensor
    quadratic: Tensor
    differentiable: bool = True

    @classmethod
    def of(cls, reward: theory.QuadraticReward) -> Quadratic:
        """Return the twin of an exact reward."""
        return cls(float(reward.constant), torch.tensor(reward.linear), torch.tensor(reward.quadratic))

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.constant + x0 @ self.linear + 0.5 * ((x0 @ self.quadratic) * x0).sum(1)


@dataclass(frozen=True, eq=False)
class Problem:
    """An exact chain and reward beside their torch twins, ready for the estimators."""

    exact_chain: theory.LinearGaussianChain
    exact_reward: theory.QuadraticReward
    chain: LinearGaussian
    params: Params
    objective: Objective

    @classmethod
    def of(cls, instance: tuple[theory.LinearGaussianChain, theory.QuadraticReward]) -> Problem:
        chain, reward = instance
        params = {"theta": torch.tensor(chain.theta)}
        return cls(chain, reward, LinearGaussian.of(chain), params, Objective(Quadratic.of(reward)))
