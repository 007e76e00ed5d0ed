"""FedSpaLLM: the server averages the weights that participants retained (Bai et al., NAACL 2025)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import PruneMask, most_voted

__all__ = ["fedspallm"]


def fedspallm(
    weight_sum: Float[Tensor, "out in"],
    keep_counts: Integer[Tensor, "out in"],
    n_participants: int,
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> tuple[Float[Tensor, "out in"], PruneMask]:
    """Average the retained weights, and prune exactly k of every comparison group.

    ``W'[o, j] = sum_i K_i W_i / sum_i K_i`` where ``K_i = 1`` if participant i retained it (l0 aggregation),
    and 0 where the mask prunes: first what all of them pruned, then the most-voted (mask expansion).

    The paper leaves two cases open. If all pruned more than k of a group, the k among them that the tie
    rule puts first are pruned. An entry that is kept although no participant retained it has no average,
    and takes the original weight.

    Args:
        weight_sum: ``sum_i K_i W_i``.
        keep_counts: ``sum_i K_i``.
        n_participants: How many contributed to this block, at least one: with layer sampling not all do.
        weight: The original weight.
        grouping: What is compared with what.
        ties: A key of `TIES`.
        seed_parts: What the tie rule ``random`` is a function of.

    Returns:
        The weights in the precision of ``weight``, exact +0.0 where pruned, and the mask.

    Source: Bai et al., FedSpaLLM (NAACL 2025), l0 aggregation and adaptive mask expansion.
    """
    assert n_participants >= 1, "no participant contributed to this block"
    votes = n_participants - keep_counts.to(torch.int32)
    pruned = most_voted(votes, weight, grouping, ties, seed_parts)
    average = (weight_sum / keep_counts.clamp(min=1)).to(weight.dtype)
    kept = torch.where(keep_counts > 0, average, weight)
    return kept.masked_fill(pruned.mask, 0.0), pruned
