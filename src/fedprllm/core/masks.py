"""Prune masks: from scores or votes to exactly k pruned weights in every comparison group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Bool, Float, Integer, Num, Shaped
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.selection import select_lowest
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

# Weights: their scores stay in the cache, and torch computes them without waking other threads (it does from
# 2^15 on), which would take longer than the work.
_SCORED_AT_ONCE = 2**15 - 1


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
        scores: finite; lower is pruned first.
        weight: the weights themselves, for the tie rule ``magnitude``.
        grouping: what is compared with what.
        ties: a key of `TIES`.
        seed_parts: what the tie rule ``random`` is a function of.
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
        score: scores of float32 weights.
        weight: in any precision.
        grouping: what is compared with what.
        ties: a key of `TIES`.
        seed_parts: what the tie rule ``random`` is a function of.
        scores_rows: the scores of a row depend on no other row.
        counts_close: count the prunes that rounding may decide (`count_close`).
    """
    n_out, n_in = weight.shape
    # A GPU is faster the more it is given.
    by_rows = scores_rows and grouping.within_rows and weight.device.type == "cpu"
    step = max(1, _SCORED_AT_ONCE // n_in) if by_rows else n_out
    rule = TIES[ties]
    keys = None if rule is None else cache(partial(_keys, rule, weight, seed_parts))
    k = grouping.n_pruned((n_out, n_in))
    mask = torch.empty((n_out, n_in), dtype=torch.bool, device=weight.device)
    n_ties = n_close = 0
    for start in range(0, n_out, step):
        rows = slice(start, start + step)
        scores = score(weight[rows].to(torch.float32))
        tie_key = None if keys is None else partial(_of_rows, keys, rows, grouping)
        selected, n = select_lowest(grouping.split(scores), k, tie_key)
        mask[rows] = grouping.join(selected, (scores.shape[0], n_in))
        n_ties += n
        n_close += count_close(scores, mask[rows], grouping) if counts_close else 0
    return PruneMask(mask, n_ties, n_close if counts_close else None)


def _keys(rule: Callable[..., Tensor], weight: Tensor, seed_parts: tuple[object, ...]) -> Tensor:
    return rule(weight.to(torch.float32), seed_parts)


def _of_rows(keys: Callable[[], Tensor], rows: slice, grouping: Grouping) -> Tensor:
    return grouping.split(keys()[rows])


def count_close(scores: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], grouping: Grouping) -> int:
    """Prunes that float rounding may decide: of scores that the lowest kept one hardly exceeds.

    A score of float32 sums, roots and products is within 2.5 units of its last place; so an order of two
    scores is certain if they differ by more than five, here rounded up to a relative 2^-21. Of equal scores
    the tie rule decides; they count too.

    Args:
        scores: as ranked; not negative.
        mask: what was pruned.
        grouping: what was compared with what.
    """
    groups, pruned = grouping.split(scores), grouping.split(mask)
    lowest_kept = groups.masked_fill(pruned, torch.inf).amin(dim=1, keepdim=True)
    return int((pruned & (groups >= lowest_kept * (1 - 2.0**-21))).sum())


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
