"""The chapter At scale on a model of the user's: audit, its report, and the plan made from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import verifine
from algorithms import estimators as named
from algorithms.baselines import Constant, Learned
from algorithms.chain import rollout
from algorithms.sweep import DirectionalSources, sweep
from claims import at_scale, audits, on_samples
from claims.on_model import Model, prepared
from claims.on_samples import Sampled, Sampling, block_of, sampling
from scale import audit
from scale.config import Config, parse
from scale.methods import make_estimator
from scale.task import build

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


def test_a_chain_with_a_step_without_noise_is_asked_nothing_about_scores() -> None:
    left = {c.id for c in at_scale.chapter((Model("tiny", config(), densities=False),))}
    assert left == {
        f"at-scale.{name}"
        for name in (
            "first-order", "zeroth-order", "random-truncation", "rlr", "stratified", "adapters-off", "checkpointing",
            "images-and-prompts",
        )
    }  # fmt: skip


def test_a_short_chain_is_asked_what_it_can_answer() -> None:
    claims = {c.id: c for c in at_scale.chapter((Model("tiny", config(sampler={"steps": 1})),))}
    assert not {"at-scale.rlr", "at-scale.telescoped", "at-scale.stratified"} & set(claims)
    assert [check.name for check in claims["at-scale.half-order"].checks] == [
        "tiny: policy gradient, by log-densities",
        "tiny: policy gradient, sampled",
    ]


def test_nothing_is_sampled_unless_asked() -> None:
    claims = at_scale.chapter((Model("tiny", config(), sampled=False),))
    assert not [name for claim in claims for name in claim.statistical_readings()]


def test_a_large_network_is_not_asked_for_a_stored_graph_of_fifty_steps() -> None:
    assert "at-scale.memory" not in {c.id for c in at_scale.chapter((Model("tiny", config(), large=True),))}


def in_double(at: Sampling) -> Sampling:
    """The same in double precision, where a mean of products can be compared to rounding."""

    def double(value: object) -> object:
        return value.double() if isinstance(value, torch.Tensor) else value

    baseline = replace(at.baseline, **{name: double(value) for name, value in vars(at.baseline).items()})
    return Sampling(audit.in_double(at.task), baseline, at.gradient.double())


def test_shared_sources_give_every_estimators_own_estimate(cache: Path) -> None:
    at = in_double(sampling.__wrapped__(Model("tiny", config()), cache, 0))
    rng = np.random.default_rng(0)
    w = at_scale.SCORED.support(at) * rng.normal(size=(3, 4))
    first = (named.first_order(3), named.random_truncation(np.array([0.5, 0.3, 0.2]), debiased=True))
    mixed = (
        named.half_order(3, 2),
        named.policy_gradient(3),
        named.Estimator("signed", named.Credit.of(np.concatenate([w, np.zeros((3, 1))], 1))),
    )
    for group, estimators in ((at_scale.BACK_PROPAGATED, first), (at_scale.SCORED, mixed)):
        block = block_of(at, group, 0)
        for estimator in estimators:
            made = on_samples.scored(at, estimator)
            outcome = estimator.credit.draw(64, torch.Generator().manual_seed(5))
            noise, task = replace(block.noise, outcome=outcome), at.task
            own = made.directional(task.chain, task.params, task.objective, noise, block.direction, block.condition)
            found = Sampled(made).of(at, block, torch.Generator().manual_seed(5))
            torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)


def test_blocks_are_made_once_and_differ(cache: Path) -> None:
    at = sampling(Model("tiny", config()), cache, 0)
    blocks = [block_of(at, at_scale.BACK_PROPAGATED, i) for i in (0, 1, 0)]
    assert blocks[0] is blocks[2]
    assert not torch.equal(blocks[0].noise.initial, blocks[1].noise.initial)
    other = block_of(at, at_scale.SCORED, 0)
    assert not torch.equal(blocks[0].noise.initial, other.noise.initial)


def test_the_reference_is_the_derivative_by_central_differences(cache: Path) -> None:
    at = in_double(sampling.__wrapped__(Model("tiny", config()), cache, 0))
    block = block_of(at, at_scale.BACK_PROPAGATED, 0)
    black = replace(at.task.objective.reward, scorer=replace_differentiable(at.task.objective.reward.scorer))
    task = replace(at.task, objective=replace(at.task.objective, reward=black))
    settings = task.config.model_copy(update={"audit": task.config.audit.model_copy(update={"step": 1e-4})})
    differences = on_samples.reference(replace(task, config=settings), block.noise, block.condition, block.direction)
    torch.testing.assert_close(differences, block.reference, rtol=1e-5, atol=1e-9)


def test_estimators_are_sampled_on_the_shorter_chain_that_was_asked_for(cache: Path) -> None:
    short = config(audit={**SETTINGS["audit"], "steps": 2})
    model = Model("tiny", short)
    assert (sampling(model, cache, 0).steps, prepared(model, cache, 0).steps, model.sampled_steps) == (2, 3, 2)
    assert Model("tiny", config(audit={**SETTINGS["audit"], "steps": 50})).sampled_steps == 3


def test_the_baseline_is_a_value_function_where_the_pilot_can_fit_one(cache: Path) -> None:
    few = sampling(Model("tiny", config()), cache, 0)
    assert isinstance(few.baseline, Constant)  # 64 roll-outs for 80 features would be no fit
    many = sampling(Model("tiny", config(audit={**SETTINGS["audit"], "pilot": 256})), cache, 0)
    assert isinstance(many.baseline, Learned)
    noise = named.policy_gradient(3).draw(many.task.chain, many.task.params, 512, torch.Generator().manual_seed(1))
    roll = rollout(many.task.chain, many.task.params, noise, many.task.condition(512))
    reward = many.task.objective.reward(roll.latents[0], many.task.condition(512).reward)
    left = [float((reward - many.baseline(reward, roll.latents[k], k)).var() / reward.var()) for k in (1, 2, 3)]
    assert max(left) < 0.7, left


def test_the_natural_direction_has_the_largest_signal_to_noise_ratio() -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    samples = torch.randn(400, 6, generator=rng, dtype=torch.float64) @ mixing
    gradient = torch.randn(6, generator=rng, dtype=torch.float64)
    covariance = torch.cov(samples.T, correction=0)

    def ratio(v: torch.Tensor, ridge: float) -> float:
        noise = covariance + ridge * covariance.trace() / 400 * torch.eye(6)
        return float((gradient @ v) / (v @ noise @ v) ** 0.5)

    for ridge in (0.1, 1.0, 100.0):
        found = audit.natural_direction(samples, gradient, ridge)
        assert float(found.norm()) == pytest.approx(1)
        others = [found + 0.01 * step for step in torch.randn(50, 6, generator=rng, dtype=torch.float64)]
        assert ratio(found, ridge) > max(ratio(v, ridge) for v in others)
        assert ratio(found, ridge) > 1.05 * ratio(gradient, ridge)


def test_recomputed_steps_leave_the_gradient_of_one_graph_as_it_is(cache: Path) -> None:
    at = prepared(Model("tiny", config()), cache, 0)
    noise, condition = at.noise(2, "test")
    kept = audit.whole_graph_gradient(at.task, at.params, noise, condition)
    again = audit.whole_graph_gradient(at.task, at.params, noise, condition, recomputed=True)
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-14)


def test_a_reward_without_slope_is_said_to_be_one(cache: Path) -> None:
    at = prepared(Model("tiny", config()), cache, 0)
    zero = {name: torch.zeros_like(p) for name, p in at.params.items()}
    with pytest.raises(ValueError, match="gradient of reward brightness is 0.0"):
        at.components(zero, zero)


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


@pytest.fixture(scope="module")
def digits(cache: Path) -> None:
    """Put the digits' network, after ten updates, where the settings look for it."""
    from scale import digits as room

    train = room.train_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "train_digits", lambda folder, seed, updates, *rest: train(folder, seed, 10, *rest))
        room.digits_model(cache)


MODELS = {
    "tiny": SETTINGS,
    "digits": {
        **SETTINGS, "model": {"kind": "digits"}, "sampler": {"steps": 3}, "prompts": {"train": ["0", "7"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_audit_writes_a_report_and_plan_reads_it(
    kind: str, tmp_path: Path, cache: Path, digits: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = MODELS[kind]
    settings = {**settings, "audit": {**settings["audit"], "samples": 0}}  # so few roll-outs would settle nothing
    file, out = tmp_path / "mine.yaml", tmp_path / "audit"
    file.write_text(json.dumps(settings))
    common = [str(file), "--cache", str(cache)]
    assert verifine.main(["audit", *common, "--out", str(out), "--jobs", "1"]) == 0
    said = capsys.readouterr()
    count = len(at_scale.chapter((Model(kind, parse(Config, settings, "test"), sampled=False),)))
    assert f"{count} of {count} statements verified on this model" in said.out
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


def test_estimators_are_judged_by_sampling_in_two_processes(tmp_path: Path, cache: Path) -> None:
    """The cheap part of a sampled audit: back-propagation, and what peers get wrong of it.

    Truncations at random take ten times the roll-outs: they are left to audits.
    """
    wanted = {"at-scale.first-order", "at-scale.importance-ratio"}
    settings = config(audit={**SETTINGS["audit"], "samples": None, "pilot": 128, "batch": 1024}, sampler={"steps": 2})
    run = audits.audit(settings, tmp_path, cache, False, lambda *a: None, lambda done: None, 2, tuple(wanted))
    assert {e.statement.id for e in run.evidence} == wanted
    assert all(e.as_recorded for e in run.evidence), [(e.statement.id, e.error) for e in run.evidence]
    readings = {r.name: r for e in run.evidence for c in e.checks for r in c.readings if r.samples}
    assert readings["outputs detached step by step"].verdict == "refuted"
    assert readings["images denormalised twice"].verdict == "refuted"
    assert min(r.samples for r in readings.values()) > 1000


def test_an_unknown_claim_is_refused_with_the_nearest(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="at-scale.rlrr: no claim about this model, did you mean at-scale.rlr?"):
        audits.audit(config(), tmp_path, cache, False, lambda *a: None, lambda done: None, 1, ("at-scale.rlrr",))


@pytest.mark.parametrize("method", ["zeroth-order", "rlr", "first-order"])
def test_memory_is_predicted_with_noise_on_the_parameters_too(method: str, cache: Path) -> None:
    settings = config(method={"name": method}, sampler={"steps": 4})
    task = build(settings, cache)
    estimator = make_estimator(settings.method, task.chain, task.params, task.objective, task.generator("plan"))
    measured, _ = audit._bytes(task, estimator, 4)
    assert audit.predicted_bytes(settings, cache, method, 4) == pytest.approx(measured, rel=0.05)
