"""SFT-PG's toy experiments: paired runs, kept runs, and a tuned sampler that is nearer to the data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from toy import experiments
from toy.experiments import draw
from toy.few_step import StepConditionedChain, pretrain, schedule
from toy.shortcut_experiments import ABLATION, ARMS, PUBLISHED, Arm, Plan, fine_tune, policy, sliced
from verdicts.streams import Stream

STREAM = Stream(6).child("tests", "shortcut-experiments")
SHORT = Plan(pretraining=64, updates=4, points=3, evaluation=200, batch=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", [*ARMS, *ABLATION])
def test_every_arm_starts_from_one_sampler_and_moves_it(name: str, cache: Path) -> None:
    arm = (ARMS | ABLATION)[name]
    _, (before,) = pretrain("swiss_roll", 10, [0], STREAM, cache, updates=64)
    seen: list[tuple[int, int]] = []
    run = fine_tune("swiss_roll", arm, 0, STREAM, cache, SHORT, lambda done, total: seen.append((done, total)))
    first = sliced(
        StepConditionedChain.of(schedule(10)),
        before,
        "swiss_roll",
        200,
        STREAM.child(0, "fine-tuning", "evaluation", 0),
    )
    assert run.updates == (0, 2, 4)
    assert run.distances[0] == first
    assert any(not torch.equal(run.params[k], before[k]) for k in before)
    again = fine_tune("swiss_roll", arm, 0, STREAM, cache, SHORT)
    assert again.distances == run.distances
    assert all(torch.equal(again.params[k], run.params[k]) for k in before)
    if name != "1 step":  # the same recipe as the published arm: one run serves both
        assert seen == [(0, 4), (2, 4), (4, 4)]


def test_arms_and_seeds_differ(cache: Path) -> None:
    runs = [
        fine_tune("swiss_roll", arm, seed, STREAM, cache, SHORT)
        for arm, seed in ((ARMS["SFT (GP)"], 0), (ARMS[PUBLISHED], 0), (ARMS[PUBLISHED], 1))
    ]
    finals = {run.distances[-1] for run in runs}
    assert len(finals) == 3


def test_the_printed_settings() -> None:
    method = ARMS[PUBLISHED].method
    assert (method.gradient, method.regulariser, method.critic_steps, method.generator_steps) == (
        "policy",
        "baseline",
        5,
        1,
    )
    assert (method.strength, method.critic_learning_rate) == (0.1, 1e-3)
    assert {arm.clip for name, arm in ABLATION.items() if name.startswith("5")} == {None, 1.0, 0.1, 0.001}


def test_samples_do_not_depend_on_the_pieces(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, (params,) = pretrain("swiss_roll", 10, [0], STREAM, cache, updates=64)
    whole = draw(chain, params, 100, STREAM)
    monkeypatch.setattr(experiments, "PIECE", 7)
    np.testing.assert_allclose(draw(chain, params, 100, STREAM), whole, atol=1e-5)


def test_sft_pg_brings_a_sampler_nearer_and_a_wrong_sign_does_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(pretraining=1000, updates=150, points=2, evaluation=4000, average=0.9)
    right = fine_tune("two_moons", ARMS[PUBLISHED], 0, STREAM, cache, plan).distances
    assert right[-1] < 0.7 * right[0]
    step = torch.optim.AdamW.step

    def downhill(self: torch.optim.AdamW, *arguments: object) -> object:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else -p.grad
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", downhill)  # the generator's; the critic has Adam
    other = Arm(policy(), clip=1e9)  # another recipe, so that the run is not the kept one
    wrong = fine_tune("two_moons", other, 0, STREAM, cache, plan).distances
    assert wrong[0] == right[0]
    assert wrong[-1] > wrong[0]


def test_points_must_divide_the_updates() -> None:
    with pytest.raises(ValueError, match=r"points must be >= 2 and points - 1 divide updates = 4, got points = 4"):
        Plan(updates=4, points=4)
