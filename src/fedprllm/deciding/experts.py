"""Decide which experts of a block are removed: those that add least to the tokens that reach them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from fedprllm.deciding.decision import BlockDecision
from fedprllm.models.block import UNCHANGED, Block
from fedprllm.sharing.expert_outputs import expert_scores
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_experts", "least_active", "n_removed"]


def by_experts(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Choose the experts; the block stays as it is until the end of the run."""
    scores = expert_scores(totals, block.linears)
    if not scores:
        return BlockDecision({}, UNCHANGED, expert_scores=[])
    n_groups = block.experts[0].n_groups
    n = n_removed(len(scores), n_groups, target.config.structures["experts"])
    unreached = sum(score == 0 for score in scores)
    notes = [f"no text reached {unreached} of {len(scores)} experts of the block"] if unreached else []
    return BlockDecision(
        {}, UNCHANGED, notes, expert_scores=scores, removed_experts=least_active(scores, n_groups, n)
    )


def n_removed(n_experts: int, n_groups: int, amount: Fraction) -> int:
    """Number of experts to remove from each block.

    Args:
        n_experts: Number of experts of a block.
        n_groups: Number of groups of experts, each of which loses equally many.
        amount: What is removed: below 1 a fraction, rounded for each group, otherwise a number.
    """
    return int(amount) if amount >= 1 else round(amount * n_experts / n_groups) * n_groups


def least_active(scores: Sequence[float], n_groups: int, n: int) -> list[int]:
    """Numbers, in order, of the ``n`` experts with the lowest scores; of equal ones the first.

    Where a router chooses among groups of consecutive experts first, each group loses equally many, so that
    every other expert stays in its group.
    """
    size = len(scores) // n_groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    lowest = [sorted(group, key=lambda number: (scores[number], number)) for group in groups]
    return sorted(number for group in lowest for number in group[: n // n_groups])
