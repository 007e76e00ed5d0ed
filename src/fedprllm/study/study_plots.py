"""Figures of a study: settings with their spread over seeds, and curves over a numeric option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedprllm.report.drawing import DASHES, MARKERS, MUTED, SERIES, WIDE, Width, drawing
from fedprllm.report.plots import shortened
from fedprllm.study.results import Spread

__all__ = ["curves", "dots"]

Panels = Mapping[str, Mapping[str, Spread]]


def dots(panels: Panels, dense: Mapping[str, float], label: str, *, width: Width = WIDE) -> Markup:
    """One panel per text with one row per setting, in which dots are seeds and a bar is their mean.

    Panels are side by side or, on a narrow page, one below the other.

    Args:
        panels: Perplexity by setting by text; every text has the same settings.
        dense: Perplexity of the dense model by text.
        label: Description of the figure.
        width: Width to draw for.
    """
    names = list(next(iter(panels.values())))
    stacked = width is not WIDE
    names_fit = width.names if stacked else 2 * width.names
    height = (0.9 + 0.25 * len(names)) * (len(panels) if stacked else 1)
    with drawing(label, height, width) as drawn:
        all_axes = _panels(drawn.figure, drawn.axes, len(panels), stacked)
        for column, (axes, (text, rows)) in enumerate(zip(all_axes, panels.items(), strict=True)):
            _limit(axes, [value for spread in rows.values() for value in spread.values], "x")
            low, high = axes.get_xlim()
            for row, name in enumerate(names):
                values = np.clip(rows[name].values, low, high)
                axes.plot(values, [row] * len(values), "o", color=SERIES[0], markersize=4, alpha=0.55)
                mean = min(rows[name].mean, high)
                axes.plot([mean, mean], [row - 0.32, row + 0.32], color=SERIES[1], linewidth=1.8)
                if not rows[name].mean < high:
                    axes.annotate("→", (high, row), ha="right", va="center", color=SERIES[1])
            if text in dense and low <= dense[text] <= high:
                axes.axvline(dense[text], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            axes.set_title(text, loc="left")
            shown = names if column == 0 or stacked else [""] * len(names)
            axes.set_yticks(range(len(names)), [shortened(name, names_fit) for name in shown])
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(length=0)
            axes.xaxis.grid(True)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel("perplexity")
    return drawn.svg


def curves(
    panels: Mapping[str, Mapping[str, Mapping[float, Spread]]],
    dense: Mapping[str, float],
    label: str,
    axis_label: str,
    *,
    doubling: bool,
    width: Width = WIDE,
) -> Markup:
    """One panel per text with one curve per method over a number; error bars are one standard deviation.

    Args:
        panels: Perplexity by number by method by text.
        dense: Perplexity of the dense model by text.
        label: Description of the figure.
        axis_label: Label of the horizontal axis.
        doubling: Whether the horizontal axis is logarithmic to base 2.
        width: Width to draw for.
    """
    stacked = width is not WIDE
    n_methods = max(len(methods) for methods in panels.values())
    with drawing(label, 0.2 * n_methods + 2.4 * len(panels) if stacked else 3.2, width) as drawn:
        all_axes = _panels(drawn.figure, drawn.axes, len(panels), stacked)
        for column, (axes, (text, methods)) in enumerate(zip(all_axes, panels.items(), strict=True)):
            for number, (name, points) in enumerate(methods.items()):
                axes.errorbar(
                    list(points),
                    [spread.mean for spread in points.values()],
                    [spread.sd for spread in points.values()],
                    color=SERIES[number % len(SERIES)],
                    linestyle=DASHES[number % len(DASHES)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    linewidth=1.4,
                    capsize=2,
                    label=shortened(name, 44) if column == 0 else None,
                )
            spreads = [spread for points in methods.values() for spread in points.values()]
            _limit(axes, [s.mean + sign * s.sd for s in spreads for sign in (-1, 1)], "y")
            low, high = axes.get_ylim()
            if text in dense and low <= dense[text] <= high:
                axes.axhline(dense[text], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            numbers = sorted({number for points in methods.values() for number in points})
            if doubling:
                axes.set_xscale("log", base=2)
            axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(text, loc="left")
            axes.set_xlabel(axis_label)
            axes.yaxis.grid(True)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        all_axes[0].set_ylabel("perplexity")
        columns = 1 if stacked else 3
        drawn.figure.legend(loc="outside upper right", ncols=columns, handlelength=3, borderaxespad=0)
    return drawn.svg


def _panels(figure: Figure, first: Axes, n: int, stacked: bool) -> list[Axes]:
    """Replace a drawing's axes by ``n`` axes side by side or one below the other."""
    first.remove()
    rows, columns = (n, 1) if stacked else (1, n)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(n)]


def _limit(axes: Axes, values: Sequence[float], axis: str) -> None:
    """Limit an axis to the finite values, on a log scale if they differ by more than a factor of ten."""
    finite = [value for value in values if np.isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
    logarithmic = high > 10 * low
    if logarithmic:
        getattr(axes, f"set_{axis}scale")("log")
        getattr(axes, f"{axis}axis").set_major_locator(LogLocator(numticks=5))
        getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(lambda tick, _: _short(tick)))
        getattr(axes, f"{axis}axis").set_minor_locator(NullLocator())
        limits = (low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    else:
        getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(5))
        room = (high - low) * 0.08 or low * 0.05
        limits = (low - room, high + room)
    getattr(axes, f"set_{axis}lim")(*limits)


def _short(value: float) -> str:
    """A tick label on a logarithmic axis: 300 or 1e6."""
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def describe(rows: Mapping[str, Mapping[str, Spread]]) -> str:
    """Description of a figure's numbers."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{text} {spread}" for text, spread in row.items())
        for name, row in rows.items()
    )


def agreement_limits(matrix: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Round limits that enclose all values off the diagonal."""
    values = np.array(matrix)
    pairs = values[~np.eye(len(values), dtype=bool)]
    return float(np.floor(pairs.min() * 50) / 50), float(np.ceil(pairs.max() * 50) / 50)
