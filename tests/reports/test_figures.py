"""Figures: readable without eyes, without colour, and the same in every run."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from claims.records import Figure, Series
from reports.figures import PRINT, SCREEN, coloured, draw, draw_sequence, followed, plot_text
from tests.reports import fake

FIGURES = (fake.FRONTIER, fake.MATRICES, fake.CLOUD, fake.BARS, Figure("empty", "Nothing", "c", "Nothing is drawn."))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figure_has_a_text_alternative_and_no_left_over_colours(figure: Figure) -> None:
    svg = draw(replace(figure, alt='less < more & "quotes"'), "key")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    named = {node.get("id"): node.text for node in root}
    assert [named[name] for name in root.get("aria-labelledby", "").split()] == [figure.title, 'less < more & "quotes"']
    for palette in (SCREEN, PRINT):
        assert not re.search("#0000[01]", coloured(svg, palette))
    assert "<dc:date>" not in svg


def test_identifiers_are_unique_across_figures_and_all_references_resolve() -> None:
    pictures = [draw(figure, f"f{i}") for i, figure in enumerate(FIGURES)]
    identifiers = re.findall(r'\bid="([^"]+)"', "".join(pictures))
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(pictures))
    assert used
    assert set(used) <= set(identifiers)


def test_drawing_twice_gives_the_same_text() -> None:
    assert draw(fake.FRONTIER, "k") == draw(fake.FRONTIER, "k")
    check = fake.full_run().evidence[0].checks[0]
    assert draw_sequence(check, "k", "t", "a") == draw_sequence(check, "k", "t", "a")


def test_a_large_cloud_is_thinned() -> None:
    x = tuple(float(i % 313) for i in range(20000))
    svg = draw(Figure("c", "t", "c", "a", series=(Series("cloud", x, x[::-1], style="points"),)), "k")
    assert 1000 < svg.count("<use") < 2000


def test_the_statement_comes_first_among_the_sequences() -> None:
    check = fake.full_run().evidence[3].checks[1]
    backwards = replace(check, readings=check.readings[::-1])
    assert [reading.role for reading in followed(backwards)] == ["claim", "printed", "control", "control"]


def test_a_sequence_without_margin_or_with_one_look_is_drawn() -> None:
    check = fake.full_run().evidence[0].checks[0]
    first = replace(check.readings[0], margin=(0.0,), looks=check.readings[0].looks[:1])
    assert draw_sequence(replace(check, readings=(first,)), "k", "t", "a").startswith("<svg")


def test_lonely_dollar_signs_are_no_mathematics() -> None:
    assert plot_text("costs $5 or $6") == r"costs \$5 or \$6"
    assert plot_text("at $x$ for $5") == r"at $x$ for \$5"
