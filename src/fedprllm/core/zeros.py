"""Put zeros into weights and count them: as whole numbers of the same bits, which a CPU does faster."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from fedprllm.core.threads import in_threads, row_slices

__all__ = ["copy_pruned", "count_zeros"]

_INTEGERS = {dtype.itemsize: dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)}


def copy_pruned(
    weight: Shaped[Tensor, "n m"], mask: Bool[Tensor, "n m"], target: Shaped[Tensor, "n m"]
) -> None:
    """Write a weight into ``target``, with exact +0.0 where the mask is True.

    Args:
        weight: The weights, in any precision.
        mask: Prune mask of the same shape.
        target: Overwritten, in a precision of its own; may be the weight itself, whose other bits then stay.
    """
    bits = _bits(target)

    def copy(rows: slice) -> None:
        if target is not weight:
            target[rows] = weight[rows]
        bits[rows] *= (~mask[rows]).view(torch.uint8)

    in_threads(copy, row_slices(target))


def count_zeros(weight: Shaped[Tensor, "n m"]) -> int:
    """Number of entries that are +0.0 or -0.0."""
    bits = _bits(weight)

    def count(rows: slice) -> int:
        # Without its highest bit, the sign, -0.0 is zero like +0.0.
        return int((bits[rows] << 1).count_nonzero())

    return bits.numel() - sum(in_threads(count, row_slices(weight)))


def _bits(weight: Tensor) -> Tensor:
    return weight.view(_INTEGERS[weight.dtype.itemsize])
