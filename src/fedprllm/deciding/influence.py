"""Decide which blocks are dropped: those that turn the hidden states least."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from fedprllm.deciding.decision import BlockDecision
from fedprllm.models.block import UNCHANGED, Block
from fedprllm.sharing.block_influence import influence_of
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_influence", "least_influential", "n_dropped"]


def by_influence(totals: Totals, block: Block, target: Target) -> BlockDecision:  # noqa: ARG001
    """Leave the block as it is: which ones are dropped is known once all have been seen."""
    return BlockDecision({}, UNCHANGED, influence=influence_of(totals))


def n_dropped(n_blocks: int, amount: Fraction) -> int:
    """Number of blocks to drop, given a number or, below 1, a fraction of them."""
    return int(amount) if amount >= 1 else round(amount * n_blocks)


def least_influential(influences: Sequence[float], n: int) -> list[int]:
    """Indices, in order, of the ``n`` blocks with the least influence; of equal ones the first."""
    return sorted(sorted(range(len(influences)), key=lambda index: (influences[index], index))[:n])
