"""FedSpaLLM: the server averages the weights that participants retained (Bai et al., NAACL 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import PruneMask, most_voted
from fedprllm.core.ties import generator

__all__ = ["fedspallm", "sample_blocks", "sampled_blocks"]


def fedspallm(
    weight_sum: Float[Tensor, "out in"],
    keep_counts: Integer[Tensor, "out in"],
    n_participants: int,
    weight: Float[Tensor, "out in"],
    grouping: Grouping,
    ties: str,
    seed_parts: tuple[object, ...] = (),
) -> tuple[Float[Tensor, "out in"], PruneMask]:
    """Average over those who retained a weight, and prune exactly k of every comparison group.

    ``W'[o, j] = sum_i K_i W_i / sum_i K_i`` where ``K_i = 1`` if participant i retained it (l0 aggregation),
    and 0 where the mask prunes: first what all of them pruned, then the most-voted (mask expansion).

    The paper leaves two cases open. If all pruned more than k of a group, the k among them that the tie
    rule puts first are pruned. An entry that is kept although nobody retained it has no average, and
    takes the original weight.

    Args:
        weight_sum: ``sum_i K_i W_i``.
        keep_counts: ``sum_i K_i``.
        n_participants: how many contributed to this block, at least one: with layer sampling not all do.
        weight: the original weight.
        grouping: what is compared with what.
        ties: a key of `TIES`.
        seed_parts: what the tie rule ``random`` is a function of.

    Returns:
        The weights in the precision of ``weight``, exact +0.0 where pruned, and the mask.

    Source: Bai et al., FedSpaLLM (NAACL 2025), l0 aggregation and adaptive mask expansion.
    """
    assert n_participants >= 1, "nobody contributed to this block"
    votes = n_participants - keep_counts.to(torch.int32)
    pruned = most_voted(votes, weight, grouping, ties, seed_parts)
    average = (weight_sum / keep_counts.clamp(min=1)).to(weight.dtype)
    kept = torch.where(keep_counts > 0, average, weight)
    return kept.masked_fill(pruned.mask, 0.0), pruned


def sampled_blocks(fraction: float | Fraction, n_blocks: int, seed: int, participant: str) -> list[int]:
    """The blocks that a participant draws: ``max(1, floor(fraction * n_blocks))`` of them at random.

    Args:
        fraction: of the blocks, in (0, 1]: the resource that the participant declares.
        n_blocks: blocks of the model.
        seed: of the run.
        participant: whatever tells it from the others.

    Returns:
        Block numbers in ascending order.

    Source: Bai et al., FedSpaLLM (NAACL 2025), layer sampling.
    """
    n_sampled = max(1, int(n_blocks * Fraction(str(fraction))))
    drawn = torch.randperm(n_blocks, generator=generator(seed, "blocks", participant))[:n_sampled]
    return sorted(drawn.tolist())


def sample_blocks(
    fractions: Mapping[str, float | Fraction], n_blocks: int, seed: int
) -> dict[str, list[int]] | None:
    """The blocks that each participant prunes, so that every block has somebody.

    Everyone draws (`sampled_blocks`). The paper leaves open what becomes of a block that nobody drew; here
    somebody takes it in exchange for the block that most participants drew, so that nobody prunes more
    blocks than it declared.

    Args:
        fractions: by name of participant, in (0, 1].
        n_blocks: blocks of the model.
        seed: of the run.

    Returns:
        Block numbers by participant, ascending; None if there are more blocks than all can prune together.
    """
    sample = {
        name: set(sampled_blocks(fraction, n_blocks, seed, name))
        for name, fraction in sorted(fractions.items())
    }
    if sum(map(len, sample.values())) < n_blocks:
        return None
    for block in range(n_blocks):
        drawn = [sum(other in own for own in sample.values()) for other in range(n_blocks)]
        if drawn[block]:
            continue
        spare = max(range(n_blocks), key=lambda other: drawn[other])
        giver = next(own for own in sample.values() if spare in own)
        giver.remove(spare)
        giver.add(block)
    return {name: sorted(own) for name, own in sample.items()}
