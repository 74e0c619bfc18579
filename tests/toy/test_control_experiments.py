"""PI-FT's experiments: runs that do not see each other, costs counted by call, DPOK's fixed point by brute force."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms import estimators as named
from algorithms.chain import Around, rollout
from algorithms.objective import KLToReference, Objective, kl_regularised
from algorithms.training import Settings, Trainer
from theory import schedules
from theory.control import ControlSchedule
from theory.control_linear_quadratic import LinearQuadratic, evaluate, optimum
from theory.gaussian import Gaussian
from toy.comparison import Problem
from toy.control_experiments import (
    NAMES,
    Plan,
    as_params,
    batch_gradients,
    calls,
    dpok_fixed_point,
    gradient_norms,
    method,
    tune,
    tuned,
    twin,
)
from toy.ddpm import MLPChain, initial_parameters
from toy.experiments import generator
from toy.parallel import EachRun, Parallel
from toy.rewards import Bumps
from verdicts.streams import Stream

STREAM = Stream(7).child("tests", "control", "experiments")
T, RUNS, BATCH = 4, 3, 8
PLAN = Plan(calls=6 * (7 * T - 1) * BATCH, learning_rate=1e-2, runs=RUNS, batch=BATCH, points=3, evaluation=64)

every_method = pytest.mark.parametrize("name", NAMES)


def small() -> Problem:
    chain = MLPChain.of(schedules.linear(T, 0.05, 0.5))
    reward = Bumps(((0.9, 0.3), (-0.6, 0.6)), (1.0, 0.6), 1.0)
    return Problem(chain, initial_parameters(chain, 6, STREAM), Objective(reward))


@every_method
def test_each_of_the_parallel_runs_is_the_run_alone(name: str) -> None:
    """Run r by itself, on its own share of the noise and with the plain chain, ends at the same parameters."""
    problem, updates, samples = small(), 2, RUNS * BATCH
    parallel = Parallel(problem.chain, RUNS)
    together = Trainer(
        parallel,
        parallel.stacked(problem.params),
        kl_regularised(problem.objective, 0.3, parallel.stacked(problem.params)),
        EachRun(method(name, T, BATCH), RUNS),
        Settings(updates, samples, 1e-2),
        lambda update: generator(STREAM, update),
    )
    together.run()
    for run in range(RUNS):
        share = slice(run * BATCH, (run + 1) * BATCH)
        alone = Trainer(
            OfShare(problem.chain, samples, share),
            problem.params,
            kl_regularised(problem.objective, 0.3, problem.params),
            method(name, T, BATCH),
            Settings(updates, BATCH, 1e-2),
            lambda update: generator(STREAM, update),
        )
        alone.run()
        for key, value in alone.result().params.items():
            torch.testing.assert_close(together.result().params[key][run], value, rtol=1e-7, atol=1e-9)
    moved = together.result().params
    assert all(not torch.equal(value[0], value[1]) for value in moved.values())


@dataclass(frozen=True, eq=False)
class OfShare(Around):
    """A chain that draws the noise of a larger batch, and takes its own share of it."""

    chain: MLPChain
    samples: int
    share: slice

    def mean(self, params: Any, x: Tensor, t: int, condition: Any) -> Tensor:
        return self.chain.mean(params, x, t, condition)


@pytest.fixture(autouse=True)
def _noise_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = named.Estimator.draw

    def of_share(self: named.Estimator, chain: Any, params: Any, samples: int, source: torch.Generator) -> Any:
        if isinstance(chain, OfShare):
            return draw(self, chain.chain, params, chain.samples, source).of(chain.share)
        return draw(self, chain, params, samples, source)

    monkeypatch.setattr(named.Estimator, "draw", of_share)


def test_calls_are_those_that_are_made() -> None:
    """Count evaluations of the network, and the backward passes that reach it, in one update of each method."""
    problem = small()
    seen: Counter = Counter()

    class Watched(torch.autograd.Function):
        """The identity; its backward pass tells whether the inputs ask for a gradient."""

        @staticmethod
        def forward(ctx: Any, mean: Tensor, who: str) -> Tensor:
            ctx.who = who
            return mean.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            seen[ctx.who, "backward"] += 1
            return grad, None

    @dataclass(frozen=True, eq=False)
    class Counting(MLPChain):
        def mean(self, params: Any, x: Tensor, t: int, condition: Any) -> Tensor:
            who = "model" if params is not objective.running_costs[0].reference else "reference"
            seen[who, "forward"] += 1
            return Watched.apply(super().mean(params, x, t, condition), who)

    chain = Counting(problem.chain.beta, problem.chain.alpha_bar)
    objective = kl_regularised(problem.objective, 0.3, problem.params)
    for name in NAMES:
        seen.clear()
        leaves = {key: p.clone().requires_grad_() for key, p in problem.params.items()}
        list(method(name, T, BATCH).updates(chain, leaves, objective, BATCH, generator(STREAM, 0), None))
        cost = seen["model", "forward"] + seen["reference", "forward"]
        cost += 2 * seen["model", "backward"] + seen["reference", "backward"]
        assert cost == calls(name, T), (name, seen)


@every_method
def test_run_spends_no_more_than_its_budget_and_nearly_all_of_it(name: str) -> None:
    course, each = tune(name, small(), 0.1, PLAN, STREAM), BATCH * calls(name, T)
    for spent, updates in zip(course.calls, course.updates, strict=True):
        assert updates * each <= spent < (updates + 1) * each
    assert course.updates[-1] >= 6
    assert course.reward.shape == course.kl.shape == course.gradient.shape == (RUNS, 3)


def test_runs_start_at_the_pretrained_sampler_and_are_judged_alike() -> None:
    courses = [tune(name, small(), strength, PLAN, STREAM, gradients=True) for name in NAMES for strength in (0.1, 1.0)]
    for course in courses:
        np.testing.assert_array_equal(course.reward[:, 0], courses[0].reward[:, 0])
        np.testing.assert_array_equal(course.gradient[:, 0], courses[0].gradient[:, 0])  # the KL is flat there
        assert not course.kl[:, 0].any()
        assert (course.kl[:, 1:] > 0).all()
    for course, strength in zip(courses, (0.1, 1.0) * len(NAMES), strict=True):
        np.testing.assert_allclose(course.objective, course.reward - strength * course.kl, rtol=1e-12)


def test_gradient_norm_is_that_of_the_run_s_own_mean() -> None:
    """By central differences along each run's own gradient, which then has the norm as its derivative."""
    problem = small()
    chain = Parallel(problem.chain, 2)
    params = chain.stacked(problem.params)
    params["b3"][1] += 0.2
    objective = kl_regularised(problem.objective, 0.3, chain.stacked(problem.params))
    noise = named.first_order(T).draw(chain, params, 2 * 16, generator(STREAM, 5))
    leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
    returns = named.first_order(T).accumulate(chain, leaves, objective, noise)
    norms = gradient_norms(chain, params, objective, noise)
    scale = torch.tensor(norms / 2)
    step = {key: 1e-5 * p.grad / scale.reshape(-1, *[1] * (p.dim() - 1)) for key, p in leaves.items()}

    def means(sign: int) -> np.ndarray:
        moved = {key: (p.detach() + sign * step[key]).requires_grad_() for key, p in leaves.items()}
        there = named.first_order(T).accumulate(chain, moved, objective, noise)
        return there.reshape(2, -1).mean(1).numpy()

    assert returns.shape == (32,)
    assert norms[0] != norms[1]
    np.testing.assert_allclose((means(1) - means(-1)) / 2e-5, norms, rtol=1e-6)


def test_run_depends_on_its_stream_alone() -> None:
    first = tune("DPOK", small(), 0.1, PLAN, STREAM)
    tune("PI-FT, first order", small(), 0.1, PLAN, STREAM)
    np.testing.assert_array_equal(first.reward, tune("DPOK", small(), 0.1, PLAN, STREAM).reward)
    other = tune("DPOK", small(), 0.1, PLAN, STREAM.child("other"))
    assert not np.array_equal(first.reward, other.reward)


def test_kept_runs_are_those_made_and_belong_to_their_arguments(tmp_path: Path) -> None:
    made, fresh = (tuned(NAMES[0], small(), 0.1, PLAN, STREAM, tmp_path, gradients=g) for g in (True, False))
    again, alone = (
        tuned(NAMES[0], small(), 0.1, PLAN, STREAM, tmp_path, gradients=True),
        tune(NAMES[0], small(), 0.1, PLAN, STREAM, gradients=True),
    )
    assert len(list(tmp_path.iterdir())) == 2
    assert np.isnan(fresh.gradient).all()
    for key, value in vars(alone).items():
        for found in (vars(made)[key], vars(again)[key]):
            if key == "final":
                assert value.keys() == found.keys()
                assert all(torch.equal(value[k], found[k]) for k in value)
            else:
                assert value.dtype == found.dtype
                np.testing.assert_array_equal(value, found)
    other = small()
    other.params["b3"] += 0.1
    assert not np.array_equal(tuned(NAMES[0], other, 0.1, PLAN, STREAM, tmp_path).reward, fresh.reward)


@every_method
def test_methods_raise_the_objective_and_a_larger_strength_holds_the_kl_down(name: str) -> None:
    plan = replace(PLAN, calls=25 * 7 * T * 16, batch=16, runs=6, points=2, evaluation=512)
    found = {strength: tune(name, small(), strength, plan, STREAM) for strength in (0.03, 1.0)}
    gain = found[0.03].objective[:, -1] - found[0.03].objective[:, 0]
    assert (gain > 0.05).all()
    assert (found[1.0].kl[:, -1] < found[0.03].kl[:, -1]).all()


# --- exactly, on linear-quadratic problems -----------------------------------------------------------------------

SCHEDULE = ControlSchedule([0.6, 0.75, 0.9], [0.6, 0.5, 0.3], 0.2)
PROBLEM = LinearQuadratic.of_gaussian(
    SCHEDULE, [0.5, -0.2], [[0.25, 0.1], [0.1, 0.5]], [[1.2, 0.3], [0.3, -0.2]], [0.7, 0.4]
)
START = Gaussian(np.zeros(2), np.eye(2))


def exact_field(problem: LinearQuadratic, K: Tensor, *, dpok: bool) -> Tensor:
    """The exact gradient of J in K (T, d, d + 1), the controls beyond the score, by moments and autograd.

    With `dpok`, the moments of the states at which the costs are charged are held fixed.
    """
    schedule, K = problem.schedule, K.clone().requires_grad_()
    d = problem.dim
    mean, cov, total = torch.zeros(d, dtype=K.dtype), torch.eye(d, dtype=K.dtype), torch.zeros((), dtype=K.dtype)
    for t in range(schedule.steps):
        a, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
        m, c = (mean.detach(), cov.detach()) if dpok else (mean, cov)
        gap = K[t, :, :d] @ m + K[t, :, d]
        square = gap @ gap + torch.trace(K[t, :, :d] @ c @ K[t, :, :d].T)
        total = total - float(schedule.strength[t]) * (1 - a) ** 2 / (2 * a * sigma**2) * square
        F, f = torch.tensor(problem.F[t]), torch.tensor(problem.f[t])
        slope = (torch.eye(d, dtype=K.dtype) + (1 - a) * (F + K[t, :, :d])) / a**0.5
        mean = slope @ mean + (1 - a) * (f + K[t, :, d]) / a**0.5
        cov = slope @ cov @ slope.T + sigma**2 * torch.eye(d, dtype=K.dtype)
    Q, q = torch.tensor(problem.Q), torch.tensor(problem.q)
    total = total + q @ mean - 0.5 * torch.trace(Q @ (cov + torch.outer(mean, mean)))
    return torch.autograd.grad(total, K)[0]


@pytest.mark.parametrize("strength", [0.2, 0.6, [0.5, 0.3, 0.1]])
def test_dpok_gradient_vanishes_at_its_fixed_point_and_the_whole_gradient_at_the_optimum(strength: Any) -> None:
    problem = replace_strength(PROBLEM, strength)
    best = optimum(problem)
    points = {"DPOK": dpok_fixed_point(problem), "PI-FT": (best.K, best.k)}
    for name, point in points.items():
        K = as_params(problem, *point)["K"]
        for dpok in (True, False):
            field = exact_field(problem, K, dpok=dpok)
            if dpok == (name == "DPOK"):
                assert float(field.abs().max()) < 1e-12
            else:
                assert float(field.abs().max()) > 1e-3
    lost = evaluate(problem, best.K, best.k, START).objective - evaluate(problem, *points["DPOK"], START).objective
    assert lost > 1e-4


def test_ascent_along_dpok_s_expected_gradient_ends_at_its_fixed_point() -> None:
    problem = replace_strength(PROBLEM, 0.4)
    K = twin(problem).params["K"]
    for _ in range(300):
        K = K + 4.0 * exact_field(problem, K, dpok=True)
    torch.testing.assert_close(K, as_params(problem, *dpok_fixed_point(problem))["K"], rtol=1e-5, atol=1e-6)


@every_method
def test_sampled_batch_gradients_have_the_exact_mean(name: str) -> None:
    """Each method's own field, away from all fixed points; the other field is more than ten standard errors away."""
    generator = torch.Generator().manual_seed(11)
    params = {"K": 0.4 * torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)}
    sampler = batch_gradients(name, twin(PROBLEM), params, 0.2, batch=8, copies=2048)(STREAM)
    found = np.concatenate([sampler(index) for index in range(12)])
    assert found.shape == (12 * 2048, 18)
    error = found.std(0) / np.sqrt(len(found))
    own, other = (
        (found.mean(0) - exact_field(PROBLEM, params["K"], dpok=dpok).flatten().numpy()) / error
        for dpok in (name == "DPOK", name != "DPOK")
    )
    assert np.abs(own).max() < 5
    assert np.abs(other).max() > 10


def test_twin_of_a_linear_quadratic_problem_earns_the_exact_objective() -> None:
    best, problem = optimum(PROBLEM), twin(PROBLEM)
    exact = evaluate(PROBLEM, best.K, best.k, START)
    params, kl = as_params(PROBLEM, best.K, best.k), KLToReference(1.0, problem.params)
    noise = named.first_order(3).draw(problem.chain, params, 1 << 16, generator(STREAM, 1))
    roll = rollout(problem.chain, params, noise, cost=lambda m, x, t: kl(problem.chain, m, x, t, None))
    reward = problem.objective.reward(roll.latents[0], None)
    for sampled, value in ((reward, exact.reward), (roll.costs.sum(0), exact.step_kl.sum())):
        assert abs(float(sampled.mean()) - value) < 5 * float(sampled.std()) / 2**8


def replace_strength(problem: LinearQuadratic, strength: Any) -> LinearQuadratic:
    return LinearQuadratic(problem.schedule.with_strength(strength), problem.F, problem.f, problem.Q, problem.q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Plan(calls=10, learning_rate=0.1, points=1), r"^points must be >= 2, got 1$"),
        (lambda: method("REINFORCE", 3, 4), r"^name must be one of .*'DPOK'.*, got 'REINFORCE'$"),
        (lambda: dpok_fixed_point(replace_strength(PROBLEM, 0.02)), r"^strength\[2\] = 0.02: too small, step 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as fault:
        call()
    assert "\n" not in str(fault.value)
