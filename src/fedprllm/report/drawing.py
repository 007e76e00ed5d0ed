"""The style of all figures and their conversion to SVG, for embedding in a page or as separate files.

Text and lines are drawn in placeholder colors that become CSS variables of the page, so that one figure
serves both its light and its dark theme. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.style import context

__all__ = [
    "DASHES",
    "INK",
    "LINE",
    "MARKERS",
    "MUTED",
    "NARROW",
    "PAGE",
    "SEQUENTIAL",
    "SERIES",
    "WIDE",
    "Drawing",
    "Drawn",
    "Width",
    "draw",
    "drawing",
    "standalone",
]

INK, MUTED, LINE, PAGE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 8))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAGE: "var(--page)",
    **{color: f"var(--c{number})" for number, color in enumerate(SERIES, start=1)},
}
# Readable without color vision: cividis, minus its darkest part, which would vanish on a dark page.
SEQUENTIAL = ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0.12, 1, 256)), name="report")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Width:
    """A width to draw a figure for.

    Attributes:
        inches: The width.
        names: Number of characters of a name that fit beside an axis.
    """

    inches: float
    names: int


# A figure is drawn twice, with letters of one size, because one that is shrunk for a phone cannot be read.
WIDE, NARROW = Width(7.5, 26), Width(3.8, 22)
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.02,
}


class Drawing:
    """A figure and, once it is drawn, its SVG.

    Args:
        height: Height in inches.
        width: Width to draw for.
    """

    def __init__(self, height: float, width: Width = WIDE) -> None:
        self.figure = Figure(figsize=(width.inches, height))
        self.axes: Axes = self.figure.add_subplot()
        self.svg = Markup()


@dataclass(frozen=True)
class Drawn:
    """A figure for a wide page and for a narrow one."""

    wide: Markup
    narrow: Markup


def draw(plot: Callable[..., Markup], *arguments: Any, **options: Any) -> Drawn:
    """Draw a figure for both widths.

    Args:
        plot: A function of `fedprllm.report.plots`, or another that takes ``width``.
        arguments: Its arguments.
        options: Its keyword arguments.
    """
    return Drawn(
        plot(*arguments, **options, width=WIDE),
        plot(*arguments, **options, width=NARROW),
    )


@contextmanager
def drawing(label: str, height: float, width: Width = WIDE) -> Iterator[Drawing]:
    """Draw a figure in the report's style.

    The style builds on matplotlib's own defaults: a user's matplotlibrc must not change the page.

    Args:
        label: Description of the figure, read out by screen readers.
        height: Height in inches.
        width: Width to draw for.
    """
    with (
        context(["default", _STYLE | {"svg.hashsalt": f"{width.inches} {label}"}]),
        warnings.catch_warnings(),
    ):
        # Names may contain characters that matplotlib's font lacks, but the page's fonts have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        made = Drawing(height, width)
        yield made
        stream = io.StringIO()
        made.figure.savefig(
            stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    made.svg = _inline(stream.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    """The SVG as part of an HTML page: without a prolog, namespaces and ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style type.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(svg.strip())


# The page's light colors, for figures outside a page.
_LIGHT = {
    "--ink": "#1a1e23",
    "--muted": "#565f69",
    "--line": "#d3d9df",
    "--page": "#ffffff",
    "--c1": "#0072b2",
    "--c2": "#c75400",
    "--c3": "#00805f",
    "--c4": "#a8508b",
    "--c5": "#8a6d00",
    "--c6": "#5a5fc4",
    "--c7": "#6b6f75",
}


def standalone(svg: Markup) -> str:
    """The content of a separate SVG file for a figure of a page: light colors on a white background."""
    text = re.sub(r"var\((--\w+)\)", lambda found: _LIGHT[found[1]], str(svg))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = text.replace("<svg", f"<svg {names}", 1)
    end = text.index(">") + 1
    return f'{text[:end]}<rect width="100%" height="100%" fill="#ffffff"/>{text[end:]}\n'
