"""A run's numbers depend on seed, profile and source only; and whatever kills it, what was measured is kept."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import claims.run
import verifine
from claims.claim import Claim
from claims.records import CorruptEvidence, Evidence, Provenance
from claims.registry import BY_ID
from claims.run import Settings, load, read, run, without_times

EXACT, PATHS, TRUNCATION, GROWTH = (
    BY_ID[i]
    for i in (
        "foundations.posterior-mean",
        "foundations.path-kl",
        "estimators.truncation-bias",
        "estimators.half-order-growth",
    )
)
CHEAP = (EXACT, PATHS, TRUNCATION, GROWTH)


def measure(folder: Path, *chosen: Claim, jobs: int = 1, resume: bool = False, seed: int = 0) -> dict[str, Evidence]:
    whole = run(chosen, Settings(seed, "smoke", folder), jobs, resume)
    assert whole.provenance.finished
    assert [e.statement.id for e in whole.evidence] == [claim.id for claim in chosen]
    return {e.statement.id: without_times(e) for e in whole.evidence}


def stored(folder: Path) -> dict[str, Evidence]:
    return {e.statement.id: without_times(e) for e in load(folder).evidence}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "claims").iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evidence]:
    """The cheap claims, measured one after the other by this process."""
    folder = tmp_path_factory.mktemp("alone")
    evidence = measure(folder, *CHEAP)
    assert stored(folder) == evidence  # the files say what was returned
    assert any(r.samples > 1 for e in evidence.values() for c in e.checks for r in c.readings)
    return evidence


def test_two_workers_and_another_order_give_the_same_bits(alone: dict[str, Evidence], tmp_path: Path) -> None:
    assert measure(tmp_path, *CHEAP[::-1], jobs=2) == alone
    assert stored(tmp_path) == alone
    assert [e.statement.id for e in load(tmp_path).evidence] == [i for i in BY_ID if i in alone]


def test_selection_gives_the_same_bits(alone: dict[str, Evidence], tmp_path: Path) -> None:
    assert measure(tmp_path, TRUNCATION) == {TRUNCATION.id: alone[TRUNCATION.id]}


def test_other_seed_gives_other_samples(alone: dict[str, Evidence], tmp_path: Path) -> None:
    (other,) = measure(tmp_path, TRUNCATION, seed=1).values()
    assert other.verdict == alone[TRUNCATION.id].verdict
    assert other.checks[0] == alone[TRUNCATION.id].checks[0]  # exact
    assert other.checks[1].readings[0].estimate != alone[TRUNCATION.id].checks[1].readings[0].estimate


def measured_again(claim_id: str, settings: Settings) -> Evidence:
    pytest.fail(f"{claim_id} was measured again")


def test_resume_keeps_what_is_there_and_measures_the_rest(
    alone: dict[str, Evidence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path, EXACT, TRUNCATION)
    before = times(tmp_path)
    measure(tmp_path, PATHS, resume=True)
    assert {name: times(tmp_path)[name] for name in before} == before
    monkeypatch.setattr("claims.run.examine_by_id", measured_again)
    kept = measure(tmp_path, EXACT, PATHS, TRUNCATION, resume=True)
    assert kept == {claim.id: alone[claim.id] for claim in (EXACT, PATHS, TRUNCATION)}


def test_without_resume_nothing_old_is_kept(tmp_path: Path) -> None:
    measure(tmp_path, EXACT, TRUNCATION)
    before = times(tmp_path)
    measure(tmp_path, EXACT)
    assert list(times(tmp_path)) == [f"{EXACT.id}.json"]
    assert times(tmp_path)[f"{EXACT.id}.json"] > before[f"{EXACT.id}.json"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seed": 1}, "it holds a run with seed 0, asked for 1"),
        ({"profile": "standard"}, "it holds a run with profile smoke, asked for standard"),
        ({"alpha": 1e-7}, "it holds a run with alpha 1e-06, asked for 1e-07"),
    ],
)
def test_run_of_other_settings_is_not_resumed_and_stays_as_it_is(
    settings: dict[str, object], text: str, tmp_path: Path
) -> None:
    measure(tmp_path, EXACT)
    before, provenance = times(tmp_path), (tmp_path / "run.json").read_bytes()
    other = dataclasses.replace(Settings(0, "smoke", tmp_path), **settings)
    with pytest.raises(ValueError, match=f"^cannot resume .*: {text}$"):
        run((EXACT,), other, 1, resume=True)
    assert times(tmp_path) == before
    assert (tmp_path / "run.json").read_bytes() == provenance


def test_evidence_of_other_source_code_is_measured_again_or_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(tmp_path, EXACT, GROWTH)
    before = times(tmp_path)
    monkeypatch.setattr("claims.run.source_digest", lambda: "another")
    monkeypatch.setattr("claims.run.examine_by_id", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, EXACT, resume=True)
    # Killed before anything was measured: nothing old may stand under the new digest.
    assert times(tmp_path) == {}
    monkeypatch.undo()
    monkeypatch.setattr("claims.run.source_digest", lambda: "another")
    measure(tmp_path, EXACT, resume=True)
    assert list(times(tmp_path)) == [f"{EXACT.id}.json"]
    assert times(tmp_path)[f"{EXACT.id}.json"] > before[f"{EXACT.id}.json"]
    assert load(tmp_path).provenance.versions["source"] == "another"


def interrupt(claim_id: str, settings: Settings) -> Evidence:
    raise KeyboardInterrupt


def test_digest_covers_every_room_that_measures_and_does_not_change_by_itself() -> None:
    assert claims.run.source_digest() == claims.run.source_digest()
    assert set(claims.run.ROOMS) == {"theory", "algorithms", "verdicts", "toy", "scale", "claims"}
    assert all((Path(verifine.__file__).parent / room).is_dir() for room in claims.run.ROOMS)


def test_interruption_is_passed_on_and_recorded(tmp_path: Path) -> None:
    def stop(evidence: Evidence) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((EXACT, GROWTH), Settings(0, "smoke", tmp_path), 1, resume=False, on_done=stop)
    partial = load(tmp_path)
    assert not partial.provenance.finished
    assert partial.provenance.selected == (EXACT.id, GROWTH.id)
    assert [e.statement.id for e in partial.evidence] == [GROWTH.id]


def fails(context: object) -> tuple[()]:
    raise ZeroDivisionError("no such\nfigure")


def test_claim_whose_code_fails_is_evidence_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BY_ID, EXACT.id, dataclasses.replace(EXACT, figures=fails))
    ask = ["verify", "--profile", "smoke", "--jobs", "1", "--out", str(tmp_path)]
    ask += ["--claim", EXACT.id, "--claim", GROWTH.id]
    assert verifine.main(ask) == 1
    broken, sound = load(tmp_path).evidence
    assert (broken.verdict, broken.as_recorded, broken.checks) == ("inconclusive", False, ())
    assert broken.error.startswith("ZeroDivisionError: no such\nfigure (test_run.py:")
    assert (sound.verdict, sound.as_recorded, sound.error) == ("verified", True, "")
    said = capsys.readouterr()
    assert "1 of 2 verdicts as recorded" in said.out
    assert f"NOT AS RECORDED: !! inconclusive {EXACT.id}" in said.out

    # It is tried again on --resume, and only it.
    monkeypatch.undo()
    before = times(tmp_path)
    assert verifine.main([*ask, "--resume"]) == 0
    assert times(tmp_path)[f"{GROWTH.id}.json"] == before[f"{GROWTH.id}.json"]
    assert all(e.as_recorded for e in load(tmp_path).evidence)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"seed": 0, "profile"', "not a valid Provenance record"),
        (b"\xff\xfe\x00binary", "not text"),
        (b"[1, 2]", "not a valid Provenance record"),
        (b"{}", "not a valid Provenance record"),
    ],
)
def test_file_that_cannot_be_read_is_named(content: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(CorruptEvidence, match=f"run.json: {text}"):
        read(Provenance, file)


# Killed from outside, in the middle of a run.

SLOW = BY_ID["estimators.credit-rows"]
QUICK = (BY_ID["estimators.jacobian-order"], GROWTH)  # begun first: a run goes through the registry from its end


def start(folder: Path, jobs: int) -> subprocess.Popen[str]:
    """`verifine verify` in a session of its own: two claims that take no time and one that takes seconds."""
    ask = ["verify", "--profile", "smoke", "--jobs", str(jobs), "--out", str(folder)]
    for claim in (*QUICK, SLOW):
        ask += ["--claim", claim.id]
    command = [sys.executable, "-c", "import sys, verifine; sys.exit(verifine.main(sys.argv[1:]))", *ask]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_evidence(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((folder / "claims").glob("[!.]*.json"))) < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "no evidence in two minutes"
        time.sleep(0.02)


@pytest.fixture
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, str]:
    """A run that was sent a signal after its first two files: its folder, exit status and standard error."""
    jobs, number = request.param
    process = start(tmp_path, jobs)
    try:
        wait_for_evidence(tmp_path, process, len(QUICK))
        process.send_signal(number)
        _, said = process.communicate(timeout=60) if number == signal.SIGINT else (process.wait(timeout=60), "")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlive their parent
        except ProcessLookupError:
            pass
        process.wait()
        if process.stderr:
            process.stderr.close()
    return tmp_path, process.returncode, said


@pytest.mark.parametrize(
    ("killed", "status", "words"),
    [
        pytest.param((2, signal.SIGKILL), -signal.SIGKILL, "", id="SIGKILL"),
        pytest.param((1, signal.SIGINT), 130, "interrupted; what was measured is kept, --resume", id="SIGINT"),
    ],
    indirect=["killed"],
)
def test_killed_run_can_be_reported_and_resumed(
    killed: tuple[Path, int, str], status: int, words: str, alone: dict[str, Evidence]
) -> None:
    folder, returned, said = killed
    assert returned == status
    assert words in said
    partial = load(folder)
    assert not partial.provenance.finished
    assert {e.statement.id for e in partial.evidence} == {claim.id for claim in QUICK}
    assert without_times(partial.evidence[-1]) == alone[GROWTH.id]
    assert verifine.main(["report", str(folder)]) == 0
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    assert GROWTH.title.split(",")[0] in (folder / "index.html").read_text(encoding="utf-8")

    before = times(folder)
    ask = ["verify", "--profile", "smoke", "--jobs", "1", "--out", str(folder), "--resume"]
    for claim in (*QUICK, SLOW):
        ask += ["--claim", claim.id]
    assert verifine.main(ask) == 0
    whole = load(folder)
    assert whole.provenance.finished
    assert [e.statement.id for e in whole.evidence] == [claim.id for claim in (SLOW, *QUICK)]
    assert {name: times(folder)[name] for name in before} == before


def test_dask_cluster_of_two_workers_gives_the_same_bits(alone: dict[str, Evidence], tmp_path: Path) -> None:
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        ask = ["verify", "--profile", "smoke", "--out", str(tmp_path), "--cluster", cluster.scheduler_address]
        for claim in CHEAP:
            ask += ["--claim", claim.id]
        assert verifine.main(ask) == 0
    assert stored(tmp_path) == alone
    assert load(tmp_path).provenance.jobs == 2


def test_cluster_that_is_not_there_is_refused_before_anything_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(tmp_path, EXACT)
    before = times(tmp_path)
    assert verifine.main(["verify", "--out", str(tmp_path), "--cluster", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot connect to a Dask cluster at 'nowhere'" in line
    assert times(tmp_path) == before


def test_a_folder_with_files_of_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "claims" / "notes.json"
    stranger.parent.mkdir()
    stranger.write_text("{}")
    with pytest.raises(ValueError, match="holds files that belong to no run"):
        run((EXACT,), Settings(0, "smoke", tmp_path), 1, resume=False)
    assert stranger.read_text() == "{}"
    assert not (tmp_path / "run.json").exists()
