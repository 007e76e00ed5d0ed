"""Decide by averaging: each weight becomes its mean over the participants that retained it (FedSpaLLM)."""

from __future__ import annotations

import torch

from fedprllm.core.fedspallm import fedspallm
from fedprllm.deciding.decision import BlockDecision
from fedprllm.models.block import Block, GivenWeights
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.pruned_weights import mask_name
from fedprllm.sharing.target import Target

__all__ = ["by_average"]


def by_average(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Average the retained weights and prune the most-voted ones (Bai et al., NAACL 2025).

    Participants leave the weights that they retain unchanged, so ``sum_i K_i W_i = W sum_i K_i``.
    """
    config = target.config
    masks, decided = {}, {}
    for name, linear in block.linears.items():
        votes = totals.votes[mask_name(name)].counts().reshape(linear.shape).to(torch.int32)
        weight = block.matrix(name)
        kept = totals.n_participants - votes.to(weight.device)
        weights, masks[name] = fedspallm(
            kept.to(torch.float64) * weight,  # in float32, the product would be rounded
            kept,
            totals.n_participants,
            weight,
            target.server_grouping(linear),
            config.vote_ties,
            (config.seed, "server", name),
        )
        decided[name] = linear.stored(weights).to(linear.dtype).contiguous()
    return BlockDecision(masks, GivenWeights(decided))
