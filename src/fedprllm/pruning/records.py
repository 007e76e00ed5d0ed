"""What a run records, as types: every block while it runs, and the result at its end.

Each is written as JSON with the names of its fields; ``path`` of a Linear is written as ``kind``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedprllm.config import PruneConfig
from fedprllm.errors import RunError
from fedprllm.evaluation.results import Perplexity

__all__ = [
    "BlockRecord",
    "LinearRecord",
    "ModelRecord",
    "ParticipantRecord",
    "Record",
    "RunRecord",
    "SurveyRecord",
    "SurveyRun",
]


class Record(BaseModel):
    """A record of one file."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """JSON values; fields that do not apply are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            RunError: The file is damaged, or another version of fedprllm wrote it.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0] if isinstance(error, ValidationError) else None
            where = ".".join(map(str, reason["loc"])) + ": " + reason["msg"] if reason else str(error)
            raise RunError(f"{path} cannot be read as the record of a run: {where}") from None


class LinearRecord(Record):
    """One Linear of a finished block.

    Attributes:
        path: Path of its module inside the block.
        shape: (out, in).
        n_zeros: Zeros in the pruned weight, those that the dense one had included.
        n_pruned: Weights that the mask prunes.
        n_ties: Prunes that a tie rule decided.
        n_close: Prunes that rounding may have decided; None where it was not counted.
        vote_histogram: Number of weights by number of votes; None without votes, or where votes count tokens.
    """

    path: Annotated[str, Field(alias="kind")]
    shape: tuple[int, int]
    n_zeros: int
    n_pruned: int
    n_ties: int
    n_close: int | None = None
    vote_histogram: list[int] | None = None

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.n_zeros / self.n_weights


class _Received(Record):
    """What the coordinator of a federation adds to a record; nothing in one process.

    Attributes:
        block: Index of the block.
        participants: Whose updates were added up, in the order of their names.
        still_in: Who takes part in what follows.
        update_bytes: Length of each one's update in bytes.
        n_tokens: Number of calibration tokens behind it.
    """

    block: int
    participants: list[str] | None = None
    still_in: list[str] | None = None
    update_bytes: dict[str, int] | None = None
    n_tokens: dict[str, int] | None = None


class BlockRecord(_Received):
    """A finished block.

    Attributes:
        linears: Its Linears by weight name.
        sparsity: Share of its prunable weights that the masks prune.
        participant_ties: Prunes that the tie rule decided in each participant's own masks.
        agreement: Share of equal mask entries, [participant, participant] by path of the Linear.
        notes: Deviations from the requested settings, in words.
        seconds: Time spent by phase.
    """

    linears: dict[str, LinearRecord]
    sparsity: float
    participant_ties: dict[str, int] = {}
    agreement: dict[str, list[list[float]]] = {}
    notes: list[str] = []
    seconds: dict[str, float] = {}

    @property
    def n_zeros(self) -> int:
        """Zeros in all of its Linears."""
        return sum(linear.n_zeros for linear in self.linears.values())


class SurveyRecord(_Received):
    """A block of a survey.

    Attributes:
        outliers: Outlying scores and all scores of the block.
    """

    outliers: tuple[int, int]


class SurveyRun(Record):
    """The result of a complete survey.

    Attributes:
        blocks: Records of all blocks.
    """

    blocks: list[SurveyRecord]


class ModelRecord(Record):
    """Which model was pruned.

    Attributes:
        source: What the user named.
        fingerprint: SHA-256 over the fingerprints of its tensors.
    """

    source: str
    fingerprint: str


class ParticipantRecord(Record):
    """A participant of a run: no text, no token ids.

    Attributes:
        sources: Where its text came from.
        n_windows: Number of calibration windows.
        window_length: Tokens of each.
        fingerprint: SHA-256 of the windows; None where they never left the participant.
        n_blocks: Number of blocks it shared an update of.
        update_bytes: Payload of everything it shared, in bytes.
    """

    sources: list[str]
    n_windows: int
    window_length: int
    fingerprint: str | None = None
    n_blocks: int | None = None
    update_bytes: int | None = None

    @property
    def n_tokens(self) -> int:
        """Number of calibration tokens."""
        return self.n_windows * self.window_length


class RunRecord(Record):
    """The result of a complete run: ``result.json``.

    Attributes:
        config: The resolved configuration.
        model: Which model was pruned.
        participants: The participants by name.
        evaluation: Perplexities by model: ``dense``, and the names of ``models``.
        versions: Versions of what the bits of a run depend on.
        run_id: Hex digits that name a run of a federation; None in one process.
        models: Folders of the pruned models, relative to the run's, by name.
        n_prunable: Number of prunable weights.
        n_participants: Number of participants that walked.
        rounds: Rounds of communication.
        update_bytes_per_block: Payload of one participant's update, in bytes by block.
        survey_bytes_per_block: The same for the survey before.
        outlier_ratios: Share of outliers by block; under ``local-only`` of each participant.
        blocks: Records of all blocks.
        comparison: Perplexities of models that the run is compared with.
    """

    config: PruneConfig
    model: ModelRecord
    participants: dict[str, ParticipantRecord]
    evaluation: dict[str, list[Perplexity]] = {}
    versions: dict[str, str]
    run_id: str | None = None
    models: dict[str, str]
    n_prunable: int
    n_participants: int
    rounds: int
    update_bytes_per_block: list[int]
    survey_bytes_per_block: list[int]
    outlier_ratios: dict[str, list[float]] = {}
    blocks: list[BlockRecord]
    comparison: dict[str, list[Perplexity]] | None = None

    def linears(self) -> Iterator[tuple[int, LinearRecord]]:
        """Every Linear with the index of its block."""
        for record in self.blocks:
            for linear in record.linears.values():
                yield record.block, linear

    @property
    def n_zeros(self) -> int:
        """Zeros among the prunable weights."""
        return sum(record.n_zeros for record in self.blocks)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights."""
        return self.n_zeros / self.n_prunable
