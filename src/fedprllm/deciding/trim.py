"""Decide by score from trimmed means, so that a quarter of the participants cannot dominate a channel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedprllm.core.owl import Outliers
from fedprllm.deciding.count import count_pooled
from fedprllm.deciding.decision import BlockDecision
from fedprllm.deciding.score import by_pooled_score
from fedprllm.models.block import Block
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_trimmed_score", "count_trimmed", "trimmed_mean"]


def trimmed_mean(values: Tensor) -> Tensor:
    """Mean of each column without its highest and lowest quarter, rounded up; for three rows, the median.

    Args:
        values: One row per participant, [participants, n]. With one or two rows, nothing is left out.

    Returns:
        The means, [n].

    Source: Yin et al., Byzantine-robust distributed learning (ICML 2018), coordinate-wise trimmed mean.
    """
    n = len(values)
    n_cut = min(-(-n // 4), (n - 1) // 2)
    return values.sort(dim=0).values[n_cut : n - n_cut].mean(dim=0)


def _trimmed(totals: Totals) -> Totals:
    """Replace the sums with the trimmed means per token, times the total number of tokens.

    All participants have equal weight, because their numbers of tokens are their own claims.
    """
    assert totals.apart is not None, "this decision's row in DECISIONS must request separate updates"
    sums = {
        name: totals.n_tokens
        * trimmed_mean(torch.stack([update[name].to(total) / n_tokens for update, n_tokens in totals.apart]))
        for name, total in totals.sums.items()
    }
    return replace(totals, sums=sums)


def by_trimmed_score(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Decide as `by_pooled_score` does, but from trimmed means."""
    return by_pooled_score(_trimmed(totals), block, target)


def count_trimmed(totals: Totals, block: Block, target: Target) -> Outliers:
    """Count as `count_pooled` does, but from trimmed means."""
    return count_pooled(_trimmed(totals), block, target)
