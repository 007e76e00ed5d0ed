"""Decide by score: prune the lowest scores of every local comparison group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedprllm.core.criteria import CRITERIA, Criterion
from fedprllm.core.masks import prune_by_score
from fedprllm.deciding.decision import UNREACHED, BlockDecision
from fedprllm.models.block import Block, Linear
from fedprllm.models.observe import BlockStatistics
from fedprllm.sharing.input_sums import pooled_norms
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_pooled_score", "own_decision"]


def own_decision(
    block: Block, statistics: BlockStatistics | None, target: Target, fingerprint: str
) -> BlockDecision:
    """A participant's own prune masks and pruned weights (FedPrLLM, section 3: local pruning).

    Args:
        block: The block, unpruned.
        statistics: Sums over the participant's inputs; None for a criterion that uses no text.
        target: What the run prunes.
        fingerprint: Fingerprint of the participant's text. It seeds random ties, so that the names and the
            order of participants have no effect.
    """
    norms = None if statistics is None else {name: sums.norm for name, sums in statistics.items()}
    return _by_score(block, norms, target, ("local", fingerprint))


def by_pooled_score(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Score as if all text were in one place, and compare scores within the local group."""
    norms = pooled_norms(totals, block.linears)
    return _by_score(block, norms, target, ("server",), counts_close=True)


def _by_score(
    block: Block,
    norms: Mapping[str, Tensor] | None,
    target: Target,
    seed_parts: tuple[object, ...],
    *,
    counts_close: bool = False,
) -> BlockDecision:
    """Prune the lowest scores.

    Args:
        block: The block, unpruned.
        norms: ``||X_j||_2`` of the input of each Linear; None for a criterion that uses no text.
        target: Criterion, groups, sparsity and tie rule.
        seed_parts: Seed of random ties, in addition to the run's seed and the weight's name.
        counts_close: Whether to count the pruned weights that rounding may have decided.
    """
    config = target.config
    criterion = CRITERIA[config.criterion]
    masks, notes = {}, []
    for name, linear in block.linears.items():
        weight = linear.view(block.tensors)
        norm = torch.ones(linear.shape[1]) if norms is None else norms[name]
        if _is_unreached(linear, norm):
            # Zeros would make all scores equal, and the order of the weights would decide.
            norm = torch.ones_like(norm)
            notes.append(f"{name}: {UNREACHED}")
        pruned = prune_by_score(
            partial(_scores, criterion, norm.to(weight.device)),
            weight,
            target.local_grouping(linear),
            config.ties,
            (config.seed, *seed_parts, name),
            scores_rows=criterion.scores_rows,
            counts_close=counts_close,
        )
        masks[name] = BlockDecision.kept(linear, pruned)
    decision = BlockDecision.of_masks(block, masks)
    decision.notes += notes
    return decision


def _is_unreached(linear: Linear, norm: Tensor) -> bool:
    """Whether a Linear belongs to an expert to which a router sent no token."""
    return bool(linear.family) and not norm.any()


def _scores(criterion: Criterion, norm: Tensor, weight: Tensor) -> Tensor:
    return criterion.score(weight, norm)
