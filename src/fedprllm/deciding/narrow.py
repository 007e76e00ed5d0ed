"""Decide which channels and heads every block loses, and refit the weights that read the others."""

from __future__ import annotations

from fractions import Fraction

from fedprllm.core.groups import Grouping
from fedprllm.core.solvers.channels import FewerChannels, kept_channels, remove_channels, remove_units
from fedprllm.core.solvers.scaled import Problem, damping_for
from fedprllm.deciding.decision import BlockDecision
from fedprllm.deciding.parts import n_removed
from fedprllm.deciding.solve import few_tokens
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, Channels, NarrowedWeights
from fedprllm.sharing.channel_inputs import channel_readers
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_channels", "kept_units"]


def by_channels(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """Remove channels and heads by optimal brain surgeon on the summed Gram matrices."""
    config = target.config
    removed, narrow, notes = {}, {}, []
    for name, linear in channel_readers(block.linears, tuple(config.structures)).items():
        gram, width = totals.sums[linear.source], linear.shape[1]
        damping = damping_for(totals.n_tokens, width)
        assert linear.channels is not None
        try:
            problem = Problem.of(block.matrix(name), gram, Grouping("layer", 0.0), damping, config.ties, ())
            found = _removed(problem, linear.channels, config.structures[linear.channels.part])
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from None
        removed[name] = found.removed
        narrow[name] = linear.stored(found.weight).to(linear.dtype).contiguous()
        notes += few_tokens(name, totals.n_tokens, width)
        if found.n_dead:
            notes.append(f"{name}: {found.n_dead} input channels were zero on every token")
    return BlockDecision({}, NarrowedWeights(block.linears, removed, narrow), notes)


def _removed(problem: Problem, channels: Channels, amount: Fraction) -> FewerChannels:
    n_gone = channels.n_units - kept_units(channels, amount)
    if channels.n_units == len(channels.units):
        return remove_channels(problem, n_gone)
    return remove_units(problem, channels.units, channels.groups, n_gone)


def kept_units(channels: Channels, amount: Fraction) -> int:
    """Number of units (channels of an MLP, heads) that stay.

    Args:
        channels: The channels.
        amount: What is removed: below 1 a fraction, rounded (`kept_channels`; for heads to a whole number for
            each group), otherwise a number.
    """
    if amount < 1 and channels.n_units == len(channels.units):
        return kept_channels(channels.n_units, amount)
    return channels.n_units - n_removed(channels.n_units, amount, channels.n_groups)
