"""Decide with a solver: prune, and correct the remaining weights so that the outputs change least."""

from __future__ import annotations

from fedprllm.core.solvers.sparsegpt import sparsegpt
from fedprllm.deciding.decision import BlockDecision
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, GivenWeights
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_sparsegpt"]


def by_sparsegpt(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """SparseGPT on the summed Gram matrices (Frantar & Alistarh 2023)."""
    config = target.config
    masks, weights, notes = {}, {}, []
    for name, linear in block.linears.items():
        try:
            result = sparsegpt(
                block.matrix(name),
                totals.sums[linear.source],
                target.sparsity(linear),
                config.n_m,
                ties=config.ties,
                seed_parts=(config.seed, "server", name),
            )
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from None
        if result.damping > 0.01:
            notes.append(f"{name}: damping raised to {result.damping:g} times the mean diagonal")
        if result.n_dead:
            notes.append(f"{name}: {result.n_dead} input channels were zero on every token")
        masks[name] = result.pruned
        weights[name] = linear.stored(result.weight).to(linear.dtype).contiguous()
    return BlockDecision(masks, GivenWeights(weights), notes)
