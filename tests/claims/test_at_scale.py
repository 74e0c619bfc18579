"""The chapter At scale on a model of the user's: audit, its report, and the plan made from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import verifine
from algorithms import estimators as named
from algorithms.sweep import DirectionalSources, sweep
from claims import at_scale, audits, on_model
from claims.on_model import Model, Sampled, block_of, prepared
from scale.config import Config, parse

SETTINGS = {
    "model": {"kind": "tiny"},
    "sampler": {"steps": 3, "guidance": 2.0},
    "lora": {"rank": 2},
    "prompts": {"train": ["a dog", "the cat"]},
    "method": {"name": "policy-gradient"},
    "audit": {
        "pilot": 16, "batch": 64, "samples": 64, "directions": 1, "measured": 8, "measured_batch": 4, "error": 0.2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config(**changes: object) -> Config:
    return parse(Config, {**SETTINGS, **changes}, "test")


def test_every_claim_appears_for_a_model_with_a_smooth_reward_and_none_needs_a_gradient_for_a_black_box() -> None:
    smooth = at_scale.chapter((Model("tiny", config()),))
    assert len(smooth) == len(at_scale.MAKERS)
    black = at_scale.chapter((Model("tiny", config(reward={"name": "jpeg_compressibility"})),))
    assert {c.id for c in smooth} - {c.id for c in black} >= {"at-scale.first-order", "at-scale.stratified"}
    assert {"at-scale.half-order", "at-scale.telescoped"} <= {c.id for c in black}


def test_shared_sources_give_every_estimators_own_estimate(cache: Path) -> None:
    model = Model("tiny", config())
    at = prepared(model, cache, 0, double=True)
    block = block_of(at, 0)
    rng = np.random.default_rng(0)
    w = np.tril(rng.normal(size=(3, 4)), 1)
    for estimator in (
        named.first_order(3),
        named.half_order(3, 2),
        named.random_truncation(np.array([0.5, 0.3, 0.2]), debiased=True),
        named.Estimator("signed", named.Credit.of(np.concatenate([w, np.zeros((3, 1))], 1))),
    ):
        made = on_model.with_baseline(estimator, on_model.Constant(at.mean_return))
        outcome = estimator.credit.draw(64, torch.Generator().manual_seed(5))
        noise = replace(block.noise, outcome=outcome)
        task = at.task
        own = made.directional(task.chain, task.params, task.objective, noise, at.direction, block.condition)
        found = Sampled(made).of(at, block, torch.Generator().manual_seed(5))
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)


def test_the_reference_is_the_derivative_by_central_differences(cache: Path) -> None:
    at = prepared(Model("tiny", config()), cache, 0, double=True)
    block = block_of(at, 0)
    black = replace(at.task.objective.reward, scorer=replace_differentiable(at.task.objective.reward.scorer))
    task = replace(at.task, objective=replace(at.task.objective, reward=black))
    settings = task.config.model_copy(update={"audit": task.config.audit.model_copy(update={"step": 1e-4})})
    differences = on_model.reference(replace(task, config=settings), block.noise, block.condition, at.direction)
    torch.testing.assert_close(differences, block.reference, rtol=1e-5, atol=1e-9)


class replace_differentiable:
    """A scorer that hides its gradient."""

    differentiable = False

    def __init__(self, scorer):
        self.scorer, self.name = scorer, scorer.name

    def __call__(self, images, prompts):
        return self.scorer(images, prompts)


def test_directional_sources_refuse_parameter_noise_as_a_source() -> None:
    readout = DirectionalSources({"w": torch.zeros(2)}, 3, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="no source of its own"):
        readout.noise(torch.ones(3), {}, slice(None))
    assert sweep is not None


def test_audit_writes_a_report_and_plan_reads_it(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only what is to rounding: what so few roll-outs can tell by sampling is nothing.
    identities = tuple(
        m for m in at_scale.MAKERS if m in (at_scale.first_order, at_scale.log_densities, at_scale.ratio)
    )
    monkeypatch.setattr(audits, "chapter", lambda models: at_scale.chapter([replace_sampled(m) for m in models]))
    monkeypatch.setattr(at_scale, "MAKERS", identities)
    file, out = tmp_path / "mine.yaml", tmp_path / "audit"
    file.write_text(json.dumps(SETTINGS))
    common = [str(file), "--cache", str(cache)]
    assert verifine.main(["audit", *common, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "3 of 3 statements verified on this model" in said.out
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Estimators on this model" in page
    assert (out / "report.pdf").stat().st_size > 1000
    names = {m["estimator"] for m in json.loads((out / "measured.json").read_text())}
    assert names == {"policy-gradient", "first-order", "tho"}  # SRT and RLR as they are by default want longer chains

    monkeypatch.setenv("COLUMNS", "240")
    assert verifine.main(["plan", *common, "--audit", str(out), "--memory", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert "Estimators on" in said
    assert "predicted" in said

    assert verifine.main(["plan", *common, "--audit", str(out), "--set", "sampler.steps=2"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert verifine.main(["plan", *common, "--audit", str(tmp_path / "none")]) == 2
    assert "holds no audit" in capsys.readouterr().err


def replace_sampled(model: Model) -> Model:
    return Model(model.name, model.settings, sampled=False)
