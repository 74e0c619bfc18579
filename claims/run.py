"""One run: claims examined in parallel, evidence written claim by claim, resumable after a kill at any moment.

Workers measure and hand their evidence back; only the process that owns the run writes to its folder. So a worker
that outlives a killed run spoils no later one, and a cluster's workers need not see the folder.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from claims.claim import PROFILES, Claim, Context, examine
from claims.records import CorruptEvidence, Evidence, Provenance, Run, from_json, to_json, write_atomically
from claims.registry import BY_ID, CLAIMS, ledger
from verdicts.streams import Stream

ALPHA = 1e-6  # error probability of a whole run, all claims together
ROOMS = ("theory", "algorithms", "verdicts", "toy", "scale", "claims")
LIBRARIES = ("numpy", "scipy", "torch", "diffusers", "peft", "transformers", "joblib", "matplotlib")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What decides a run's numbers: the root seed and the profile; `folder` is where its evidence lies."""

    seed: int
    profile: str
    folder: Path
    alpha: float = ALPHA
    model: str = ""  # that is audited


def run(
    claims: tuple[Claim, ...],
    settings: Settings,
    jobs: int,
    resume: bool,
    on_start: Callable[[], None] = lambda: None,
    on_done: Callable[[Evidence], None] = lambda evidence: None,
    cluster: str | None = None,
) -> Run:
    """Examine `claims` and write their evidence under the run's folder; return the whole run.

    Evidence that is already there is kept with `resume` if it comes from the same seed, profile and source code, and
    deleted otherwise. An interruption (Ctrl-C) is passed on after the provenance of the unfinished run has been written.
    `on_start` is called once nothing stands in the way of measuring, `on_done` with every claim's evidence.

    Raises:
        ValueError: if the folder's evidence belongs to no run, if `resume` meets a run with another seed or profile,
            or if the `cluster` cannot be connected to.
        CorruptEvidence: if a file that should be resumed cannot be read.
        OSError: if the folder cannot be written.
    """
    if cluster is None:
        return _run(claims, settings, jobs, resume, on_start, on_done, _in_parallel if jobs > 1 else _here)
    with _connected(cluster) as cores:  # before anything is written or deleted
        return _run(claims, settings, cores, resume, on_start, on_done, _in_parallel)


Measure = Callable[[list[str], Settings, int], Iterator[Evidence]]


def _run(
    claims: tuple[Claim, ...],
    settings: Settings,
    jobs: int,
    resume: bool,
    on_start: Callable[[], None],
    on_done: Callable[[Evidence], None],
    measure: Measure,
) -> Run:
    settings.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    earlier = _resumable(settings) if resume else {}
    found = _evidence_files(settings.folder)
    if found and not (settings.folder / "run.json").exists():
        raise ValueError(f"{found[0].parent} holds files that belong to no run: name another folder")
    for file in found:
        if file.stem not in earlier:  # nothing that was not measured by this run may stand under its provenance
            file.unlink()
    done = {claim.id: earlier[claim.id] for claim in claims if claim.id in earlier}
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def provenance(finished: bool) -> Provenance:
        return Provenance(
            seed=settings.seed,
            profile=settings.profile,
            alpha=settings.alpha,
            started=started,
            seconds=time.perf_counter() - start,
            commit=_commit(),
            machine=_machine(),
            versions=_versions(),
            jobs=jobs,
            selected=tuple(claim.id for claim in claims),
            finished=finished,
            model=settings.model,
        )

    _write_provenance(settings.folder, provenance(False))
    on_start()
    for evidence in done.values():
        on_done(evidence)
    try:
        # The last claims of the registry take longest: begun first, they leave no worker idle at the end.
        for evidence in measure([c.id for c in reversed(claims) if c.id not in done], settings, jobs):
            done[evidence.statement.id] = evidence
            write_atomically(settings.folder / "claims" / f"{evidence.statement.id}.json", to_json(evidence))
            on_done(evidence)
    except BaseException:
        _write_provenance(settings.folder, provenance(False))
        raise
    whole = Run(provenance(True), tuple(done[claim.id] for claim in claims))
    _write_provenance(settings.folder, whole.provenance)
    return whole


def run_here(
    claims: tuple[Claim, ...],
    settings: Settings,
    resume: bool,
    on_start: Callable[[], None],
    on_done: Callable[[Evidence], None],
    examined: Callable[[tuple[Claim, ...]], Iterator[Evidence]],
) -> Run:
    """Do what `run` does in this process, with claims that `examined` judges: they need not be registered."""

    def measure(ids: list[str], settings: Settings, jobs: int) -> Iterator[Evidence]:
        yield from examined(tuple(claim for claim in claims if claim.id in ids))

    return _run(claims, settings, 1, resume, on_start, on_done, measure)


def load(folder: Path) -> Run:
    """Read a run back from its folder, finished or not.

    Raises:
        CorruptEvidence: if a file cannot be read; the text names it.
        ValueError: if the folder holds no run.
    """
    file = folder / "run.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no run: there is no run.json in it")
    provenance = read(Provenance, file)
    found = {e.statement.id: e for e in (read(Evidence, f) for f in _evidence_files(folder))}
    order = [claim.id for claim in CLAIMS] + sorted(set(found) - set(BY_ID))
    return Run(provenance, tuple(found[i] for i in order if i in found))


def read(kind: type[T], file: Path) -> T:
    """Read one record from a file.

    Raises:
        CorruptEvidence: if the file does not hold such a record; the text names the file and the fault.
        OSError: if it cannot be opened.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise CorruptEvidence(f"{file}: not text ({fault})") from None
    return from_json(kind, text, str(file))


def examine_by_id(claim_id: str, settings: Settings) -> Evidence:
    """Examine one claim: the task that workers are handed.

    A failure of the claim's own code becomes evidence with an error text and an inconclusive verdict.
    """
    import torch

    # One thread per worker, always: results then do not depend on how many workers share the machine.
    torch.set_num_threads(1)
    return examine_claim(BY_ID[claim_id], settings, ledger(settings.alpha).spend, settings.folder / "cache")


def examine_claim(claim: Claim, settings: Settings, share: Callable[[str], float], cache: Path) -> Evidence:
    """Examine a claim, registered or not, with shares of the error budget from `share`; see `examine_by_id`."""
    context = Context(Stream(settings.seed), 0.0, PROFILES[settings.profile], cache)
    began = time.perf_counter()
    try:
        return examine(claim, context, share)
    except Exception as fault:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        error = f"{type(fault).__name__}: {fault} ({Path(where.filename).name}:{where.lineno})"
        return Evidence(claim.record(), "inconclusive", False, (), (), time.perf_counter() - began, error=error)


def _here(ids: list[str], settings: Settings, jobs: int) -> Iterator[Evidence]:
    """Yield evidence measured by this process."""
    yield from (examine_by_id(i, settings) for i in ids)


def _in_parallel(ids: list[str], settings: Settings, jobs: int) -> Iterator[Evidence]:
    """Yield evidence as it comes from joblib's workers: processes of this machine, or the cluster connected to."""
    import joblib

    parallel: Any = joblib.Parallel  # it has no types, and those guessed from its defaults are wrong
    tasks = (joblib.delayed(examine_by_id)(i, settings) for i in ids)
    yield from parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")(tasks)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[int]:
    """Let joblib use the Dask cluster at `address`; give the number of its cores."""
    import joblib

    try:
        from dask.distributed import Client
    except ImportError:
        raise ValueError("a cluster needs dask.distributed: install verifine[cluster]") from None
    try:
        client: Any = Client(address)
    except (ValueError, OSError) as fault:
        raise ValueError(f"cannot connect to a Dask cluster at {address!r}: {fault}") from None
    with client, joblib.parallel_config(backend="dask"):
        yield sum(client.ncores().values())


def _resumable(settings: Settings) -> dict[str, Evidence]:
    """Return the folder's evidence if it belongs to this very run, nothing if the code has changed since."""
    file = settings.folder / "run.json"
    if not file.exists():
        return {}
    found = read(Provenance, file)
    for what, there, asked in (
        ("seed", found.seed, settings.seed),
        ("profile", found.profile, settings.profile),
        ("alpha", found.alpha, settings.alpha),
    ):
        if there != asked:
            raise ValueError(f"cannot resume {settings.folder}: it holds a run with {what} {there}, asked for {asked}")
    if found.versions != _versions():
        return {}
    loaded = (read(Evidence, f) for f in _evidence_files(settings.folder))
    return {e.statement.id: e for e in loaded if not e.error}


def _evidence_files(folder: Path) -> list[Path]:
    return sorted((folder / "claims").glob("[!.]*.json"))


def _write_provenance(folder: Path, provenance: Provenance) -> None:
    write_atomically(folder / "run.json", to_json(provenance))


def source_digest() -> str:
    """Return a digest of the source of every room that measures: evidence is resumed under the same digest only."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted(f for room in ROOMS for f in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str:
    root = Path(__file__).parent.parent
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"verifine": importlib.metadata.version("verifine"), "source": source_digest(), **libraries}


def without_times(evidence: Evidence) -> Evidence:
    """Return evidence with its clock readings zeroed: what must be bit-identical between two runs."""
    checks = tuple(
        replace(check, readings=tuple(replace(reading, seconds=0.0) for reading in check.readings))
        for check in evidence.checks
    )
    return replace(evidence, checks=checks, seconds=0.0)
