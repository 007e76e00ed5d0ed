"""The healed model: scales folded into the weights, in the names, types, shapes and zeros of its source."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from fedprllm.files import write_text
from fedprllm.healing.records import HealRecord
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.tunable import TunableParameters

__all__ = ["write_healed", "write_healed_card"]

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
