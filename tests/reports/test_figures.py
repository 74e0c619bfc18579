"""Figures: readable without eyes, without colour, and the same in every run."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas
from PIL import Image

from claims.records import Figure, Panel, Series
from reports.figures import draw, draw_sequence, followed
from reports.palette import HUES, PRINT, SCREEN, coloured, stroke
from reports.plots import WIDTH, draw_panels, draw_plot, plot_text, spread
from reports.templating import template_text
from tests.reports import fake

EMPTY = Figure("empty", "Nothing", "c", "Nothing is drawn.")
FIGURES = (
    *(fake.FRONTIER, fake.MATRICES, fake.CLOUD, fake.BARS, fake.GRID, fake.TRAINING, fake.SMALL, fake.IMAGES, EMPTY),
    replace(EMPTY, name="no panels", kind="panels"),
    replace(EMPTY, name="no images", kind="images"),
    replace(fake.BARS, name="bars in panels", kind="panels", panels=(Panel("one", fake.BARS.series),) * 5),
)


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


def test_images_keep_their_greys_and_stand_in_lines() -> None:
    """Two lines of three, each picture embedded with the values that were given."""
    svg = draw(fake.IMAGES, "k")
    found = re.findall(r'xlink:href="data:image/png;base64,\s*([^"]+)"', svg)
    assert len(found) == 6
    shades = []
    for data in found:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) / 255
        shades.append((pixels.min(), pixels.max()))
    expected = [(min(map(min, image)), max(map(max, image))) for _, line in fake.IMAGES.images for image in line]
    np.testing.assert_allclose(shades, expected, atol=0.005)


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


def painted(painter: Callable[[Canvas, Figure], None], figure: Figure) -> Canvas:
    canvas = Canvas(figsize=(WIDTH, 2.9))
    FigureCanvasAgg(canvas)
    painter(canvas, figure)
    return canvas


def test_a_label_looks_the_same_in_every_panel_and_is_named_once() -> None:
    few = tuple(s for s in fake.GRID.panels[0].series if s.label in ("AlignProp", "zeroth order"))
    panels = (fake.GRID.panels[0], Panel("others missing", few[::-1]))
    canvas = painted(draw_panels, replace(fake.GRID, panels=panels))
    first, second = ({str(c.get_label()): to_hex(c.get_edgecolor()[0]) for c in a.collections} for a in canvas.axes)
    assert len(first) == 12
    assert list(second) == ["zeroth order", "AlignProp"]
    assert second.items() < first.items()
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == list(fake.METHODS)


@pytest.mark.parametrize(("shared", "same_x", "same_y"), [("all", 1, 1), ("grid", 2, 2), ("none", 4, 4)])
def test_limits_are_equal_where_the_axes_are_shared(shared: Any, same_x: int, same_y: int) -> None:
    panels = tuple(
        Panel(f"to {top}", (Series("p", (1.0, top), (1.0, top), style="points"),)) for top in (2.0, 30.0, 400.0, 5000.0)
    )
    canvas = painted(draw_panels, replace(fake.GRID, panels=panels, panel_columns=2, shared_axes=shared))
    assert len({axes.get_xlim() for axes in canvas.axes}) == same_x
    assert len({axes.get_ylim() for axes in canvas.axes}) == same_y


def test_names_stand_beside_the_curves_in_their_order_where_they_fit() -> None:
    canvas = painted(draw_plot, fake.TRAINING)
    assert canvas.axes[0].get_legend() is None
    height = {text.get_text(): text.get_position()[1] for text in canvas.texts}
    ends = {s.label: s.y[-1] for s in fake.TRAINING.series}
    assert sorted(height, key=lambda name: height[name]) == sorted(ends, key=lambda name: ends[name])


def test_names_that_do_not_fit_beside_the_curves_stand_above() -> None:
    long = tuple(
        replace(s, label=s.label + " with a name that takes half of the measure") for s in fake.TRAINING.series
    )
    many = tuple(replace(s, label=f"{s.label} {k}") for s in fake.TRAINING.series for k in range(2))
    for series in (long, many):
        canvas = painted(draw_plot, replace(fake.TRAINING, series=series))
        legend = canvas.axes[0].get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [s.label for s in series]
        assert not canvas.texts


def test_a_curve_that_diverges_is_named_at_its_last_finite_point() -> None:
    broken = Series("diverges", (1.0, 2.0, 3.0), (1.0, 2.0, float("nan")))
    never = Series("never finite", (1.0, 2.0), (float("nan"), float("inf")))
    svg = draw(replace(fake.TRAINING, series=(broken, never, fake.TRAINING.series[0])), "k")
    assert "nan" not in svg.split("</desc>")[1]


@given(st.lists(st.floats(-5, 15), max_size=12), st.floats(0.01, 0.7))
def test_spread_keeps_order_distance_and_bounds(wanted: list[float], gap: float) -> None:
    wanted = sorted(wanted)
    places = spread(wanted, gap, 0.0, 10.0)
    assert all(b - a >= gap - 1e-9 for a, b in zip(places, places[1:], strict=False))
    assert all(-1e-9 <= place <= 10 + 1e-9 for place in places)
    fine = all(b - a >= gap for a, b in zip(wanted, wanted[1:], strict=False)) and all(0 <= w <= 10 for w in wanted)
    if fine:
        assert places == pytest.approx(wanted)


def test_twelve_series_differ_without_colour_and_thirty_six_with_it() -> None:
    twelve = [stroke(i) for i in range(12)]
    assert len({(s.marker, s.fill == s.colour) for s in twelve}) == 12
    assert len({(s.colour, s.dash) for s in twelve}) == 12
    assert len({(s.colour, s.dash, s.marker, s.fill) for s in map(stroke, range(36))}) == 36


# Machado, Oliveira & Fernandes (2009), severity 1: what each colour blindness makes of linear RGB.
SEEN_AS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1)
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def palettes() -> dict[str, tuple[list[str], str]]:
    """Hues and paper of the printed, the light and the dark report."""
    css = template_text("page.css").split("prefers-color-scheme: dark")
    found = {
        name: (re.findall(r"--hue\d: (#\w{6})", text), re.findall(r"--paper: (#\w{6})", text)[0])
        for name, text in zip(("light", "dark"), css, strict=True)
    }
    return found | {"print": ([PRINT[hue] for hue in HUES], "#ffffff")}


@pytest.mark.parametrize("medium", ["print", "light", "dark"])
@pytest.mark.parametrize("sight", SEEN_AS)
def test_colour_blind_readers_tell_the_hues_apart(medium: str, sight: str) -> None:
    hues, _ = palettes()[medium]
    assert len(hues) == len(HUES)
    seen = [lab(np.array(SEEN_AS[sight]) @ linear(hue)) for hue in hues]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15  # in units of the CIE's delta E (1976)


@pytest.mark.parametrize("medium", ["print", "light", "dark"])
def test_hues_stand_out_from_the_paper(medium: str) -> None:
    hues, paper = palettes()[medium]
    for hue in hues:
        low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (hue, paper))
        assert (high + 0.05) / (low + 0.05) >= 3  # what WCAG 2.1 asks of graphics
