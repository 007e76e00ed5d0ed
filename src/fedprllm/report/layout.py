"""What a page is made of, and its rendering: one template and one style for all pages.

A page gives the answer first, then the evidence, then how it came about, folded. Its builders put content
into the parts below; the template alone knows HTML. Text is escaped there, so that a name cannot become
markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedprllm.report.drawing import Drawn
from fedprllm.report.plots import MAX_NAMED

__all__ = [
    "MAX_ROWS",
    "Cell",
    "Code",
    "Fold",
    "Notes",
    "Page",
    "Part",
    "Plot",
    "Section",
    "Table",
    "Verdict",
    "code",
    "numbered",
    "render",
]

# Tables with more rows are collapsed, and figures number the participants instead of naming them.
MAX_ROWS = MAX_NAMED
# Characters of a table's text that fit on a narrow page, and as many as the gap between two columns takes.
_NARROW, _GAP = 46, 2
_SHORT = 30  # words of a command that stay in one line, so that no break follows a hyphen
_LEAST = 16  # characters of running text beside other columns


def code(text: str) -> Markup:
    """Words of a command or a file, to put into a sentence."""
    kind = ' class="short"' if len(text) <= _SHORT else ""
    return Markup(f"<code{kind}>{{}}</code>").format(text)


@dataclass(frozen=True)
class Cell:
    """A value in a table and a note beside it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of strings or cells.

    Attributes:
        caption: Caption of the table.
        columns: Column headings.
        align: One letter per column: ``l`` left-aligned, ``r`` right-aligned, ``p`` a long path.
        rows: The rows.
        strong: Indices of the rows to emphasize.
        wide: Whether notes go below their values.
    """

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[str]
    align: str
    rows: Sequence[Sequence[str | Cell]]
    strong: frozenset[int] = frozenset()
    wide: bool = False

    @property
    def folded(self) -> bool:
        """Whether the table is too long to be shown expanded."""
        return len(self.rows) > MAX_ROWS

    @property
    def stacked(self) -> bool:
        """Whether a narrow page shows each row as a list, because its columns would not fit."""
        needed = [
            max(_longest_word(column), *(_needed(row[number], align) for row in self.rows))
            for number, (column, align) in enumerate(zip(self.columns, self.align, strict=True))
        ]
        return sum(needed) + _GAP * len(needed) > _NARROW


def _longest_word(text: str) -> int:
    return max(map(len, text.split(" ")))


def _needed(value: str | Cell, align: str) -> int:
    """Number of characters that a value needs in one line."""
    text, note = (value, "") if isinstance(value, str) else (value.text, value.note)
    words = max(_longest_word(text), _longest_word(note))
    return min(max(len(text), len(note)), _LEAST) if align == "p" else words


@dataclass(frozen=True)
class Plot:
    """A figure, the caption that explains it, and its numbers as a table for those who cannot see it."""

    kind: ClassVar = "plot"
    figure: Drawn
    caption: str
    numbers: Table | None = None


@dataclass(frozen=True)
class Verdict:
    """A sentence that answers the section's question."""

    kind: ClassVar = "verdict"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    kind: ClassVar = "notes"
    items: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Parts below a line that opens them."""

    kind: ClassVar = "fold"
    title: str
    parts: Sequence[Part]


Part = str | Table | Plot | Verdict | Code | Notes | Fold


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it, in order."""

    name: str
    title: str
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kind: What it is about, in a few words.
        name: Its heading.
        summary: What was done and what came of it, in a few sentences.
        tiles: Key figures, each with its name, value and note.
        answers: What a reader wants to know first.
        evidence: What the answers rest on.
        made: How it came about.
    """

    kind: str
    name: str
    summary: str
    tiles: Sequence[tuple[str, str, str]]
    answers: Sequence[Section]
    evidence: Sequence[Section]
    made: Sequence[Section]

    @property
    def sections(self) -> list[Section]:
        """All sections in the order of the page."""
        return [*self.answers, *self.evidence, *self.made]


def numbered(rows: list[list[str | Cell]]) -> list[list[str | Cell]]:
    """Add the numbers by which figures refer to participants if there are too many to name."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [[Cell(str(row[0]), f"no. {number}"), *row[1:]] for number, row in enumerate(rows, start=1)]


def render(page: Page, source: str) -> str:
    """The page as HTML.

    Args:
        page: Its content.
        source: What it was made from, for the footer.
    """
    folder = files("fedprllm.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = folder.joinpath("template.html").read_text(encoding="utf-8")
    style = Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    return environment.from_string(template).render(page=page, source=source, style=style)
