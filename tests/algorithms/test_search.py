"""The searches, against brute force and against what each must never do."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import search
from algorithms.search import Box, Parameters, Search, Trial

BOX = Box(("a", "b", "c"), (0, 0, 0.01), (1, 1, 100), log=("c",))


def smooth(p: Parameters, number: int = 0) -> float:
    """Return a quadratic with correlated axes, smallest (0) at (0.3, 0.7, sqrt(10)); c counts in decades."""
    a, b, c = p["a"] - 0.3, p["b"] - 0.7, math.log10(p["c"]) - 0.5
    return a * a + 2 * b * b + 0.1 * c * c + 0.5 * a * b


def fails_left(p: Parameters, number: int = 0) -> float:
    """Fail in three ways in the half a < 0.5, where `smooth` has its minimum."""
    if p["a"] < 0.5:
        if p["b"] < 0.3:
            raise ValueError("a must be >= 0.5")
        return math.nan if p["b"] < 0.6 else math.inf
    return smooth(p)


class TestBox:
    def test_places_are_linear_or_logarithmic(self) -> None:
        box = Box(("u", "v"), (-1, 0.01), (3, 100), log=("v",))
        assert box.at((0.25, 0.25)) == pytest.approx({"u": 0.0, "v": 0.1})
        assert box.at((0, 0)) == {"u": -1, "v": 0.01}
        assert box.at((1, 1)) == {"u": 3, "v": 100}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (((), (), ()), "names must be at least one, each once, got []"),
            ((("a", "a"), (0, 0), (1, 1)), "each once, got ['a', 'a']"),
            ((("a", "b"), (0,), (1, 1)), "low and high must have 2 entries, got 1, 2"),
            ((("a",), (1,), (1,)), "range of a must be finite with low < high, got [1, 1]"),
            ((("a",), (0,), (math.inf,)), "range of a must be finite"),
            ((("a",), (math.nan,), (1,)), "range of a must be finite"),
            ((("a",), (0,), (1,), ("a",)), "range of a must lie above 0 on a logarithmic scale, got [0, 1]"),
            ((("a",), (0,), (1,), ("b",)), "log names 'b', must be among a"),
            (("ab", (0, 0), (1, 1)), "names and log must be sequences of texts, got 'ab'"),
        ],
    )
    def test_refuses(self, given: Any, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            Box(*given)
        assert message in str(caught.value)

    def test_checks_a_point(self) -> None:
        assert list(BOX.check({"c": 1, "b": 0.5, "a": 1})) == ["a", "b", "c"]
        with pytest.raises(ValueError, match=r"c must lie in \[0.01, 100\], got 101"):
            BOX.check({"a": 0, "b": 0, "c": 101})
        with pytest.raises(ValueError, match="parameters must be a, b, c, got a"):
            BOX.check({"a": 0})


class TestSearch:
    def test_best_is_the_first_of_equals_and_the_curve_counts_calls(self) -> None:
        values = [math.inf, 3.0, 1.0, 2.0, 1.0]
        found = Search(tuple(Trial({"x": float(i)}, v, calls=i + 1) for i, v in enumerate(values)))
        assert found.best.parameters == {"x": 2.0}
        assert (found.calls, found.failed) == (15, 1)
        assert found.best_so_far() == [(1, math.inf), (3, 3.0), (6, 1.0), (10, 1.0), (15, 1.0)]

    def test_a_search_that_only_failed_has_no_best(self) -> None:
        found = search.grid(lambda p, n: math.nan, {"x": [1, 2]})
        assert [t.value for t in found.trials] == [math.inf, math.inf]
        with pytest.raises(ValueError, match="must have a trial that did not fail, all of its 2 failed"):
            _ = found.best


class TestGrids:
    values = {"a": [0.0, 0.3, 0.6], "b": [0.5, 0.7], "c": [1.0, 3.0, 10.0, 30.0]}

    def test_a_grid_tries_every_combination_once(self) -> None:
        numbers: list[int] = []

        def counted(p: Parameters, number: int) -> float:
            numbers.append(number)
            return smooth(p)

        found = search.grid(counted, self.values, calls=7)
        tried = {tuple(t.parameters.values()) for t in found.trials}
        assert tried == set(itertools.product(*self.values.values()))
        assert numbers == list(range(24))
        assert found.calls == 7 * 24
        assert found.best.parameters == {"a": 0.3, "b": 0.7, "c": 3.0}

    def test_the_greedy_grid_fixes_each_parameter_before_the_next(self) -> None:
        order, start = ["c", "a", "b"], {"a": 0.6, "b": 0.5, "c": 30.0}
        found = search.greedy_grid(smooth, self.values, order, start)
        # By hand: 4 values of c; then a, of whose 3 values 0.6 is known; then b, of whose 2 values 0.5 is known.
        point, expected = dict(start), []
        for name in order:
            for value in self.values[name]:
                if point | {name: value} not in expected:
                    expected.append(point | {name: value})
            point |= {name: min(self.values[name], key=lambda v: smooth(point | {name: v}))}  # noqa: B023, called here
        assert [t.parameters for t in found.trials] == expected
        assert len(found.trials) == 4 + 2 + 1
        assert found.best.parameters == point

    def test_greed_misses_what_the_grid_finds_where_parameters_interact(self) -> None:
        def ridge(p: Parameters, number: int) -> float:
            return (p["x"] - p["y"]) ** 2 + 0.1 * (p["x"] + p["y"] - 2) ** 2

        values, start = {"x": [0.0, 0.5, 1.0], "y": [0.0, 0.5, 1.0]}, {"x": 0.0, "y": 0.0}
        greedy, whole = search.greedy_grid(ridge, values, ["x", "y"], start), search.grid(ridge, values)
        assert whole.best.value == 0 < greedy.best.value

    def test_a_parameter_whose_values_all_fail_keeps_its_start(self) -> None:
        def objective(p: Parameters, number: int) -> float:
            return p["y"] if p["x"] == 5 else math.nan

        found = search.greedy_grid(objective, {"x": [1, 2], "y": [4, 3]}, ["x", "y"], {"x": 5, "y": 0})
        assert found.best.parameters == {"x": 5, "y": 3}
        assert found.failed == 2

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="values must name at least one parameter"):
            search.grid(smooth, {})
        with pytest.raises(ValueError, match="values of b must be at least one"):
            search.grid(smooth, {"a": [1], "b": []})
        with pytest.raises(ValueError, match="order must name each of a, b, c once, got a, b"):
            search.greedy_grid(smooth, self.values, ["a", "b"], {"a": 0, "b": 0, "c": 1})
        with pytest.raises(ValueError, match="start must give a, b, c, got a"):
            search.greedy_grid(smooth, self.values, ["a", "b", "c"], {"a": 0})


class TestRandom:
    def test_points_are_uniform_on_the_scales_of_the_box(self) -> None:
        found = search.random(smooth, BOX, 2000, 3)
        points = np.array([[t.parameters[n] for n in ("a", "b")] + [t.parameters["c"]] for t in found.trials])
        uniform = np.column_stack([points[:, :2], (np.log10(points[:, 2]) + 2) / 4])
        # Kolmogorov's distance exceeds 1.95 / sqrt(n) with probability 0.001.
        for column in uniform.T:
            distance = np.abs(np.sort(column) - (np.arange(2000) + 0.5) / 2000).max()
            assert distance < 1.95 / math.sqrt(2000)
        linear = np.abs(np.sort(points[:, 2]) / 100 - (np.arange(2000) + 0.5) / 2000).max()
        assert linear > 0.4  # a linear scale would be seen

    def test_the_points_follow_from_the_seed_alone(self) -> None:
        long, short = search.random(smooth, BOX, 9, 1), search.random(fails_left, BOX, 5, 1)
        assert [t.parameters for t in long.trials[:5]] == [t.parameters for t in short.trials]
        given = search.random(smooth, BOX, 9, np.random.default_rng(1))
        assert given == long != search.random(smooth, BOX, 9, 2)

    def test_refuses_no_trials(self) -> None:
        with pytest.raises(ValueError, match="trials must be >= 1, got 0"):
            search.random(smooth, BOX, 0, 1)


class TestBayesian:
    @pytest.mark.parametrize(("noisy", "seed"), [(True, 0), (False, 1)])
    def test_beats_ten_times_as_many_random_trials_on_a_smooth_function(self, noisy: bool, seed: int) -> None:
        gaussian, blind = search.bayesian(smooth, BOX, 24, seed, noisy=noisy), search.random(smooth, BOX, 240, seed)
        assert gaussian.best.value < 0.1 * blind.best.value
        assert gaussian.best_so_far()[9] == search.random(smooth, BOX, 10, seed).best_so_far()[9]

    def test_the_same_seed_gives_the_same_trials(self) -> None:
        first, again, other = (search.bayesian(smooth, BOX, 10, seed, startup=5) for seed in (4, 4, 5))
        assert first == again
        assert first.trials[5:] != other.trials[5:]

    def test_starts_where_it_is_told(self) -> None:
        start = {"a": 0.9, "b": 0.1, "c": 100.0}
        found = search.bayesian(smooth, BOX, 7, 0, start=start, startup=3)
        assert found.trials[0].parameters == start
        assert found.trials[1:3] == search.bayesian(smooth, BOX, 3, 0).trials[1:3]

    def test_finds_its_way_around_failures(self) -> None:
        found, blind = search.bayesian(fails_left, BOX, 30, 1, startup=6), search.random(fails_left, BOX, 30, 1)
        assert 0 < found.failed < blind.failed
        assert found.best.value < 0.7 * blind.best.value
        assert len({tuple(t.parameters.values()) for t in found.trials}) == 30

    def test_goes_on_when_everything_fails(self) -> None:
        found = search.bayesian(lambda p, n: math.nan, BOX, 8, 1, startup=4)
        assert found.failed == 8

    def test_averages_noise_instead_of_chasing_it(self) -> None:
        """With noise of 0.3 on values of 0 to 1, most of the late trials are near the minimum, not near a lucky one."""
        box = Box(("x",), (0.0,), (1.0,))
        noise = np.random.default_rng(0).normal(size=40)
        found = search.bayesian(lambda p, n: 4 * (p["x"] - 0.7) ** 2 + 0.3 * noise[n], box, 30, 2)
        late = [t.parameters["x"] for t in found.trials[15:]]
        assert abs(float(np.median(late)) - 0.7) < 0.1

    def test_leaves_no_trace(self, capfd: pytest.CaptureFixture[str]) -> None:
        import optuna

        before = (
            optuna.logging.get_verbosity(),
            torch.get_rng_state(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002, whether it was touched  # pyright: ignore
            torch.get_num_threads(),
            dict(os.environ),
            list(warnings.filters),
        )
        search.bayesian(fails_left, BOX, 9, 1, startup=4, noisy=False)
        assert optuna.logging.get_verbosity() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002  # pyright: ignore
        assert (torch.get_num_threads(), dict(os.environ), list(warnings.filters)) == before[3:]
        assert capfd.readouterr() == ("", "")

    def test_the_objectives_own_warnings_are_not_swallowed(self) -> None:
        def loud(p: Parameters, number: int) -> float:
            warnings.warn("careful", UserWarning, stacklevel=1)
            return 0.0

        with pytest.warns(UserWarning, match="careful"):
            search.bayesian(loud, BOX, 1, 0)

    def test_optuna_is_loaded_for_this_search_only(self) -> None:
        code = (
            "import sys; from algorithms import search as s; "
            "s.random(lambda p, n: 0.0, s.Box(('a',), (0,), (1,)), 2, 0); assert 'optuna' not in sys.modules"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"trials": 0}, "trials must be >= 1, got 0"),
            ({"startup": 0}, "startup must be >= 1, got 0"),
            ({"seed": -1}, "seed must be an integer in [0, 2^32), got -1"),
            ({"seed": True}, "seed must be an integer"),
            ({"start": {"a": 2.0, "b": 0.0, "c": 1.0}}, "a must lie in [0, 1], got 2"),
        ],
    )
    def test_refuses(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            search.bayesian(**{"objective": smooth, "box": BOX, "trials": 3, "seed": 0} | given)
        assert message in str(caught.value)


SEARCHES: list[Callable[..., Search]] = [
    lambda f, **k: search.grid(f, {"a": [0.1, 0.9], "b": [0.1, 0.9], "c": [1]}, **k),
    lambda f, **k: search.greedy_grid(
        f, {"a": [0.1, 0.9], "b": [0.1, 0.9], "c": [1]}, ["a", "b", "c"], {"a": 0.1, "b": 0.1, "c": 1}, **k
    ),
    lambda f, **k: search.random(f, BOX, 6, 0, **k),
    lambda f, **k: search.bayesian(f, BOX, 6, 0, startup=4, **k),
]


@pytest.mark.parametrize("run", SEARCHES, ids=["grid", "greedy", "random", "bayesian"])
class TestEvery:
    def test_reports_each_trial_and_counts_failures(self, run: Callable[..., Search]) -> None:
        heard: list[tuple[Trial, int]] = []
        found = run(fails_left, calls=5, on_trial=lambda trial, total: heard.append((trial, total)))
        assert [trial for trial, _ in heard] == list(found.trials)
        assert {total >= len(found.trials) for _, total in heard} == {True}
        assert found.calls == 5 * len(found.trials)
        for trial in found.trials:
            assert trial.failed == (trial.parameters["a"] < 0.5)
            assert trial.failed or trial.value == smooth(trial.parameters)

    def test_lets_other_errors_through(self, run: Callable[..., Search]) -> None:
        def broken(p: Parameters, number: int) -> float:
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            run(broken)

    def test_does_not_trust_the_objective_with_its_own_point(self, run: Callable[..., Search]) -> None:
        def clears(p: Parameters, number: int) -> float:
            value = smooth(p)
            p.clear()
            return value

        assert run(clears) == run(smooth)
