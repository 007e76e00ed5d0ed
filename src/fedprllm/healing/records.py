"""The records that healing leaves, as types."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fedprllm.errors import ConfigError
from fedprllm.evaluation.results import Perplexity
from fedprllm.healing.config import HealConfig
from fedprllm.pruning.records import ModelRecord, ParticipantRecord, Record, RunRecord

__all__ = ["HealRecord", "RoundRecord", "is_healing", "left_dense", "pruned_from"]


class RoundRecord(Record):
    """A finished round.

    Attributes:
        number: Number of the round, from 0; the last one only measures.
        learning_rate: Largest step of a parameter in it.
        n_tokens: Number of predicted tokens behind the gradient.
        loss: Mean loss of these tokens in nats; None if there are none.
        held_out_loss: Mean loss on held-out windows with the parameters that the round began with; None if
            it was not measured.
        losses: Mean loss by participant; empty where only the sum is known.
        taken_back: Whether the parameters were taken back to the best ones.
        participants: Participants that contributed; None in one process, where all do.
        still_in: Participants that take part in the following rounds.
        seconds: Time that the round took.
        figures: What the server continues from, with the tensors of the file.
        files: SHA-256 of the file with the server's tensors, by path relative to the folder.
    """

    number: int
    learning_rate: float
    n_tokens: int
    loss: float | None = None
    held_out_loss: float | None = None
    losses: dict[str, float] = Field(default_factory=dict)
    taken_back: bool = False
    participants: list[str] | None = None
    still_in: list[str] | None = None
    seconds: float
    figures: dict[str, float | int | None]
    files: dict[str, str] = Field(default_factory=dict)


class HealRecord(Record):
    """The result of healing: ``result.json``.

    Attributes:
        config: The resolved configuration.
        model: Which model was healed.
        dense: The model before pruning, where the loss compares with it.
        participants: The participants by name.
        n_parameters: Number of parameters that were trained.
        n_model_parameters: Number of parameters of the model.
        update_bytes: Payload of one participant's update in each round, in bytes.
        best_round: Round that began with the parameters of the result.
        rounds: Records of all rounds.
        evaluation: Perplexities by model: ``before`` and ``healed``.
        versions: Versions of the software that the exact bits of the result depend on.
        run_id: Identifier of a federated run in hex digits; None in one process.
        models: Folder of the healed model, relative to the run's folder.
        files: SHA-256 of its files, by path relative to the run's folder.
        notes: Sentences about text and about how it went.
    """

    config: HealConfig
    model: ModelRecord
    dense: ModelRecord | None = None
    participants: dict[str, ParticipantRecord]
    n_parameters: int
    n_model_parameters: int
    update_bytes: int
    best_round: int
    rounds: list[RoundRecord]
    evaluation: dict[str, list[Perplexity]] = Field(default_factory=dict)
    versions: dict[str, str]
    run_id: str | None = None
    models: dict[str, str]
    files: dict[str, str]
    notes: list[str] = Field(default_factory=list)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """Rounds in which held-out windows were measured, and the loss."""
        return [(one.number, one.held_out_loss) for one in self.rounds if one.held_out_loss is not None]


def is_healing(run: Path) -> bool:
    """Whether a folder is that of a healing, not of a run that prunes."""
    return (run / "rounds").is_dir()


def left_dense(run: Path) -> tuple[str, ...]:
    """The Linears that a complete run, or a healing, was told to leave as they are: they get no scale.

    Raises:
        RunError: Its record is missing or damaged.
    """
    kind = HealRecord if is_healing(run) else RunRecord
    return kind.read(run / "result.json").config.exclude


def pruned_from(run: Path) -> ModelRecord:
    """The model that a complete run pruned.

    Raises:
        ConfigError: The run healed, and what it healed is not dense.
        RunError: The run's record is missing or damaged.
    """
    if is_healing(run):
        raise ConfigError(
            f"loss dense compares with the model before pruning, and {run} is a healing: heal the result of "
            "the run that pruned"
        )
    return RunRecord.read(run / "result.json").model
