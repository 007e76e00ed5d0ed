"""Decide which channels every MLP loses, and refit the weights that read the others."""

from __future__ import annotations

from fedprllm.core.groups import Grouping
from fedprllm.core.solvers.channels import kept_channels, remove_channels
from fedprllm.core.solvers.scaled import Problem, damping_for
from fedprllm.deciding.decision import BlockDecision
from fedprllm.deciding.solve import few_tokens
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, NarrowedWeights
from fedprllm.sharing.channel_inputs import channel_readers
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_channels"]


def by_channels(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Remove channels by optimal brain surgeon on the summed Gram matrices."""
    config = target.config
    removed, narrow, notes = {}, {}, []
    for name, linear in channel_readers(block.linears).items():
        gram, width = totals.sums[linear.source], linear.shape[1]
        seed_parts = (config.seed, "server", name)
        damping = damping_for(totals.n_tokens, width)
        try:
            problem = Problem.of(
                block.matrix(name), gram, Grouping("layer", 0.0), damping, config.ties, seed_parts
            )
            found = remove_channels(problem, width - kept_channels(width, config.structures["mlp"]))
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from None
        removed[name] = found.removed
        narrow[name] = linear.stored(found.weight).to(linear.dtype).contiguous()
        notes += few_tokens(name, totals.n_tokens, width)
        if found.n_dead:
            notes.append(f"{name}: {found.n_dead} input channels were zero on every token")
    return BlockDecision({}, NarrowedWeights(block.linears, removed, narrow), notes)
