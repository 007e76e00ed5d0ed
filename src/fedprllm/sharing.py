"""What participants share of a block, and what the server makes of the sum.

An update is additive: a mapping from weight name to a tensor. The aggregator needs only the sum over
participants, so another way of summing can take its place unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.groups import Grouping, GroupName
from fedprllm.core.masks import PruneMask, most_voted, prune_lowest, scale_kept, vote_dtype
from fedprllm.models.blocks import Block
from fedprllm.participant import BlockStatistics

__all__ = ["BlockDecision", "Votes", "local_decision", "mask_bytes"]


@dataclass
class BlockDecision:
    """What a block loses: one participant's own decision, or the server's.

    Attributes:
        masks: the prune mask of each Linear, as [out, in].
        weights: the pruned weights, in the orientation and precision of the checkpoint.
    """

    masks: dict[str, PruneMask]
    weights: dict[str, Tensor] = field(default_factory=dict)


def _grouping(config: PruneConfig, group: GroupName) -> Grouping:
    return Grouping(group, config.sparsity, config.n_m)


def local_decision(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, participant: str
) -> BlockDecision:
    """A participant's own prune masks and the weights it walks on with.

    Args:
        block: the block, with its weights.
        statistics: of its inputs on the participant's text; None for a criterion that uses no text.
        config: criterion, local group, ties.
        participant: what random ties are drawn for (a fingerprint of the text, so that the order and
            the names of participants change nothing).
    """
    score = CRITERIA[config.criterion].score
    grouping = _grouping(config, config.local_group)
    decision = BlockDecision({})
    for name, linear in block.linears.items():
        weight = block.matrix(name)
        norm = torch.ones(linear.shape[1]) if statistics is None else statistics[name].norm
        scores = score(weight, norm.to(weight.device))
        seed_parts = (config.seed, "local", participant, name)
        pruned = prune_lowest(scores, weight, grouping, config.ties, seed_parts)
        decision.masks[name] = pruned
        decision.weights[name] = _without(block.tensors[name], linear.oriented(pruned.mask))
    return decision


def _without(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with exact +0.0 where the mask is True."""
    return torch.where(mask, weight.new_zeros(()), weight)


def mask_bytes(block_linears: Mapping[str, object], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Payload of a block's masks: one bit per weight, each mask rounded up to a byte."""
    return sum((shapes[name][0] * shapes[name][1] + 7) // 8 for name in block_linears)


class Votes:
    """The server's sum of prune masks over participants, for one block.

    Attributes:
        counts: votes per weight, as [out, in], in the smallest integer type that cannot overflow.
        n_participants: number of masks added so far.
    """

    def __init__(self, block: Block, max_participants: int) -> None:
        dtype = vote_dtype(max_participants)
        self.counts = {
            name: torch.zeros(linear.shape, dtype=dtype, device=block.tensors[name].device)
            for name, linear in block.linears.items()
        }
        self.n_participants = 0

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Count one participant's masks; order does not matter."""
        for name, counts in self.counts.items():
            counts += masks[name]
        self.n_participants += 1

    def decide(self, block: Block, config: PruneConfig) -> BlockDecision:
        """Prune the most-voted weights of every server comparison group, and scale if asked to."""
        grouping = _grouping(config, config.server_group)
        decision = BlockDecision({})
        for name, linear in block.linears.items():
            seed_parts = (config.seed, "server", name)
            pruned = most_voted(self.counts[name], block.matrix(name), grouping, config.ties, seed_parts)
            decision.masks[name] = pruned
            weight = block.tensors[name]
            if config.scale_weights:
                weight = scale_kept(weight, linear.oriented(self.counts[name]), self.n_participants)
            decision.weights[name] = _without(weight, linear.oriented(pruned.mask))
        return decision
