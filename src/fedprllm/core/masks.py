"""Prune masks: turn scores or votes into exactly k pruned weights in every comparison group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from threading import Lock

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, Num, Shaped
from numpy.typing import NDArray
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.selection import select_lowest
from fedprllm.core.threads import in_threads, row_slices
from fedprllm.core.ties import TIES

__all__ = [
    "MaskViews",
    "PruneMask",
    "count_close",
    "exact_float",
    "most_voted",
    "prune_by_score",
    "prune_lowest",
    "scale_kept",
    "vote_dtype",
]


_INFINITY = 0x7F800000  # bit pattern of infinity in float32


class PruneMask:
    """The weights to prune.

    Args:
        mask: True where a weight is pruned.
        n_ties: Number of pruned weights that the tie rule chose.
        n_close: Number of pruned weights that rounding may have decided (`count_close`); None if not counted.
    """

    def __init__(self, mask: Bool[Tensor, "out in"], n_ties: int, n_close: int | None = None) -> None:
        self._mask: Tensor | None = mask
        self._bits: NDArray[np.uint8] | None = None
        self._shape, self._device = mask.shape, mask.device
        self.n_ties, self.n_close = n_ties, n_close

    @property
    def mask(self) -> Bool[Tensor, "out in"]:
        """True where a weight is pruned; unpacked on each access if it is packed."""
        if self._bits is None:
            assert self._mask is not None
            return self._mask
        bits = np.unpackbits(self._bits, count=self._shape.numel(), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(self._shape).to(self._device)

    def packed(self) -> PruneMask:
        """The same at one bit for each weight, an eighth of the memory."""
        packed = PruneMask(self.mask, self.n_ties, self.n_close)
        packed._bits = np.packbits(self.mask.cpu().contiguous().numpy(), bitorder="little")
        packed._mask = None
        return packed


class MaskViews(Mapping[str, Tensor]):
    """Masks by weight name, each taken from its `PruneMask` on access."""

    def __init__(self, masks: Mapping[str, PruneMask]) -> None:
        self._masks = masks

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name].mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


def prune_lowest(
    scores: Num[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> PruneMask:
    """Prune the ``k = floor(n * sparsity)`` lowest scores of every comparison group.

    Args:
        scores: Finite scores; lower is pruned first.
        weight: The weights themselves, for the tie rule ``magnitude``.
        grouping: The comparison groups and their sparsity.
        ties: A key of `TIES`.
        seed_parts: Seed of the tie rule ``random``.
    """
    shape = (scores.shape[0], scores.shape[1])
    rule = TIES[ties]
    tie_key = None if rule is None else lambda: grouping.split(rule(weight, seed_parts))
    selected, n_ties = select_lowest(grouping.split(scores), grouping.n_pruned(shape), tie_key)
    return PruneMask(grouping.join(selected, shape), n_ties)


def prune_by_score(
    score: Callable[[Float[Tensor, "rows in"]], Float[Tensor, "rows in"]],
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
    *,
    scores_rows: bool,
    counts_close: bool = False,
) -> PruneMask:
    """Prune the lowest scores of every comparison group, bit for bit as `prune_lowest` of ``score(weight)``.

    Where the result allows it, a few rows at a time are scored and compared, so that the scores stay in the
    cache and take almost no memory on top of the weights.

    Args:
        score: Function that scores float32 weights.
        weight: The weights, in any precision.
        grouping: The comparison groups and their sparsity.
        ties: A key of `TIES`.
        seed_parts: Seed of the tie rule ``random``.
        scores_rows: Whether the scores of a row are independent of all other rows.
        counts_close: Whether to count the pruned weights that rounding may have decided (`count_close`).
    """
    n_out, n_in = weight.shape
    by_rows = scores_rows and grouping.within_rows
    rule = TIES[ties]
    keys = None if rule is None else _once(lambda: rule(weight.to(torch.float32), seed_parts))
    k = grouping.n_pruned((n_out, n_in))
    mask = torch.empty((n_out, n_in), dtype=torch.bool, device=weight.device)

    def prune_rows(rows: slice) -> tuple[int, int]:
        scores = score(weight[rows].to(torch.float32))
        tie_key = None if keys is None else lambda: grouping.split(keys()[rows])
        selected, n_ties = select_lowest(grouping.split(scores), k, tie_key)
        mask[rows] = grouping.join(selected, (scores.shape[0], n_in))
        return n_ties, count_close(scores, mask[rows], grouping) if counts_close else 0

    counts = in_threads(prune_rows, row_slices(weight) if by_rows else [slice(n_out)])
    n_ties, n_close = (sum(column) for column in zip(*counts, strict=True))
    return PruneMask(mask, n_ties, n_close if counts_close else None)


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A thread-safe function that computes its value on the first call."""
    cached, lock = cache(make), Lock()

    def get() -> Tensor:
        with lock:
            return cached()

    return get


def count_close(scores: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], grouping: Grouping) -> int:
    """Count the pruned weights whose score lies within rounding error of the lowest kept score.

    A score made of float32 sums, roots and products is accurate to 2.5 units in the last place, so the order
    of two scores is certain if they differ by more than five units, here rounded up to a relative 2^-21.
    Equal scores, which the tie rule decides, are counted too.

    Args:
        scores: The ranked scores; float32, nonnegative.
        mask: True where a weight was pruned.
        grouping: The comparison groups.
    """
    groups, pruned = grouping.split(scores), grouping.split(mask)
    # Nonnegative floats have the same order when read as integers, and a CPU masks integers ten times as
    # fast. Pruned scores get the bits of infinity.
    hidden = groups.view(torch.int32) | (pruned.to(torch.int32) * _INFINITY)
    lowest_kept = hidden.amin(dim=1, keepdim=True).view(torch.float32)
    n_close = int((groups >= lowest_kept * (1 - 2.0**-21)).count_nonzero())
    # The kept weights are counted above as well.
    return n_close - int((~pruned).count_nonzero())


def most_voted(
    votes: Integer[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> PruneMask:
    """The server's mask: prune the k most-voted weights of every comparison group (FedPrLLM, section 3).

    Differs from the paper's code on purpose: ties follow one named rule for every kind of group, whereas
    the code draws at random for ``layer`` and takes the lowest index for ``row`` and ``column``.
    """
    # Floats, because only their partition is vectorized.
    exact = exact_float(torch.iinfo(votes.dtype).max)
    return prune_lowest(-votes.to(exact), weight, grouping, ties, seed_parts)


def scale_kept(
    weight: Shaped[Tensor, "*shape"], votes: Integer[Tensor, "*shape"], total: int
) -> Shaped[Tensor, "*shape"]:
    """``W * (m - V) / m``: the average of the locally pruned models (FedPrLLM, weight scaling).

    The factor and the product are float32 whatever the precision of the weight; the paper's code rounds the
    factor to float16.
    """
    factor = (total - votes.to(torch.float32)) / total
    # A factor of zero turns a negative weight into -0.0; adding zero makes that +0.0.
    return (weight.to(torch.float32) * factor + 0.0).to(weight.dtype)


def exact_float(total: int) -> torch.dtype:
    """The smallest floating-point type that holds every integer up to ``total``, which is below 2^53."""
    return torch.float32 if total <= 2**24 else torch.float64


def vote_dtype(total: int) -> torch.dtype:
    """The smallest integer type that counts up to ``total`` without overflow."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if total <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
