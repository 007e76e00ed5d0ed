"""The healed model: scales folded into the weights, in the names, types, shapes and zeros of its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedprllm.evaluation.results import Perplexity
from fedprllm.files import write_text
from fedprllm.healing.records import HealRecord, RoundRecord
from fedprllm.healing.round_sums import round_bytes
from fedprllm.healing.run_folder import HealingRun
from fedprllm.healing.server import HealingServer
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.tunable import TunableParameters

__all__ = ["heal_record", "write_healed", "write_healed_card"]

_CARD = "README.md"
_HEADING = "## Healed"


def write_healed(
    folder: Path, model: BlockwiseModel, tunable: TunableParameters, vector: Float[Tensor, " n"]
) -> None:
    """Write a model with other parameters, one block in memory at a time.

    Args:
        folder: Folder to write to.
        model: The model that was healed.
        tunable: Its parameters.
        vector: Their new values.
    """
    writer = CheckpointWriter(folder, model.checkpoint, model.n_blocks)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            writer.write(index, tunable.folded_block(block, vector))
    writer.finish(model.names_outside_blocks(), tensors=tunable.folded_outside(vector))


def heal_record(
    identity: Mapping[str, Any],
    model: BlockwiseModel,
    n_parameters: int,
    server: HealingServer,
    records: Sequence[RoundRecord],
    run: HealingRun,
    evaluation: Mapping[str, Sequence[Perplexity]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> HealRecord:
    """The result of a healing whose model has been written.

    Args:
        identity: What determines the result: configuration, model, participants, versions.
        model: The model that was healed.
        n_parameters: Number of parameters that were trained.
        server: The server, after the last round.
        records: Records of all rounds.
        run: The folder, open.
        evaluation: Perplexities ``before`` and ``healed``.
        notes: Sentences about text.
    """
    paths = [path for path in sorted(run.model_dir().rglob("*")) if path.is_file() and path.name != _CARD]
    return HealRecord.model_validate(
        {
            **identity,
            "n_parameters": n_parameters,
            "n_model_parameters": sum(parameter.numel() for parameter in model.skeleton.parameters()),
            "update_bytes": round_bytes(n_parameters),
            "best_round": server.best_round,
            "rounds": records,
            "evaluation": evaluation,
            "models": {"model": run.model_dir().name},
            "files": run.digests(paths),
            "notes": [*notes, *_how_it_went(server, records)],
        }
    )


def _how_it_went(server: HealingServer, records: Sequence[RoundRecord]) -> list[str]:
    """Sentences that whoever uses the result should know."""
    measured = [one.held_out_loss for one in records if one.held_out_loss is not None]
    if not measured:
        return ["no window was held out, so nobody measured whether healing helped: give more text"]
    if server.best_round == 0:
        return ["the loss on held-out windows never fell: the model is as it was; lower the learning rate"]
    if server.n_taken_back:
        return [
            f"the loss on held-out windows rose {server.n_taken_back} times, and the parameters were taken "
            "back to the best ones"
        ]
    return []


def write_healed_card(folder: Path, source: Path, record: HealRecord) -> None:
    """Write the model card: that of the model that was healed, and what healing did to it.

    Args:
        folder: Folder of the healed model.
        source: Folder of the model that was healed.
        record: The result.
    """
    card = source / _CARD
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {record.model.source}\n"
    write_text(folder / _CARD, f"{before.rstrip()}\n\n{_section(record)}")


def _section(record: HealRecord) -> str:
    losses = record.held_out
    n, names = record.config.rounds, len(record.participants)
    lines = [
        _HEADING,
        "",
        f"After pruning, {record.n_parameters:,} of {record.n_model_parameters:,} parameters (norms, biases "
        f"and one scale for each output row of a Linear) were trained in {n} rounds on the text of {names} "
        f"{'participants that kept it local' if names > 1 else 'participant'}; zeros and shapes are those of "
        "the model before.",
    ]
    if losses:
        best = dict(losses)[record.best_round]
        lines.append(f"Loss on held-out windows: {losses[0][1]:.4f} before, {best:.4f} after.")
    return "\n".join([*lines, ""])
