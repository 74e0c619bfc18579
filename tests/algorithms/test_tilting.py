"""Reward tuning on samples: against the exact n-point problem of theory, and mistakes that the released code makes."""

from typing import Any

import numpy as np
import pytest
import torch

from algorithms.bilevel import PenaltyBilevel
from algorithms.tilting import (
    STRENGTH,
    WEIGHTS,
    Gate,
    MinusUpper,
    Regularised,
    Tilt,
    at_least,
    divergence,
    effective_share,
    log_weights,
    uniform,
)
from theory.reward_tuning import FiniteRewardTuning
from verdicts.streams import Stream

RNG = Stream(8).child("tests", "tilting").generator()
N, STRENGTHS, GAMMA = 12, np.array([0.7, 1.5, 4.0]), 8.0
UPPER, LOWER = RNG.normal(size=(3, N)), RNG.normal(size=(3, N))
CASES = [FiniteRewardTuning(np.full(N, 1 / N), UPPER[i], LOWER[i]) for i in range(3)]
X = {STRENGTH: torch.tensor(STRENGTHS)}


def rewards(update):
    return torch.tensor(UPPER), torch.tensor(LOWER)


def sgd(rate=0.1, momentum=0.0):
    return lambda tensors: torch.optim.SGD(tensors, lr=rate, momentum=momentum)


def method(seen, *, direction: Any = "forward", mixed: Any = "penalty", rate=0.0, **options):
    start = options.pop("start", X)
    return PenaltyBilevel(
        MinusUpper(), Regularised(direction), Tilt(rewards, mixed), start, uniform(start[STRENGTH], N), gamma=GAMMA,
        optimizer=options.pop("optimizer", sgd(rate)), callback=lambda update, record: seen.append(record), **options,
    )  # fmt: skip


def gradient(**options):
    seen = []
    method(seen, **options).run(1)
    return seen[0].gradient[STRENGTH].numpy()


def test_weights_are_those_of_the_tilts_of_theory():
    y, z = (Tilt(rewards).solve(X, {}, gamma, 1)[WEIGHTS].exp().numpy() for gamma in (None, GAMMA))
    released = Tilt(rewards, "released").solve(X, {}, GAMMA, 1)[WEIGHTS].exp().numpy()
    for i, case in enumerate(CASES):
        np.testing.assert_allclose(y[i], case.tilted(STRENGTHS[i]), rtol=1e-12)
        np.testing.assert_allclose(z[i], case.tilted(STRENGTHS[i], GAMMA), rtol=1e-12)
        np.testing.assert_allclose(released[i], case.tilted(STRENGTHS[i], 1 / GAMMA), rtol=1e-12)
    w = np.exp((LOWER[0] + UPPER[0] / GAMMA) / STRENGTHS[0])
    np.testing.assert_allclose(z[0], w / w.sum(), rtol=1e-12)


def test_gradient_is_that_of_the_penalty_function_of_the_points():
    found, reverse = gradient(), gradient(direction="reverse")
    for i, case in enumerate(CASES):
        assert found[i] == pytest.approx(case.penalty_slope(STRENGTHS[i], GAMMA), rel=1e-10)
        assert reverse[i] == pytest.approx(case.released_slope(STRENGTHS[i], GAMMA), rel=1e-10)
    assert np.abs(found - reverse).min() > 1e-3
    swapped = gradient(mixed="released")
    assert np.abs(found - swapped).min() > 1e-3


def test_gradient_is_that_of_finite_differences():
    def value(strength, i):  # F_gamma = -gamma strength (log Z^gamma - log Z*)
        both, alone = (np.log(np.mean(np.exp(r / strength))) for r in (UPPER[i] / GAMMA + LOWER[i], LOWER[i]))
        return -GAMMA * strength * (both - alone)

    expected = [(value(s + 1e-5, i) - value(s - 1e-5, i)) / 2e-5 for i, s in enumerate(STRENGTHS)]
    np.testing.assert_allclose(gradient(), expected, rtol=1e-6)


def test_run_ends_at_the_minimum_of_the_penalty_function():
    case = FiniteRewardTuning(np.full(3, 1 / 3), [1.0, 0.2, 0.0], [0.9, 1.6, -1.0])
    best = case.penalty_optimum(GAMMA)
    start = torch.tensor([0.5, 5.0]).double()
    shared = torch.tensor(case.upper).expand(2, 3), torch.tensor(case.lower).expand(2, 3)
    run = PenaltyBilevel(
        MinusUpper(), Regularised(), Tilt(lambda update: shared), {STRENGTH: start}, uniform(start, 3), gamma=GAMMA,
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1), project=at_least(0.05),
    )  # fmt: skip
    run.run(600)
    np.testing.assert_allclose(run.x[STRENGTH].numpy(), best, rtol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_is_the_sum_by_hand(direction):
    logs = log_weights(torch.tensor(UPPER), X[STRENGTH])
    w = logs.exp().numpy()
    forward, reverse = (w * np.log(N * w)).sum(-1), -(np.log(N * w) / N).sum(-1)
    np.testing.assert_allclose(
        divergence(logs, direction).numpy(), forward if direction == "forward" else reverse, rtol=1e-12
    )
    assert float(divergence(uniform(torch.tensor(1.0).double(), N)[WEIGHTS], direction)) == pytest.approx(0, abs=1e-15)


def test_effective_share_is_that_of_theory():
    for gamma in (None, GAMMA):
        found = effective_share(Tilt(rewards).solve(X, {}, gamma, 1)[WEIGHTS]).numpy()
        expected = [case.effective_sample_size(s, gamma) for case, s in zip(CASES, STRENGTHS, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    one = torch.log(torch.tensor([1.0, 1e-30, 1e-30]).double())
    assert float(effective_share(one)) == pytest.approx(1 / 3)


def test_gate_judges_each_problem_by_the_less_even_of_its_weights():
    even, peaked = torch.full((N,), -np.log(N)).double(), torch.full((N,), -60.0).double()
    peaked[0] = 0.0
    y = {WEIGHTS: torch.stack([even, peaked, even, peaked])}
    z = {WEIGHTS: torch.stack([even, even, peaked, peaked])}
    assert Gate(2.0)({}, y, z).tolist() == [True, False, False, False]
    assert Gate(1.0 - 0.0)({}, y, y).tolist() == [True, True, True, True]
    half = torch.log(torch.tensor([0.5, 0.5, 1e-40, 1e-40]).double())
    assert bool(Gate(1.99)({}, {WEIGHTS: half}, {WEIGHTS: half}))
    assert not bool(Gate(2.01)({}, {WEIGHTS: half}, {WEIGHTS: half}))


def test_gate_holds_single_problems_of_a_run_with_momentum():
    sizes = [
        N * min(case.effective_sample_size(s), case.effective_sample_size(s, GAMMA))
        for case, s in zip(CASES, STRENGTHS, strict=True)
    ]
    order = np.argsort(sizes)
    smallest = (sizes[order[0]] + sizes[order[1]]) / 2  # refuses one of three
    seen, free = [], []
    method(seen, gate=Gate(smallest), optimizer=sgd(0.01, 0.9)).run(3)
    method(free, optimizer=sgd(0.01, 0.9)).run(3)
    refused = torch.zeros(3, dtype=torch.bool)
    refused[int(order[0])] = True
    assert torch.equal(seen[0].refused, refused)
    assert torch.equal(seen[2].x[STRENGTH][refused], X[STRENGTH][refused])
    assert torch.equal(seen[2].x[STRENGTH][~refused], free[2].x[STRENGTH][~refused])


def test_strengths_have_a_floor():
    project = at_least(0.1)
    other = torch.tensor(-5.0)
    found = project({STRENGTH: torch.tensor([-1.0, 0.05, 0.1, 2.0]), "other": other})
    torch.testing.assert_close(found[STRENGTH], torch.tensor([0.1, 0.1, 0.1, 2.0]))
    assert found["other"] is other


def test_both_solutions_see_the_samples_of_the_update():
    asked = []

    def drawn(update):
        asked.append(update)
        return torch.tensor(UPPER) + update, torch.tensor(LOWER) * update

    start = X[STRENGTH]
    run = PenaltyBilevel(
        MinusUpper(), Regularised(), Tilt(drawn), X, uniform(start, N), gamma=GAMMA, optimizer=sgd(0.0)
    )
    run.run(2)
    assert asked == [1, 1, 2, 2]
    expected = log_weights(torch.tensor(LOWER) * 2, start)
    assert torch.equal(run.y[WEIGHTS], expected)


def test_even_weights():
    weights = uniform(torch.ones(2, 3).double(), 5)[WEIGHTS]
    assert weights.shape == (2, 3, 5)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights.exp().numpy(), 0.2, rtol=1e-14)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf"), float("nan")])
def test_strength_must_be_positive_and_finite(strength):
    with pytest.raises(ValueError, match=f"strength must be positive and finite, got {strength}"):
        log_weights(torch.tensor(UPPER), torch.tensor([1.0, strength, 2.0]).double())


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1])
def test_rewards_must_be_finite(which, wrong):
    both = [torch.tensor(UPPER), torch.tensor(LOWER)]
    both[which][2, 3] = wrong
    run = PenaltyBilevel(
        MinusUpper(), Regularised(), Tilt(lambda update: (both[0], both[1])), X, uniform(X[STRENGTH], N), gamma=GAMMA,
        optimizer=sgd(0.1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="reward must be finite for every sample"):
        run.run(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(0.5), "smallest effective sample size must be >= 1"),
        (lambda: Gate(float("nan")), "smallest effective sample size must be >= 1"),
        (lambda: at_least(0.0), "smallest strength must be positive"),
        (lambda: at_least(float("inf")), "smallest strength must be positive and finite"),
        (lambda: uniform(torch.tensor(1.0), 0), "samples must be >= 1"),
        (lambda: Regularised("sideways"), "direction must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: divergence(torch.zeros(1), "sideways"), "direction must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Tilt(rewards, "mixed"), "mixed must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Regularised().gradient(X, {}, (1,), "u"), "of must be 'x'"),
        (lambda: MinusUpper().gradient(X, {}, (1,), "u"), "of must be 'x'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_other_samples_than_the_run_started_with_are_refused():
    run = PenaltyBilevel(
        MinusUpper(), Regularised(), Tilt(rewards), X, uniform(X[STRENGTH], N + 1), gamma=GAMMA, optimizer=sgd()
    )
    with pytest.raises(ValueError, match="the solver's y must have names and shapes"):
        run.run(1)
