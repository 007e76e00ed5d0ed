"""Decide which blocks are dropped: those that turn the hidden states least."""

from __future__ import annotations

from fedprllm.deciding.decision import BlockDecision
from fedprllm.models.block import UNCHANGED, Block
from fedprllm.sharing.block_influence import influence_of
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_influence"]


def by_influence(totals: Totals, block: Block, target: Target) -> BlockDecision:  # noqa: ARG001
    """Leave the block as it is: which ones are dropped is known once all have been seen."""
    return BlockDecision({}, UNCHANGED, influence=influence_of(totals))
