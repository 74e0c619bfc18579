"""Searches for the best hyperparameters by trying them: grid, greedy grid, random, and Bayesian by a Gaussian process.

These are the baselines of the generative bilevel paper (sections 6.1 and 6.2, appendices F.1 and F.2). Each sees the
objective as a black box to be minimised, and pays one evaluation for a trial.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Parameters = dict[str, float]
ObjectiveOf = Callable[[Parameters, int], float]
"""Called as objective(parameters, number), with trials numbered from 0; what it returns is minimised.

A value that is not finite, or a ValueError, is a failed trial: it is paid for, and counts as infinitely bad.
"""


@dataclass(frozen=True)
class Trial:
    """A point that was tried: its value (inf where it failed), and what it cost in calls of whatever is counted."""

    parameters: Parameters
    value: float
    calls: int = 1

    @property
    def failed(self) -> bool:
        return not math.isfinite(self.value)


OnTrial = Callable[[Trial, int], None]
"""Called as on_trial(trial, trials) after each trial, with the most that there will be."""


@dataclass(frozen=True)
class Search:
    """All trials of a search, in their order."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The first of the trials with the smallest value.

        Raises:
            ValueError: if none has a value.
        """
        found = min(self.trials, key=lambda trial: trial.value, default=None)
        if found is None or found.failed:
            raise ValueError(f"search must have a trial that did not fail, all of its {len(self.trials)} failed")
        return found

    @property
    def calls(self) -> int:
        """What all trials cost."""
        return sum(trial.calls for trial in self.trials)

    @property
    def failed(self) -> int:
        """How many trials failed."""
        return sum(trial.failed for trial in self.trials)

    def best_so_far(self) -> list[tuple[int, float]]:
        """Return after each trial the calls made until then and the smallest value found (inf before there is one)."""
        calls = itertools.accumulate(trial.calls for trial in self.trials)
        return list(zip(calls, itertools.accumulate((trial.value for trial in self.trials), min), strict=True))


@dataclass(frozen=True)
class Box:
    """Ranges of parameters by name: low <= value <= high, searched on a logarithmic scale for the names in `log`.

    Raises:
        ValueError: if there is no name or a name comes twice, the lengths differ, a limit is not finite, low < high
            does not hold, or a name of `log` is unknown or its range does not lie above 0.

    >>> Box(("lambda",), (0.01,), (100.0,), log=("lambda",)).at((0.5,))
    {'lambda': 1.0}
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    log: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or isinstance(self.log, str):
            raise ValueError(f"names and log must be sequences of texts, got {self.names!r} and {self.log!r}")
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "log", tuple(self.log))
        object.__setattr__(self, "low", tuple(float(value) for value in self.low))
        object.__setattr__(self, "high", tuple(float(value) for value in self.high))
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be at least one, each once, got {list(self.names)}")
        if not len(self.names) == len(self.low) == len(self.high):
            raise ValueError(f"low and high must have {len(self.names)} entries, got {len(self.low)}, {len(self.high)}")
        for name in self.log:
            if name not in self.names:
                raise ValueError(f"log names {name!r}, must be among {', '.join(self.names)}")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"range of {name} must be finite with low < high, got [{low:g}, {high:g}]")
            if name in self.log and low <= 0:
                raise ValueError(f"range of {name} must lie above 0 on a logarithmic scale, got [{low:g}, {high:g}]")

    def at(self, place: Sequence[float]) -> Parameters:
        """Return the parameters at a place in [0, 1]^d, linear in the value, or in its logarithm."""
        found = {}
        for name, low, high, share in zip(self.names, self.low, self.high, place, strict=True):
            if name in self.log:
                value = low * (high / low) ** share
            else:
                value = (1 - share) * low + share * high
            found[name] = min(max(value, low), high)  # rounding may leave the box
        return found

    def check(self, parameters: Mapping[str, float]) -> Parameters:
        """Return parameters in the order of the names.

        Raises:
            ValueError: if the names are others, or a value lies outside.
        """
        if set(parameters) != set(self.names):
            raise ValueError(f"parameters must be {', '.join(self.names)}, got {', '.join(parameters) or 'none'}")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not low <= parameters[name] <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {parameters[name]:g}")
        return {name: float(parameters[name]) for name in self.names}


def grid(
    objective: ObjectiveOf,
    values: Mapping[str, Sequence[float]],
    *,
    calls: int = 1,
    on_trial: OnTrial | None = None,
) -> Search:
    """Try every combination of the values, the last name's changing fastest.

    Args:
        calls: what a trial costs, in calls of whatever is counted.

    Raises:
        ValueError: if there is no name, or a name without values.
    """
    _check_values(values)
    points = [dict(zip(values, map(float, point), strict=True)) for point in itertools.product(*values.values())]
    return _all(objective, points, calls, on_trial)


def greedy_grid(
    objective: ObjectiveOf,
    values: Mapping[str, Sequence[float]],
    order: Sequence[str],
    start: Mapping[str, float],
    *,
    calls: int = 1,
    on_trial: OnTrial | None = None,
) -> Search:
    """Tune one parameter after the other over its values, the others as they were found best, or as in `start`.

    A point that was tried before is not tried again, so that there are at most sum_i k_i trials for k_i values each,
    where the grid has prod_i k_i. The start is tried only where it lies on the grid.

    Args:
        order: the parameters as they are tuned; the paper tunes the most sensitive one first (F.2).
        start: values of all parameters.

    Raises:
        ValueError: if the names of values, order and start are not the same, or a name has no values.
    """
    _check_values(values)
    if sorted(order) != sorted(values):
        raise ValueError(f"order must name each of {', '.join(values)} once, got {', '.join(order) or 'none'}")
    if set(start) != set(values):
        raise ValueError(f"start must give {', '.join(values)}, got {', '.join(start) or 'none'}")
    total = sum(len(own) for own in values.values())
    current: Parameters = {name: float(start[name]) for name in values}
    seen: dict[tuple[float, ...], float] = {}
    trials: list[Trial] = []
    for name in order:
        for value in values[name]:
            point = current | {name: float(value)}
            key = tuple(point.values())
            if key in seen:
                continue
            trials.append(_tried(objective, point, len(trials), calls))
            seen[key] = trials[-1].value
            if on_trial is not None:
                on_trial(trials[-1], total)
        # The first of equals; where all have failed, what there was.
        candidates = [current | {name: float(value)} for value in values[name]]
        best = min(candidates, key=lambda point: seen[tuple(point.values())])
        if math.isfinite(seen[tuple(best.values())]):
            current = best
    return Search(tuple(trials))


def random(
    objective: ObjectiveOf,
    box: Box,
    trials: int,
    generator: np.random.Generator | int,
    *,
    calls: int = 1,
    on_trial: OnTrial | None = None,
) -> Search:
    """Try points that are uniform in the box, on a logarithmic scale where the box asks for it.

    The points do not depend on the values, and those of fewer trials are the first of those of more.

    Raises:
        ValueError: if trials < 1.
    """
    _check_count("trials", trials)
    return _all(objective, _draws(box, trials, generator), calls, on_trial)


def bayesian(
    objective: ObjectiveOf,
    box: Box,
    trials: int,
    seed: int,
    start: Mapping[str, float] | None = None,
    startup: int = 10,
    *,
    noisy: bool = True,
    calls: int = 1,
    on_trial: OnTrial | None = None,
) -> Search:
    """Try the point of the largest expected improvement under a Gaussian process fitted to the trials before it.

    The process is Optuna's GPSampler: Matern 5/2 with a length scale for each parameter, by maximum a posteriori,
    and log expected improvement; the paper's gp_minimize has the same kernel and criterion. The first `startup`
    trials are those of `random` with this seed, `start` in the place of the first. A failed trial enters the process as
    the worst value so far, so that its neighbourhood is avoided. Equal seeds give equal trials on one machine; times
    grow with the cube of the trials.

    Args:
        start: parameters to try first.
        startup: trials before the process is asked.
        noisy: fit the variance of the objective's noise; if False it is taken to be exact.

    Raises:
        ValueError: if trials or startup < 1, start lies outside the box, or seed is not in [0, 2^32).
    Source: Snoek et al. (2012), Practical Bayesian optimization of machine learning algorithms; Ament et al. (2023),
        Unexpected improvements to expected improvement.
    """
    _check_count("trials", trials)
    _check_count("startup", startup)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2^32), got {seed!r}")
    first = _draws(box, min(startup, trials), int(seed))
    if start is not None:
        first[0] = box.check(start)
    import optuna  # slow to load, and only for this search

    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(low, high, log=name in box.log)
        for name, low, high in zip(box.names, box.low, box.high, strict=True)
    }
    with _quiet():
        sampler = optuna.samplers.GPSampler(
            seed=int(seed), n_startup_trials=len(first), deterministic_objective=not noisy
        )
        study = optuna.create_study(sampler=sampler, direction="minimize")
    done: list[Trial] = []
    for number in range(trials):
        with _quiet():
            if number < len(first):
                study.enqueue_trial(first[number])
            asked = study.ask(ranges)
        # Through the logarithm and back, a value on the limit may come out a little outside.
        point = {
            name: min(max(float(asked.params[name]), low), high)
            for name, low, high in zip(box.names, box.low, box.high, strict=True)
        }
        done.append(_tried(objective, point, number, calls))
        with _quiet():
            study.tell(asked, done[-1].value)
        if on_trial is not None:
            on_trial(done[-1], trials)
    return Search(tuple(done))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's log and its warnings of experimental features; both are put back."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _draws(box: Box, count: int, generator: np.random.Generator | int) -> list[Parameters]:
    if not isinstance(generator, np.random.Generator):
        generator = np.random.default_rng(generator)
    return [box.at(generator.random(len(box.names)).tolist()) for _ in range(count)]


def _all(objective: ObjectiveOf, points: Sequence[Parameters], calls: int, on_trial: OnTrial | None) -> Search:
    trials = []
    for number, point in enumerate(points):
        trials.append(_tried(objective, point, number, calls))
        if on_trial is not None:
            on_trial(trials[-1], len(points))
    return Search(tuple(trials))


def _tried(objective: ObjectiveOf, point: Parameters, number: int, calls: int) -> Trial:
    try:
        value = float(objective(dict(point), number))
    except ValueError:
        value = math.inf
    return Trial(point, value if math.isfinite(value) else math.inf, calls)


def _check_values(values: Mapping[str, Sequence[float]]) -> None:
    if not values:
        raise ValueError("values must name at least one parameter, got none")
    for name, own in values.items():
        if not len(own):
            raise ValueError(f"values of {name} must be at least one, got none")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}")
