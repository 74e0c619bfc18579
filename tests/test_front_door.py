"""The command line: what it prints, its exit status, and one line that names the cause when something is wrong."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import verifine
from algorithms.estimators import half_order, policy_gradient
from claims.registry import BY_ID, CLAIMS
from theory import instances, schedules
from theory.chains import LinearGaussianChain, QuadraticReward
from theory.gaussian import Gaussian
from theory.schedules import NoiseSchedule
from toy.linear_gaussian import Problem

EXACT, OTHER = BY_ID["foundations.posterior-mean"], BY_ID["foundations.reverse-variance"]
COMMANDS = ("verify", "report", "claims", "show")
Captured = pytest.CaptureFixture[str]


def front_door(*arguments: object) -> int:
    """Exit status of the command line, argparse's own exits included."""
    try:
        return verifine.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def refused(capsys: Captured, *arguments: object) -> str:
    """The one line on standard error with which the front door refuses; nothing goes to standard output."""
    capsys.readouterr()
    assert front_door(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("verifine")
    return line


@pytest.fixture
def measured(tmp_path: Path, capsys: Captured) -> Path:
    """A small finished run."""
    folder = tmp_path / "run"
    ask = ("verify", "--profile", "smoke", "--jobs", 1, "--out", folder, "--claim", EXACT.id, "--claim", OTHER.id)
    assert front_door(*ask) == 0
    said = capsys.readouterr()
    planted = sum(len(check.controls) for claim in (EXACT, OTHER) for check in claim.checks)
    assert said.out.startswith(f"2 of 2 verdicts as recorded; {planted} of {planted} planted errors found; ")
    assert all(f"ok verified     {claim.id}" in said.err for claim in (EXACT, OTHER))
    return folder


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--claim", "foundations.posterior-maen"], "unknown claim 'foundations.posterior-maen': did you mean 'foun"),
        (["--claim", "zzz"], "unknown claim 'zzz': `verifine claims` lists them"),
        (["--claim", EXACT.id, "--claim", ""], "unknown claim ''"),
        (["--paper", "RRL"], "unknown paper 'RRL': did you mean 'RLR'?"),
        (["--paper", "The Bible"], "unknown paper"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number with 0 <= seed < 2^64"),
        (["--seed", "abc"], "argument --seed: 'abc' is not a whole number"),
        (["--seed", "1.5"], "argument --seed: '1.5' is not a whole number"),
        (["--seed", ""], "argument --seed: '' is not a whole number"),
        (["--seed", str(2**64)], "argument --seed: '18446744073709551616' is not a whole number"),
        (["--seed"], "argument --seed: expected one argument"),
        (["--jobs", "0"], "argument --jobs: '0' is not a whole number >= 1"),
        (["--jobs", "-2"], "argument --jobs: '-2' is not a whole number >= 1"),
        (["--jobs", "two"], "argument --jobs: 'two' is not a whole number >= 1"),
        (["--profile", "quick"], "argument --profile: invalid choice: 'quick'"),
        (["--sed", "1"], "unrecognized arguments: --sed 1"),
        (["--cluster", "no port"], "cannot connect to a Dask cluster at 'no port'"),
        (["--resume", "--seed", "7"], "it holds a run with seed 0, asked for 7"),
        (["--resume", "--profile", "full"], "it holds a run with profile smoke, asked for full"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_question_is_refused_and_the_evidence_stays_as_it_is(
    arguments: list[str], cause: str, measured: Path, capsys: Captured
) -> None:
    before = snapshot(measured)
    ask = ["verify", "--out", measured, "--profile", "smoke", *arguments]
    assert cause in refused(capsys, *ask)
    assert snapshot(measured) == before


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["verfy"], "invalid choice: 'verfy'"),
        (["show"], "the following arguments are required: CLAIM"),
        (["show", "foundations.elb"], "unknown claim 'foundations.elb': did you mean 'foundations.elbo'?"),
        (["claims", "--yaml"], "unrecognized arguments: --yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_is_refused(arguments: list[str], cause: str, capsys: Captured) -> None:
    assert cause in refused(capsys, *arguments)


def test_largest_seed_is_accepted(tmp_path: Path) -> None:
    ask = ("verify", "--profile", "smoke", "--jobs", 1, "--out", tmp_path, "--claim", EXACT.id)
    assert front_door(*ask, "--seed", 2**64 - 1) == 0
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 2**64 - 1


def no_file(*arguments: object, **options: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_folder_that_cannot_be_written_is_refused_before_the_work(
    measured: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = tmp_path / "file", snapshot(measured)
    file.write_text("a file, no folder")
    monkeypatch.setattr("claims.run.examine_by_id", no_file)  # would be called if work were begun
    for out in (file, file / "x"):
        assert f"--out {out} cannot be written: " in refused(capsys, "verify", "--claim", EXACT.id, "--out", out)
        assert f"--out {out} cannot be written: " in refused(capsys, "report", measured, "--out", out)
    monkeypatch.setattr(tempfile, "TemporaryFile", no_file)  # a folder without write permission, seen by any user
    assert f"--out {measured} cannot be written: Permission denied" in refused(
        capsys, "verify", "--claim", EXACT.id, "--out", measured
    )
    assert "cannot be written: Permission denied" in refused(capsys, "report", measured)
    assert snapshot(measured) == before
    assert file.read_text() == "a file, no folder"


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_schema(content: bytes) -> bytes:
    return content.replace(b'"schema": 1', b'"schema": 99')


def binary(content: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n\x00\xff" + content


def other_field(content: bytes) -> bytes:
    return content.replace(b'"verdict"', b'"judgement"')


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncated, "not a valid Evidence record"),
        (other_schema, "schema 99, this version reads 1"),
        (binary, "not text"),
        (other_field, "unknown field 'judgement'"),
        (lambda content: b"", "not a valid Evidence record"),
        (lambda content: b"[]", "not a valid Evidence record"),
    ],
    ids=["truncated", "schema", "binary", "field", "empty", "list"],
)
def test_damaged_evidence_is_named_and_left_alone(
    damage: Callable[[bytes], bytes], fault: str, measured: Path, capsys: Captured
) -> None:
    file = measured / "claims" / f"{EXACT.id}.json"
    file.write_bytes(damage(file.read_bytes()))
    before = snapshot(measured)
    for ask in (
        ("report", measured),
        ("verify", "--resume", "--profile", "smoke", "--claim", OTHER.id, "--out", measured),
    ):
        line = refused(capsys, *ask)
        assert str(file) in line
        assert fault in line
    assert snapshot(measured) == before

    assert front_door("show", EXACT.id, "--run", measured) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: " in line
    assert fault in line
    assert front_door("show", OTHER.id, "--run", measured) == 0


def test_damaged_provenance_is_named(measured: Path, capsys: Captured) -> None:
    file = measured / "run.json"
    file.write_bytes(truncated(file.read_bytes()))
    before = snapshot(measured)
    for ask in (("report", measured), ("verify", "--resume", "--claim", EXACT.id, "--out", measured)):
        assert f"{file}: not a valid Provenance record" in refused(capsys, *ask)
    assert snapshot(measured) == before


def test_file_that_is_no_run_is_refused(measured: Path, capsys: Captured) -> None:
    file = measured / "claims" / f"{EXACT.id}.json"
    assert f"{file}: not a valid Run record" in refused(capsys, "report", file)
    file.write_bytes(binary(b""))
    assert f"{file}: not text" in refused(capsys, "report", file)


def test_missing_run_is_refused_and_not_made(tmp_path: Path, capsys: Captured) -> None:
    missing = tmp_path / "nowhere"
    assert f"{missing} holds no run" in refused(capsys, "report", missing)
    assert f"{missing} holds no run" in refused(capsys, "report", missing, "--out", tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


# --- what is answered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_help_of_every_command(arguments: list[str], capsys: Captured) -> None:
    assert front_door(*arguments, "--help") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"usage: {' '.join(['verifine', *arguments])}")
    if not arguments:
        assert all(command in said.out for command in COMMANDS)


def test_claims_as_a_table(capsys: Captured) -> None:
    assert front_door("claims") == 0
    said = capsys.readouterr().out
    assert all(claim.id in said and claim.title in said and claim.source in said for claim in CLAIMS)
    assert said.endswith(f"{len(CLAIMS)} claims\n")


def test_claims_as_json(capsys: Captured) -> None:
    assert front_door("claims", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["id"] for entry in listed] == [claim.id for claim in CLAIMS]
    for entry, claim in zip(listed, CLAIMS, strict=True):
        assert {"paper", "source", "statement", "printed", "corrected", "controls", "kinds"} <= entry.keys()
        assert (entry["paper"], entry["source"], entry["statement"]) == (claim.paper, claim.source, claim.statement)
        assert (entry["printed"], entry["corrected"]) == (claim.printed, claim.corrected)
        assert entry["controls"]
        assert set(entry["kinds"]) <= {"exact", "statistical", "frequency", "scale"} != set()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_show_prints_statement_and_derivation(claim: object, tmp_path: Path, capsys: Captured) -> None:
    assert front_door("show", claim.id, "--run", tmp_path) == 0
    said = capsys.readouterr().out
    assert said.startswith(claim.title)
    assert claim.source in said
    assert f"As stated:  {claim.statement}" in said
    assert claim.corrected is None or f"Corrected:  {claim.corrected}" in said
    assert claim.why in said
    text = said.split(f"Derivation (docs/{claim.derivation})\n\n")[1]
    assert text.startswith("#")
    assert len(text.split("No evidence in")[0]) > 300  # a section, not a heading
    assert f"No evidence in {tmp_path} yet: verifine verify --claim {claim.id}" in said


def test_show_stops_at_the_end_of_the_section(tmp_path: Path, capsys: Captured) -> None:
    assert front_door("show", EXACT.id, "--run", tmp_path) == 0
    said = capsys.readouterr().out
    headings = [line for line in said.splitlines() if line.startswith("#")]
    assert EXACT.derivation == f"ddpm.md#{verifine.slug(headings[0])}"
    assert all(line.startswith("###") for line in headings[1:])


def test_show_prints_the_last_evidence(measured: Path, capsys: Captured) -> None:
    assert front_door("show", EXACT.id, "--run", measured) == 0
    said = capsys.readouterr().out
    assert f"Last evidence ({measured / 'claims' / f'{EXACT.id}.json'}): ok verified" in said
    (check,) = EXACT.checks
    assert f"{check.name} ({check.kind}): {check.question}" in said
    for role, name, _ in check.readings():
        verdict = "verified" if role == "claim" else "refuted"
        assert f"    {verdict:12} {role:8} {name}" in said


def test_slug_is_the_anchor_of_a_heading() -> None:
    assert verifine.slug("## The KL, $x_0$ & *more* (part 2)") == "the-kl-x0--more-part-2"
    assert verifine.slug("# Self-included baseline") == "self-included-baseline"


def test_report_writes_three_files_from_a_folder_and_again_from_its_evidence(
    measured: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert front_door("report", measured) == 0
    names = ("index.html", "report.pdf", "evidence.json")
    assert capsys.readouterr().out.splitlines() == [str(measured / name) for name in names]
    assert front_door("report", measured / "evidence.json", "--out", tmp_path / "again") == 0
    for name in ("index.html", "evidence.json"):
        assert (tmp_path / "again" / name).read_bytes() == (measured / name).read_bytes()


def test_interrupted_command_says_how_to_go_on(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("claims.run.examine_by_id", stop)
    assert front_door("verify", "--claim", EXACT.id, "--jobs", 1, "--out", tmp_path) == 130
    assert "interrupted; what was measured is kept, --resume goes on from here" in capsys.readouterr().err


# --- bad input to the library -----------------------------------------------------------------------------------------


def without_noise() -> Problem:
    """BLN sampled with eta = 0 at step 2."""
    chain, reward = instances.bilinear_instance()
    std = chain.std * np.array([1, 0, 1])
    silent = LinearGaussianChain(chain.A, chain.B, chain.c, std, chain.theta, chain.mean_T, chain.cov_T, chain.N)
    return Problem.of((silent, reward))


def score_of_a_silent_step(length: int) -> None:
    problem, estimator = without_noise(), half_order(3, length)
    noise = estimator.draw(problem.chain, problem.params, 4, torch.Generator().manual_seed(0))
    estimator.per_sample(problem.chain, problem.params, problem.objective, noise)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Gaussian.scalar(0.0, -0.5), "variances = [-0.5]: must be non-negative"),
        (lambda: Gaussian.diagonal([0, 0], [1, -2]), "variances = [1.0, -2.0]: must be non-negative"),
        (
            lambda: Gaussian([0, 0], [[1, 2], [2, 1]]),
            "cov = [[1.0, 2.0], [2.0, 1.0]]: must be positive semi-definite (least eigenvalue -1)",
        ),
        (lambda: Gaussian([0, 0], [[1, 0.5], [0, 1]]), "cov = [[1.0, 0.5], [0.0, 1.0]]: must be symmetric"),
        (lambda: Gaussian([0.0], [[float("nan")]]), "cov = [[nan]]: must be finite"),
        (lambda: NoiseSchedule([0.1, 1.0]), "beta[1] = 1.0: must lie in (0, 1)"),
        (lambda: NoiseSchedule([0.0, 0.5]), "beta[0] = 0.0: must lie in (0, 1)"),
        (lambda: schedules.linear(3, 0.1, 1.2), "must lie in"),
        (
            lambda: QuadraticReward(0.0, [1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]]),
            "quadratic differs from its transpose by 1; it must be symmetric",
        ),
        (lambda: score_of_a_silent_step(1), "step t = 2 has std = 0 (eta = 0?): its noise has no score; sample with"),
        (lambda: policy_gradient(0), "steps must be >= 1, got 0"),
        (lambda: half_order(3, 4), "length must lie in 1..3, got 4"),
    ],
)
def test_bad_input_to_the_library_is_one_line_that_names_argument_and_rule(call: Callable[[], None], text: str) -> None:
    with pytest.raises(ValueError) as fault:
        call()
    message = str(fault.value)
    assert text in message
    assert "\n" not in message


def test_step_without_noise_is_allowed_where_nobody_asks_for_its_score() -> None:
    score_of_a_silent_step(3)  # one block: only the noise of step 1 pays
