"""Share prune masks, the paper's way: the server prunes what has the most votes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.bitplanes import PackedVotes
from fedprllm.core.masks import scale_kept
from fedprllm.errors import UpdateError
from fedprllm.models.blocks import Block, Linear, PrunedWeights
from fedprllm.participant import BlockStatistics
from fedprllm.sharing.base import (
    BlockDecision,
    Contribution,
    Shapes,
    Sharing,
    Totals,
    grouping_of,
    local_decision,
)

__all__ = ["MASKS", "check_mask", "zero_votes"]

_SCALED_AT_ONCE = 2**20  # weights


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


def zero_votes(block: Block) -> dict[str, PackedVotes]:
    """No votes yet on any Linear."""
    return {name: PackedVotes(prod(linear.shape)) for name, linear in block.linears.items()}


def _zeros(block: Block) -> Totals:
    return Totals(votes=zero_votes(block))


def _decide(totals: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    """Prune the most-voted weights of every server comparison group, and scale if asked to."""
    masks = {}
    for name, linear in block.linears.items():
        votes, weight = totals.votes[name], linear.oriented(block.tensors[name])
        grouping = grouping_of(config, config.server_group, linear)
        seed_parts = (config.seed, "server", name)
        masks[name] = votes.most_voted(weight, grouping, config.vote_ties, seed_parts)
    pruned = PrunedWeights(block, {name: pruned.mask for name, pruned in masks.items()})
    if not config.scale_weights:
        return BlockDecision(masks, pruned)
    scaled = {
        name: _scaled(weight, block.linears[name], totals.votes[name]) for name, weight in pruned.items()
    }
    return BlockDecision(masks, scaled)


def _scaled(weight: Tensor, linear: Linear, votes: PackedVotes) -> Tensor:
    """The weight scaled by the votes against it, a few rows at a time: counts are larger than planes."""
    scaled = torch.empty_like(weight)
    source, target = linear.oriented(weight), linear.oriented(scaled)
    n_out, n_in = linear.shape
    step = max(1, _SCALED_AT_ONCE // n_in)
    for row in range(0, n_out, step):
        last = min(row + step, n_out)
        counts = votes.counts(row * n_in, last * n_in).reshape(-1, n_in).to(weight.device)
        target[row:last] = scale_kept(source[row:last], counts, votes.total)
    return scaled


MASKS = Sharing("mask", _contribute, _shapes, _check, _zeros, _decide, decides_alone=True)
