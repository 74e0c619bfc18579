"""Markdown with LaTeX into fragments of HTML or Typst, all texts of a document in one call of pandoc.

Two kinds of text occur in the records. *Prose* (statements, reasons, captions) is Markdown. *Labels* (titles, names,
sources) are plain words in which nothing but mathematics between dollar signs has a meaning: a `<`, `_` or `#` in a
name is shown as it stands. Templates put a token where a text belongs; `Fragments.resolve` replaces them all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Literal

import pypandoc

Format = Literal["html", "typst"]

MATHS = re.compile(r"(?<!\\)\$(?=\S)((?:[^$\\]|\\.)+?)(?<=\S)\$(?!\d)", re.DOTALL)

# Records come from many hands: what could break out of its place on the page (raw HTML, headings that number
# themselves, footnotes, divisions) is switched off, so that it is shown as it stands.
_DIALECT = "markdown" + "".join(
    f"-{extension}"
    for extension in (
        "raw_html raw_tex raw_attribute yaml_metadata_block pandoc_title_block citations auto_identifiers footnotes "
        "inline_notes example_lists fenced_divs native_divs native_spans bracketed_spans header_attributes "
        "fenced_code_attributes inline_code_attributes link_attributes implicit_figures latex_macros definition_lists"
    ).split()
)
_WRITER = {"html": "html5", "typst": "typst"}
_MARK = {"html": re.compile(r"<p>MARK(\d+)END</p>\n?"), "typst": re.compile(r"^MARK(\d+)END\n+", re.MULTILINE)}
_SIZED = re.compile(r"\\(?:big|Big|bigg|Bigg)([lr]?)(?![A-Za-z])\s*")
_CIRCLED = re.compile(r"\b(times|plus|minus|dot)\.circle\b")
_TOKEN = re.compile("\ue000(\\d+)\ue001")
_FORBIDDEN = (
    (re.compile(r"^\s{0,3}(#|[=-]{3,}\s*$)", re.MULTILINE), "a heading or a rule"),
    (re.compile(r"!\["), "an image"),
    (re.compile(r"\]\(\s*#"), "a link into the page"),
)


class MarkupError(ValueError):
    """A text that cannot be typeset. `text` is the text, `fault` says what is wrong with it."""

    def __init__(self, text: str, fault: str, place: str = "") -> None:
        super().__init__(f"{place or 'text'} {text!r}: {fault}")
        self.text = text
        self.fault = fault


class Fragments:
    """The texts of one document: hands out a token for each and puts the typeset texts in their places."""

    def __init__(self, form: Format) -> None:
        self.form: Format = form
        self._texts: dict[tuple[str, bool], int] = {}

    def prose(self, text: str) -> str:
        """Return the token of a Markdown text that is set as paragraphs."""
        return self._token(inspect.cleandoc(text), False)

    def inline(self, text: str) -> str:
        """Return the token of a Markdown text that is set within a line, if it is a single paragraph."""
        return self._token(inspect.cleandoc(text), True)

    def label(self, text: str) -> str:
        """Return the token of a label: plain words and mathematics, within a line."""
        return self._token(escaped(text), True)

    def resolve(self, document: str) -> str:
        """Replace every token in `document`.

        Raises:
            MarkupError: if pandoc cannot parse one of the texts, or if a text breaks out of its place.
        """
        keys = list(self._texts)
        pieces = translate([text for text, _ in keys], self.form)
        settled = [_unwrapped(p, self.form) if line else p for p, (_, line) in zip(pieces, keys, strict=True)]
        return _TOKEN.sub(lambda found: settled[int(found.group(1))], document)

    def _token(self, text: str, line: bool) -> str:
        return f"\ue000{self._texts.setdefault((text, line), len(self._texts))}\ue001"


def escaped(label: str) -> str:
    r"""Return a label as Markdown: one line, every special character escaped outside mathematics.

    >>> print(escaped("half_order <h> at $h = 2$, #3"))
    half\_order \<h\> at $h = 2$\, \#3
    """
    parts, end = [], 0
    label = " ".join(label.split())
    for span in MATHS.finditer(label):
        parts += [_escape(label[end : span.start()]), span.group()]
        end = span.end()
    return "".join(parts) + _escape(label[end:])


def translate(texts: Sequence[str], form: Format) -> list[str]:
    """Return the texts (Markdown) as fragments of HTML or Typst, in the same order.

    Raises:
        MarkupError: for the first text that pandoc cannot parse.
    """
    if not texts:
        return []
    for text in texts:
        for pattern, name in _FORBIDDEN:
            if pattern.search(text):
                raise MarkupError(text, f"{name} cannot stand here")
    document = "\n\n".join(f"MARK{i}END\n\n{text}" for i, text in enumerate(texts)) + "\n"
    if form == "typst":
        document = "$".join(_growing(segment) for segment in document.split("$"))
    fault = ""
    try:
        output = pypandoc.convert_text(
            document, _WRITER[form], format=_DIALECT, extra_args=["--mathml", "--wrap=none", "--fail-if-warnings"]
        )
        parts = _MARK[form].split(output.rstrip() + "\n\n")
        if [int(index) for index in parts[1::2]] == list(range(len(texts))):
            return [_mended(part.strip(), form) for part in parts[2::2]]
        fault = "it breaks out of its place"
    except RuntimeError as error:
        fault = _first_warning(str(error))
    if len(texts) == 1:
        raise MarkupError(texts[0], fault)
    # Only on failure, to name the culprit: halve until one text is left.
    half = len(texts) // 2
    return translate(texts[:half], form) + translate(texts[half:], form)


def _growing(segment: str) -> str:
    r"""Replace brackets of a fixed size, which pandoc turns into scaled text, by brackets that fit their content.

    >>> print(_growing(r"\Bigl(\frac{a}{b}\Bigr) \big| c"))
    \left(\frac{a}{b}\right) | c
    """
    sides = [found.group(1) for found in _SIZED.finditer(segment)]
    paired = "&" not in segment and sides.count("l") == sides.count("r")
    names = {"l": r"\left", "r": r"\right"} if paired else {}
    return _SIZED.sub(lambda found: names.get(found.group(1), ""), segment)


def _escape(text: str) -> str:
    return re.sub(r"([^\w\s])", lambda found: "\\" * found.group().isascii() + found.group(), text).replace("_", r"\_")


def _unwrapped(piece: str, form: Format) -> str:
    single = re.fullmatch(r"<p>((?:(?!</?p>).)*)</p>", piece, flags=re.DOTALL) if form == "html" else None
    return single.group(1) if single else piece


def _mended(piece: str, form: Format) -> str:
    r"""Undo two slips of pandoc's: the small negative space `\!` as a whole em, and names that Typst has given up.

    >>> _mended(r"$a times.circle b$", "typst")
    '$a times.o b$'
    """
    if form == "html":
        return piece
    return _CIRCLED.sub(r"\1.o", piece.replace("#h(-1em)", "#h(-0.167em)"))


def _first_warning(message: str) -> str:
    text = message.split("[WARNING]", 1)[-1].split("Failing because", 1)[0]
    return " ".join(re.sub(r"expecting .*", "", text, flags=re.DOTALL).split())
