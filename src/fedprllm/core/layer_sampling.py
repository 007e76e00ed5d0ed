"""Layer sampling: which blocks each participant prunes, given its declared resources (FedSpaLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch

from fedprllm.core.ties import generator

__all__ = ["sample_blocks", "sampled_blocks"]


def sampled_blocks(fraction: float | Fraction, n_blocks: int, seed: int, participant: str) -> list[int]:
    """Draw ``max(1, floor(fraction * n_blocks))`` blocks at random for a participant.

    Args:
        fraction: Fraction of the blocks, in (0, 1]: the resources that the participant declares.
        n_blocks: Number of blocks in the model.
        seed: Seed of the run.
        participant: Anything that identifies the participant.

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
    """Assign blocks to participants so that every block has at least one.

    Each participant draws its blocks (`sampled_blocks`). The paper leaves open what happens to a block that
    was not drawn at all; here one participant takes it in exchange for the block drawn most often, so that
    no participant prunes more blocks than it declared.

    Args:
        fractions: Fraction of the blocks, in (0, 1], by participant name.
        n_blocks: Number of blocks in the model.
        seed: Seed of the run.

    Returns:
        Ascending block numbers by participant name; None if the model has more blocks than all participants
        together can prune.
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
