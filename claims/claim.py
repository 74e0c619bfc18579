"""Claim: a statement, the checks that settle it, and the planted errors that the same checks must refute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from claims.records import (
    CheckEvidence,
    Evidence,
    Figure,
    Kind,
    Look,
    Printed,
    Reading,
    Role,
    Statement,
    Table,
    Verdict,
)
from verdicts.means import MeanResult
from verdicts.streams import Stream


@dataclass(frozen=True)
class Profile:
    """How hard a run tries. Margins are declared for `standard`; the others scale them, before any sample is drawn."""

    name: str
    margin_scale: float
    max_samples: int
    trials: int  # simulated checks of each kind when the verifier itself is measured


PROFILES = {
    p.name: p
    for p in (
        Profile("smoke", margin_scale=4.0, max_samples=1 << 21, trials=200),
        Profile("standard", margin_scale=1.0, max_samples=1 << 24, trials=2000),
        Profile("full", margin_scale=0.5, max_samples=1 << 27, trials=20000),
    )
}


@dataclass(frozen=True)
class Context:
    """What a check may use: its own random stream, its share of the error budget, the profile, a cache folder."""

    stream: Stream
    alpha: float
    profile: Profile
    cache: Path

    def at(self, *names: str, alpha: float = 0.0) -> Context:
        """Return the context of a part of this one: its own stream and error share."""
        return Context(self.stream.child(*names), alpha, self.profile, self.cache)


class Judge(Protocol):
    """Turns a subject into a result: the true statement and its planted errors go through the same judge."""

    def __call__(self, subject: Any, context: Context) -> MeanResult: ...


@dataclass(frozen=True)
class Check:
    """One comparison. `subject` is what we stand behind; `printed` the form that was printed, where that is wrong."""

    name: str
    kind: Kind
    question: str
    coordinates: tuple[str, ...]
    judge: Judge
    subject: Any
    controls: Mapping[str, Any]
    printed: Any = None
    margin_from: str = "rounding of float64"

    @property
    def sampled(self) -> bool:
        """Whether its readings spend of the error budget."""
        return self.kind == "statistical" or getattr(self.judge, "spends", False)

    def readings(self) -> list[tuple[Role, str, Any]]:
        """Return (role, name, subject) of everything this check judges, the statement first."""
        rows: list[tuple[Role, str, Any]] = [("claim", "as stated", self.subject)]
        if self.printed is not None:
            rows.append(("printed", "as printed", self.printed))
        return rows + [("control", name, subject) for name, subject in self.controls.items()]


@dataclass(frozen=True)
class Claim:
    """A statement of a paper (or of released code, or about the verifier itself) with everything that settles it.

    `printed` is the recorded status of the printed form: if it is not "holds", some check must carry that form as
    `printed` and refute it. Texts are Markdown with LaTeX between dollar signs.
    """

    id: str
    chapter: str
    paper: str
    source: str
    title: str
    statement: str
    printed: Printed
    why: str
    derivation: str
    checks: tuple[Check, ...]
    corrected: str | None = None
    about: Literal["paper", "code", "own", "verifier"] = "paper"
    figures: Callable[[Context], tuple[Figure, ...]] = field(default=lambda context: ())
    tables: Callable[[Context], tuple[Table, ...]] = field(default=lambda context: ())

    def record(self) -> Statement:
        """Return the claim without its code."""
        kinds: tuple[Kind, ...] = tuple(dict.fromkeys(check.kind for check in self.checks))
        controls = tuple(dict.fromkeys(name for check in self.checks for name in check.controls))
        return Statement(
            self.id, self.chapter, self.paper, self.about, self.source, self.title, self.statement, self.printed,
            self.corrected, self.why, self.derivation, kinds, controls,
        )  # fmt: skip

    def statistical_readings(self) -> list[str]:
        """Names under which the error ledger knows this claim's statistical readings."""
        return [
            ledger_name(self.id, check.name, role, name)
            for check in self.checks
            if check.sampled
            for role, name, _ in check.readings()
        ]


def ledger_name(claim: str, check: str, role: str, name: str) -> str:
    """Return the ledger's name of one reading."""
    return " / ".join((claim, check, role, name))


def examine(claim: Claim, context: Context, share: Callable[[str], float]) -> Evidence:
    """Run every check of a claim on the statement, its printed form and its planted errors.

    `share(name)` is the error probability that the ledger grants a statistical reading.
    """
    start = time.perf_counter()
    checks = []
    for check in claim.checks:
        readings = []
        for role, name, subject in check.readings():
            granted = share(ledger_name(claim.id, check.name, role, name)) if check.sampled else 0.0
            begun = time.perf_counter()
            result = check.judge(subject, context.at(claim.id, check.name, role, name, alpha=granted))
            readings.append(_reading(role, name, result, time.perf_counter() - begun, granted))
        scale = context.profile.margin_scale
        scaled = f"; times {scale:g} in the {context.profile.name} profile"
        margin_from = check.margin_from + (scaled if check.sampled and scale != 1 else "")
        checks.append(
            CheckEvidence(check.name, check.kind, check.question, margin_from, check.coordinates, tuple(readings))
        )
    shown = context.at(claim.id, "figures")  # of tables too: they may show the numbers of a figure
    figures, tables = claim.figures(shown), claim.tables(shown)
    verdict, as_recorded = settle(claim.printed, tuple(checks))
    seconds = time.perf_counter() - start
    return Evidence(claim.record(), verdict, as_recorded, tuple(checks), figures, seconds, tables=tables)


def settle(printed: Printed, checks: tuple[CheckEvidence, ...]) -> tuple[Verdict, bool]:
    """Return a claim's verdict, and whether it is the recorded one.

    A claim whose check has no planted error, or fails to refute one, is inconclusive whatever else was measured:
    nothing has shown that the check can fail.
    """

    def of(role: Role, rows: tuple[Reading, ...]) -> list[Verdict]:
        return [row.verdict for row in rows if row.role == role]

    def found(row: Reading) -> bool:
        # A planted error that computes nothing would be refuted for the wrong reason.
        return row.verdict == "refuted" and all(map(math.isfinite, row.estimate))

    controls = [[row for row in c.readings if row.role == "control"] for c in checks]
    seen = all(rows and all(map(found, rows)) for rows in controls)
    main = [verdict for c in checks for verdict in of("claim", c.readings)]
    if "refuted" in main:
        verdict: Verdict = "refuted"
    elif not seen or not main or "inconclusive" in main:
        verdict = "inconclusive"
    else:
        verdict = "verified"
    as_printed = [v for c in checks for v in of("printed", c.readings)]
    printed_as_recorded = not as_printed if printed == "holds" else bool(as_printed) and set(as_printed) == {"refuted"}
    return verdict, verdict == "verified" and printed_as_recorded


def _reading(role: Role, name: str, result: MeanResult, seconds: float, alpha: float) -> Reading:
    def floats(values: Any) -> tuple[float, ...]:
        return tuple(float(v) for v in values)

    i = result.coordinate
    return Reading(
        role=role,
        name=name,
        verdict=result.verdict,
        estimate=floats(result.estimate),
        reference=floats(result.reference),
        lower=floats(result.lower),
        upper=floats(result.upper),
        margin=floats(result.margin),
        samples=result.samples,
        seconds=seconds,
        alpha=alpha,
        looks=tuple(
            Look(int(look.samples), float(look.estimate[i]), float(look.lower[i]), float(look.upper[i]))
            for look in result.looks
        ),
        looks_of=i,
        note=result.note,
    )
