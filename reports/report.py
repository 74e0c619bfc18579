"""Evidence in, three files out: the page, the paper, and the evidence itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from claims.records import Run, to_json, write_atomically
from reports.content import report_of
from reports.markup import MarkupError, escaped, translate
from reports.page import page
from reports.paper import pdf, unset
from reports.plots import check_plot_text
from reports.tables import cell

_PROSE = {"statement", "corrected", "why", "question", "margin_from", "caption", "note", "notes"}
_LABELS = {"title", "source", "chapter", "paper", "name", "controls", "coordinates", "group", "rows"}
_PLOTTED = {"x_label", "y_label", "label", "labels", "row_labels", "column_labels", "matrices"}


def write_report(run: Run, folder: Path) -> tuple[Path, Path, Path]:
    """Write `index.html`, `report.pdf` and `evidence.json` of a run to `folder`, each whole or not at all.

    Raises:
        MarkupError: (a ValueError) if a text cannot be typeset; the message names the claim and the field.
    """
    folder.mkdir(parents=True, exist_ok=True)
    evidence = folder / "evidence.json"
    write_atomically(evidence, to_json(run))  # first: it must not be lost to a fault of presentation
    check_markup(run)
    report = report_of(run)
    index, paper = folder / "index.html", folder / "report.pdf"
    write_atomically(index, page(report))
    write_atomically(paper, pdf(report))
    return index, paper, evidence


def check_markup(run: Run) -> None:
    """Raise MarkupError, naming the claim and the field, if a text of the run cannot be typeset."""
    places: dict[str, str] = {}
    for place, text, field in _texts(run):
        if field in _PLOTTED or ".panels[" in place:
            _check_plotted(place, text)
        else:
            shown = cell(text) if field == "rows" else text
            places.setdefault(inspect.cleandoc(text) if field in _PROSE else escaped(shown), place)
    texts = list(places)
    try:
        translate(texts, "html")
        pieces = translate(texts, "typst")
    except MarkupError as error:
        raise MarkupError(error.text, error.fault, places[error.text]) from None
    if found := unset(pieces):
        index, fault = found
        raise MarkupError(texts[index], f"Typst cannot set it: {fault}", places[texts[index]])


def _check_plotted(place: str, text: str) -> None:
    try:
        check_plot_text(text)
    except ValueError as error:
        raise MarkupError(text, f"Matplotlib cannot set it: {' '.join(str(error).split())}", place) from None


def _texts(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the text and the field's name of every text that is shown."""
    for i, note in enumerate(run.notes):
        yield f"run, notes[{i}]", note, "notes"
    for evidence in run.evidence:
        for path, text, field in _strings(evidence, ""):
            if field in _PROSE | _LABELS | _PLOTTED:
                yield f"claim {evidence.statement.id}, {path}", text, field


def _strings(value: Any, path: str, field: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(value, str):
        yield path, value, field
    elif is_dataclass(value):
        for entry in fields(value):
            inner = f"{path}.{entry.name}" if path else entry.name
            yield from _strings(getattr(value, entry.name), inner, entry.name)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _strings(item, f"{path}[{i}]", field)
