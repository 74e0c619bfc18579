"""Rewards of one direction of the sample, with their derivatives and exact Lipschitz constants.

PI-FT's Assumption 2.6 asks for a reward that is Lipschitz (L_0) and has a Lipschitz gradient (L_1). These are
sums of amplitude f(scale direction . y - shift), the bends f being smooth with known constants, so that
the bounds can be computed without estimating anything; `Absolute` has no L_1, which the sharper theory does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array

Function = Callable[[Array], Array]


def _log_cosh(x: Array) -> Array:
    return np.logaddexp(x, -x) - math.log(2.0)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


# name: (f, f', sup |f'|, sup |f''|). tanh'' = -2 tanh (1 - tanh^2) is largest where tanh^2 = 1/3.
_BENDS: dict[str, tuple[Function, Function, float, float]] = {
    "log cosh": (_log_cosh, np.tanh, 1.0, 1.0),
    "sin": (np.sin, np.cos, 1.0, 1.0),
    "tanh": (np.tanh, lambda x: 1.0 - np.tanh(x) ** 2, 1.0, 4.0 / (3.0 * math.sqrt(3.0))),
    "softplus": (lambda x: np.logaddexp(0.0, x), _sigmoid, 1.0, 0.25),
    "identity": (lambda x: x, np.ones_like, 1.0, 0.0),
    "absolute": (np.abs, np.sign, 1.0, math.inf),
}


@dataclass(frozen=True, eq=False)
class Ridge:
    """r(y) = amplitude f(scale direction . y - shift) for a bend f, (n, d) to (n,); the direction is normalised.

    Attributes:
        bend: "log cosh", "sin", "tanh", "softplus", "identity" or "absolute" (|x|, which has a kink).

    Raises:
        ValueError: if the bend is unknown or the direction is zero.

    >>> Ridge("log cosh").lipschitz, Ridge("softplus", amplitude=0.5, scale=2.0, shift=0.4).gradient_lipschitz
    (1.0, 0.5)
    >>> Ridge("tanh")([[0.0]]), Ridge("tanh").gradient([[0.0]])
    (array([0.]), array([[1.]]))
    """

    bend: str
    amplitude: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    direction: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.bend not in _BENDS:
            raise ValueError(f"bend = {self.bend!r}: must be one of {', '.join(_BENDS)}")
        if not np.linalg.norm(self.direction) > 0:
            raise ValueError(f"direction = {self.direction}: must not be zero")

    def __call__(self, y: ArrayLike) -> Array:
        """The reward at the rows of y (n, d), as (n,)."""
        return self.amplitude * _BENDS[self.bend][0](self._bent(y))

    def gradient(self, y: ArrayLike) -> Array:
        """Its gradient at the rows of y (n, d), as (n, d)."""
        slope = self.amplitude * self.scale * _BENDS[self.bend][1](self._bent(y))
        return slope[:, None] * self._unit

    @property
    def lipschitz(self) -> float:
        """L_0, the supremum of |grad r|."""
        return abs(self.amplitude * self.scale) * _BENDS[self.bend][2]

    @property
    def gradient_lipschitz(self) -> float:
        """L_1, the supremum of the gradient's difference quotients; infinite for a kink."""
        return abs(self.amplitude) * self.scale**2 * _BENDS[self.bend][3]

    @property
    def _unit(self) -> Array:
        direction = np.asarray(self.direction, dtype=np.float64)
        return direction / np.linalg.norm(direction)

    def _bent(self, y: ArrayLike) -> Array:
        points = checked.array("y", y, 2)
        if points.shape[1] != len(self.direction):
            raise ValueError(f"y has shape {points.shape}: must be (n, {len(self.direction)})")
        return self.scale * points @ self._unit - self.shift


@dataclass(frozen=True, eq=False)
class Sum:
    """r = the sum of rewards; its Lipschitz constants are the sums, upper bounds that need not be attained.

    >>> both = Sum((Ridge("sin", scale=2.0), Ridge("identity", amplitude=0.15)))
    >>> both.lipschitz, both.gradient_lipschitz
    (2.15, 4.0)
    """

    parts: tuple[Ridge, ...]

    def __call__(self, y: ArrayLike) -> Array:
        """The reward at the rows of y (n, d), as (n,)."""
        return np.sum([part(y) for part in self.parts], axis=0)

    def gradient(self, y: ArrayLike) -> Array:
        """Its gradient at the rows of y (n, d), as (n, d)."""
        return np.sum([part.gradient(y) for part in self.parts], axis=0)

    @property
    def lipschitz(self) -> float:
        """An upper bound of L_0."""
        return sum(part.lipschitz for part in self.parts)

    @property
    def gradient_lipschitz(self) -> float:
        """An upper bound of L_1."""
        return sum(part.gradient_lipschitz for part in self.parts)


Reward = Ridge | Sum
