"""Decide which experts of a block are removed: those that add least to the tokens that reach them."""

from __future__ import annotations

from fedprllm.deciding.decision import BlockDecision
from fedprllm.deciding.parts import lowest, n_removed
from fedprllm.models.block import UNCHANGED, Block
from fedprllm.sharing.expert_outputs import expert_scores
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_experts"]


def by_experts(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Choose the experts; the block stays as it is until the end of the run."""
    scores = expert_scores(totals, block.linears)
    if not scores:
        return BlockDecision({}, UNCHANGED, expert_scores=[])
    n_groups = block.experts[0].n_groups
    n = n_removed(len(scores), target.config.structures["experts"], n_groups)
    unreached = sum(score == 0 for score in scores)
    notes = [f"no text reached {unreached} of {len(scores)} experts of the block"] if unreached else []
    return BlockDecision(
        {}, UNCHANGED, notes, expert_scores=scores, removed_experts=lowest(scores, n, n_groups)
    )
