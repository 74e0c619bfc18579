"""Pictures as SVG text, drawn once for screen and paper: plots, multiples, matrices, images, confidence sequences.

Their colours are placeholders (see `palette`), and numbers stand in every cell of a matrix.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullLocator

from claims.records import CheckEvidence, Figure, Reading
from reports.numerals import number
from reports.palette import HUES, INK, MUTED, RULE, stroke
from reports.plots import WIDTH, decimal_ticks, draw_panels, draw_plot, legend_and_margins, plot_text

_FINE = re.compile(r"(\.\d\d)\d+")
_STYLE: dict[Any, Any] = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],  # the second for signs that the first lacks
    "mathtext.fontset": "stix",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.fonttype": "path",
}


def draw(figure: Figure, key: str) -> str:
    """Return the SVG of a figure; `key` makes its identifiers unique on the page and equal in every run."""
    return _svg(PAINTERS[figure.kind], figure, key, figure.title, figure.alt)


def draw_sequence(check: CheckEvidence, key: str, title: str, alt: str) -> str:
    """Return the SVG of the check's confidence sequences, in units of the margin."""
    return _svg(_draw_sequences, check, key, title, alt)


def followed(check: CheckEvidence) -> tuple[Reading, ...]:
    """Return the readings of a check that recorded a confidence sequence: the statement's first."""
    order = {"claim": 0, "printed": 1, "control": 2}
    return tuple(sorted((r for r in check.readings if r.looks), key=lambda reading: order[reading.role]))


def unit(reading: Reading) -> float:
    """Return the margin of the coordinate that a confidence sequence follows, or 1 where it has none."""
    margin = reading.margin[reading.looks_of] if reading.looks_of < len(reading.margin) else 1.0
    return margin if 0 < margin < math.inf else 1.0


def _svg(painter: Callable[[Canvas, Any], None], subject: Any, key: str, title: str, alt: str) -> str:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        canvas = Canvas(figsize=(WIDTH, 2.9), facecolor="none")
        FigureCanvasAgg(canvas)
        painter(canvas, subject)
        for axes in canvas.axes:
            axes.set_facecolor("none")
        buffer = io.StringIO()
        canvas.savefig(
            buffer,
            format="svg",
            facecolor="none",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _accessible(buffer.getvalue(), key, title, alt)


def _accessible(svg: str, key: str, title: str, alt: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[A-Za-z]+_\d+">', "<g>", body)  # Matplotlib's artist names repeat in every figure
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub(r"\n\s*", "\n", body)
    # A hundredth of a point is finer than any screen; the digits after it are a fifth of a figure of curves.
    body = re.sub(r'(?<= [dxy]=")[^"]*', lambda found: _FINE.sub(r"\1", found.group()), body)
    opening, rest = body.split(">", 1)
    opening += f' role="img" aria-labelledby="{key}-title {key}-desc"'
    names = f'<title id="{key}-title">{html.escape(title)}</title>\n<desc id="{key}-desc">{html.escape(alt)}</desc>'
    return f"{opening}>\n{names}{rest}".strip()


def _draw_matrices(canvas: Canvas, figure: Figure) -> None:
    widest = max((len(rows[0]) if rows else 0 for _, rows in figure.matrices), default=1) + 1
    columns = max(1, min(len(figure.matrices), 16 // max(widest, 4)))
    lines = math.ceil(len(figure.matrices) / columns) or 1
    tallest = max((len(rows) for _, rows in figure.matrices), default=1)
    cell = min(0.28, WIDTH / columns / (widest + 1.6))
    canvas.set_size_inches(WIDTH, lines * (cell * tallest + 0.86))
    grid = canvas.subplots(lines, columns, squeeze=False)
    canvas.subplots_adjust(0.06, 0.42 / canvas.get_figheight(), 1, 1 - 0.4 / canvas.get_figheight(), 0.1)
    canvas.subplots_adjust(hspace=0.86 / (cell * tallest))
    for axes, matrix in zip(grid.flat, figure.matrices, strict=False):
        _draw_matrix(axes, *matrix, figure, cell)
    for axes in list(grid.flat)[len(figure.matrices) :]:
        axes.set_axis_off()


def _draw_matrix(axes: Axes, name: str, rows: Sequence[Sequence[float]], figure: Figure, cell: float) -> None:
    size = max(6.0, min(9.0, 26 * cell))
    top = max((abs(w) for row in rows for w in row if math.isfinite(w)), default=1.0) or 1.0
    width = len(rows[0]) if rows else 0
    squares = [[(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)] for i in range(len(rows)) for j in range(width)]
    weights = [weight for row in rows for weight in row]
    shades = [0.5 * min(1.0, abs(w) / top) if math.isfinite(w) else 0.0 for w in weights]
    colours = [to_rgba(HUES[0] if w >= 0 else HUES[1], shade) for w, shade in zip(weights, shades, strict=True)]
    axes.add_collection(PolyCollection(squares, facecolors=colours, linewidths=0))
    axes.add_collection(LineCollection([[*square, square[0]] for square in squares], colors=RULE, linewidths=0.5))
    for i, row in enumerate(rows):
        for j, weight in enumerate(row):
            text = number(weight, 2) if weight else "·"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size, color=INK if weight else MUTED)
    if figure.row_sums:
        _write_row_sums(axes, rows, size)
    axes.set(xlim=(-0.05, width + 1.5), ylim=(len(rows) + 0.05, -0.05), aspect="equal")
    axes.set_title(plot_text(name), fontsize=10, pad=13)
    column_names = figure.column_labels or tuple(str(j) for j in range(width))
    row_names = figure.row_labels or tuple(str(i + 1) for i in range(len(rows)))
    axes.set_xticks([j + 0.5 for j in range(width)], [plot_text(text) for text in column_names[:width]])
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [plot_text(text) for text in row_names[: len(rows)]])
    axes.tick_params(length=0, labelsize=max(6.0, size - 0.5), labelcolor=MUTED)
    axes.set_xlabel(plot_text(figure.x_label), fontsize=9, color=MUTED)
    axes.set_ylabel(plot_text(figure.y_label), fontsize=9, color=MUTED)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_row_sums(axes: Axes, rows: Sequence[Sequence[float]], size: float) -> None:
    """Write the sum of each row beside it, in bold where it is not one."""
    at = (len(rows[0]) if rows else 0) + 0.75
    for i, row in enumerate(rows):
        total = math.fsum(row)
        wrong = abs(total - 1) > 1e-9
        colour, weight = (HUES[1], "bold") if wrong else (INK, "normal")
        axes.text(
            at, i + 0.5, number(total, 3), ha="center", va="center", fontsize=size, color=colour, fontweight=weight
        )
    axes.text(at, -0.12, "sum", ha="center", va="bottom", fontsize=size, color=MUTED)


def _draw_images(canvas: Canvas, figure: Figure) -> None:
    """Draw lines of grey images, the name of each line before it; they keep their greys on every background."""
    longest = max((len(line) for _, line in figure.images), default=1) or 1
    names, gap = 1.35, 0.06  # inches
    side = min(0.62, (WIDTH - names) / longest - gap)
    canvas.set_size_inches(WIDTH, max(1, len(figure.images)) * (side + gap))
    height = canvas.get_figheight()
    for i, (name, line) in enumerate(figure.images):
        bottom = height - (i + 1) * (side + gap)
        canvas.text(0, (bottom + side / 2) / height, plot_text(name), va="center", fontsize=9.5)
        for j, image in enumerate(line):
            left = (names + j * (side + gap)) / WIDTH
            axes = canvas.add_axes((left, bottom / height, side / WIDTH, side / height))
            # Larger than it is, so that viewers that smooth what they enlarge show its pixels.
            axes.imshow(np.kron(image, np.ones((8, 8))), cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set_axis_off()


def _draw_sequences(canvas: Canvas, check: CheckEvidence) -> None:
    canvas.set_size_inches(WIDTH, 2.5)
    axes = canvas.add_subplot()
    readings = followed(check)
    main = readings[0]
    scaled = any(0 < r.margin[r.looks_of] < math.inf for r in readings if r.looks_of < len(r.margin))
    if scaled:
        axes.axhspan(-1, 1, color=MUTED, alpha=0.16, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.9)
    for i, reading in enumerate(readings):
        samples = [look.samples for look in reading.looks]
        lower = [look.lower / unit(reading) for look in reading.looks]
        upper = [look.upper / unit(reading) for look in reading.looks]
        style = stroke(i)
        middle = [(a + b) / 2 for a, b in zip(lower, upper, strict=True)]
        strong = reading is main
        axes.fill_between(samples, lower, upper, color=style.colour, alpha=0.25 if strong else 0.12, linewidth=0)
        for edge in (lower, upper):
            axes.plot(samples, edge, color=style.colour, linewidth=0.9 if strong else 0.4)
        if len(samples) == 1:
            axes.vlines(samples, lower, upper, color=style.colour, linewidth=1)
        axes.plot(
            samples,
            middle,
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            markerfacecolor=style.fill,
            markevery=max(1, len(samples) // 8),
            linewidth=1.2,
            label=plot_text(reading.name),
        )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1.5, linscale=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    decimal_ticks(axes.xaxis)
    finite = [
        abs(v) / unit(r) for r in readings for look in r.looks for v in (look.lower, look.upper) if math.isfinite(v)
    ]
    decades = range(math.ceil(math.log10(max([*finite, 1.0]))) + 1)
    powers = [10.0**k for k in decades][:: max(1, len(decades) // 4)]
    axes.set_yticks(sorted({0.0, 1.0, -1.0, *powers, *(-p for p in powers)}))
    top = 1.3 * max([*finite, 1.5])
    axes.set_ylim(-top if min(_lowest(r) for r in readings) < 0 else -1.5, top)
    axes.set_xlabel("samples")
    axes.set_ylabel("(estimate − reference) / margin" if scaled else "estimate − reference")
    legend_and_margins(canvas, axes)


def _lowest(reading: Reading) -> float:
    return min((look.lower for look in reading.looks if math.isfinite(look.lower)), default=0.0)


PAINTERS: dict[str, Callable[[Canvas, Figure], None]] = {
    "plot": draw_plot,
    "matrix": _draw_matrices,
    "panels": draw_panels,
    "images": _draw_images,
}
