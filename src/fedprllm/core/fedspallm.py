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
    """Average each weight over the participants that retained it, and prune exactly k of every group.

    ``W'[o, j] = sum_i K_i W_i / sum_i K_i`` where ``K_i = 1`` if participant i retained the weight (l0
    aggregation). The mask prunes the weights that all participants pruned, then the most-voted of the others
    (mask expansion); pruned weights are 0.

    The paper leaves two cases open. If all participants pruned the same weights and there are more than k of
    them in a group, the tie rule picks k of these. A weight that is kept although no participant retained it
    has no average and takes its original value.

    Args:
        weight_sum: ``sum_i K_i W_i``.
        keep_counts: ``sum_i K_i``.
        n_participants: Number of participants that contributed to this block, at least 1; with layer
            sampling not all of them do.
        weight: The original weights.
        grouping: The comparison groups and their sparsity.
        ties: A key of `TIES`.
        seed_parts: Seed of the tie rule ``random``.

    Returns:
        The weights in the precision of ``weight``, exact +0.0 where pruned, and the prune mask.

    Source: Bai et al., FedSpaLLM (NAACL 2025), l0 aggregation and adaptive mask expansion.
    """
    assert n_participants >= 1, "no participant contributed to this block"
    votes = n_participants - keep_counts.to(torch.int32)
    pruned = most_voted(votes, weight, grouping, ties, seed_parts)
    average = (weight_sum / keep_counts.clamp(min=1)).to(weight.dtype)
    kept = torch.where(keep_counts > 0, average, weight)
    return kept.masked_fill(pruned.mask, 0.0), pruned
