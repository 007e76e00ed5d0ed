"""Decide how much to prune from a block: count its outlying scores before pruning starts (OWL)."""

from __future__ import annotations

from fedprllm.core.owl import Outliers
from fedprllm.models.block import Block
from fedprllm.sharing.input_sums import pooled_norms
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.outlier_counts import block_outliers, n_weights, outlier_total
from fedprllm.sharing.target import Target

__all__ = ["count_pooled", "count_shared"]


def count_shared(totals: Totals, block: Block, target: Target) -> Outliers:  # noqa: ARG001
    """Outliers that each participant counted on its own text, out of all scores of all participants."""
    return Outliers(outlier_total(totals), totals.n_participants * n_weights(block.linears))


def count_pooled(totals: Totals, block: Block, target: Target) -> Outliers:
    """Outliers among the scores of the pooled text."""
    return block_outliers(block, pooled_norms(totals, block.linears), target.config)
