"""Writing a run's model: block by block while it walks, or at the end if blocks or experts are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprllm.config import PruneConfig
from fedprllm.deciding.parts import lowest, n_removed
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.fewer_experts import write_fewer_experts
from fedprllm.models.shorter import write_shorter
from fedprllm.models.smaller import write_rest
from fedprllm.models.tensor_file import Writable
from fedprllm.pruning.records import BlockRecord

__all__ = ["ResultWriter", "dropped_blocks", "without_dropped"]


class ResultWriter:
    """Writes a pruned model.

    Args:
        folder: Folder to write to.
        model: The dense model.
        config: The run's configuration.
    """

    def __init__(self, folder: Path, model: BlockwiseModel, config: PruneConfig) -> None:
        self._folder, self._model, self._config = folder, model, config
        self._writer = CheckpointWriter(folder, model.checkpoint, model.n_blocks)

    def write(self, index: int, tensors: Mapping[str, Writable]) -> None:
        """Write a block, unless blocks or experts are removed at the end of the run."""
        if not {"depth", "experts"} & self._config.structures.keys():
            self._writer.write(index, tensors)

    def finish(self, records: Sequence[BlockRecord]) -> None:
        """Write the rest of the model, given the records of all blocks."""
        if "depth" in self._config.structures:
            write_shorter(self._folder, self._model, dropped_blocks(records, self._config))
        elif "experts" in self._config.structures:
            write_fewer_experts(
                self._folder, self._model, [record.removed_experts or [] for record in records]
            )
        else:
            write_rest(self._writer, self._model)


def dropped_blocks(records: Sequence[BlockRecord], config: PruneConfig) -> list[int]:
    """Indices of the blocks that the pruned model lacks."""
    amount = config.structures.get("depth")
    if amount is None:
        return []
    influences = [record.influence for record in records if record.influence is not None]
    assert len(influences) == len(records), "a run that drops blocks records their influence"
    return lowest(influences, n_removed(len(records), amount))


def without_dropped(records: Sequence[BlockRecord], config: PruneConfig) -> list[BlockRecord]:
    """The records, in which dropped blocks have no Linears."""
    gone = dropped_blocks(records, config)
    return [
        record.model_copy(update={"linears": {}, "dropped": True}) if record.block in gone else record
        for record in records
    ]
