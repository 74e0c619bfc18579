"""The control problems that the chapter *PI-FT* keeps returning to. Notation of theory/control.py: time runs forwards."""

from __future__ import annotations

from functools import cache

import numpy as np

from theory.control import ControlSchedule
from theory.control_bellman import ControlProblem, Solution, iterates, optimum
from theory.control_linear_quadratic import LinearQuadratic
from theory.control_rewards import Ridge, Sum
from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture

CHAPTER = "PI-FT"
PAPER = "PI-FT"
POINTS = (-1.0, 0.3, 2.0)  # where values and controls are compared
WINDOW = 8.0  # suprema over the line are taken on [-8, 8]: lower bounds of the true ones
START = Gaussian.scalar(0.0, 1.0)  # the law of Y_0


def two_modes(mean: float, variance: float) -> GaussianMixture:
    """1/2 N(-mean, variance) + 1/2 N(mean, variance)."""
    return GaussianMixture([0.5, 0.5], [[-mean], [mean]], [[[variance]], [[variance]]])


NAMES = ("MIX", "GSP")
DATA = {"MIX": two_modes(1.0, 0.5), "GSP": GaussianMixture([1.0], [[0.5]], [[[0.25]]])}


@cache
def problem(name: str) -> ControlProblem:
    """MIX or GSP, small problems in one dimension with exact scores and nothing linear.

    MIX: T = 2, alpha = (.8, .9), strengths (.5, .4), data 1/2 N(+-1, 1/2), reward log cosh.
    GSP: T = 3, alpha = (.7, .8, .9), strength .3, data N(1/2, 1/4), reward softplus(2 (y - .2)) / 2.
    """
    if name == "MIX":
        return ControlProblem.of_mixture(ControlSchedule.ddpm([0.8, 0.9], [0.5, 0.4]), DATA[name], Ridge("log cosh"))
    schedule = ControlSchedule.ddpm([0.7, 0.8, 0.9], 0.3)
    return ControlProblem.of_mixture(schedule, DATA[name], Ridge("softplus", 0.5, 2.0, 0.4))


PLANE_DIRECTIONS = ((1.0, -0.5), (0.3, 0.9))
PLANE_DATA = GaussianMixture([0.5, 0.5], [[-1.0, -0.6], [1.0, 0.6]], [0.4 * np.eye(2)] * 2)


@cache
def plane() -> ControlProblem:
    """PLANE: two dimensions, T = 2, alpha = (.8, .88), strengths (.6, .5), data of two modes at +-(1, .6), variance .4.

    The reward is .6 log cosh(y_1 - .5 y_2) + .7 tanh(.3 y_1 + .9 y_2).
    """
    lengths = [float(np.hypot(*direction)) for direction in PLANE_DIRECTIONS]
    bends = (("log cosh", 0.6), ("tanh", 0.7))
    parts = [Ridge(b, w, n, 0.0, d) for (b, w), n, d in zip(bends, lengths, PLANE_DIRECTIONS, strict=True)]
    return ControlProblem.of_mixture(ControlSchedule.ddpm([0.8, 0.88], [0.6, 0.5]), PLANE_DATA, Sum(tuple(parts)))


@cache
def linear_quadratic() -> LinearQuadratic:
    """LQ: T = 4, alpha = (.6, .7, .8, .9), strength .8, data N(1/2, 1/4), reward .7 y - 1.2 y^2 / 2."""
    schedule = ControlSchedule.ddpm([0.6, 0.7, 0.8, 0.9], 0.8)
    return LinearQuadratic.of_gaussian(schedule, [0.5], [[0.25]], [[1.2]], [0.7])


@cache
def best(name: str) -> Solution:
    """The optimum of MIX or GSP."""
    return optimum(problem(name))


@cache
def iterated(name: str, counts: tuple[int, ...]) -> Solution:
    """PI-FT after so many iterations at each step of MIX or GSP."""
    return iterates(problem(name), counts)
