"""Texts of the records: labels are shown as they stand, prose is typeset, faults are named."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claims.records import Run
from reports.markup import Fragments, MarkupError, escaped, translate
from reports.paper import unset
from reports.report import check_markup
from tests.reports import fake

NASTY = (
    "a_b*c [sic] <code> @x ~ ^ | ` \\ {b} #1",
    "costs $5 and $6",
    "1. not a list",
    "- nor this + or that = heading",
    "# no heading",
    "// no comment /* at all */",
    "\"quotes\" and 'these' -- dashes...",
    "&amp; <b>bold</b> &nbsp;",
    ":::",
    "```",
    "https://example.org/x_y?z=1&w=#2",
)


def shown(fragment: str) -> str:
    """Return the text that a browser shows for a paragraph."""
    return html.unescape(re.sub(r"</?p>|</?a[^>]*>", "", fragment))


def test_labels_are_shown_as_they_stand() -> None:
    assert [shown(piece) for piece in translate([escaped(text) for text in NASTY], "html")] == list(NASTY)


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="$")), max_size=5)
)
def test_any_label_is_shown_as_it_stands(words: list[str]) -> None:
    text = " ".join(word for word in words if word)
    assert shown(translate([escaped(text)], "html")[0]) == text


def test_mathematics_in_labels_is_typeset() -> None:
    piece = translate([escaped(r"half_order at $\eta_1 > 0$")], "html")[0]
    assert "half_order at <math" in piece
    assert "η" in piece


@pytest.mark.parametrize("form", ["html", "typst"])
def test_texts_keep_their_places(form: str) -> None:
    fragments = Fragments(form)  # type: ignore[arg-type]
    texts = [f"text *number* {i}" for i in range(30)]
    document = "|".join(fragments.inline(text) for text in texts + texts[:3])
    pieces = re.sub(r"</?em>|#emph\[|\]", "", fragments.resolve(document)).split("|")
    assert pieces == [f"text number {i}" for i in [*range(30), 0, 1, 2]]


@pytest.mark.parametrize("form", ["html", "typst"])
def test_an_open_fence_does_not_swallow_what_follows(form: str) -> None:
    pieces = translate(["fine", "```\nopen", ": no definition", "fine"], form)  # type: ignore[arg-type]
    assert len(pieces) == 4
    assert pieces[0] == pieces[3]


@pytest.mark.parametrize("form", ["html", "typst"])
def test_a_text_that_looks_like_a_seam_is_refused(form: str) -> None:
    with pytest.raises(MarkupError, match="breaks out of its place"):
        translate(["fine", "MARK2END", "fine"], form)  # type: ignore[arg-type]


def test_labels_are_plain_text_in_typst_too() -> None:
    pieces = translate([escaped(text) for text in (*NASTY, "= x", "/ a: b", "+ x", "@label")], "typst")
    for piece in pieces:
        bare = re.sub(r"\\.", "", piece)
        assert not re.search(r"[#$@<`*_\[\]]|//|/\*|^[-+=/]", bare), piece


@pytest.mark.parametrize("form", ["html", "typst"])
def test_brackets_of_a_fixed_size_grow_with_their_content_on_paper(form: str) -> None:
    fixed, free = translate([r"$\Bigl(\frac{a}{b}\Bigr)^{\!\top}$", r"$\left(\frac{a}{b}\right)^{\!\top}$"], form)  # type: ignore[arg-type]
    assert (fixed == free) == (form == "typst")
    assert "-1em" not in fixed


def _with(run: Run, at: int, **changes: object) -> Run:
    evidence = list(run.evidence)
    evidence[at] = replace(evidence[at], statement=replace(evidence[at].statement, **changes))
    return replace(run, evidence=tuple(evidence))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("why", r"because $\frac{1}$ is not enough"),
        ("statement", r"$$\undefinedmacro{x}$$"),
        ("title", r"A title with $x_{$ in it"),
        ("why", "# A heading"),
        ("why", "![picture](x.png)"),
        ("corrected", "see [there](#nowhere)"),
        ("corrected", "a\n\nMARK7END\n\nb"),
    ],
)
def test_a_bad_text_is_named_by_claim_and_field(field: str, text: str) -> None:
    run = _with(fake.full_run(), 5, **{field: text})
    with pytest.raises(MarkupError, match=rf"^claim {re.escape(run.evidence[5].statement.id)}, statement\.{field} "):
        check_markup(run)


def test_bad_mathematics_in_a_figure_is_named() -> None:
    run = fake.full_run()
    bad = replace(fake.FRONTIER, y_label=r"$\undefinedmacro{x}$")
    evidence = (*run.evidence[:2], replace(run.evidence[2], figures=(bad,)))
    with pytest.raises(MarkupError, match=r"^claim foundations\.tweedie, figures\[0\]\.y_label "):
        check_markup(replace(run, evidence=evidence))


def test_the_made_up_run_can_be_typeset() -> None:
    check_markup(fake.full_run())


def test_what_typst_cannot_compile_is_found_and_names_it_has_given_up_are_mended() -> None:
    assert unset(translate([r"$a \otimes b$", r"$\bigotimes_i c_i \odot d$", r"$x \ominus y$"], "typst")) is None
    found = unset(["$a$", "$b$", "$c nosuch.symbol d$", "$e times.circle f$"])
    assert found is not None
    assert found[0] == 2
    assert "unknown" in found[1]
