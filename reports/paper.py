"""The report as a typeset paper: Typst source, and the PDF made of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import typst

from reports.content import FEW_COORDINATES, MEANINGS, Report
from reports.fonts import MATHS_FILE, TEXT_FILES, TEXT_FOLDER
from reports.markup import Fragments
from reports.numerals import PLAIN
from reports.palette import PRINT, coloured
from reports.templating import environment


def source(report: Report) -> str:
    """Return the Typst source of a report; its figures are the files `KEY.svg`.

    Raises:
        MarkupError: if a text of the report cannot be typeset.
    """
    fragments = Fragments("typst")
    jinja = environment(autoescape=False)
    for name in ("prose", "inline", "label"):
        jinja.filters[name] = getattr(fragments, name)
    jinja.filters["str"] = _string
    jinja.filters["num"] = _numeral
    return fragments.resolve(
        jinja.get_template("paper.typ").render(report=report, meanings=MEANINGS, few=FEW_COORDINATES)
    )


def pdf(report: Report) -> bytes:
    """Return the PDF of a report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fonts = folder / "fonts"
        fonts.mkdir()
        for file in (*(TEXT_FOLDER / text for text in TEXT_FILES.values()), MATHS_FILE):
            (fonts / file.name).write_bytes(file.read_bytes())
        for chapter in report.chapters:
            for section in chapter.sections:
                for picture in (*(c.sequence for c in section.checks if c.sequence), *section.pictures):
                    (folder / f"{picture.key}.svg").write_text(coloured(picture.svg, PRINT), encoding="utf-8")
        if report.guide and report.guide.frontier:
            (folder / "frontier.svg").write_text(coloured(report.guide.frontier[1].svg, PRINT), encoding="utf-8")
        main = folder / "paper.typ"
        main.write_text(source(report), encoding="utf-8")
        return typst.compile(str(main), root=str(folder), font_paths=[str(fonts)], ignore_system_fonts=True)


def unset(pieces: Sequence[str]) -> tuple[int, str] | None:
    """Return the index of the first Typst fragment that cannot be compiled, and the fault; None if all can."""
    with tempfile.TemporaryDirectory() as name:
        main = Path(name) / "main.typ"
        main.write_text("\n\n".join(pieces), encoding="utf-8")
        try:
            typst.compile(str(main), root=name, ignore_system_fonts=True)
        except typst.TypstError as error:
            fault = " ".join(str(error).split())
        else:
            return None
    if len(pieces) == 1:
        return 0, fault
    half = len(pieces) // 2  # only on failure, to name the culprit
    if found := unset(pieces[:half]):
        return found
    found = unset(pieces[half:])
    return None if found is None else (half + found[0], found[1])


def _string(text: str) -> str:
    """Return `text` as a Typst string literal."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{quoted}"'


def _numeral(text: str) -> str:
    """Return formatted numbers as Typst content, with exponents raised."""
    pieces = re.split("([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text)
    return "".join(
        f"#super[{piece.translate(PLAIN)}]" if i % 2 else f"#{_string(piece)};"
        for i, piece in enumerate(pieces)
        if piece
    )
