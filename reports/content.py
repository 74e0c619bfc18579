"""From the records of a run to what stands in the report, for page and paper alike.

Nothing is typeset here: the result holds words, formatted numbers and figures, and both templates show all of it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from joblib import Parallel, delayed

from claims.records import CheckEvidence, Evidence, Provenance, Reading, Run, Statement
from claims.records import Figure as FigureRecord
from reports.figures import draw, draw_sequence, followed, unit
from reports.markup import escaped
from reports.numerals import count, duration, interval, number
from reports.tables import Listing, listing

MOST_COORDINATES = 64  # listed per reading; the rest is in evidence.json
FEW_COORDINATES = 6  # that a page of paper lists in full
MANY_PICTURES = 40  # that are worth the start of more processes


@dataclass(frozen=True)
class Badge:
    """A verdict as shape and word."""

    key: str
    shape: str
    word: str


VERIFIED = Badge("verified", "●", "verified")
CORRECTED = Badge("corrected", "▲", "corrected")
REFUTED = Badge("refuted", "■", "refuted")
INCONCLUSIVE = Badge("inconclusive", "○", "inconclusive")
STATUSES = (VERIFIED, CORRECTED, REFUTED, INCONCLUSIVE)
MEANINGS = (
    (VERIFIED, "the statement holds as printed"),
    (CORRECTED, "it holds after the correction given with it"),
    (REFUTED, "it is false as printed"),
    (INCONCLUSIVE, "the run could not decide"),
)


@dataclass(frozen=True)
class Picture:
    """A numbered figure: SVG with placeholder colours, and its words (Markdown caption)."""

    key: str
    number: int
    title: str
    caption: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Coordinate:
    """One coordinate of a reading, formatted."""

    name: str
    estimate: str
    reference: str
    interval: str
    margin: str


@dataclass(frozen=True)
class Row:
    """One reading, formatted: the coordinate that decides, and all of them where there are several."""

    role: str
    name: str
    badge: Badge
    missed: str
    total: int
    deciding: Coordinate
    samples: str
    seconds: str
    note: str
    all: tuple[Coordinate, ...]
    omitted: int


@dataclass(frozen=True)
class Check:
    """One check of a claim: its readings as rows and its confidence sequences as a picture."""

    name: str
    kind: str
    question: str
    margin_from: str
    rows: tuple[Row, ...]
    vectors: tuple[Row, ...]
    sequence: Picture | None


@dataclass(frozen=True)
class Section:
    """The section of one claim."""

    number: str
    anchor: str
    statement: Statement
    badge: Badge
    remarks: tuple[str, ...]
    error: str
    derivation: str
    checks: tuple[Check, ...]
    pictures: tuple[Picture, ...]
    tables: tuple[Listing, ...]
    planted: tuple[tuple[str, Badge | None], ...]
    seconds: str


@dataclass(frozen=True)
class Chapter:
    """The claims of one chapter, and how many of them ended how."""

    number: int
    anchor: str
    title: str
    tally: tuple[tuple[Badge, int], ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Fault:
    """One line of the tables of what is wrong."""

    section: Section
    printed: str
    true: str
    coordinate: str
    wrong_value: str
    right_value: str
    missing: str


@dataclass(frozen=True)
class Basis:
    """Claims that rest on one kind of evidence."""

    name: str
    meaning: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Guide:
    """Which estimator for which budget: the picture and the advice, each with the section that its evidence is in."""

    frontier: tuple[Section, Picture] | None
    advice: tuple[Section, Listing] | None
    origins: tuple[tuple[Section, str], ...]  # the sections, and a warning where one has not been verified


@dataclass(frozen=True)
class Report:
    """Everything the report shows."""

    headline: str
    budget: str
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    wrong_in_papers: tuple[Fault, ...]
    wrong_in_code: tuple[Fault, ...]
    guide: Guide | None
    chapters: tuple[Chapter, ...]
    bases: tuple[Basis, ...]
    spent: tuple[tuple[Section, str], ...]
    spent_total: str
    alpha: str
    provenance: tuple[tuple[str, str], ...]
    title: str
    command: str  # that measures one claim, whose identifier follows


TITLE = "What holds in reward fine-tuning of diffusion models"


def report_of(run: Run) -> Report:
    """Return the content of the report of a run, with all figures drawn."""
    chapters = _chapters(run)
    sections = [section for chapter in chapters for section in chapter.sections]
    evidence = {e.statement.id: e for e in run.evidence}
    spending = [(s, _spent(evidence[s.statement.id])) for s in sections]
    return Report(
        headline=_headline(run.evidence),
        budget=_budget_line(run),
        facts=_facts(run.provenance),
        warnings=_warnings(run),
        notes=run.notes,
        wrong_in_papers=_faults(sections, evidence, "paper"),
        wrong_in_code=_faults(sections, evidence, "code"),
        guide=_guide(sections, evidence),
        chapters=chapters,
        bases=_bases(sections, evidence),
        spent=tuple((s, number(alpha, 3)) for s, alpha in spending if alpha > 0),
        spent_total=number(math.fsum(alpha for _, alpha in spending), 3),
        alpha=number(run.provenance.alpha, 3),
        provenance=_provenance(run.provenance),
        title=f"Audit of {run.provenance.model}" if run.provenance.model else TITLE,
        command=f"verifine {'audit CONFIG' if run.provenance.model else 'verify'} --claim",
    )


def status(evidence: Evidence) -> Badge:
    """Return what became of a statement as it was printed."""
    if evidence.error or evidence.verdict == "inconclusive":
        return INCONCLUSIVE
    if evidence.verdict == "refuted":
        return REFUTED
    return {"holds": VERIFIED, "holds-corrected": CORRECTED, "refuted": REFUTED}[evidence.statement.printed]


def planted(evidence: Evidence) -> dict[str, Badge | None]:
    """Return the verdict on every planted error of a claim, None where it was not tried.

    A planted error that occurs in several checks counts as refuted only if all of them refute it.
    """
    names = dict.fromkeys(evidence.statement.controls)
    read = [r for check in evidence.checks for r in check.readings if r.role == "control"]
    names |= dict.fromkeys(r.name for r in read)
    return {name: _weakest([r for r in read if r.name == name]) for name in names}


def anchor(text: str) -> str:
    """Return `text` as an identifier for links.

    >>> anchor("estimators.half-order"), anchor("Où & why?")
    ('estimators.half-order', 'o-why')
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower() or "x"


def _weakest(readings: Sequence[Reading]) -> Badge | None:
    if not readings:
        return None
    verdicts = {r.verdict for r in readings}
    return REFUTED if verdicts == {"refuted"} else VERIFIED if "verified" in verdicts else INCONCLUSIVE


def _headline(evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return "This run has checked **no statements**."
    own = [e for e in evidence if e.statement.about in ("own", "verifier")]
    others = [e for e in evidence if e not in own]
    printed = (
        (VERIFIED, "holds as printed", "hold as printed"),
        (CORRECTED, "holds after a correction", "hold after a correction"),
        (REFUTED, "is refuted as printed", "are refuted as printed"),
        (INCONCLUSIVE, "is inconclusive", "are inconclusive"),
    )
    stated = (
        (VERIFIED, "is verified", "are verified"),
        (REFUTED, "is refuted", "are refuted"),
        (INCONCLUSIVE, "is inconclusive", "are inconclusive"),
    )
    parts = []
    if others:
        parts.append(f"of **{_statements(len(others))}** in papers and released code, {_tally(others, printed)}")
    if own:
        parts.append(f"of **{_statements(len(own))}** of our own, {_tally(own, stated)}")
    text = "; ".join(parts)
    controls = [badge for e in evidence for badge in planted(e).values() if badge is not None]
    found = sum(badge is REFUTED for badge in controls)
    return f"{text[0].upper()}{text[1:]}. **{found} of {len(controls)}** planted errors were found."


def _statements(count: int) -> str:
    return f"{count} statement{'' if count == 1 else 's'}"


def _tally(evidence: Sequence[Evidence], verbs: Sequence[tuple[Badge, str, str]]) -> str:
    """Return "**3** hold, **1** is refuted and **0** are inconclusive"."""
    counts = Counter(status(e) for e in evidence)
    parts = [f"**{counts[badge]}** {one if counts[badge] == 1 else many}" for badge, one, many in verbs]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _budget_line(run: Run) -> str:
    return f"Probability that any statistical verdict is wrong: at most {number(run.provenance.alpha, 3)}."


def _facts(p: Provenance) -> tuple[tuple[str, str], ...]:
    return (
        ("run time", duration(p.seconds)),
        ("machine", p.machine),
        ("seed", str(p.seed)),
        ("commit", p.commit[:12] or "unknown"),
        ("profile", p.profile),
    )


def _provenance(p: Provenance) -> tuple[tuple[str, str], ...]:
    return (
        ("Started", p.started),
        ("Run time", duration(p.seconds)),
        ("Machine", p.machine),
        ("Parallel jobs", str(p.jobs)),
        ("Commit", p.commit or "unknown"),
        ("Root seed", str(p.seed)),
        ("Profile", p.profile),
        ("Error budget", number(p.alpha, 3)),
        ("Claims asked for", str(len(p.selected))),
        *((f"Version of {name}", version) for name, version in sorted(p.versions.items())),
    )


def _warnings(run: Run) -> tuple[str, ...]:
    measured = {e.statement.id for e in run.evidence}
    missing = [claim for claim in run.provenance.selected if claim not in measured]
    lines = []
    if not run.provenance.finished:
        lines.append("This report is partial: the run has not finished.")
    if missing:
        shown = ", ".join(missing[:12]) + (f" and {len(missing) - 12} more" if len(missing) > 12 else "")
        lines.append(
            f"This report is partial: {len(missing)} of {len(run.provenance.selected)} selected "
            f"claims {'has' if len(missing) == 1 else 'have'} no evidence yet ({shown})."
        )
    if failed := [e for e in run.evidence if e.error]:
        lines.append(f"The code of {len(failed)} {'claim' if len(failed) == 1 else 'claims'} failed; see there.")
    if odd := [e for e in run.evidence if not e.as_recorded and not e.error]:
        names = ", ".join(e.statement.id for e in odd)
        lines.append(f"Not the verdict that the registry records: {names}.")
    return tuple(lines)


class _Numbering:
    """Numbers figures, or tables, in the order in which they are met."""

    def __init__(self, before: int) -> None:
        self.last = before

    def next(self) -> int:
        self.last += 1
        return self.last


def _chapters(run: Run) -> tuple[Chapter, ...]:
    titles = list(dict.fromkeys(e.statement.chapter for e in run.evidence))
    chapters = [(title, [e for e in run.evidence if e.statement.chapter == title]) for title in titles]
    places = [(e, f"{i}.{j}") for i, (_, members) in enumerate(chapters, 1) for j, e in enumerate(members, 1)]
    pictures, tables = (list(itertools.accumulate(of(e) for e, _ in places)) for of in (_pictures, _tables))
    # A section knows how many figures stand before it, so that sections can be drawn in any order and in parallel.
    before = list(zip(places, [0, *pictures], [0, *tables], strict=False))
    workers = -1 if pictures and pictures[-1] >= MANY_PICTURES else 1
    drawn = Parallel(workers)(delayed(_section)(e, place, figure, table) for (e, place), figure, table in before)
    sections = iter(cast("list[Section]", drawn))
    made = []
    for i, (title, members) in enumerate(chapters, 1):
        tally = Counter(status(e) for e in members)
        counted = tuple((badge, tally[badge]) for badge in STATUSES if tally[badge])
        own = tuple(next(sections) for _ in members)
        made.append(Chapter(i, f"chapter-{i}-{anchor(title)}", title, counted, own))
    return tuple(made)


def _pictures(e: Evidence) -> int:
    return sum(bool(followed(check)) for check in e.checks) + len(e.figures)


def _tables(e: Evidence) -> int:
    return len(e.tables)


def _section(e: Evidence, place: str, figures_before: int, tables_before: int) -> Section:
    figures, tables, remarks = _Numbering(figures_before), _Numbering(tables_before), []
    if not e.as_recorded and not e.error:
        remarks.append("This is not the verdict that the registry records for this statement.")
    if missed := [name for name, badge in planted(e).items() if badge not in (REFUTED, None)]:
        remarks.append(f"Planted error not found: {', '.join(missed)}. The claim cannot count as verified.")
    if untried := [name for name, badge in planted(e).items() if badge is None]:
        remarks.append(f"Planted error not tried in this run: {', '.join(untried)}.")
    name, key = anchor(e.statement.id), place.replace(".", "-")
    checks = tuple(_check(check, place, f"s{key}-{k}", figures) for k, check in enumerate(e.checks))
    return Section(
        number=place,
        anchor=f"claim-{name}",
        statement=e.statement,
        badge=status(e),
        remarks=tuple(remarks),
        error=e.error,
        derivation=_derivation(e.statement.derivation),
        checks=checks,
        pictures=tuple(_picture(f, f"f{key}-{k}", figures) for k, f in enumerate(e.figures)),
        tables=tuple(listing(t, f"t{key}-{k}", tables.next()) for k, t in enumerate(e.tables)),
        planted=tuple(planted(e).items()),
        seconds=duration(e.seconds),
    )


def _derivation(name: str) -> str:
    return f"docs/{name}" if name and not name.startswith("docs/") else name


def _picture(figure: FigureRecord, key: str, numbering: _Numbering) -> Picture:
    return Picture(key, numbering.next(), figure.title, figure.caption, figure.alt, draw(figure, key))


def _check(check: CheckEvidence, place: str, key: str, numbering: _Numbering) -> Check:
    rows = tuple(_row(check, reading) for reading in check.readings)
    return Check(
        name=check.name,
        kind=check.kind,
        question=check.question,
        margin_from=check.margin_from,
        rows=rows,
        vectors=tuple(row for row in rows if row.total > 1),
        sequence=_sequence(check, place, key, numbering) if followed(check) else None,
    )


def _sequence(check: CheckEvidence, place: str, key: str, numbering: _Numbering) -> Picture:
    alt = "Confidence sequences against the number of samples. " + " ".join(
        f"{name}: {outcome}." for name, outcome in (_approach(reading, check) for reading in followed(check))
    )
    title = f"Confidence sequences of {place}: {check.name}"
    svg = draw_sequence(check, key, title, alt)
    outcomes = "; ".join(
        f"*{escaped(name)}* {escaped(outcome)}" for name, outcome in (_approach(r, check) for r in followed(check))
    )
    caption = f"{outcomes}. The grey band is the margin."
    return Picture(key, numbering.next(), title, caption, alt, svg)


def _approach(reading: Reading, check: CheckEvidence) -> tuple[str, str]:
    """Return the subject of a confidence sequence and what it did."""
    subject = reading.name
    if len(check.coordinates) > 1 and reading.looks_of < len(check.coordinates):
        subject += f" ({check.coordinates[reading.looks_of]})"
    margin = unit(reading)
    inside = next((k.samples for k in reading.looks if -margin <= k.lower and k.upper <= margin), None)
    outside = next((k.samples for k in reading.looks if k.lower > 0 or k.upper < 0), None)
    if reading.verdict == "verified" and inside is not None:
        return subject, f"is within the margin after {count(inside)} samples"
    if reading.verdict == "refuted" and outside is not None:
        return subject, f"is away from zero after {count(outside)} samples"
    last = reading.looks[-1]
    return subject, f"is {reading.verdict} after {count(last.samples)} samples, at {interval(last.lower, last.upper)}"


def _row(check: CheckEvidence, reading: Reading) -> Row:
    total = len(reading.estimate)
    decided = deciding(reading)
    everything = tuple(_coordinate(check, reading, i) for i in range(min(total, MOST_COORDINATES)))
    is_control = reading.role == "control"
    return Row(
        role={"claim": "statement", "printed": "printed form", "control": "planted error"}[reading.role],
        name=reading.name,
        badge={"verified": VERIFIED, "refuted": REFUTED, "inconclusive": INCONCLUSIVE}[reading.verdict],
        missed="not found" if is_control and reading.verdict != "refuted" else "",
        total=total,
        deciding=_coordinate(check, reading, decided) if total else Coordinate("", "–", "–", "–", "–"),
        samples=count(reading.samples) if reading.samples else "exact" if check.kind == "exact" else "0",
        seconds=duration(reading.seconds),
        note=reading.note,
        all=everything if total > 1 else (),
        omitted=max(0, total - MOST_COORDINATES),
    )


def deciding(reading: Reading) -> int:
    """Return the coordinate to show first: the one whose difference is largest in units of its margin."""

    def deviation(i: int) -> float:
        gap = abs(reading.estimate[i] - reading.reference[i])
        margin = reading.margin[i] if i < len(reading.margin) else 0.0
        gap = math.inf if math.isnan(gap) else gap
        return gap / margin if 0 < margin < math.inf else gap

    return max(range(len(reading.estimate)), key=deviation, default=0)


def _coordinate(check: CheckEvidence, reading: Reading, i: int) -> Coordinate:
    name = check.coordinates[i] if i < len(check.coordinates) else f"entry {i + 1}"
    bounded = i < len(reading.lower) and i < len(reading.upper)
    return Coordinate(
        name=name if len(reading.estimate) > 1 or check.coordinates else "",
        estimate=number(reading.estimate[i]),
        reference=number(reading.reference[i]) if i < len(reading.reference) else "–",
        interval=interval(reading.lower[i], reading.upper[i]) if bounded else "–",
        margin=number(reading.margin[i], 3) if i < len(reading.margin) else "–",
    )


def _faults(sections: Iterable[Section], evidence: dict[str, Evidence], about: str) -> tuple[Fault, ...]:
    return tuple(
        _fault(section, evidence[section.statement.id])
        for section in sections
        if section.statement.about == about and section.statement.printed != "holds"
    )


def _fault(section: Section, e: Evidence) -> Fault:
    true = e.statement.corrected or e.statement.why
    refuted = [
        (check, r) for check in e.checks for r in check.readings if r.role == "printed" and r.verdict == "refuted"
    ]
    if not refuted:
        missing = "its code failed in this run" if e.error else "no counterexample in this run"
        return Fault(section, e.statement.statement, true, "", "", "", missing)
    # An exact counterexample is the smallest: it needs no samples.
    check, reading = min(refuted, key=lambda pair: pair[0].kind != "exact")
    shown = _coordinate(check, reading, deciding(reading))
    return Fault(section, e.statement.statement, true, shown.name, shown.estimate, shown.reference, "")


def _guide(sections: Sequence[Section], evidence: dict[str, Evidence]) -> Guide | None:
    """Return the last advice and the frontier of its claim, or else the last frontier: later chapters know more."""
    frontiers, advices = [], []
    for section in sections:
        e = evidence[section.statement.id]
        pairs = zip(e.figures, section.pictures, strict=True)
        frontiers += [(section, record, picture) for record, picture in pairs if record.name == "frontier"]
        advices += [(section, t) for r, t in zip(e.tables, section.tables, strict=True) if r.name == "advice"]
    if not frontiers and not advices:
        return None
    advice = (advices[-1][0], replace(advices[-1][1], key="advice")) if advices else None
    frontier = None
    if frontiers:
        beside = [row for row in frontiers if advice and row[0] is advice[0]]
        section, record, picture = (beside or frontiers)[-1]
        frontier = (section, replace(picture, key="frontier", svg=draw(record, "frontier")))
    origins = {part[0].anchor: part[0] for part in (advice, frontier) if part}
    doubts = {name: evidence[s.statement.id].verdict != "verified" for name, s in origins.items()}
    return Guide(
        frontier,
        advice,
        tuple((s, "which this run could not verify" if doubts[name] else "") for name, s in origins.items()),
    )


def _spent(e: Evidence) -> float:
    return math.fsum(r.alpha for check in e.checks for r in check.readings)


def _bases(sections: Iterable[Section], evidence: dict[str, Evidence]) -> tuple[Basis, ...]:
    groups: dict[frozenset[str], list[Section]] = {}
    for section in sections:
        kinds = frozenset(check.kind for check in evidence[section.statement.id].checks)
        groups.setdefault(kinds, []).append(section)
    described = (
        ({"exact"}, "Exact computation", "no sampling; nothing of the error budget is spent"),
        ({"statistical"}, "Statistics", "confidence sequences, valid at whatever sample they stop"),
        ({"exact", "statistical"}, "Both", "an exact check and a statistical one"),
        ({"scale"}, "Networks", "identities to rounding, and samples, on the models that the checks name"),
        ({"frequency"}, "Repeated trials", "frequencies of verdicts, with exact binomial intervals at 99 %"),
        ({"exact", "frequency"}, "Repeated trials and computation", "frequencies of verdicts, and planned power"),
        (set[str](), "Nothing yet", "no check has run"),
    )
    return tuple(
        Basis(name, meaning, tuple(groups[frozenset(kinds)]))
        for kinds, name, meaning in described
        if frozenset(kinds) in groups
    )
