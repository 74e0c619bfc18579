"""The strength of entropy regularisation, chosen by a second reward (Generative bilevel, eq. 9 and Algorithm 2).

    lower level   g(lambda, p) = -E_p r2 + lambda KL(p || p_data),    minimised by p_data exp(r2 / lambda) / Z
    upper level   f(lambda, p) = -E_p r1
    penalty       z = p_data exp((r1 / gamma + r2) / lambda) / Z
    gradient      F_gamma' = gamma (KL(z || p_data) - KL(y || p_data))

With n samples of the pre-trained model in the place of p_data all of this is exact: laws are weights on the samples,
and the gradient is that of the n-point problem. As an estimate of the original problem's it is the self-normalised one.
It is as good as the weights are even: their effective sample size is what `Gate` looks at.

    rewards = lambda draw: (upper, lower)                     # of n samples, each (*batch, n)
    strength = torch.tensor(2.0)
    run = PenaltyBilevel(MinusUpper(), Regularised(), Tilt(rewards), {"strength": strength}, uniform(strength, n),
                         gamma=100, optimizer=..., project=at_least(0.1), gate=Gate(50))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from algorithms.bilevel import Draw, Variable
from algorithms.chain import Params

Rewards = Callable[[int], tuple[Tensor, Tensor]]
"""The samples of an update: their upper and lower rewards r1 and r2, each (*batch, n)."""

Direction = Literal["forward", "reverse"]
Mixed = Literal["penalty", "released"]
STRENGTH, WEIGHTS = "strength", "log_weights"


def log_weights(reward: Tensor, strength: Tensor) -> Tensor:
    """Return the logarithms (*batch, n) of the weights of exp(reward / strength), which sum to one.

    Args:
        reward: (*batch, n).
        strength: lambda, (*batch,).

    Raises:
        ValueError: unless every strength is positive and finite, and every reward finite.
    """
    if not bool(((strength > 0) & (strength < math.inf)).all()):
        raise ValueError(f"strength must be positive and finite, got {_first(strength)}")
    if not bool(torch.isfinite(reward).all()):
        raise ValueError("reward must be finite for every sample, some are not")
    return torch.log_softmax(reward / strength[..., None], -1)


def _check_name(name: str, given: str, allowed: object) -> None:
    if given not in get_args(allowed):
        raise ValueError(f"{name} must be one of {get_args(allowed)}, got {given!r}")


def _first(strength: Tensor) -> float:
    wrong = ~((strength > 0) & (strength < math.inf))
    return float(strength[wrong].flatten()[0])


def divergence(logs: Tensor, direction: Direction = "forward") -> Tensor:
    """Return the KL divergence (*batch,) of weights, given by their logarithms (*batch, n), from even ones.

    "reverse" is that of the even ones from the weights.

    Raises:
        ValueError: for another direction.
    """
    _check_name("direction", direction, Direction)
    excess = logs + math.log(logs.shape[-1])
    return (logs.exp() * excess).sum(-1) if direction == "forward" else -excess.mean(-1)


def effective_share(logs: Tensor) -> Tensor:
    """Return the effective sample size over n, (*batch,): 1 / (n sum w^2), for the logarithms of weights."""
    return (-torch.logsumexp(2 * logs, -1)).exp() / logs.shape[-1]


@dataclass(frozen=True)
class Tilt:
    """The solver: y and z in closed form, on the samples of the update; both see the same ones.

    Attributes:
        mixed: the reward of the penalty problem, from r1, r2 and gamma. "released" is gamma r1 + r2, as the released
            code has it, in the place of r1 / gamma + r2.

    Raises:
        ValueError: for another `mixed`; in `solve`, for a strength or a reward that `log_weights` refuses.
    """

    rewards: Rewards
    mixed: Mixed = "penalty"

    def __post_init__(self) -> None:
        _check_name("mixed", self.mixed, Mixed)

    def solve(self, x: Params, u: Params, gamma: float | None, update: int) -> Params:
        upper, reward = self.rewards(update)
        if gamma is not None:
            reward = reward + upper * (1 / gamma if self.mixed == "penalty" else gamma)
        return {WEIGHTS: log_weights(reward, x[STRENGTH])}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Regularised:
    """The lower level g: in lambda its gradient is the KL divergence from the pre-trained law.

    Attributes:
        direction: "reverse" is what the released code estimates: the divergence of the pre-trained law from the tilt.

    Raises:
        ValueError: for another direction; in `gradient`, if it is asked for in u.
    """

    direction: Direction = "forward"

    def __post_init__(self) -> None:
        _check_name("direction", self.direction, Direction)

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        if of == "u":
            raise ValueError("of must be 'x' here: the lower problem is solved in closed form, by Tilt")
        return {STRENGTH: divergence(u[WEIGHTS], self.direction)}


@dataclass(frozen=True)
class MinusUpper:
    """The upper level f: the strength enters through the law only, so the gradient in it is zero.

    Raises:
        ValueError: in `gradient`, if it is asked for in u.
    """

    def gradient(self, x: Params, u: Params, draw: Draw, of: Variable) -> Params:
        if of == "u":
            raise ValueError("of must be 'x' here: the penalty problem is solved in closed form, by Tilt")
        return {STRENGTH: torch.zeros_like(x[STRENGTH])}


@dataclass(frozen=True)
class Gate:
    """Refuses an estimate whose weights, y's or z's, have an effective sample size below a number of samples.

    Raises:
        ValueError: if smallest is < 1.
    """

    smallest: float

    def __post_init__(self) -> None:
        if not self.smallest >= 1:
            raise ValueError(f"smallest effective sample size must be >= 1, got {self.smallest}")

    def __call__(self, x: Params, y: Params, z: Params) -> Tensor:
        sizes = [effective_share(u[WEIGHTS]) * u[WEIGHTS].shape[-1] for u in (y, z)]
        return torch.minimum(*sizes) >= self.smallest


def at_least(smallest: float) -> Callable[[Params], Params]:
    """Return the projection on strengths >= smallest: lambda = 0 has no tilt.

    Raises:
        ValueError: if smallest is not positive and finite.
    """
    if not 0 < smallest < math.inf:
        raise ValueError(f"smallest strength must be positive and finite, got {smallest}")
    return lambda x: {**x, STRENGTH: x[STRENGTH].clamp(min=smallest)}


def uniform(strength: Tensor, samples: int) -> Params:
    """Return even weights on n samples, where a run starts from: (*batch, n) of their logarithms.

    Raises:
        ValueError: if samples is < 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    return {WEIGHTS: strength.new_full((*strength.shape, samples), -math.log(samples))}
