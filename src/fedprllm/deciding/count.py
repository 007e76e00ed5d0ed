"""Decide how much a block is to lose: count its outlying scores, before pruning starts (OWL)."""

from __future__ import annotations

from fedprllm.core.owl import Outliers
from fedprllm.models.block import Block
from fedprllm.sharing.input_sums import pooled_norms
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.outlier_counts import block_outliers, n_weights, outlier_total
from fedprllm.sharing.target import Target

__all__ = ["count_pooled", "count_shared"]


def count_shared(totals: Totals, block: Block, target: Target) -> Outliers:  # noqa: ARG001
    """Outliers that participants counted, each by its own text, among all scores of all of them."""
    return Outliers(outlier_total(totals), totals.n_participants * n_weights(block.linears))


def count_pooled(totals: Totals, block: Block, target: Target) -> Outliers:
    """Outliers by the scores of the pooled text."""
    return block_outliers(block, pooled_norms(totals, block.linears), target.config)
