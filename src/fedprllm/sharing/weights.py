"""Share pruned weights, FedSpaLLM's way: the server averages over those who retained a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.weights import fedspallm
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
)
from fedprllm.sharing.masks import check_mask, zero_votes

__all__ = ["WEIGHTS"]

_MASK = ".mask"


def _contribute(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, fingerprint: str
) -> Contribution:
    own = local_decision(block, statistics, config, fingerprint)
    update: dict[str, Tensor] = {}
    for name, linear in block.linears.items():
        update[name] = linear.oriented(own.weights[name]).contiguous()
        update[name + _MASK] = own.masks[name].mask
    return Contribution(update, own)


def _shapes(linears: Mapping[str, Linear]) -> Shapes:
    weights: Shapes = {name: (linear.shape, linear.dtype) for name, linear in linears.items()}
    return weights | {name + _MASK: (linear.shape, torch.bool) for name, linear in linears.items()}


def _check(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:
    for name, linear in block.linears.items():
        mask = update[name + _MASK]
        check_mask(linear, mask, config)
        if (update[name][mask] != 0).any():
            raise UpdateError(f"the weights of '{name}' are not zero where their mask prunes")


def _zeros(block: Block) -> Totals:
    sums = {
        name: torch.zeros(linear.shape, dtype=torch.float32, device=block.tensors[name].device)
        for name, linear in block.linears.items()
    }
    return Totals(sums, {name + _MASK: votes for name, votes in zero_votes(block).items()})


def _decide(totals: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    masks, decided = {}, {}
    for name, linear in block.linears.items():
        votes = totals.votes[name + _MASK].counts().reshape(linear.shape).to(torch.int32)
        weights, masks[name] = fedspallm(
            totals.sums[name],
            totals.n_participants - votes.to(totals.sums[name].device),
            totals.n_participants,
            block.matrix(name),
            grouping_of(config, config.server_group, linear),
            config.vote_ties,
            (config.seed, "server", name),
        )
        decided[name] = linear.oriented(weights).to(block.tensors[name].dtype).contiguous()
    return BlockDecision(masks, decided)


WEIGHTS = Sharing("weights", _contribute, _shapes, _check, _zeros, _decide, decides_alone=True)
