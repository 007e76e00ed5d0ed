"""The plots of docs/benchmarks.md, drawn from the benchmarks' JSON in the style of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedprllm.report.drawing import MARKERS, MUTED, SERIES, Drawing, drawing
from fedprllm.report.plots import grouped_bars

Json = Mapping[str, Any]

_OURS = ("select_lowest", "planes", "fedprllm")


def plots(name: str, result: Json) -> dict[str, Markup]:
    """Draw the plots of a benchmark, by label."""
    drawn = [draw(label, result) for label, draw in _PLOTS.get(name, {}).items()]
    return dict(zip(_PLOTS.get(name, {}), drawn, strict=True))


def _sweeps(label: str, result: Json) -> Markup:
    sweeps = result["sweeps"]
    with drawing(label, 2.5) as drawn:
        for number, (axes, (name, sweep)) in enumerate(zip(_panels(drawn, 3), sweeps.items(), strict=True)):
            n, colour = sweep["n"], SERIES[number]
            axes.plot(
                [0, max(n)],
                [sweep["intercept_s"], sweep["intercept_s"] + sweep["slope_s"] * max(n)],
                color=colour,
                linewidth=1,
            )
            axes.plot(n, sweep["seconds"], MARKERS[number], color=colour, markersize=5)
            axes.set_title(f"{sweep['slope_s']:.2f} s each, r² = {sweep['r2']:.4f}", color=MUTED)
            beside = ", ".join(_counted(count, what) for what, count in sweep["job"].items() if what != name)
            axes.set_xlabel(f"{name}\n({beside})")
            _from_zero(axes, n)
            if number == 0:
                axes.set_ylabel("seconds")
    return drawn.svg


def _participants(label: str, result: Json) -> Markup:
    rows = result["participants"]
    n = [row["n_participants"] for row in rows]
    lines = (
        ("seconds, all masks", [row["seconds"] for row in rows]),
        ("votes, MB", [row["votes_bytes"] / 1e6 for row in rows]),
    )
    with drawing(label, 2.3) as drawn:
        for number, (axes, (name, values)) in enumerate(zip(_panels(drawn, 2), lines, strict=True)):
            axes.plot(n, values, f"{MARKERS[number]}-", color=SERIES[number], markersize=5, linewidth=1)
            axes.set_title(name, color=MUTED)
            axes.set_xlabel("participants")
            _from_zero(axes, n)
    return drawn.svg


def _adding(label: str, result: Json) -> Markup:
    rows = {name: row["seconds"] * 1e3 for name, row in result["adding"]["contenders"].items()}
    return _bars({"adding one mask": rows}, label, "milliseconds")


def _selection(label: str, result: Json) -> Markup:
    groups = {
        "{} x {}".format(*shape["shape"]): {
            name: row["times_ours"] for name, row in shape["contenders"].items()
        }
        for shape in result["shapes"]
        if max(shape["shape"]) >= 4096
    }
    return _bars(groups, label, "time, select_lowest = 1")


def _llm_compressor(label: str, result: Json) -> Markup:
    figures = {
        "time of the process": "process_s",
        "time of the pruning": "prune_s",
        "peak resident memory": "peak_resident_mb",
        "peak anonymous memory": "peak_anonymous_mb",
    }
    compared = {dtype: found["contenders"] for dtype, found in result["smollm2"].items()}
    groups = {
        title: {
            f"{shown}, {dtype}": contenders[name][figure] / contenders["theirs"][figure]
            for name, shown in (("ours", "fedprllm"), ("bare", "two passes"))
            for dtype, contenders in compared.items()
        }
        for title, figure in figures.items()
    }
    return _bars(groups, label, "llm-compressor = 1")


def _healing(label: str, result: Json) -> Markup:
    with drawing(label, 2.6) as drawn:
        axes = drawn.axes
        for number, row in enumerate(result["rows"]):
            rounds, losses = zip(*row["curve"], strict=True)
            shape = f"{MARKERS[number]}-"
            axes.plot(
                rounds,
                [math.exp(loss) for loss in losses],
                shape,
                color=SERIES[number],
                markersize=4,
                linewidth=1,
                label=row["start"],
            )
        axes.set_xlabel("rounds")
        axes.set_ylabel("perplexity, held-out windows")
        axes.set_xlim(0, max(rounds) * 1.02)
        axes.grid(axis="y")
        drawn.figure.legend(loc="outside right upper")
    return drawn.svg


_PLOTS: dict[str, dict[str, Callable[[str, Json], Markup]]] = {
    "sweeps": {"Seconds of a run against its windows, participants and blocks": _sweeps},
    "selection": {"Time of the lowest half of every row, by shape and by way": _selection},
    "votes": {
        "Milliseconds to add one mask, by way": _adding,
        "Time and memory of the votes against the number of participants": _participants,
    },
    "healing": {"Perplexity on the participants' held-out windows, by round": _healing},
    "llm-compressor": {"Time and memory in units of llm-compressor's, SmolLM2-135M": _llm_compressor},
}


def _bars(groups: Mapping[str, Mapping[str, float]], label: str, axis_label: str) -> Markup:
    """Draw grouped bars, with ours in color."""
    colors = {name: int(name.startswith(_OURS)) for rows in groups.values() for name in rows}
    return grouped_bars(groups, colors, label, axis_label)


def _panels(drawn: Drawing, n: int) -> Sequence[Axes]:
    """Divide a drawing into plots side by side."""
    drawn.axes.remove()
    panels: Sequence[Axes] = drawn.figure.subplots(1, n)
    return panels


def _from_zero(axes: Axes, n: Sequence[int]) -> None:
    """Start both axes at 0, so that proportionality is visible."""
    axes.set_xlim(0, max(n) * 1.05)
    axes.set_ylim(0, axes.dataLim.y1 * 1.08)
    axes.set_xticks([0, *n])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _counted(n: int, things: str) -> str:
    return f"{n} {things.removesuffix('s') if n == 1 else things}"
