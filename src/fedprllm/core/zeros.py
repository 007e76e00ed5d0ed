"""Write and count zeros in weights, treating the bits as integers, which is faster on a CPU."""

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
    """Copy a weight to ``target``, with exact +0.0 where the mask is True.

    Args:
        weight: The weight, in any precision.
        mask: True where the weight is pruned.
        target: Tensor to overwrite, in any precision; if it is the weight itself, its kept entries are
            untouched.
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
        # Shifting out the sign bit makes -0.0 zero like +0.0.
        return int((bits[rows] << 1).count_nonzero())

    return bits.numel() - sum(in_threads(count, row_slices(weight)))


def _bits(weight: Tensor) -> Tensor:
    return weight.view(_INTEGERS[weight.dtype.itemsize])
