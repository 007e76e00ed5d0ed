"""Decide by vote: prune the weights that the most participants would prune (FedPrLLM, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes
from fedprllm.core.masks import scale_kept
from fedprllm.deciding.decision import BlockDecision
from fedprllm.models.block import Block, GivenWeights, Linear
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_votes"]

_SCALED_AT_ONCE = 2**20  # weights


def by_votes(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Prune the most-voted weights of every server comparison group; scale the others if configured."""
    config = target.config
    masks = {
        name: BlockDecision.kept(
            linear,
            totals.votes[name].most_voted(
                linear.view(block.tensors),
                target.server_grouping(linear),
                config.vote_ties,
                (config.seed, "server", name),
            ),
        )
        for name, linear in block.linears.items()
    }
    decision = BlockDecision.of_masks(block, masks)
    if config.scale_weights:
        decision.weights = GivenWeights(
            {
                name: _scaled(weight, block.linears[name], totals.votes[name])
                for name, weight in decision.weights.items()
            }
        )
    return decision


def _scaled(weight: Tensor, linear: Linear, votes: PackedVotes) -> Tensor:
    """The weight times ``(m - votes) / m``, a few rows at a time: counts take more memory than planes."""
    scaled = torch.empty_like(weight)
    source, target = linear.stored(weight), linear.stored(scaled)
    n_out, n_in = linear.shape
    step = max(1, _SCALED_AT_ONCE // n_in)
    for row in range(0, n_out, step):
        last = min(row + step, n_out)
        counts = votes.counts(row * n_in, last * n_in).reshape(-1, n_in).to(weight.device)
        target[row:last] = scale_kept(source[row:last], counts, votes.total)
    return scaled
