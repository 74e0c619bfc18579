"""Choosing the entropy strength: what each method chooses, what it costs, and that nothing is lost or done twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import verifine
from scale import strength
from scale.config import STRENGTH_METHODS, Config, Strength, load_config
from scale.journal import Journal
from scale.metrics import frechet_distance
from scale.strength import BASE, bilevel, tune
from scale.strength_table import Choice, Cost, Row, Tuned, markdown, summary

STEPS, ROUNDS, POOL, TRIED, SHOWN = 2, 1, 8, 2, 6
TEXTS = ["the digit", "a thing"]
SHORT = [
    "device=cpu",
    "method={name: first-order}",
    f"sampler={{scheduler: ddim, steps: {STEPS}, eta: 1.0, guidance: 2.0}}",
    "strength={upper: symmetry, grid: [0.02, 1.0], trials: 2, startup: 1, weights: [20.0], low: 0.01}",
    f"strength.pool={POOL}",
    "strength.gate=2",
    "strength.updates=20",
    f"strength.rounds={ROUNDS}",
    f"strength.samples={TRIED}",
    f"evaluation={{samples: {SHOWN}, batch: 4}}",
    "evaluation.features=tests.scale.test_strength:colours",
]


def colours(images: Tensor) -> Tensor:
    """Map images to the mean of each channel: three features, so that few samples have a Frechet distance."""
    return images.flatten(2).mean(2)


def constant(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 0 * images.flatten(1).sum(1) + 1


def settings(*more: str) -> Config:
    return load_config("tiny-brightness", [*SHORT, *more])


def numbers(tuned: Tuned) -> Any:
    """Return a result without its seconds."""
    nothing = {"seconds": 0.0}

    def plain(cost: Cost) -> Cost:
        return replace(cost, **nothing)

    choices = {
        name: [
            replace(c, cost=plain(c.cost), tries=tuple(replace(t, cost=plain(t.cost)) for t in c.tries)) for c in found
        ]
        for name, found in tuned.choices.items()
    }
    rows = [
        replace(row, choosing=plain(row.choosing), sampling=plain(row.sampling), seconds_ratio=None)
        for row in tuned.rows
    ]
    return replace(tuned, rows=tuple(rows), choices={}), choices


def row(tuned: Tuned, method: str) -> Row:
    return next(found for found in tuned.rows if found.method == method)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path, list[str]]:
    """All methods on the tiny Stable Diffusion."""
    folder, said = tmp_path_factory.mktemp("tuned"), []
    announced: list[int] = []
    found = tune(settings(), folder, cache, on_start=lambda task, n: announced.append(n), on_step=said.append)
    assert announced == [len(said)]
    return found, folder, said


# --- Algorithm 2 on a pool of rewards ---------------------------------------------------------------------------------


def penalty_function(strengths: np.ndarray, upper: np.ndarray, lower: np.ndarray, gamma: float) -> np.ndarray:
    """Return F_gamma = -gamma lambda (log E exp((r1 / gamma + r2) / lambda) - log E exp(r2 / lambda)) on samples."""
    t = strengths[:, None]
    first, second = (np.log(np.exp(r / t).mean(1)) for r in (upper / gamma + lower, lower))
    return -gamma * strengths * (first - second)


def pool(samples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return r1 = -(x - 1)^2 / 2 and r2 = -(x - 2)^2 / 2 of normal quantiles: for normal x, lambda = 3/5 is best."""
    from scipy.stats import norm

    x = norm.ppf((np.arange(samples) + 0.5) / samples)
    return -((x - 1) ** 2) / 2, -((x - 2) ** 2) / 2


def chosen(upper: np.ndarray, lower: np.ndarray, **options: Any) -> tuple[tuple[float, ...], float] | None:
    given = {"gamma": 100.0, "updates": 400, "step_size": 0.02, "gate": 20.0, "pool": 400, **options}
    return bilevel(torch.tensor(upper), torch.tensor(lower), Strength(**given))


@pytest.mark.parametrize("start", [0.5, 1.0, 3.0])
def test_bilevel_finds_the_minimum_of_the_penalty_function(start: float) -> None:
    upper, lower = pool()
    found = chosen(upper, lower, start=start)
    assert found is not None
    candidates = np.exp(np.linspace(math.log(0.2), math.log(5), 4001))
    best = candidates[penalty_function(candidates, upper, lower, 100.0).argmin()]
    assert found[0][-1] == pytest.approx(best, rel=2e-3)
    assert found[0][-1] == pytest.approx(0.6, rel=0.05)
    assert len(found[0]) == 400
    swapped = chosen(lower, upper, start=start)
    assert swapped is not None
    assert abs(swapped[0][-1] / best - 1) > 0.2


def test_the_gate_limits_how_small_lambda_may_become() -> None:
    upper, lower = pool()
    found = chosen(lower, lower, gate=150.0)  # more of the same is better: lambda falls as far as it may
    assert found is not None
    path, floor = found

    def effective(strength: float) -> float:
        sizes = []
        for reward in (lower, lower / 100 + lower):
            weights = np.exp(reward / strength)
            sizes.append(weights.sum() ** 2 / (weights**2).sum())
        return min(sizes)

    assert path[-1] == floor == min(path)
    assert effective(floor) == pytest.approx(150, abs=1e-4)
    assert effective(1.01 * floor) > 150 > effective(0.99 * floor)
    assert chosen(lower, lower, gate=400.0, high=2.0) is None
    loose = chosen(lower, lower, gate=1.0, low=0.3)
    assert loose is not None
    assert loose[1] == 0.3


# --- a run ------------------------------------------------------------------------------------------------------------


def test_every_method_has_its_row_and_its_files(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, folder, _ = run
    assert [r.method for r in tuned.rows] == [BASE, *STRENGTH_METHODS]
    assert tuned.prompts == tuple(TEXTS)
    for found in tuned.rows:
        assert (found.samples, found.note) == (SHOWN, "")
        assert found.frechet is not None
        assert len(found.strengths) == len(TEXTS)
        with Image.open(folder / "images" / f"{found.method}.png") as sheet:
            assert sheet.width > 96
    held = json.loads((folder / "strength.json").read_text())
    assert [r["method"] for r in held["rows"]] == [BASE, *STRENGTH_METHODS]
    assert held["rows"][2]["upper"] == list(row(tuned, "grid").upper or ())
    table = (folder / "strength.md").read_text()
    assert table == markdown(tuned) + "\n"
    assert all(f"| {name} |" in table for name in [BASE, *STRENGTH_METHODS])
    assert all(name in summary(tuned) for name in ["symmetry (upper)", "brightness (lower)", "ratio of both"])
    assert "they measure change, not truth" in summary(tuned)
    assert load_config(folder / "config.yaml") == settings()


def test_searches_choose_the_best_of_what_they_tried(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, _, _ = run
    for method, tries in {"grid": 2, "random": 2, "bayesian": 2, "weighted-sum": 1}.items():
        for choice in tuned.choices[method]:
            assert len(choice.tries) == tries
            best = max(choice.tries, key=lambda t: -math.inf if t.upper is None else t.upper)
            assert (choice.strength, choice.weight) == (best.strength, best.weight)
    assert [t.strength for t in tuned.choices["grid"][0].tries] == [0.02, 1.0]
    assert tuned.choices["bayesian"][1].tries[0].strength == 1.0  # the start
    assert tuned.choices["weighted-sum"][0].tries[0].weight == 20.0
    assert "bilevel's lambda for 'the digit' still moved (" in summary(tuned)  # twenty updates are too few
    for choice in tuned.choices["bilevel"]:
        assert len(choice.path) == 20
        assert choice.path[-1] == choice.strength


def test_tries_share_their_noise_and_prompts_do_not(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, _, _ = run
    for prompt in range(2):
        by_grid, by_start = tuned.choices["grid"][prompt].tries[1], tuned.choices["bayesian"][prompt].tries[0]
        assert (by_grid.strength, by_grid.upper, by_grid.lower) == (by_start.strength, by_start.upper, by_start.lower)
    first, second = (tuned.choices["grid"][prompt].tries[1] for prompt in range(2))
    assert first.upper != second.upper


def test_a_smaller_lambda_raises_the_lower_reward_and_a_weight_the_upper(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, _, _ = run
    for prompt in range(2):
        strong, weak = tuned.choices["grid"][prompt].tries
        assert strong.lower is not None
        assert weak.lower is not None
        assert strong.lower > weak.lower
        (weighted,) = tuned.choices["weighted-sum"][prompt].tries
        assert weighted.upper is not None
        assert weak.upper is not None
        assert weighted.upper > weak.upper  # at the same lambda and noise


def test_costs_are_those_of_the_algorithms(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, _, _ = run
    pooled, tried, shown = (2 * STEPS * n for n in (POOL, TRIED, SHOWN))  # guidance 2 makes two calls of a step
    for prompt in range(2):
        assert tuned.choices["bilevel"][prompt].cost.calls == pooled
        assert tuned.choices["bilevel"][prompt].cost.gradients == 0
        grid = tuned.choices["grid"][prompt]
        assert grid.cost.calls == 2 * tried * (1 + ROUNDS)
        assert grid.cost.gradients == 2 * tried * ROUNDS
        assert grid.cost.seconds >= sum(t.cost.seconds for t in grid.tries)
    assert (row(tuned, BASE).sampling.calls, row(tuned, BASE).choosing) == (shown, Cost())
    for method in STRENGTH_METHODS:
        found = row(tuned, method)
        assert (found.sampling.calls, found.sampling.gradients) == (shown * (1 + ROUNDS), shown * ROUNDS)
        total = found.choosing.calls + found.sampling.calls
        against = row(tuned, "bilevel")
        assert found.calls_ratio == pytest.approx(total / (against.choosing.calls + against.sampling.calls))
    assert row(tuned, "bilevel").seconds_ratio == 1


def test_frechet_distances_are_to_other_samples_of_the_model(run: tuple[Tuned, Path, list[str]]) -> None:
    tuned, folder, _ = run
    features = {file.stem: np.load(file)["features"] for file in (folder / "samples").iterdir()}
    for name in [BASE, *STRENGTH_METHODS]:
        expected = frechet_distance(features[name], features["reference"])
        assert row(tuned, name).frechet == pytest.approx(expected)
    assert not np.array_equal(features[BASE], features["reference"])


def test_a_method_alone_gives_what_it_gives_among_others(
    run: tuple[Tuned, Path, list[str]], cache: Path, tmp_path: Path
) -> None:
    """And with batches of another size or activations computed again, and the others can be added later."""
    alone = tune(settings("evaluation.batch=3", "model.checkpointing=true"), tmp_path, cache, ["grid"])
    assert [r.method for r in alone.rows] == [BASE, "grid"]
    for name in (BASE, "grid"):
        one, all_ = row(alone, name), row(run[0], name)
        assert one.strengths == all_.strengths
        assert one.upper == pytest.approx(all_.upper, rel=1e-4)
        assert one.frechet == pytest.approx(all_.frechet, rel=1e-2)
        assert one.sampling.calls == all_.sampling.calls
    assert row(alone, "grid").calls_ratio is None
    both = tune(settings(), tmp_path, cache, ["random"], resume=True)
    assert [r.method for r in both.rows] == [BASE, "grid", "random"]
    assert row(both, "grid").upper == row(alone, "grid").upper


def test_half_precision(cache: Path, tmp_path: Path) -> None:
    more = ["model={kind: tiny, dtype: bfloat16, checkpointing: true}", "prompts={train: [a thing]}"]
    tuned = tune(settings(*more), tmp_path, cache, ["weighted-sum", "bilevel"])
    assert all(found.upper is not None and math.isfinite(found.upper[0]) for found in tuned.rows)


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_made_again(
    run: tuple[Tuned, Path, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, folder, said = run
    before = (folder / "journal.jsonl").read_bytes()

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr(strength, "guided_sampling", refuse)
    monkeypatch.setattr(strength, "_unguided", refuse)
    again: list[str] = []
    assert numbers(tune(settings(), folder, cache, resume=True, on_step=again.append)) == numbers(tuned)
    assert again == said
    assert (folder / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("after", [1, 13])
def test_an_interrupted_run_goes_on_where_it_was(
    after: int, run: tuple[Tuned, Path, list[str]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said, made = settings(), [], []
    guided = strength.guided_sampling

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options["strength"])
        return guided(*arguments, **options)

    def interrupt(line: str) -> None:
        said.append(line)
        if len(said) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(strength, "guided_sampling", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(config, tmp_path, cache, on_step=interrupt)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"name": "cut')
    assert numbers(tune(config, tmp_path, cache, resume=True)) == numbers(run[0])
    # Seven tries and five methods' samples, each for two prompts: none of them twice.
    assert len(made) == 2 * (2 + 2 + 2 + 1) + 2 * 5


def test_the_journal_computes_once_and_names_a_damaged_line(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, list[float]]:
        calls.append(1)
        return {"a": [1.5]}

    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    assert journal("x", compute) == journal("x", compute) == Journal(path)("x", compute) == {"a": [1.5]}
    assert len(calls) == 1
    with path.open("ab") as file:
        file.write(b'{"name": "y", "va')
    assert "y" not in Journal(path)
    assert path.read_bytes().endswith(b"}\n")
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Journal(path)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_method_whose_samples_diverge_is_reported_and_the_others_go_on(cache: Path, tmp_path: Path) -> None:
    tuned = tune(settings("strength.scale=1e30", "strength.rounds=2"), tmp_path, cache, ["grid", "bilevel"])
    failed = row(tuned, "grid")
    assert failed.upper is failed.frechet is failed.strengths[0] is None
    assert "no lambda was found for 'the digit'" in failed.note
    assert all(t.error and t.cost.calls > 0 for t in tuned.choices["grid"][0].tries)
    assert "no lambda" not in row(tuned, "bilevel").note  # it has one, from the pre-trained samples alone
    assert row(tuned, "bilevel").note
    assert "failed" in markdown(tuned)
    assert row(tuned, BASE).frechet is not None


def test_too_small_a_pool_is_reported(cache: Path, tmp_path: Path) -> None:
    more = ["strength.gate=8", "strength.high=1e-3", "strength.low=1e-4", "strength.start=1e-3", "strength.grid=[1e-3]"]
    tuned = tune(settings(*more), tmp_path, cache, ["bilevel"])
    assert "strength.pool is too small for strength.gate" in row(tuned, "bilevel").note


def test_a_reward_without_spread_cannot_guide(cache: Path, tmp_path: Path) -> None:
    same = "reward={name: custom, options: {function: 'tests.scale.test_strength:constant', differentiable: true}}"
    tuned = tune(settings(same), tmp_path, cache, ["grid"])
    assert "reward must differ between samples of 'the digit', all 8 are 1.0" in row(tuned, "grid").note


def refusal(config: Config, folder: Path, cache: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        tune(config, folder, cache, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_what_the_folder_does_not_hold(run: tuple[Tuned, Path, list[str]], cache: Path) -> None:
    folder = run[1]
    assert "holds a run already: resume it" in refusal(settings(), folder, cache)
    said = refusal(settings("strength.scale=2", "training.seed=7"), folder, cache, resume=True)
    assert "run with other settings: strength.scale, training.seed differ" in said


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["reward.name=jpeg_compressibility"], {}, "reward.name must have a gradient, which guides the samples"),
        (["strength.upper=jpeg_compressibility"], {}, "strength.upper must have a gradient for weighted-sum"),
        (["strength.upper_options={a: 1}"], {}, "strength.upper: reward 'symmetry' has no option 'a'"),
        (["prompts={train: [a, b, c, d, e, f, g]}"], {}, "evaluation.samples must be >= the prompts, 7, got 6"),
        ([], {"methods": ["gird"]}, "method 'gird' is unknown, did you mean grid?"),
    ],
)
def test_refuses(more: list[str], options: Any, message: str, cache: Path, tmp_path: Path) -> None:
    assert message in refusal(settings(*more), tmp_path, cache, **options)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strength.low=0", "strength.low must be > 0, got 0"),
        ("strength.low=200", "strength.low must be < strength.high = 100"),
        ("strength.start=200", "strength.start must lie in [0.01, 100]"),
        ("strength.grid=[0]", "strength.grid.0 must be > 0, got 0"),
        ("strength.methods=[bilevel, gird]", "strength.methods must hold names of methods, did you mean grid?"),
        ("strength.methods=[grid, grid]", "strength.methods must name a method once"),
        ("strength.methods=[]", "strength.methods must be a list of at least 1"),
        ("strength.upper=clipp", "strength.upper must be the name of a reward, did you mean clip?"),
        ("strength.gate=65", "strength.gate must be <= strength.pool = 64"),
        ("strength.gamma=0", "strength.gamma must be > 0"),
        ("strength.gradient=own-ish", "strength.gradient must be one of own, mean, samples"),
    ],
)
def test_settings_are_checked(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config("tiny-brightness", [override])
    assert message in str(caught.value)


# --- the front door ---------------------------------------------------------------------------------------------------


def test_from_the_command_line(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["tune", "tiny-brightness", "--out", str(tmp_path / "run"), "--cache", str(cache), "--method", "grid"]
    for value in SHORT:
        ask += ["--set", value]
    assert verifine.main(ask) == 0
    said = capsys.readouterr()
    assert said.out.startswith("tiny: DDIMScheduler")
    assert "grid" in said.out
    assert f"table: {tmp_path / 'run' / 'strength.md'}" in said.out
    assert "grid/0/1: lambda 1: upper" in said.err
    assert verifine.main(ask) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert verifine.main([*ask, "--resume"]) == 0
    assert verifine.main([*ask, "--resume", "--method", "newton"]) == 2
    assert "verifine: method 'newton' is unknown" in capsys.readouterr().err


def test_an_interrupt_at_the_command_line_says_how_to_go_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(strength, "guided_sampling", interrupt)
    ask = ["tune", "tiny-brightness", "--out", str(tmp_path), "--cache", str(cache), "--method", "grid"]
    for value in SHORT:
        ask += ["--set", value]
    assert verifine.main(ask) == 130
    assert "--resume goes on from here" in capsys.readouterr().err
    assert (tmp_path / "journal.jsonl").exists()


def test_the_preset_is_the_papers_experiment() -> None:
    config = load_config("bilevel-strength-sd15")
    s = config.strength
    assert (config.reward.name, s.upper, s.start, s.samples, s.rounds, s.trials) == ("resnet", "clip", 1.0, 3, 7, 5)
    assert s.methods == STRENGTH_METHODS
    assert (config.sampler.steps, config.sampler.guidance) == (50, 7.5)
    assert config.evaluation.samples > 48  # features of `pooled` on three channels


def test_choices_are_plain_data(run: tuple[Tuned, Path, list[str]]) -> None:
    held = json.loads((run[1] / "strength.json").read_text())["choices"]
    for method, found in run[0].choices.items():
        for choice, plain in zip(found, held[method], strict=True):
            assert isinstance(choice, Choice)
            assert plain["strength"] == choice.strength
            assert plain["path"] == list(choice.path)
