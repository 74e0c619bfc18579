"""The two faces of the report, cut down to the characters that a report can need.

Text is STIX General (it ships with Matplotlib), mathematics STIX Two Math (it ships with ziamath); both are under the
SIL Open Font License. A browser maps the letters of MathML to the mathematical alphanumerics by itself, so those must
be in the file although they never occur in the page's text.
"""

from __future__ import annotations

import base64
import functools
import io
import logging
from importlib.metadata import distribution
from pathlib import Path

import matplotlib
from fontTools import subset
from fontTools.ttLib import TTFont

TEXT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Found without importing ziamath, which warns on import.
MATHS_FILE = Path(str(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")))
TEXT_FILES = {
    ("normal", 400): "STIXGeneral.ttf",
    ("italic", 400): "STIXGeneralItalic.ttf",
    ("normal", 700): "STIXGeneralBol.ttf",
    ("italic", 700): "STIXGeneralBolIta.ttf",
}
_LATIN = frozenset(map(chr, range(0x20, 0x180)))
# Never written in the page, but drawn: italics that stand for plain letters, the root, the badges.
_MAPPED = frozenset(map(chr, (*range(0x1D434, 0x1D468), *range(0x1D6A4, 0x1D71C), 0x210E, 0x221A))) | set("●▲■○−×")


def font_faces(document: str) -> str:
    """Return the CSS rules that embed both faces, with the characters of `document`."""
    used = frozenset(document)
    rules = [
        _rule("Report Text", style, weight, TEXT_FOLDER / file, _LATIN | used)
        for (style, weight), file in TEXT_FILES.items()
    ]
    return "\n".join([*rules, _rule("Report Maths", "normal", 400, MATHS_FILE, _LATIN | _MAPPED | used)])


def _rule(family: str, style: str, weight: int, file: Path, characters: frozenset[str]) -> str:
    data = base64.b64encode(_woff2(file, characters)).decode("ascii")
    return (
        f'@font-face{{font-family:"{family}";font-style:{style};font-weight:{weight};font-display:swap;'
        f"src:url(data:font/woff2;base64,{data}) format('woff2')}}"
    )


@functools.lru_cache(maxsize=16)
def _woff2(file: Path, characters: frozenset[str]) -> bytes:
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it reports every table that it leaves out
    options = subset.Options(flavor="woff2", layout_features=["kern", "ssty"], hinting=False, notdef_outline=True)
    options.drop_tables += ["FFTM", "DSIG", "GlyphOrder"]
    font = TTFont(file, recalcTimestamp=False)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[ord(character) for character in characters])
    cutter.subset(font)
    font.flavor = "woff2"
    buffer = io.BytesIO()
    font.save(buffer)
    return buffer.getvalue()
