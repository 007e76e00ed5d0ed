"""Typed records of a study: the measurements of each cell, and each stored walk."""

from __future__ import annotations

from typing import Any, Literal

from fedprllm.evaluation.results import Perplexity
from fedprllm.pruning.records import ModelRecord, ParticipantRecord, Record

__all__ = ["CellRecord", "StudiedModel", "WalkRecord"]


class CellRecord(Record):
    """Everything that a study records about a cell.

    Attributes:
        setting: Everything but the seed (see `Cell.setting`).
        seed: The seed.
        made: How the pruned weights came about: ``run`` if a run of its own computed them, ``derived`` if
            they were decided from participants' stored updates, which other cells use too. Perplexities are
            measured by forward passes in either case.
        n_participants: Number of participants.
        participants: Their names, in the order of ``agreement``.
        n_tokens: Number of calibration tokens of all participants together.
        update_bytes: Payload that one participant shares during the run, in bytes.
        update_bytes_per_block: Payload of its largest update of a block, in bytes.
        models: Perplexities by model, each with one row per text.
        n_prunable: Number of prunable weights.
        n_zeros: Number of zeros among them after pruning.
        n_pruned: Number of weights that the masks prune.
        n_ties: Number of prunes decided by a tie rule.
        pruned_by_votes: Number of pruned weights by number of votes; None if unknown.
        agreement: Share of equal mask entries, [participant, participant]; None if unknown.
        seconds: Time spent measuring the cell, in seconds.
        window_losses: Negative log-likelihood of each window in nats, by model and text; None if an earlier
            version measured the cell.
    """

    setting: dict[str, Any]
    seed: int
    made: Literal["run", "derived"]
    n_participants: int
    participants: list[str]
    n_tokens: int
    update_bytes: int
    update_bytes_per_block: int
    models: dict[str, list[Perplexity]]
    n_prunable: int
    n_zeros: int
    n_pruned: int
    n_ties: int
    pruned_by_votes: list[int] | None = None
    agreement: list[list[float]] | None = None
    seconds: float = 0.0
    window_losses: dict[str, dict[str, list[float]]] | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values; a field that is None because nothing was counted stays."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def tie_share(self) -> float:
        """Fraction of the prunes that a tie rule decided."""
        return self.n_ties / self.n_pruned if self.n_pruned else 0.0


class WalkRecord(Record):
    """A complete stored walk.

    Attributes:
        participant: The participant that walked.
        n_ties: Number of prunes decided by the tie rule.
        files: SHA-256 of the files of updates by name.
    """

    participant: ParticipantRecord
    n_ties: int
    files: dict[str, str]


class StudiedModel(ModelRecord):
    """The model of a study.

    Attributes:
        n_prunable: Number of prunable weights.
    """

    n_prunable: int
