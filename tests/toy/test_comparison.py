"""The comparison: costs counted by hand, runs that depend on their names alone, and methods that learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms import credit as credits
from algorithms.chain import rollout
from algorithms.estimators import with_redrawn_noise
from algorithms.objective import Objective
from algorithms.telescoped import band
from algorithms.training import FromEstimator
from theory import schedules
from toy import comparison
from toy.comparison import (
    ABLATION,
    BLACK_BOX,
    METHODS,
    Contender,
    Curve,
    Curves,
    Plan,
    Problem,
    compare,
    contender,
    read_out,
    run,
    swiss_roll,
    truncation,
    untuned,
    wins,
)
from toy.ddpm import MLPChain, initial_parameters
from toy.rewards import Bump, Bumps, Threshold
from verdicts.streams import Stream

STREAM = Stream(5).child("tests", "comparison")
T, BATCH = 5, 8
PLAN = Plan(calls=14 * 4 * T * BATCH, batch=BATCH, learning_rate=1e-2, points=3, evaluation=64)
NAMES = sorted({*METHODS, *BLACK_BOX, *ABLATION.values()})


def small(reward: Bumps | Threshold = Bumps(((0.9, 0.3), (-0.6, 0.6)), (1.0, 0.6), 1.0)) -> Problem:  # noqa: B008
    chain = MLPChain.of(schedules.linear(T, 0.05, 0.5))
    return Problem(chain, initial_parameters(chain, 6, STREAM), Objective(reward))


def black_box() -> Problem:
    return small(Threshold(Bumps(((0.0, 0.0),), (1.0,), 1.0), 0.5))


def test_costs_are_the_counted_network_evaluations() -> None:
    """By hand, T = 5, one sample: a roll-out is 5, a step visited 1, a gradient in the parameters 2, one in x 1."""
    calls = {name: contender(name, small(), 1).calls for name in NAMES}
    assert calls["first order"] == calls["DDPO"] == 5 + 5 * 3
    assert calls["DRaFT-1"] == 5 + 3
    assert calls["DRaFT-LV"] == 5 + 3 * 3
    assert calls["AlignProp, uniform"] == 5 + 3 * (1 + 2 + 3 + 4) / 4
    assert calls["SRT(2)"] == 5 + 3 * 2
    assert calls["DDPO, PPO-clip"] == 5 + 2 * 5 * 3
    assert calls["RLR without HO"] == 5 + 3
    assert calls["RLR"] == calls["RLR without ZO"] == 5 + 3 + 3 * 2  # step 1, and the steps j + 1 and j + 2
    assert calls["RLR, antithetic"] == 2 * calls["RLR"]
    assert calls["zeroth order, antithetic"] == 2 * 5
    # Rows {0, 1}, {0, 1, 2}, {2, 3}, {3, 4}, {4, 5}; pulled back: two at step 1, then one each.
    assert calls["THO(2)"] == 5 + 5 * 3 + (2 + 1 + 1 + 1)
    assert contender("THO(2)", black_box(), 1).calls == 5 + 5 * 3 + 3  # the fused pass at step 1 pulls for nothing


def test_pilots_pay_for_every_source_by_itself() -> None:
    support = np.concatenate([band(T, 2), np.zeros((T, 1), bool)], 1)
    sources = 2 + 3 + 2 + 2 + 2
    assert read_out(credits.Credit.of(support.astype(float))) == 5 + 5 + 2 * sources + (2 + 1 + 1 + 1)
    assert read_out(credits.first_order(T)) == 5 + 5 + 2 * 5 + 4


def test_pilots_take_a_quarter_of_the_cost_in_the_long_run() -> None:
    for name in ("THO(2)", "SRT(2)"):
        found = contender(name, small(), BATCH)
        share = found.pilot / (found.pilot + found.every * found.calls)
        assert 0.2 < share <= 0.25


def test_affordable_is_the_most_that_the_budget_pays() -> None:
    found = Contender(contender("DDPO", small(), 4).method, calls=10.0, pilot=25.0, every=3)
    assert [found.spent(n) for n in range(5)] == [0, 35, 45, 55, 90]
    assert [found.affordable(c) for c in (0, 34.9, 35, 54, 89, 90)] == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_run_spends_no_more_than_its_budget_and_nearly_all_of_it(name: str) -> None:
    found, curve = contender(name, small(), BATCH), run(name, small(), PLAN, STREAM, 0)
    for calls, updates in zip(curve.calls, curve.updates, strict=True):
        assert found.spent(int(updates)) <= calls < found.spent(int(updates) + 1)
    assert curve.updates[-1] > curve.updates[0] == 0
    assert curve.reward[0] != curve.reward[-1]


@pytest.mark.parametrize("name", ["DDPO", "THO(2)", "RLR"])
def test_run_depends_on_its_stream_name_and_seed_alone(name: str) -> None:
    first = run(name, small(), PLAN, STREAM, 3).reward
    run("SRT(2)", small(), PLAN, STREAM, 0)
    np.testing.assert_array_equal(first, run(name, small(), PLAN, STREAM, 3).reward)
    for stream, seed in ((STREAM, 4), (STREAM.child("other"), 3)):
        assert not np.array_equal(first, run(name, small(), PLAN, stream, seed).reward)


def test_all_methods_are_judged_on_the_same_roll_outs() -> None:
    starts = {name: run(name, small(), PLAN, STREAM, 1).reward[0] for name in ("DDPO", "DRaFT-1", "THO(2)")}
    assert len({*starts.values(), untuned(small(), PLAN, STREAM, 1).reward[0]}) == 1


@pytest.mark.parametrize("name", BLACK_BOX)
def test_black_box_methods_need_no_gradient_of_the_reward(name: str) -> None:
    assert np.isfinite(run(name, black_box(), PLAN, STREAM, 0).reward).all()


@pytest.mark.parametrize("name", ["first order", "DRaFT-LV", "RLR", "SRT(2)"])
def test_pathwise_methods_refuse_a_black_box(name: str) -> None:
    with pytest.raises(ValueError, match="differentiable"):
        run(name, black_box(), PLAN, STREAM, 0)


@pytest.mark.parametrize("name", ["first order", "DDPO", "DDPO, PPO-clip", "SRT(2)", "THO(2)", "DRaFT-LV"])
def test_methods_raise_the_reward(name: str) -> None:
    plan = Plan(calls=40 * 4 * T * 32, batch=32, learning_rate=1e-2, points=2, evaluation=2048)
    before, after = run(name, small(), plan, STREAM, 0).reward
    assert after > before + 0.1


def test_weights_are_fitted_again_on_schedule() -> None:
    fits: list[int] = []
    problem, made = small(), contender("DDPO", small(), BATCH).method

    def fit(params: object, source: torch.Generator) -> object:
        fits.append(1)
        return made.estimator

    method = comparison.Refitted(fit, 3)
    leaves = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    seen = []
    for update in range(7):
        list(method.updates(problem.chain, leaves, problem.objective, BATCH, torch.Generator().manual_seed(update)))
        seen.append(len(fits))
    assert seen == [1, 1, 1, 2, 2, 2, 3]


def test_truncation_curves_count_updates_and_differ_by_length() -> None:
    found = [truncation(k, small(), PLAN, 4, STREAM, [0, 1]) for k in (1, 5)]
    assert all(c.reward.shape == (2, 3) and c.updates.tolist() == [0, 2, 4] for c in found)
    assert found[0].calls[-1] == 4 * BATCH * 8
    assert found[1].calls[-1] == 4 * BATCH * 20
    assert not np.array_equal(found[0].reward, found[1].reward)


SIDE_BY_SIDE = [name for name in NAMES if name not in ("DDPO, PPO-clip", "DRaFT-LV", "SRT(2)", "THO(2)")]


@pytest.mark.parametrize("name", [*SIDE_BY_SIDE, "SRT(2)"])
def test_compare_stacks_the_runs_of_the_seeds_as_if_each_had_been_alone(name: str) -> None:
    curves = compare([name], small(), PLAN, STREAM, [2, 0, 7])[name]
    assert curves.reward.shape == (3, PLAN.points)
    for row, seed in zip(curves.reward, [2, 0, 7], strict=True):
        np.testing.assert_allclose(row, run(name, small(), PLAN, STREAM, seed).reward, rtol=1e-9)


def test_side_by_side_are_runs_of_estimators_that_are_not_fitted_on_the_way() -> None:
    together = [name for name in NAMES if comparison.side_by_side(contender(name, small(), BATCH).method, small())]
    assert together == SIDE_BY_SIDE
    redrawn = with_redrawn_noise(contender("RLR", small(), BATCH).method.estimator)
    assert not comparison.side_by_side(FromEstimator(redrawn), small())
    prompted = replace(small(), condition=lambda samples: torch.zeros(samples, 1))
    assert not comparison.side_by_side(contender("DDPO", small(), BATCH).method, prompted)


def test_summaries_of_curves() -> None:
    calls, updates = np.array([0.0, 1.0, 2.0]), np.array([0, 1, 2])
    runs = [Curve(calls, np.array(r), updates) for r in ([0.0, 3.0, 1.0], [1.0, 2.0, 4.0])]
    curves = Curves.of(runs)
    assert curves.final.tolist() == [1.0, 4.0]
    assert curves.average.tolist() == [2.0, 3.0]
    assert curves.fallen.tolist() == [2.0, 0.0]
    assert wins(curves.final, curves.average) == 1


def test_swiss_roll_tasks_share_the_sampler_and_differ_in_the_reward(tmp_path: Path, monkeypatch: object) -> None:
    def quick(data: str, schedule: object, stream: Stream, cache: Path, width: int) -> object:
        chain = MLPChain.of(schedule)
        return chain, initial_parameters(chain, width, stream)

    monkeypatch.setattr(comparison, "train", quick)
    problems = {name: swiss_roll(name, STREAM, tmp_path) for name in comparison.REWARDS}
    chain, params = problems["narrow"].chain, problems["narrow"].params
    assert chain.steps == 10
    assert sum(p.numel() for p in params.values()) == 770
    noise = comparison.named.first_order(10).draw(chain, params, 256, torch.Generator().manual_seed(1))
    x0 = rollout(chain, params, noise).latents[0]
    narrow, box = (problems[name].objective.reward(x0, None) for name in ("narrow", "black box"))
    assert torch.equal(box, (narrow > 0.5).double())
    assert [p.objective.reward.differentiable for p in problems.values()] == [True, True, False]


X = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64)


def test_bumps_add_up() -> None:
    reward = Bumps(((0.5, 0.0), (2.0, 1.0)), (1.0, -3.0), 0.5)
    expected = [
        np.exp(-1.0 / 0.5) - 3 * np.exp(-(2.25 + 4) / 0.5),
        np.exp(-(2.25 + 0.0625) / 0.5) - 3 * np.exp(-0.5625 / 0.5),
    ]
    np.testing.assert_allclose(reward(X, None), expected, rtol=1e-14)
    torch.testing.assert_close(Bumps(((0.3, 0.3),), (1.0,), 0.7)(X, None), Bump(0.3, 0.7)(X, None))
    assert torch.autograd.gradcheck(lambda x: reward(x, None), X.clone().requires_grad_())


def test_threshold_is_one_strictly_above_its_level() -> None:
    reward = Bump(0.0, 1.0)
    levels = reward(X, None)
    assert Threshold(reward, 0.1)(X, None).tolist() == (levels > 0.1).double().tolist()
    assert Threshold(reward, float(levels[0]))(X, None)[0] == 0
    assert not Threshold(reward, 0.1).differentiable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bumps(((0.0, 0.0),), (1.0, 2.0), 1.0), r"^weights must be one per target, got 2 for 1 targets$"),
        (lambda: Bumps((), (), 1.0), r"^weights must be one per target, got 0 for 0 targets$"),
        (lambda: Bumps(((0.0, 0.0),), (1.0,), 0.0), r"^width must be > 0, got 0.0$"),
        (lambda: contender("Adam", small(), 4), r"^name must be one of .*'DDPO'.*, got 'Adam'$"),
        (lambda: Plan(points=1), r"^points must be >= 2, got 1$"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
