"""Share prune masks, the paper's way: the server prunes what has the most votes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.masks import most_voted, scale_kept, vote_dtype
from fedprllm.errors import UpdateError
from fedprllm.models.blocks import Block, Linear
from fedprllm.participant import BlockStatistics
from fedprllm.sharing.base import (
    BlockDecision,
    Contribution,
    Shapes,
    Sharing,
    Totals,
    grouping_of,
    local_decision,
    without,
)

__all__ = ["MASKS", "check_mask", "zero_votes"]


def _contribute(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, fingerprint: str
) -> Contribution:
    own = local_decision(block, statistics, config, fingerprint)
    return Contribution({name: pruned.mask for name, pruned in own.masks.items()}, own)


def _shapes(linears: Mapping[str, Linear]) -> Shapes:
    return {name: (linear.shape, torch.bool) for name, linear in linears.items()}


def _check(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:
    for name, linear in block.linears.items():
        check_mask(linear, update[name], config)


def check_mask(linear: Linear, mask: Tensor, config: PruneConfig) -> None:
    """Refuse a ballot that does not prune exactly k weights of every local comparison group.

    Raises:
        UpdateError: names the weight and the first group that differs.
    """
    grouping = grouping_of(config, config.local_group, linear)
    counts = grouping.split(mask).sum(dim=1)
    k = grouping.n_pruned(linear.shape)
    wrong = (counts != k).nonzero()
    if wrong.numel():
        first = int(wrong[0])
        raise UpdateError(
            f"the mask of '{linear.name}' prunes {int(counts[first])} weights in comparison group {first} "
            f"({config.local_group}): expected exactly {k} at sparsity {float(grouping.sparsity):g}"
        )


def zero_votes(block: Block, max_weight: int) -> dict[str, Tensor]:
    """No votes yet, in the smallest integer type that cannot overflow."""
    dtype = vote_dtype(max_weight)
    return {
        name: torch.zeros(linear.shape, dtype=dtype, device=block.tensors[name].device)
        for name, linear in block.linears.items()
    }


def _zeros(block: Block, max_weight: int) -> Totals:
    return Totals(zero_votes(block, max_weight))


def _decide(votes: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    """Prune the most-voted weights of every server comparison group, and scale if asked to."""
    decision = BlockDecision({})
    for name, linear in block.linears.items():
        counts, weight = votes.sums[name], block.tensors[name]
        grouping = grouping_of(config, config.server_group, linear)
        seed_parts = (config.seed, "server", name)
        pruned = most_voted(counts, block.matrix(name), grouping, config.vote_ties, seed_parts)
        if config.scale_weights:
            weight = scale_kept(weight, linear.oriented(counts), votes.weight)
        decision.masks[name] = pruned
        decision.weights[name] = without(weight, linear.oriented(pruned.mask))
    return decision


MASKS = Sharing("mask", _contribute, _shapes, _check, _zeros, _decide, decides_alone=True)
