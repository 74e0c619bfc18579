"""Plots, and small multiples of them: series drawn in axes, with their names beside or above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.optimize import isotonic_regression

from claims.records import Figure, Series
from reports.markup import MATHS
from reports.numerals import number
from reports.palette import INK, MUTED, PAPER, Stroke, stroke

MOST_POINTS = 1500  # of a cloud: more would only make the file heavy
WIDTH = 5.8  # inches: the measure of the text
_LINE = 0.165  # inches from one name to the next beside a plot
_KEY = 0.3  # inches: the piece of curve before a name


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


def draw_plot(canvas: Canvas, figure: Figure) -> None:
    """Draw the series of a figure in one pair of axes."""
    axes = canvas.add_subplot()
    _draw_all(axes, figure.series, strokes(figure.series))
    _set_scales(axes, figure)
    axes.set_xlabel(plot_text(figure.x_label))
    axes.set_ylabel(plot_text(figure.y_label))
    if any(series.labels for series in figure.series):
        axes.margins(0.08, 0.12)  # room for the labels of the outermost points
    if not (figure.end_labels and _label_ends(canvas, axes, figure.series)):
        legend_and_margins(canvas, axes)
    _label_points(axes, figure.series, 9.5)


def draw_panels(canvas: Canvas, figure: Figure) -> None:
    """Draw the panels of a figure row by row, with one legend above and the names of the axes once."""
    columns = max(1, min(figure.panel_columns, len(figure.panels)))
    rows = max(1, math.ceil(len(figure.panels) / columns))
    share_x, share_y = {"all": ("all", "all"), "grid": ("col", "row"), "none": ("none", "none")}[figure.shared_axes]
    grid = canvas.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)  # type: ignore[arg-type]
    styles = strokes([series for panel in figure.panels for series in panel.series])
    size = 9.0 if columns < 3 else 8.0
    named: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        _draw_all(axes, panel.series, styles)
        _set_scales(axes, figure, ticks=5 if columns < 3 else 4)
        axes.set_title(plot_text(panel.title), fontsize=size + 1, pad=4)
        axes.tick_params(labelsize=size, length=2.5, pad=2)
        if any(series.labels for series in panel.series):
            axes.margins(0.12, 0.16)
        named |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for i, axes in enumerate(grid.flat):
        if i >= len(figure.panels):
            axes.set_axis_off()
        elif i + columns >= len(figure.panels):
            axes.tick_params(labelbottom=True)  # the last of its column, wherever that ends
    height = rows * (WIDTH / columns * 0.78 + 0.12) + 0.45
    if named:
        across = _legend_columns(named)
        key = 2.8 if any(isinstance(handle, Line2D) for handle in named.values()) else 1.2
        height += 0.18 * math.ceil(len(named) / across)
        canvas.legend(
            list(named.values()), list(named), loc="outside upper left", ncols=across, handlelength=key, **_LEGEND
        )
    canvas.set_size_inches(WIDTH, max(height, 2.4))
    canvas.supxlabel(plot_text(figure.x_label), fontsize=10)
    canvas.supylabel(plot_text(figure.y_label), fontsize=10)
    canvas.set_layout_engine("constrained", w_pad=0.04, h_pad=0.03, wspace=0.02, hspace=0.02)
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # the places are found; labels of points must not move them
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        _label_points(axes, panel.series, size - 0.5)


def strokes(series: Sequence[Series]) -> dict[str, Stroke]:
    """Return the stroke of every label, in the order in which the labels are met."""
    return {label: stroke(i) for i, label in enumerate(dict.fromkeys(s.label for s in series))}


_LEGEND: dict[str, Any] = {"borderaxespad": 0.2, "columnspacing": 1.4, "labelspacing": 0.3}


def legend_and_margins(canvas: Canvas, axes: Axes) -> None:
    """Set the legend above the axes, and margins that fit the labels (several times faster than Matplotlib's)."""
    handles, labels = axes.get_legend_handles_labels()
    rows = 0
    if handles:
        columns = _legend_columns(labels)
        rows = math.ceil(len(labels) / columns)
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=2.6, **_LEGEND
        )
    _set_margins(canvas, axes, top=0.1 + 0.19 * rows, right=0.06)


def _legend_columns(labels: Sequence[str] | dict[str, Any]) -> int:
    longest = max(map(len, labels))
    return 1 if longest > 45 else 2 if longest > 24 else 3 if longest > 16 or len(labels) < 8 else 4


def _set_margins(canvas: Canvas, axes: Axes, top: float, right: float) -> None:
    """Set margins, in inches; the left one fits the labels of the y axis."""
    width, height = canvas.get_size_inches()
    bottom, upper = 0.5 / height, 1 - top / height
    axes.set_position((0.2, bottom, 0.98 - 0.2 - right / width, upper - bottom))
    labels_box = axes.yaxis.get_tightbbox(_renderer(canvas))
    inches = (axes.bbox.x0 - labels_box.x0) / canvas.dpi if labels_box else 0.0
    left = (inches + 0.06) / width
    axes.set_position((left, bottom, 1 - right / width - left, upper - bottom))


def _renderer(canvas: Canvas) -> Any:
    return canvas.canvas.get_renderer()  # type: ignore[attr-defined]  # only canvases of pixels have one


def decimal_ticks(axis: Axis) -> bool:
    """Mark a logarithmic axis between powers of ten too, if these alone would leave few ticks."""
    low, high = axis.get_view_interval()
    if high >= 40 * low:
        return False
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    return True


def _set_scales(axes: Axes, figure: Figure, ticks: int | None = None) -> None:
    """Set linear or logarithmic axes; `ticks` bounds their number on a small panel."""
    axes.set_xscale(figure.x_scale)
    axes.set_yscale(figure.y_scale)
    for axis, scale in ((axes.xaxis, figure.x_scale), (axes.yaxis, figure.y_scale)):
        if scale == "log":
            axis.set_minor_locator(NullLocator())
            if not decimal_ticks(axis) and ticks:
                axis.set_major_locator(LogLocator(numticks=ticks))
        elif ticks:
            axis.get_major_locator().set_params(nbins=ticks)  # type: ignore[attr-defined]  # of a linear axis


def _draw_all(axes: Axes, series: Sequence[Series], styles: dict[str, Stroke]) -> None:
    curves = [s for s in series if s.style in ("line", "dashed", "step")]
    bars = [s for s in series if s.style == "bars"]
    for entry in series:
        style, label = styles[entry.label], plot_text(entry.label) or None
        if entry.style == "bars":
            _draw_bars(axes, entry, style, label, bars.index(entry), len(bars))
        elif entry.style == "points":
            _draw_points(axes, entry, style, label)
        else:
            _draw_curve(axes, entry, style, label, curves.index(entry), len(curves))


def _draw_points(axes: Axes, series: Series, style: Stroke, label: str | None) -> None:
    few = len(series.x) <= 30
    stride = max(1, math.ceil(len(series.x) / MOST_POINTS))
    points = axes.scatter(
        series.x[::stride],
        series.y[::stride],
        s=26 if few else 7,
        marker=style.marker,
        color=style.fill,
        edgecolors=style.colour,
        label=label,
        linewidths=1 if few and style.fill == PAPER else 0,
    )
    points.set_alpha(1 if few else 0.55)
    if series.lower and series.upper:
        axes.errorbar(
            series.x, series.y, yerr=_reach(series), fmt="none", ecolor=style.colour, elinewidth=1, zorder=0.9
        )


def _draw_curve(axes: Axes, series: Series, style: Stroke, label: str | None, i: int, total: int) -> None:
    few = len(series.x) <= 30
    if series.lower and series.upper:
        shade = 0.18 if total <= 4 else 0.1
        step = "post" if series.style == "step" else None
        axes.fill_between(series.x, series.lower, series.upper, color=style.colour, alpha=shade, linewidth=0, step=step)
    if series.style == "step":
        axes.step(series.x, series.y, where="post", color=style.colour, linestyle=style.dash, label=label)
    elif series.style == "dashed":
        axes.plot(series.x, series.y, color=style.colour, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    else:
        stride = max(1, len(series.x) // 7)
        axes.plot(
            series.x,
            series.y,
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            markerfacecolor=style.fill,
            markevery=1 if few else (stride * i // total, stride),  # the curves' markers do not hide one another
            linewidth=1.5 if total <= 6 else 1.2,
            label=label,
        )


def _draw_bars(axes: Axes, series: Series, style: Stroke, label: str | None, i: int, total: int) -> None:
    gap = min((b - a for a, b in zip(series.x, series.x[1:], strict=False)), default=1.0)
    width = 0.8 * gap / total
    left = [x + (i - (total - 1) / 2) * width for x in series.x]
    axes.bar(
        left, series.y, width=width, color=style.colour, alpha=0.75, hatch=style.hatch, edgecolor=PAPER, label=label
    )
    if series.lower and series.upper:
        axes.errorbar(left, series.y, yerr=_reach(series), fmt="none", ecolor=INK, elinewidth=1, capsize=2)


def _reach(series: Series) -> tuple[list[float], list[float]]:
    """Return how far the band of a series reaches below and above it."""
    below = [max(0.0, y - low) for y, low in zip(series.y, series.lower, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(series.y, series.upper, strict=True)]
    return below, above


def _label_points(axes: Axes, series: Sequence[Series], size: float) -> None:
    """Write the points' labels: towards the middle of the axes, so that none is cut off, and above one another."""
    texts = [row for s in series for row in zip(s.x, s.y, s.labels, strict=False)]
    if not texts:
        return
    dpi = axes.figure.dpi
    line = 1.16 * size / 72 * dpi  # pixels from one label to the next
    low, high = axes.bbox.intervalx
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(texts, key=lambda row: row[1]):
        across, up = axes.transData.transform((x, y))
        side, shift = ("right", -5) if across > low + 0.6 * (high - low) else ("left", 5)
        wanted = up + 4.0 / 72 * dpi
        for other_across, other_up in taken:
            if abs(across - other_across) < 0.25 * (high - low) and abs(wanted - other_up) < line:
                wanted = other_up + line
        taken.append((across, wanted))
        lift = (wanted - up) * 72 / dpi
        axes.annotate(
            plot_text(text), (x, y), xytext=(shift, lift), textcoords="offset points", ha=side, fontsize=size, color=INK
        )


def _label_ends(canvas: Canvas, axes: Axes, series: Sequence[Series]) -> bool:
    """Write each curve's name, after a piece of it, level with its right end; False where they do not fit."""
    curves = [s for s in series if s.label and any(map(math.isfinite, s.y))]
    names = {s.label: canvas.text(0, 0, plot_text(s.label), va="center", fontsize=9.5) for s in curves}
    widest = max((text.get_window_extent(_renderer(canvas)).width for text in names.values()), default=0.0) / canvas.dpi
    width, height = canvas.get_size_inches()
    if widest > 0.4 * width or _LINE * len(curves) > height - 0.6:
        for text in names.values():
            text.remove()
        return False
    axes.margins(x=0.02)
    _set_margins(canvas, axes, top=0.1, right=widest + _KEY + 0.35)
    inches = canvas.dpi_scale_trans
    low, high = (axes.transAxes - inches).transform([(0, 0), (1, 1)])[:, 1]
    ends = {s.label: (axes.transData - inches).transform(_end(s)) for s in curves}
    start = width - widest - _KEY - 0.1
    styles = strokes(series)
    order = sorted(ends, key=lambda label: ends[label][1])
    for label, up in zip(order, spread([ends[label][1] for label in order], _LINE, low, high), strict=True):
        style, (across, level) = styles[label], ends[label]
        pieces: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
            ((across, start), (level, up), {"color": MUTED, "linewidth": 0.4}),
            ((start, start + _KEY), (up, up), {"color": style.colour, "linestyle": style.dash, "linewidth": 1.3}),
            (
                (start + _KEY / 2,),
                (up,),
                {"color": style.colour, "marker": style.marker, "markerfacecolor": style.fill},
            ),
        )
        for across_all, up_all, look in pieces:
            canvas.add_artist(Line2D(across_all, up_all, transform=inches, **look))
        names[label].set(position=(start + _KEY + 0.06, up), transform=inches)
    return True


def _end(series: Series) -> tuple[float, float]:
    return [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)][-1]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the places nearest to `wanted` (increasing) that lie at least `gap` apart and within [low, high].

    >>> spread([0.0, 0.1, 5.0], 1.0, -3.0, 9.0)
    [-0.45, 0.55, 5.0]
    >>> spread([9.0, 9.0], 1.0, 0.0, 9.0)
    [8.0, 9.0]
    """
    # Less i times the gap, places that are far enough apart are places in order: isotonic regression.
    if not wanted:
        return []
    level = isotonic_regression([y - i * gap for i, y in enumerate(wanted)]).x
    top = max(low, high - (len(wanted) - 1) * gap)
    return [min(max(float(y), low), top) + i * gap for i, y in enumerate(level)]
