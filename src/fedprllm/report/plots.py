"""Figures of the report as inline SVG: equal numbers give equal bytes, and the page sets the colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedprllm.report.drawing import (
    DASHES,
    MARKERS,
    MUTED,
    PAGE,
    SEQUENTIAL,
    SERIES,
    WIDE,
    Drawing,
    Width,
    drawing,
)
from fedprllm.report.words import perplexity

__all__ = ["MAX_NAMED", "bars", "grouped_bars", "heatmap", "lines", "shares", "shortened"]

# Heatmaps with at most this many rows have values printed into their cells; narrow ones with at most half.
_MAX_PRINTED = 12
# Heatmaps with more rows than this number the rows instead of naming them.
MAX_NAMED = 24


def shortened(name: str, length: int) -> str:
    """A name that fits beside an axis: of a long one, its ends, which tell it from others."""
    tail = length // 2
    return name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"


def _no_ticks(axis: Any) -> None:
    axis.set_tick_params(length=0)


def _row_axis(axes: Axes, positions: Sequence[float], names: Sequence[str], width: Width) -> None:
    """Rows from top to bottom, with their names on the left."""
    axes.set_yticks(positions, [shortened(name, width.names) for name in names])
    axes.set_ylim(max(positions) + 0.6, min(positions) - 0.6)
    _no_ticks(axes.yaxis)
    axes.spines["left"].set_visible(False)


# Bars ------------------------------------------------------------------------------------------


def bars(values: Mapping[str, float], texts: Sequence[str], label: str, *, width: Width = WIDE) -> Markup:
    """One horizontal bar per name, with a text at its end.

    Args:
        values: Length of the bar by name.
        texts: Text at the end of each bar.
        label: Description of the figure.
        width: Width to draw for.
    """
    with drawing(label, 0.25 + 0.27 * len(values), width) as drawn:
        axes = drawn.axes
        rows = range(len(values))
        axes.barh(rows, list(values.values()), height=0.66, color=SERIES[0])
        longest = max(values.values(), default=0) or 1
        for row, value, text in zip(rows, values.values(), texts, strict=True):
            axes.text(value + longest * 0.01, row, text, va="center", fontsize=8.5)
        axes.set_xlim(0, longest * (1.22 if width is WIDE else 1.75))
        _row_axis(axes, rows, list(values), width)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
    return drawn.svg


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]],
    colors: Mapping[str, int],
    label: str,
    axis_label: str,
    *,
    width: Width = WIDE,
) -> Markup:
    """Groups of horizontal bars, each group below its name, with the values at the ends of the bars.

    The axis is linear from 0 or, if the values differ by more than a factor of ten, logarithmic from 1.

    Args:
        groups: Value by row by group; the bar of an infinite value extends to the edge.
        colors: Number of the series color by row; 0 is muted.
        label: Description of the figure.
        axis_label: Label of the value axis.
        width: Width to draw for.
    """
    values = [value for group in groups.values() for value in group.values()]
    finite = [value for value in values if np.isfinite(value)] or [1.0]
    logarithmic = max(finite) > 10 * min(finite) >= 10
    high = max(finite) ** 1.13 if logarithmic else max(finite) * 1.13
    height = 0.45 + 0.235 * sum(len(group) + 1.25 for group in groups.values())
    with drawing(label, height, width) as drawn:
        axes = drawn.axes
        positions, names, position = [], [], 0.0
        for group, rows in groups.items():
            axes.annotate(
                shortened(group, 2 * width.names),
                (0, position),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
            for name, value in rows.items():
                position += 1
                end = value if np.isfinite(value) else high
                color = SERIES[(colors[name] - 1) % len(SERIES)] if colors[name] else MUTED
                axes.barh(position, end, height=0.72, color=color)
                text = f"{value:,.0f}" if 1000 <= value < 1e5 else perplexity(value)
                inside = end == high
                axes.annotate(
                    text,
                    (end, position),
                    xytext=(-4 if inside else 4, 0),
                    textcoords="offset points",
                    va="center",
                    ha="right" if inside else "left",
                    fontsize=8.5,
                )
                positions.append(position)
                names.append(name)
            position += 1.35
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1 if logarithmic else 0, high)
        axes.set_xlabel(f"{axis_label}, logarithmic from 1" if logarithmic else axis_label)
        axes.xaxis.grid(True)
        axes.set_axisbelow(True)
        _no_ticks(axes.xaxis)
        _row_axis(axes, positions, names, width)
        axes.set_ylim(max(positions) + 0.6, -0.7)
        axes.spines["bottom"].set_visible(False)
    return drawn.svg


def shares(
    rows: Mapping[str, Sequence[float]], label: str, axis_label: str, *, width: Width = WIDE
) -> Markup:
    """One stacked bar per row with the shares of 0, 1, 2, ... from dark to light.

    Args:
        rows: Shares by row; those of a row add up to 1.
        label: Description of the figure.
        axis_label: Label of the color key.
        width: Width to draw for.
    """
    n = max(len(parts) for parts in rows.values())
    scale = Normalize(0, max(n - 1, 1))
    narrowest, n_ticks = (0.055, 6) if width is WIDE else (0.16, 3)
    with drawing(label, 1.0 + 0.27 * len(rows), width) as drawn:
        axes = drawn.axes
        parts = np.array(list(rows.values()))
        starts = np.cumsum(parts, axis=1) - parts
        # Each part extends slightly below its right neighbor, so that no seam shows between them.
        under = np.pad(np.minimum(parts[:, 1:], 0.004), ((0, 0), (0, 1)))
        for number in range(n):
            color = SEQUENTIAL(scale(number))
            lengths = parts[:, number] + under[:, number]
            axes.barh(
                range(len(rows)), lengths, left=starts[:, number], height=0.78, color=color, linewidth=0
            )
            for row, part in enumerate(parts[:, number]):
                if n <= 9 and part >= narrowest:
                    middle = starts[row, number] + part / 2
                    ink, text = _readable(color), f"{part * 100:.0f} %"
                    axes.text(middle, row, text, ha="center", va="center", color=ink, fontsize=8)
        axes.set_xlim(0, 1)
        ticks = np.linspace(0, 1, n_ticks)
        axes.set_xticks(ticks, [f"{share * 100:.0f} %" for share in ticks])
        _no_ticks(axes.xaxis)
        _row_axis(axes, range(len(rows)), list(rows), width)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("share of weights")
        _steps(drawn, n, axis_label)
    return drawn.svg


def _steps(drawn: Drawing, n: int, label: str) -> None:
    """A color key above the axes with one swatch for each number from 0 to n - 1."""
    key = drawn.figure.colorbar(
        matplotlib.cm.ScalarMappable(
            Normalize(-0.5, n - 0.5), ListedColormap(SEQUENTIAL(np.linspace(0, 1, n)))
        ),
        ax=drawn.axes,
        location="top",
        fraction=0.05,
        aspect=40,
        pad=0.02,
    )
    key.outline.set_visible(False)
    key.ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    key.set_label(label)
    _no_ticks(key.ax.xaxis)


# Heatmaps and lines ----------------------------------------------------------------------------


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    limits: tuple[float, float],
    names: tuple[str, str, str],
    width: Width = WIDE,
) -> Markup:
    """A matrix drawn in colors; NaN values stay blank.

    Args:
        values: Matrix [row, column].
        rows: Name of each row.
        columns: Name of each column.
        label: Description of the figure.
        limits: Values of the darkest and the lightest color.
        names: Names of the column axis, the row axis and the values.
        width: Width to draw for.
    """
    printed = _MAX_PRINTED if width is WIDE else _MAX_PRINTED // 2
    square = list(rows) == list(columns)
    height = 0.7 + (0.3 if square else 0.23) * len(rows) if len(rows) <= MAX_NAMED else width.inches * 0.83
    with drawing(label, max(height, 1.8), width) as drawn:
        axes = drawn.axes
        image = axes.imshow(
            np.ma.masked_invalid(values),
            cmap=SEQUENTIAL,
            vmin=limits[0],
            vmax=limits[1],
            interpolation="none",
            aspect="equal" if square and len(rows) > printed else "auto",
        )
        n_ticks = 16 if width is WIDE else 8
        _name_cells(axes.yaxis, rows, width.names - 6, n_ticks)
        _name_cells(axes.xaxis, columns, 20 if width is WIDE else 13, n_ticks)
        if len(columns) <= MAX_NAMED and len(columns) * max(map(len, columns)) > (
            80 if width is WIDE else 30
        ):
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.spines[:].set_visible(False)
        if max(len(rows), len(columns)) <= 48:
            axes.vlines(np.arange(len(columns) - 1) + 0.5, -0.5, len(rows) - 0.5, PAGE, linewidth=1)
            axes.hlines(np.arange(len(rows) - 1) + 0.5, -0.5, len(columns) - 0.5, PAGE, linewidth=1)
        if square and len(rows) <= printed:
            _print_values(axes, values, SEQUENTIAL, Normalize(*limits))
        bar = drawn.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(names[2])
        _no_ticks(bar.ax.yaxis)
    return drawn.svg


def _name_cells(axis: Any, names: Sequence[str], length: int, n_ticks: int) -> None:
    """Label all cells by name if they are few, and some of them by number if they are many."""
    _no_ticks(axis)
    if all(name.isdigit() for name in names) or len(names) > MAX_NAMED:
        step = max(1, -(-len(names) // n_ticks))
        first = int(names[0]) if names[0].isdigit() else 1
        places = range(0, len(names), step)
        axis.set_ticks(places, [str(first + place) for place in places])
    else:
        axis.set_ticks(range(len(names)), [shortened(name, length) for name in names])


def _print_values(axes: Axes, values: np.ndarray, colors: Colormap, scale: Normalize) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = _readable(colors(scale(value)))
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=8)


def _readable(color: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast with a color."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def lines(
    series: Mapping[str, Sequence[float]],
    label: str,
    names: tuple[str, str],
    reference: tuple[float, str],
    *,
    bridged: bool = False,
    width: Width = WIDE,
) -> Markup:
    """One line per name over 0, 1, 2, ..., distinguished by color, dash pattern and marker.

    Args:
        series: Values by name; NaN leaves a gap.
        label: Description of the figure.
        names: Names of the horizontal and the vertical axis.
        reference: A value drawn as a horizontal line, and its name.
        bridged: Draw a line on across NaN instead of leaving a gap.
        width: Width to draw for.
    """
    n = max(len(values) for values in series.values())
    below = 0 if width is WIDE else 0.2 * -(-len(series) // 2)
    with drawing(label, (3.4 if width is WIDE else 2.7) + below, width) as drawn:
        axes = drawn.axes
        for number, (name, values) in enumerate(series.items()):
            places = [at for at, value in enumerate(values) if not (bridged and math.isnan(value))]
            axes.plot(
                places,
                [values[at] for at in places],
                color=SERIES[number % len(SERIES)],
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4 if n <= 16 else 3,
                linewidth=1.4,
                label=shortened(name, width.names),
            )
        _level(axes, *reference)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_xlim(-0.4, n - 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(16 if width is WIDE else 8, integer=True))
        axes.yaxis.grid(True)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        if width is WIDE:
            drawn.figure.legend(loc="outside right upper", handlelength=3, borderaxespad=0)
        else:
            drawn.figure.legend(loc="outside lower center", ncols=2, handlelength=3, borderaxespad=0)
    return drawn.svg


def _level(axes: Axes, value: float, name: str) -> None:
    """A named horizontal line or, if it is far from all data, only its name at the nearest edge."""
    low, high = axes.get_ylim()
    span = high - low
    near = low - 2 * span <= value <= high + 2 * span
    if not near:
        axes.set_ylim(low - 0.08 * span * (value < low), high + 0.08 * span * (value > high))
    if near:
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate(
        name if near else f"{name}: {value:.3f}, {'below' if value < low else 'above'}",
        (0, value if near else 0 if value < low else 1),
        xycoords=("axes fraction", "data" if near else "axes fraction"),
        xytext=(4, 3 if near or value < low else -10),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )
