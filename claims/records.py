"""What is claimed and what was measured, as plain data.

Everything the report shows is in these records, and nothing else is: a run is the JSON form of one `Run`, so an
old run can be drawn again without any algorithm. Arrays are lists of floats; non-finite floats are written as the
strings "inf", "-inf" and "nan", so that the files are valid JSON. `SCHEMA` is raised when a field changes meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
_NUMBERS = re.compile(r"\[\n[-+.\deE,\s]*\]")  # no string holds a line break, so this is never inside one

T = typing.TypeVar("T")

Verdict = Literal["verified", "refuted", "inconclusive"]
Printed = Literal["holds", "holds-corrected", "refuted"]
Role = Literal["claim", "printed", "control"]
Kind = Literal["exact", "statistical", "frequency", "scale"]  # frequency: of repeated trials; scale: on a network


class CorruptEvidence(ValueError):
    """An evidence file that cannot be read back; the text names the file and the fault."""


@dataclass(frozen=True)
class Statement:
    """A claim without its code: what is asserted, where it was printed, and what became of it.

    `statement`, `corrected` and `why` are Markdown with LaTeX between dollar signs. `printed` is the recorded status
    of the statement as it was printed (or released, for code).
    """

    id: str  # "estimators.half-order-unbiased": chapter, dot, name
    chapter: str  # "Foundations"
    paper: str  # short name of the paper or of the released code the statement stands in
    about: Literal["paper", "code", "own", "verifier"]  # whose statement it is; "own" and "verifier" are ours
    source: str  # "RLR, Proposition 4.1"
    title: str  # one line of plain words
    statement: str  # as printed
    printed: Printed
    corrected: str | None
    why: str  # two or three lines, for a reader in a hurry
    derivation: str  # file and heading under docs/, "estimators.md#sweep"
    kinds: tuple[Kind, ...]
    controls: tuple[str, ...]  # names of the planted errors


@dataclass(frozen=True)
class Look:
    """One look of a confidence sequence: interval of (estimate - reference) for the widest coordinate."""

    samples: int
    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Reading:
    """One subject (the statement, its printed form, or a planted error) judged by one check.

    `estimate`, `reference`, `lower`, `upper` have one entry per coordinate (`Check.coordinates` names them);
    `lower`/`upper` bound (estimate - reference) and are equal for exact checks up to rounding. `margin` is the
    pre-declared half-width of the region that counts as agreement. `looks` is the confidence sequence of the
    coordinate that decided last. `note` is a sentence for the reader.
    """

    role: Role
    name: str
    verdict: Verdict
    estimate: tuple[float, ...]
    reference: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    margin: tuple[float, ...]
    samples: int
    seconds: float
    alpha: float  # error probability spent on this reading; 0 for exact checks
    looks: tuple[Look, ...] = ()
    looks_of: int = 0  # the coordinate that `looks` follows
    note: str = ""


@dataclass(frozen=True)
class CheckEvidence:
    """All readings of one check: the statement itself, its printed form if that differs, and the planted errors."""

    name: str
    kind: Kind
    question: str  # plain words: what is compared with what
    margin_from: str  # where the margin comes from
    coordinates: tuple[str, ...]
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Series:
    """A curve, band, cloud or bar set: `x` and `y` of equal length; `lower`/`upper` make a band when present."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    style: Literal["line", "points", "bars", "dashed", "step"] = "line"
    labels: tuple[str, ...] = ()  # one text per point, for labelled scatter plots


@dataclass(frozen=True)
class Panel:
    """One of several small plots that share their axes' names, their scales and one legend."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Figure:
    """Data of one picture. `kind` says which of `series`, `matrices` (name, rows as tuples), `panels`, `images` is drawn.

    "plot" draws `series` in one pair of axes, "matrix" draws `matrices`, "images" draws lines of grey images (name of
    the line, images with values from 0, black, to 1), "panels" draws small multiples, row by row:
    a label has the same colour, dash and marker in all of them. `shared_axes` says which panels have equal limits:
    "all"; "grid" (y along a row, x down a column); or "none".
    """

    name: str  # "frontier": the first screen may show it as the answer to "which estimator for my budget?"
    title: str
    caption: str  # states the finding
    alt: str  # text alternative for readers who cannot see it
    kind: Literal["plot", "matrix", "panels", "images"] = "plot"
    x_label: str = ""
    y_label: str = ""
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    series: tuple[Series, ...] = ()
    matrices: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...] = ()
    row_labels: tuple[str, ...] = ()  # of every matrix; 1, 2, ... where empty
    column_labels: tuple[str, ...] = ()  # of every matrix; 0, 1, ... where empty
    images: tuple[tuple[str, tuple[tuple[tuple[float, ...], ...], ...]], ...] = ()
    row_sums: bool = True  # stand beside every matrix: a credit matrix is unbiased if they are one
    panels: tuple[Panel, ...] = ()
    panel_columns: int = 3
    shared_axes: Literal["all", "grid", "none"] = "all"
    end_labels: bool = False  # of a plot: names at the right ends of its curves instead of a legend above


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, how its cells are set, and the wider heading that it stands under, if any.

    Neighbours with the same `group` share that heading: "paper" beside "ours".
    """

    name: str
    align: Literal["left", "right", "center"] = "right"
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table beside the figures. The first column names the rows; cells are words and mathematics between dollars.

    Numbers in cells are written as Python formats them ("-0.31", "1.2e-05", "0.31 [0.29, 0.33]"): minus signs and
    powers of ten are typeset by the report. Raises ValueError for a row that has not one cell per column.
    """

    name: str  # "advice" (columns: regime, take, why): the first screen shows it above the frontier
    title: str
    caption: str  # states the finding
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.name!r}, rows[{i}]: {len(row)} cells, must be one per column ({len(self.columns)})"
                )


@dataclass(frozen=True)
class Evidence:
    """What one run measured about one statement.

    `verdict` is about the statement that we stand behind (the corrected one where there is a correction):
    `verified` only if its checks verify it, every planted error is refuted and, where the printed form is recorded
    as wrong, the printed form is refuted too.
    """

    statement: Statement
    verdict: Verdict
    as_recorded: bool  # the verdict is the one the registry records
    checks: tuple[CheckEvidence, ...]
    figures: tuple[Figure, ...]
    seconds: float
    schema: int = SCHEMA
    error: str = ""  # the exception's text, when the claim's own code failed
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where a run comes from: everything needed to repeat it."""

    seed: int
    profile: str
    alpha: float  # error probability of the whole run
    started: str  # ISO 8601, UTC
    seconds: float
    commit: str
    machine: str
    versions: dict[str, str]
    jobs: int
    selected: tuple[str, ...]  # identifiers of the claims that were asked for
    finished: bool
    model: str = ""  # the one that was audited; none for the registry's claims


@dataclass(frozen=True)
class Run:
    """One whole run: provenance and the evidence of every claim, in registry order."""

    provenance: Provenance
    evidence: tuple[Evidence, ...]
    schema: int = SCHEMA
    notes: tuple[str, ...] = field(default=())


def to_json(record: Any) -> str:
    """Return the JSON text of a record (any dataclass of this module), with a list of numbers on one line."""
    text = json.dumps(_plain(dataclasses.asdict(record)), indent=1, ensure_ascii=False, allow_nan=False)
    return _NUMBERS.sub(lambda found: " ".join(found.group().split()), text)


def from_json(kind: type[T], text: str, origin: str = "evidence") -> T:
    """Read a record of class `kind` back from JSON text.

    Raises:
        CorruptEvidence: if the text is not JSON, lacks a field, or was written under another schema.
    """
    try:
        data = json.loads(text)
        if data.get("schema", SCHEMA) != SCHEMA:
            raise CorruptEvidence(f"{origin}: schema {data['schema']}, this version reads {SCHEMA}")
        return _build(kind, data)
    except CorruptEvidence:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CorruptEvidence(f"{origin}: not a valid {kind.__name__} record ({fault})") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader, or a kill at any moment, sees the old file or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # temporary files are private, evidence is to be read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if unknown := set(value) - names:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_build(arguments[0], item) for item in value)
        return tuple(_build(a, item) for a, item in zip(arguments, value, strict=True))
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is not one of {arguments}")
        return value
    if kind is float:
        return float(value)
    if kind in (int, str, bool) and not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value
