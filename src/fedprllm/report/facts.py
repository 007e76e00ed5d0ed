"""Facts about a run that several sections of the report need, and their formatting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fedprllm.api import PruneResult
from fedprllm.evaluation.results import Perplexity
from fedprllm.pruning.records import BlockRecord, LinearRecord, ParticipantRecord
from fedprllm.pruning.strategies import STRATEGIES, Strategy
from fedprllm.report.plots import MAX_NAMED

__all__ = [
    "MAX_ROWS",
    "Cell",
    "Facts",
    "Perplexities",
    "Plot",
    "Section",
    "Table",
    "change",
    "count",
    "mean_perplexity",
    "numbered",
    "percent",
    "perplexity",
    "seconds",
    "size",
    "size_range",
]

# Perplexities by model name, each with one row per text.
Perplexities = dict[str, list[Perplexity]]
# Tables with more rows are collapsed, and figures number the participants instead of naming them.
MAX_ROWS = MAX_NAMED


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


@dataclass(frozen=True)
class Plot:
    """A figure and the caption that explains it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it, in order."""

    name: str
    title: str
    parts: list[str | Table | Plot] = field(default_factory=list)


# The run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Its heading.
        summary: What was done, in a few sentences.
        tiles: Key figures, each with its name, value and note.
        sections: What follows.
    """

    title: str
    summary: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]


class Facts:
    """The record of a run with the summaries that several sections need.

    Args:
        result: A complete run.
    """

    def __init__(self, result: PruneResult) -> None:
        self.record = result.record
        self.config = result.config
        self.blocks: list[BlockRecord] = self.record.blocks
        self.strategy: Strategy = STRATEGIES[result.config.strategy]
        self.participants: dict[str, ParticipantRecord] = self.record.participants
        self.voting = ["pooled text"] if self.strategy.pools_text else list(self.participants)
        self.model = Path(self.record.model.source).name
        self.evaluation = _named(result.evaluation, result.config.strategy)
        self.comparison = dict(self.record.comparison or {})
        # Only a run over the network has an id; its record holds the number of bytes actually sent.
        self.networked = self.record.run_id is not None
        self.dropouts = any(len(self.voters(record)) < len(self.voting) for record in self.blocks)
        self.types = list(dict.fromkeys(linear.type for _, linear in self.linears()))

    def voters(self, record: BlockRecord) -> list[str]:
        """Participants that took part in a block, in the order of its agreement matrix."""
        return record.participants or self.voting

    def linears(self) -> Iterator[tuple[int, LinearRecord]]:
        """Each Linear's record with the index of its block."""
        return self.record.linears()

    def total(self, key: str, of_type: str | None = None) -> int:
        """Sum of a field over all Linears or over those of one type."""
        return sum(getattr(linear, key) for _, linear in self.linears() if of_type in (None, linear.type))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.record.sparsity

    @property
    def pruned_models(self) -> tuple[Perplexities, list[str]]:
        """The perplexities to quote from and the names of this run's models among them."""
        table = self.evaluation or self.comparison
        own = [_model_name(name, self.config.strategy) for name in self.record.models]
        found = [name for name in own if name in table]
        return table, found or [name for name in ("federated",) if name in table]

    @property
    def sent(self) -> dict[str, int]:
        """Total bytes that each participant shares during the run, by name."""
        return {name: one.update_bytes or 0 for name, one in self.participants.items()}

    @property
    def has_votes(self) -> bool:
        """Whether the number of votes is known: not if sums are shared or votes are weighted by tokens."""
        return all(linear.vote_histogram is not None for _, linear in self.linears())

    def votes(self, of_type: str | None = None) -> np.ndarray:
        """Number of weights by number of votes, [n_participants + 1]."""
        # If participants dropped out, a block's histogram is shorter.
        votes = np.zeros(len(self.voting) + 1, dtype=np.int64)
        for _, linear in self.linears():
            if of_type in (None, linear.type) and linear.vote_histogram is not None:
                votes[: len(linear.vote_histogram)] += np.array(linear.vote_histogram, dtype=np.int64)
        return votes

    @property
    def pruned_share(self) -> float:
        """Fraction of the prunable weights that the masks prune."""
        return float(self.total("n_pruned") / self.record.n_prunable)


def _named(evaluation: Mapping[str, list[Perplexity]], strategy: str) -> Perplexities:
    return {_model_name(name, strategy): rows for name, rows in evaluation.items()}


def _model_name(name: str, strategy: str) -> str:
    """A model's name on the page; a participant's own model is named after the participant."""
    if name == "model":
        return strategy
    return name if name == "dense" or strategy != "local-only" else f"local-only: {name}"


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal place."""
    return f"{share * 100:.1f} %"


def size(n_bytes: float) -> str:
    """A number of bytes in a suitable unit, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"


def size_range(numbers: Iterable[int]) -> str:
    """The range of several numbers of bytes."""
    low, high = size(min(numbers := list(numbers))), size(max(numbers))
    return low if low == high else f"{low} to {high}"


def seconds(duration: float) -> str:
    """A duration in seconds or, from two minutes on, in minutes and seconds."""
    if duration < 120:
        return f"{duration:.1f} s" if duration >= 1 else f"{duration:.2f} s"
    return "{} min {} s".format(*divmod(round(duration), 60))


def count(number: int, noun: str) -> str:
    """``3 blocks``, ``1 block``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def perplexity(value: float) -> str:
    """A perplexity with two decimal places; ∞ beyond the range of floats."""
    return f"{value:,.2f}" if math.isfinite(value) else "∞"


def change(value: float, dense: float) -> str:
    """Relative change from the dense model."""
    ratio = value / dense
    if not math.isfinite(ratio):
        return ""
    return f"{(ratio - 1) * 100:+.1f} %" if ratio < 10 else f"{ratio:,.0f} times"


def mean_perplexity(rows: Sequence[Perplexity]) -> float:
    """Geometric mean over texts: ``exp`` of the mean negative log-likelihood."""
    nll = math.fsum(row.nll for row in rows) / len(rows)
    return math.exp(nll) if nll < 709 else math.inf


def numbered(rows: list[list[str | Cell]]) -> list[list[str | Cell]]:
    """Add the numbers by which figures refer to participants if there are too many to name."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [[Cell(str(row[0]), f"no. {number}"), *row[1:]] for number, row in enumerate(rows, start=1)]
