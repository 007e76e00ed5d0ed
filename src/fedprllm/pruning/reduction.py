"""How much smaller a model became by losing whole parts."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.find import find_blocks
from fedprllm.models.skeleton import build_skeleton
from fedprllm.pruning.records import Reduction

__all__ = ["reduction"]


def reduction(model: BlockwiseModel, folder: Path) -> Reduction | None:
    """Compare the sizes of the dense and the pruned model; None if no part was removed.

    Args:
        model: The dense model.
        folder: The complete pruned model.
    """
    dense, pruned = model.skeleton, build_skeleton(folder, model.dtype)
    counts = _n_parameters(dense), _n_parameters(pruned)
    if counts[0] == counts[1]:
        return None
    in_blocks = [sum(map(_n_parameters, find_blocks(skeleton)[1])) for skeleton in (dense, pruned)]
    return Reduction(
        n_parameters=counts,
        n_block_parameters=(in_blocks[0], in_blocks[1]),
        n_bytes=(model.checkpoint.n_bytes, Checkpoint(folder, pruned).n_bytes),
    )


def _n_parameters(module: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
