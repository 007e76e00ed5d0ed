"""Prune masks: from scores or votes to exactly k pruned weights in every comparison group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch
from jaxtyping import Bool, Float, Integer, Num, Shaped
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.selection import select_lowest
from fedprllm.core.threads import in_threads, row_slices
from fedprllm.core.ties import TIES

__all__ = [
    "PruneMask",
    "count_close",
    "exact_float",
    "most_voted",
    "prune_by_score",
    "prune_lowest",
    "scale_kept",
    "vote_dtype",
]


_INFINITY = 0x7F800000  # the bits of a float32


@dataclass(frozen=True)
class PruneMask:
    """The weights to prune, how many of them a tie decided, and how many rounding may (`count_close`)."""

    mask: Bool[Tensor, "out in"]
    n_ties: int
    n_close: int | None = None


def prune_lowest(
    scores: Num[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> PruneMask:
    """Prune the ``k = floor(n * sparsity)`` lowest scores of every comparison group.

    Args:
        scores: Finite; lower is pruned first.
        weight: The weights themselves, for the tie rule ``magnitude``.
        grouping: What is compared with what.
        ties: A key of `TIES`.
        seed_parts: What the tie rule ``random`` is a function of.
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
    """Prune the lowest scores of every comparison group: `prune_lowest` of ``score(weight)``, bit by bit.

    Scores are made and compared a few rows at a time where that is the same: they stay in the cache, and take
    no memory beside the weights.

    Args:
        score: Scores of float32 weights.
        weight: The weights, in any precision.
        grouping: What is compared with what.
        ties: A key of `TIES`.
        seed_parts: What the tie rule ``random`` is a function of.
        scores_rows: The scores of a row depend on no other row.
        counts_close: Count the prunes that rounding may decide (`count_close`).
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
    """A function that makes its value when it is first called, for whichever thread."""
    cached, lock = cache(make), Lock()

    def get() -> Tensor:
        with lock:
            return cached()

    return get


def count_close(scores: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], grouping: Grouping) -> int:
    """Prunes that float rounding may decide: of scores that the lowest kept one hardly exceeds.

    A score of float32 sums, roots and products is within 2.5 units of its last place; so an order of two
    scores is certain if they differ by more than five, here rounded up to a relative 2^-21. Of equal scores
    the tie rule decides; they count too.

    Args:
        scores: As ranked; float32, not negative.
        mask: What was pruned.
        grouping: What was compared with what.
    """
    groups, pruned = grouping.split(scores), grouping.split(mask)
    # As whole numbers, in which floats that are not negative have the same order, a CPU masks them ten times
    # as fast. Pruned ones get the bits of infinity.
    hidden = groups.view(torch.int32) | (pruned.to(torch.int32) * _INFINITY)
    lowest_kept = hidden.amin(dim=1, keepdim=True).view(torch.float32)
    n_close = int((groups >= lowest_kept * (1 - 2.0**-21)).count_nonzero())
    # Those that are kept are among them.
    return n_close - int((~pruned).count_nonzero())


def most_voted(
    votes: Integer[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> PruneMask:
    """The server's mask: the k most-voted weights of every comparison group (FedPrLLM, section 3).

    Differs from the paper's code on purpose: ties follow one named rule in every group, where the code
    draws at random for ``layer`` and takes the lowest index for ``row`` and ``column``.
    """
    # The partition of floats is the vectorised one.
    exact = exact_float(torch.iinfo(votes.dtype).max)
    return prune_lowest(-votes.to(exact), weight, grouping, ties, seed_parts)


def scale_kept(
    weight: Shaped[Tensor, "*shape"], votes: Integer[Tensor, "*shape"], total: int
) -> Shaped[Tensor, "*shape"]:
    """``W * (m - V) / m``: the average of the locally pruned models (FedPrLLM, weight scaling).

    The factor and the product are float32 whatever the precision of the weight, unlike the paper's code,
    which rounds the factor to float16.
    """
    factor = (total - votes.to(torch.float32)) / total
    # Adding zero turns -0.0, which a factor of zero makes of a negative weight, into +0.0.
    return (weight.to(torch.float32) * factor + 0.0).to(weight.dtype)


def exact_float(total: int) -> torch.dtype:
    """The smallest floating type that holds every whole number up to ``total``, which is below 2^53."""
    return torch.float32 if total <= 2**24 else torch.float64


def vote_dtype(total: int) -> torch.dtype:
    """The smallest integer type that counts up to ``total`` without overflow."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if total <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
