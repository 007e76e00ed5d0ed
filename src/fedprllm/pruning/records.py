"""Typed records of a run: one per block while it runs, and the result at the end.

Each is stored as JSON under the names of its fields, except that a Linear's ``path`` is stored as ``kind``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedprllm.config import PruneConfig
from fedprllm.errors import RunError
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import unsealed

__all__ = [
    "BlockRecord",
    "CandidateRecord",
    "ChoiceRecord",
    "ExpertsRecord",
    "LinearRecord",
    "ModelRecord",
    "ParticipantRecord",
    "Record",
    "Reduction",
    "RunRecord",
    "SurveyRecord",
    "SurveyRun",
    "type_of",
]

FEW_TOKENS = 10  # for an expert; sums over fewer say little about its channels


class Record(BaseModel):
    """Base class of everything that is stored as a JSON record."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values; fields that are None are omitted."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record from a JSON file.

        Raises:
            RunError: The file is missing, damaged or was written by another version of fedprllm.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(unsealed(value, path, required=False))
        except RunError as error:
            raise RunError(f"{error}; restore it, or choose another folder with --out") from None
        except FileNotFoundError:
            raise RunError(f"{path} is missing: restore it, or choose another folder with --out") from None
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0] if isinstance(error, ValidationError) else None
            where = ".".join(map(str, reason["loc"])) + ": " + reason["msg"] if reason else str(error)
            raise RunError(
                f"{path} is not a valid record ({where}): it is damaged or was written by another version of "
                "fedprllm; restore it, or choose another folder with --out"
            ) from None


def type_of(path: str) -> str:
    """The path of a Linear with ``*`` in place of an expert's number."""
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "*", path)


class LinearRecord(Record):
    """One Linear of a finished block.

    Attributes:
        path: Path of its module inside the block.
        shape: Shape of its weight in the pruned model, (out, in).
        dense_shape: Its shape in the dense model; None if that is the same.
        n_zeros: Number of zeros in the pruned weight, including those of the dense weight.
        n_pruned: Number of weights that the mask prunes.
        n_ties: Number of prunes decided by a tie rule.
        n_close: Number of prunes that rounding may have decided; None if not counted.
        vote_histogram: Number of weights by number of votes; None if there was no vote or votes are weighted
            by tokens.
    """

    path: Annotated[str, Field(alias="kind")]
    shape: tuple[int, int]
    dense_shape: tuple[int, int] | None = None
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
        """Fraction of zeros."""
        return self.n_zeros / self.n_weights

    @property
    def type(self) -> str:
        """The path with ``*`` in place of an expert's number: a report has one row for all experts."""
        return type_of(self.path)


class _Received(Record):
    """Fields of every block's record. What only the coordinator of a federation knows is None in one process.

    Attributes:
        block: Block index.
        files: SHA-256 of the files that belong to the block, by path relative to the run's folder once the
            run is complete.
        newest: SHA-256 of the files that are needed only until the next block is finished, by relative path.
        participants: Participants whose updates were added up, in the order of their names.
        still_in: Participants that take part in the following blocks.
        update_bytes: Size of each participant's update in bytes.
        n_tokens: Number of each participant's calibration tokens.
    """

    block: int
    files: dict[str, str] | None = None
    newest: dict[str, str] | None = None
    participants: list[str] | None = None
    still_in: list[str] | None = None
    update_bytes: dict[str, int] | None = None
    n_tokens: dict[str, int] | None = None


class ExpertsRecord(Record):
    """How far one participant's text reached the experts of a block, or of several blocks together.

    Attributes:
        n_experts: Number of experts.
        n_unreached: Number of experts to which the router sent none of its tokens.
        n_few: Number of experts to which it sent some, but fewer than `FEW_TOKENS`.
    """

    n_experts: int
    n_unreached: int
    n_few: int

    @classmethod
    def of(cls, n_tokens: Sequence[int]) -> Self:
        """The record of experts, given the number of tokens that reached each."""
        n_few = sum(0 < n < FEW_TOKENS for n in n_tokens)
        return cls(n_experts=len(n_tokens), n_unreached=sum(n == 0 for n in n_tokens), n_few=n_few)

    @classmethod
    def total(cls, records: Iterable[Self]) -> Self:
        """The record of several blocks together."""
        counts = [(one.n_experts, one.n_unreached, one.n_few) for one in records]
        n_experts, n_unreached, n_few = (sum(column) for column in zip(*counts, strict=True))
        return cls(n_experts=n_experts, n_unreached=n_unreached, n_few=n_few)

    def sentence(self, name: str) -> str:
        """What the participant of that name should know; empty if its text reached all experts well."""
        if not self.n_unreached and not self.n_few:
            return ""
        return (
            f"the text of '{name}' reached {self.n_experts - self.n_unreached} of {self.n_experts} experts, "
            f"{self.n_few} of them with fewer than {FEW_TOKENS} tokens (an expert that it does not reach is "
            "pruned by magnitude): more windows reach more experts"
        )


class BlockRecord(_Received):
    """A finished block.

    Attributes:
        linears: Its Linears by weight name.
        sparsity: Fraction of its prunable weights that the masks prune.
        coverage: Share of the block's weight matrices that is prunable; None in records of earlier versions.
        participant_ties: Number of prunes decided by the tie rule in each participant's own masks.
        agreement: Share of equal mask entries, [participant, participant], by path of the Linear.
        notes: Descriptions of deviations from the requested settings.
        total_tokens: Number of calibration tokens behind all updates, where only their sum is known.
        experts: How far each participant's text reached the block's experts; empty if it has none, or in a
            federation, where only the participant knows.
        seconds: Time spent per phase, in seconds.
        influence: Mean of ``1 - cos(input, output)`` over tokens, if blocks are to be dropped.
        dropped: Whether the pruned model lacks this block; its Linears are then left out.
        expert_scores: Mean of what each expert adds to its tokens, if experts are to be removed.
        removed_experts: Numbers of the experts that the pruned model lacks; their Linears are left out.
    """

    linears: dict[str, LinearRecord]
    sparsity: float
    coverage: float | None = None
    experts: dict[str, ExpertsRecord] = {}
    participant_ties: dict[str, int] = {}
    agreement: dict[str, list[list[float]]] = {}
    notes: list[str] = []
    total_tokens: int | None = None
    seconds: dict[str, float] = {}
    influence: float | None = None
    dropped: bool | None = None
    expert_scores: list[float] | None = None
    removed_experts: list[int] | None = None

    @property
    def n_zeros(self) -> int:
        """Number of zeros in all of its Linears."""
        return sum(linear.n_zeros for linear in self.linears.values())

    @property
    def n_weights(self) -> int:
        """Number of weights in all of its Linears."""
        return sum(linear.n_weights for linear in self.linears.values())


class SurveyRecord(_Received):
    """A block of a survey.

    Attributes:
        outliers: Number of outlying scores and number of all scores in the block.
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
        source: The model as the user named it: hub id, folder or file.
        fingerprint: SHA-256 over the fingerprints of its tensors.
    """

    source: str
    fingerprint: str


class ParticipantRecord(Record):
    """A participant of a run; the record holds neither text nor token ids.

    Attributes:
        sources: Where its text came from.
        n_windows: Number of calibration windows; None where it went into a sum under masks.
        window_length: Number of tokens per window.
        fingerprint: SHA-256 of the windows; None in a federation, where it stays with the participant.
        n_blocks: Number of blocks for which it shared an update.
        update_bytes: Total payload that it shared, in bytes.
    """

    sources: list[str]
    n_windows: int | None = None
    window_length: int
    fingerprint: str | None = None
    n_blocks: int | None = None
    update_bytes: int | None = None

    @property
    def n_tokens(self) -> int:
        """Number of calibration tokens, as far as it is known."""
        return (self.n_windows or 0) * self.window_length


class Reduction(Record):
    """How much smaller a model became by losing whole parts; each field is a pair, before and after.

    Attributes:
        n_parameters: Number of parameters; tied ones count once.
        n_block_parameters: The same inside the decoder blocks.
        n_bytes: Size of the weight files.
    """

    n_parameters: tuple[int, int]
    n_block_parameters: tuple[int, int]
    n_bytes: tuple[int, int]

    @property
    def of_blocks(self) -> float:
        """Fraction of the blocks' parameters that is gone."""
        before, after = self.n_block_parameters
        return 1 - after / before

    @property
    def of_model(self) -> float:
        """Fraction of all parameters that is gone."""
        before, after = self.n_parameters
        return 1 - after / before


class CandidateRecord(Record):
    """A structure that a run could remove, and what its model lost.

    Attributes:
        structure: As in `PruneConfig.structure`.
        of_blocks: Fraction of the blocks' parameters that goes with it.
        loss: Mean loss per token of its model in nats, on the held-out windows of all participants.
        n_tokens: Number of predicted tokens in these windows.
    """

    structure: str
    of_blocks: float
    loss: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


class ChoiceRecord(Record):
    """How a run chose the structure that it removes.

    Attributes:
        smaller: Fraction of the blocks' parameters that had to go at least.
        candidates: What it chose among.
        refused: Why other ways to make the model smaller were not among them, by name.
    """

    smaller: float
    candidates: list[CandidateRecord]
    refused: dict[str, str] = {}

    @property
    def chosen(self) -> CandidateRecord:
        """The candidate with the lowest loss; of equal ones the first."""
        return min(self.candidates, key=lambda one: one.loss)

    @property
    def sentence(self) -> str:
        """What was chosen and why, as a sentence without its period."""
        others = ", ".join(
            f"{one.structure} {one.perplexity:.2f}" for one in self.candidates if one is not self.chosen
        )
        why = (
            f"the lowest perplexity on {self.chosen.n_tokens:,} held-out tokens of the participants, "
            f"{self.chosen.perplexity:.2f} ({others})"
            if others
            else "the only structure that makes the blocks so much smaller"
        )
        return f"{self.chosen.structure}: {why}"


class RunRecord(Record):
    """The result of a complete run: ``result.json``.

    Attributes:
        config: The resolved configuration.
        model: Which model was pruned.
        participants: The participants by name.
        evaluation: Perplexities by model: ``dense`` and the names in ``models``.
        versions: Versions of the software that the exact bits of the result depend on.
        run_id: Identifier of a federated run in hex digits; None in one process.
        models: Folders of the pruned models by name, relative to the run's folder.
        n_prunable: Number of prunable weights of the pruned model.
        reduction: How much smaller the model became by losing whole parts; None if it lost none.
        choice: How the structure was chosen; None if the user named it, or none was removed.
        coverage: Share of the weight matrices inside the blocks that is prunable; None in records of earlier
            versions.
        n_participants: Number of participants that walked through the model.
        rounds: Number of communication rounds.
        update_bytes_per_block: Payload of one participant's update for each block, in bytes.
        survey_bytes_per_block: The same for the preceding survey.
        outlier_ratios: Fraction of outliers in each block, under the key ``model`` or, with ``local-only``,
            under each participant's name.
        blocks: Records of all blocks.
        files: SHA-256 of the models' files that belong to no block, by path relative to the run's folder.
        notes: Sentences about text: fewer windows than asked for, files of a folder that were left out.
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
    reduction: Reduction | None = None
    choice: ChoiceRecord | None = None
    coverage: float | None = None
    n_participants: int
    rounds: int
    update_bytes_per_block: list[int]
    survey_bytes_per_block: list[int]
    outlier_ratios: dict[str, list[float]] = {}
    blocks: list[BlockRecord]
    files: dict[str, str] | None = None
    notes: list[str] | None = None
    comparison: dict[str, list[Perplexity]] | None = None

    @property
    def n_windows(self) -> int:
        """Calibration windows of all participants; where only sums are known, those of the largest block."""
        known = [one.n_windows for one in self.participants.values()]
        length = max((one.window_length for one in self.participants.values()), default=1)
        largest = max((block.total_tokens or 0 for block in self.blocks), default=0) // length
        return largest if None in known else sum(n for n in known if n is not None)

    def linears(self) -> Iterator[tuple[int, LinearRecord]]:
        """Every Linear with the index of its block."""
        for record in self.blocks:
            for linear in record.linears.values():
                yield record.block, linear

    def deviations(self) -> list[str]:
        """Deviations from the requested settings, with the number of Linears or blocks that each concerns."""
        counts: Counter[str] = Counter()
        for record in self.blocks:
            for note in record.notes:
                name, _, about = note.partition(": ")
                counts[about if name in record.linears else note] += 1
        found = [f"{about} ({n} times)" if n > 1 else about for about, n in counts.most_common()]
        return [*found, *self.reach()]

    def reach(self) -> list[str]:
        """A sentence for each participant whose text reached some experts hardly or not at all."""
        reached: dict[str, list[ExpertsRecord]] = {}
        for record in self.blocks:
            for name, experts in record.experts.items():
                reached.setdefault(name, []).append(experts)
        sentences = (ExpertsRecord.total(records).sentence(name) for name, records in reached.items())
        return [sentence for sentence in sentences if sentence]

    @property
    def outcome(self) -> str:
        """What became of the model, to follow its name and "was"."""
        if self.reduction is None:
            return f"pruned to {self.sparsity:.1%} zeros"
        zeros = f" and pruned to {self.sparsity:.1%} zeros" if self.n_zeros else ""
        return f"made {self.reduction.of_blocks:.1%} smaller (parameters of its decoder blocks){zeros}"

    @property
    def n_zeros(self) -> int:
        """Number of zeros among the prunable weights."""
        return sum(record.n_zeros for record in self.blocks)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.n_zeros / self.n_prunable
