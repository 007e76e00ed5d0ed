"""The facts of a run that several sections of the report need, and how they are written down."""

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

# Perplexities of models by name, each with a row for every text.
Perplexities = dict[str, list[Perplexity]]
# Tables with more rows are folded, and figures number participants instead of naming them.
MAX_ROWS = MAX_NAMED


@dataclass(frozen=True)
class Cell:
    """A value in a table, and a note beside it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of strings or cells; ``align``: ``l`` left, ``r`` right, ``p`` a path, by column."""

    caption: str
    columns: Sequence[str]
    align: str
    rows: Sequence[Sequence[str | Cell]]
    strong: frozenset[int] = frozenset()
    wide: bool = False

    @property
    def folded(self) -> bool:
        """Whether it is too long to stand open."""
        return len(self.rows) > MAX_ROWS


@dataclass(frozen=True)
class Plot:
    """A figure and what has to be known to read it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order."""

    name: str
    title: str
    parts: list[str | Table | Plot] = field(default_factory=list)


# The run ----------------------------------------------------------------------------------------


class Facts:
    """The record of a run, summed up where several sections need it."""

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
        # A run over the network has an identity of its own, and records what really was sent.
        self.networked = self.record.run_id is not None
        self.dropouts = any(len(self.voters(record)) < len(self.voting) for record in self.blocks)
        self.paths = list(dict.fromkeys(linear.path for _, linear in self.linears()))

    def voters(self, record: BlockRecord) -> list[str]:
        """Participants of a block, in the order of its agreement matrix."""
        return record.participants or self.voting

    def linears(self) -> Iterator[tuple[int, LinearRecord]]:
        """Each Linear's record with the number of its block."""
        return self.record.linears()

    def total(self, key: str, path: str | None = None) -> int:
        """Sum of a number over all Linears, or those of one path."""
        return sum(getattr(linear, key) for _, linear in self.linears() if path in (None, linear.path))

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights."""
        return self.record.sparsity

    @property
    def pruned_models(self) -> tuple[Perplexities, list[str]]:
        """The table of perplexities to quote from, and the names of this run's models in it."""
        table = self.evaluation or self.comparison
        own = [_model_name(name, self.config.strategy) for name in self.record.models]
        found = [name for name in own if name in table]
        return table, found or [name for name in ("federated",) if name in table]

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that each participant shares in the whole run, by name."""
        return {name: one.update_bytes or 0 for name, one in self.participants.items()}

    @property
    def has_votes(self) -> bool:
        """Whether votes were counted one by one: not if sums are shared, or votes count tokens."""
        return all(linear.vote_histogram is not None for _, linear in self.linears())

    def votes(self, path: str | None = None) -> np.ndarray:
        """Number of weights by number of votes, [n_participants + 1]."""
        # Where participants dropped out, a block has fewer possible numbers of votes.
        votes = np.zeros(len(self.voting) + 1, dtype=np.int64)
        for _, linear in self.linears():
            if path in (None, linear.path) and linear.vote_histogram is not None:
                votes[: len(linear.vote_histogram)] += np.array(linear.vote_histogram, dtype=np.int64)
        return votes

    @property
    def pruned_share(self) -> float:
        """Share of the prunable weights that a mask prunes."""
        return float(self.total("n_pruned") / self.record.n_prunable)


def _named(evaluation: Mapping[str, list[Perplexity]], strategy: str) -> Perplexities:
    return {_model_name(name, strategy): rows for name, rows in evaluation.items()}


def _model_name(name: str, strategy: str) -> str:
    """What a model is called on the page; a participant's own is named after it."""
    if name == "model":
        return strategy
    return name if name == "dense" or strategy != "local-only" else f"local-only: {name}"


def percent(share: float) -> str:
    """A share with one digit after the point."""
    return f"{share * 100:.1f} %"


def size(n_bytes: float) -> str:
    """Bytes in the unit that fits, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"


def size_range(numbers: Iterable[int]) -> str:
    """Bytes from the least to the most."""
    low, high = size(min(numbers := list(numbers))), size(max(numbers))
    return low if low == high else f"{low} to {high}"


def seconds(duration: float) -> str:
    """Seconds, from two minutes on minutes and seconds."""
    if duration < 120:
        return f"{duration:.1f} s" if duration >= 1 else f"{duration:.2f} s"
    return "{} min {} s".format(*divmod(round(duration), 60))


def count(number: int, noun: str) -> str:
    """``3 blocks``, ``1 block``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def perplexity(value: float) -> str:
    """Two digits after the point; beyond the range of floats, infinity."""
    return f"{value:,.2f}" if math.isfinite(value) else "∞"


def change(value: float, dense: float) -> str:
    """Relative change against the dense model."""
    ratio = value / dense
    if not math.isfinite(ratio):
        return ""
    return f"{(ratio - 1) * 100:+.1f} %" if ratio < 10 else f"{ratio:,.0f} times"


def mean_perplexity(rows: Sequence[Perplexity]) -> float:
    """Geometric mean over texts: exp of the mean negative log-likelihood."""
    nll = math.fsum(row.nll for row in rows) / len(rows)
    return math.exp(nll) if nll < 709 else math.inf


def numbered(rows: list[list[str | Cell]]) -> list[list[str | Cell]]:
    """With many participants figures show numbers: say whose they are."""
    if len(rows) <= MAX_ROWS:
        return rows
    return [[Cell(str(row[0]), f"no. {number}"), *row[1:]] for number, row in enumerate(rows, start=1)]
