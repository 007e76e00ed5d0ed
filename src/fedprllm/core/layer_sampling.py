"""Layer sampling: which blocks each participant prunes, by the resources it declares (FedSpaLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch

from fedprllm.core.ties import generator

__all__ = ["sample_blocks", "sampled_blocks"]


def sampled_blocks(fraction: float | Fraction, n_blocks: int, seed: int, participant: str) -> list[int]:
    """The blocks that a participant draws: ``max(1, floor(fraction * n_blocks))`` of them at random.

    Args:
        fraction: Share of the blocks in (0, 1]: the resource that the participant declares.
        n_blocks: Blocks of the model.
        seed: Seed of the run.
        participant: Whatever tells it from the others.

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
    """The blocks that each participant prunes, so that every block is pruned by at least one.

    Every participant draws (`sampled_blocks`). The paper leaves open what happens to a block that none
    drew. Here a participant takes it in exchange for the block that most participants drew, so that none
    prunes more blocks than it declared.

    Args:
        fractions: Share of the blocks in (0, 1], by name of participant.
        n_blocks: Blocks of the model.
        seed: Seed of the run.

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
