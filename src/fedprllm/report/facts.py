"""Facts about a run that several sections of the report need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fedprllm.api import PruneResult
from fedprllm.evaluation.results import Perplexity
from fedprllm.pruning.records import BlockRecord, LinearRecord, ParticipantRecord
from fedprllm.pruning.strategies import STRATEGIES, Strategy

__all__ = ["Facts", "Perplexities"]

# Perplexities by model name, each with one row per text.
Perplexities = dict[str, list[Perplexity]]


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
        self.folders = dict(result.model_dirs)
        run = result.out.resolve().name
        self.shown_folders = {name: f"{run}/{folder}" for name, folder in self.record.models.items()}
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
    def measured(self) -> Perplexities:
        """All models with perplexities: the comparison's, preceded by those of the run that it lacks."""
        if not self.comparison:
            return self.evaluation
        own = {name: rows for name, rows in self.evaluation.items() if name not in self.comparison}
        return own | self.comparison

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
    def prunes_weights(self) -> bool:
        """Whether the run prunes single weights, not only whole parts."""
        return self.record.reduction is None or self.total("n_pruned") > 0

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
