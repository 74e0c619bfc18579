"""Pictures as SVG text, drawn once for screen and paper.

Colours are drawn as placeholders and named afterwards: CSS variables on the page, so that a figure follows light and
dark, and ink on paper. Curves differ by dash and marker as well as by colour, and numbers stand in every cell of a
matrix, so that nothing is lost in black and white.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.mathtext import MathTextParser
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, StrMethodFormatter

from claims.records import CheckEvidence, Figure, Reading, Series
from reports.markup import MATHS
from reports.numerals import number

INK, MUTED, RULE, PAPER = "#000001", "#000002", "#000003", "#000004"
HUES = ("#000011", "#000012", "#000013", "#000014", "#000015", "#000016")
SCREEN = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    hue: f"var(--hue{i})" for i, hue in enumerate(HUES)
}
PRINT: dict[str, str] = dict(
    zip(
        (INK, MUTED, RULE, PAPER, *HUES),
        ("#1d1c1a", "#5f5b53", "#d8d4ca", "#ffffff", "#0b5394", "#c2410c", "#00755c", "#8e3b74", "#8a6100", "#3c7a9e"),
        strict=True,
    )
)
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1.2, 2)), (0, (8, 3)), (0, (3, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_POINTS = 1500  # of a cloud: more would only make the file heavy
WIDTH = 5.8  # inches: the measure of the text

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


def plot_text(text: str) -> str:
    """Return `text` for Matplotlib, with every dollar sign that does not delimit mathematics escaped."""
    parts, end = [], 0
    for span in MATHS.finditer(text):
        parts += [text[end : span.start()].replace("$", r"\$"), span.group()]
        end = span.end()
    return "".join(parts) + text[end:].replace("$", r"\$")


def check_plot_text(text: str) -> None:
    """Raise ValueError if Matplotlib cannot typeset the mathematics in `text`."""
    if "$" in text:
        MathTextParser("path").parse(plot_text(text))


def draw(figure: Figure, key: str) -> str:
    """Return the SVG of a figure; `key` makes its identifiers unique on the page and equal in every run."""
    return _svg(_draw_matrices if figure.kind == "matrix" else _draw_plot, figure, key, figure.title, figure.alt)


def draw_sequence(check: CheckEvidence, key: str, title: str, alt: str) -> str:
    """Return the SVG of the check's confidence sequences, in units of the margin."""
    return _svg(_draw_sequences, check, key, title, alt)


def coloured(svg: str, colours: dict[str, str]) -> str:
    """Return the SVG with its placeholder colours replaced (`SCREEN` or `PRINT`)."""
    return re.sub(r"#0000[01]\d", lambda found: colours[found.group()], svg)


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
    opening, rest = body.split(">", 1)
    opening += f' role="img" aria-labelledby="{key}-title {key}-desc"'
    names = f'<title id="{key}-title">{html.escape(title)}</title>\n<desc id="{key}-desc">{html.escape(alt)}</desc>'
    return f"{opening}>\n{names}{rest}".strip()


def _draw_plot(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.add_subplot()
    for i, series in enumerate(figure.series):
        _draw_series(axes, series, i, len(figure.series))
    axes.set_xscale(figure.x_scale)
    axes.set_yscale(figure.y_scale)
    axes.set_xlabel(plot_text(figure.x_label))
    axes.set_ylabel(plot_text(figure.y_label))
    for axis, scale in ((axes.xaxis, figure.x_scale), (axes.yaxis, figure.y_scale)):
        if scale == "log":
            axis.set_minor_locator(NullLocator())
            low, high = axis.get_view_interval()
            if high < 20 * low:  # powers of ten alone would leave one tick or none
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if any(series.labels for series in figure.series):
        axes.margins(0.08, 0.12)  # room for the labels of the outermost points
    _legend_and_margins(canvas, axes)
    _draw_labels(axes, figure)


def _draw_series(axes: Axes, series: Series, i: int, total: int) -> None:
    colour, dash, marker = HUES[i % 6], DASHES[i % 6], MARKERS[i % 6]
    label = plot_text(series.label) or None
    few = len(series.x) <= 30
    if series.style == "bars":
        _draw_bars(axes, series, i, total, label)
    elif series.style == "points":
        stride = max(1, math.ceil(len(series.x) / MOST_POINTS))
        size = 26 if few else 7
        points = axes.scatter(
            series.x[::stride], series.y[::stride], s=size, marker=marker, color=colour, label=label, linewidths=0
        )
        points.set_alpha(1 if few else 0.55)
    elif series.style == "step":
        axes.step(series.x, series.y, where="post", color=colour, linestyle=dash, label=label)
    elif series.style == "dashed":
        axes.plot(series.x, series.y, color=colour, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    else:
        axes.plot(
            series.x,
            series.y,
            color=colour,
            linestyle=dash,
            marker=marker,
            markevery=1 if few else max(1, len(series.x) // 8),
            label=label,
        )
    if series.lower and series.upper and series.style != "bars":
        if series.style == "points":
            below = [max(0.0, y - low) for y, low in zip(series.y, series.lower, strict=True)]
            above = [max(0.0, high - y) for y, high in zip(series.y, series.upper, strict=True)]
            axes.errorbar(series.x, series.y, yerr=(below, above), fmt="none", ecolor=colour, elinewidth=1)
        else:
            axes.fill_between(series.x, series.lower, series.upper, color=colour, alpha=0.18, linewidth=0)


def _draw_labels(axes: Axes, figure: Figure) -> None:
    """Write the points' labels: towards the middle of the axes, so that none is cut off, and above one another."""
    texts = [row for s in figure.series for row in zip(s.x, s.y, s.labels, strict=False)]
    if not texts:
        return
    line = 11.0 / 72 * axes.figure.dpi  # pixels from one label to the next
    low, high = axes.bbox.intervalx
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(texts, key=lambda row: row[1]):
        across, up = axes.transData.transform((x, y))
        side, shift = ("right", -5) if across > low + 0.6 * (high - low) else ("left", 5)
        wanted = up + 4.0 / 72 * axes.figure.dpi
        for other_across, other_up in taken:
            if abs(across - other_across) < 0.25 * (high - low) and abs(wanted - other_up) < line:
                wanted = other_up + line
        taken.append((across, wanted))
        lift = (wanted - up) * 72 / axes.figure.dpi
        axes.annotate(
            plot_text(text), (x, y), xytext=(shift, lift), textcoords="offset points", ha=side, fontsize=9.5, color=INK
        )


def _draw_bars(axes: Axes, series: Series, i: int, total: int, label: str | None) -> None:
    gap = min((b - a for a, b in zip(series.x, series.x[1:], strict=False)), default=1.0)
    width = 0.8 * gap / total
    left = [x + (i - (total - 1) / 2) * width for x in series.x]
    hatch = (None, "//", "..", "xx", "\\\\", "++")[i % 6]
    axes.bar(left, series.y, width=width, color=HUES[i % 6], alpha=0.75, hatch=hatch, edgecolor=PAPER, label=label)
    if series.lower and series.upper:
        below = [max(0.0, y - low) for y, low in zip(series.y, series.lower, strict=True)]
        above = [max(0.0, high - y) for y, high in zip(series.y, series.upper, strict=True)]
        axes.errorbar(left, series.y, yerr=(below, above), fmt="none", ecolor=INK, elinewidth=1, capsize=2)


def _legend_and_margins(canvas: Canvas, axes: Axes) -> None:
    """Set the legend above the axes, and margins that fit the labels (several times faster than Matplotlib's)."""
    handles, labels = axes.get_legend_handles_labels()
    rows = 0
    if handles:
        longest = max(map(len, labels))
        columns = 1 if longest > 45 else 2 if longest > 24 else 3
        rows = math.ceil(len(labels) / columns)
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=columns,
            borderaxespad=0.2,
            handlelength=2.6,
            columnspacing=1.4,
            labelspacing=0.3,
        )
    width, height = canvas.get_size_inches()
    bottom, top = 0.5 / height, 1 - (0.1 + 0.19 * rows) / height
    axes.set_position((0.2, bottom, 0.78, top - bottom))
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # only canvases of pixels have one
    labels_box = axes.yaxis.get_tightbbox(renderer)
    inches = (axes.bbox.x0 - labels_box.x0) / canvas.dpi if labels_box else 0.0
    left = (inches + 0.06) / width
    axes.set_position((left, bottom, 1 - 0.06 / width - left, top - bottom))


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
        total = math.fsum(row)
        wrong = abs(total - 1) > 1e-9
        axes.text(
            width + 0.75,
            i + 0.5,
            number(total, 3),
            ha="center",
            va="center",
            fontsize=size,
            color=HUES[1] if wrong else INK,
            fontweight="bold" if wrong else "normal",
        )
    axes.text(width + 0.75, -0.12, "sum", ha="center", va="bottom", fontsize=size, color=MUTED)
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
        colour, dash, marker = HUES[i % 6], DASHES[i % 6], MARKERS[i % 6]
        middle = [(a + b) / 2 for a, b in zip(lower, upper, strict=True)]
        strong = reading is main
        axes.fill_between(samples, lower, upper, color=colour, alpha=0.25 if strong else 0.12, linewidth=0)
        for edge in (lower, upper):
            axes.plot(samples, edge, color=colour, linewidth=0.9 if strong else 0.4)
        if len(samples) == 1:
            axes.vlines(samples, lower, upper, color=colour, linewidth=1)
        axes.plot(
            samples,
            middle,
            color=colour,
            linestyle=dash,
            marker=marker,
            markevery=max(1, len(samples) // 8),
            linewidth=1.2,
            label=plot_text(reading.name),
        )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1.5, linscale=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
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
    _legend_and_margins(canvas, axes)


def _lowest(reading: Reading) -> float:
    return min((look.lower for look in reading.looks if math.isfinite(look.lower)), default=0.0)
