"""What participants share of a block, and what the server makes of the sum.

A way of sharing is a handful of functions and a line in `SHARING`. Updates are additive: the server
needs nothing but their sum over participants, so a secure sum can take the place of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.groups import GroupName, Grouping
from fedprllm.core.masks import PruneMask, most_voted, prune_lowest, scale_kept, vote_dtype
from fedprllm.errors import UpdateError
from fedprllm.models.blocks import Block
from fedprllm.participant import BlockStatistics

__all__ = ["SHARING", "BlockDecision", "Contribution", "Sharing", "Totals", "local_decision"]

Tensors = dict[str, Tensor]


@dataclass
class BlockDecision:
    """What a block loses: one participant's own decision, or the server's.

    Attributes:
        masks: the prune mask of each Linear, as [out, in].
        weights: the pruned weights, in the orientation and precision of the checkpoint.
    """

    masks: dict[str, PruneMask]
    weights: Tensors = field(default_factory=dict)


@dataclass
class Contribution:
    """What one participant makes of a block.

    Attributes:
        update: the tensors it shares, and nothing else of its own leaves it.
        own: its own decision, with which it walks on unless it follows the server.
    """

    update: Tensors
    own: BlockDecision


@dataclass
class Totals:
    """Sums of updates over participants, for one block.

    Attributes:
        sums: by tensor name.
        n_participants: number of updates added so far.
    """

    sums: Tensors
    n_participants: int = 0

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add one participant's update."""
        for name, total in self.sums.items():
            total += update[name].to(total.device)
        self.n_participants += 1


@dataclass(frozen=True)
class Sharing:
    """A way of sharing.

    Attributes:
        contribute: ``(block, statistics, config, fingerprint)`` to what a participant shares; the
            fingerprint of its text seeds random ties, so that order and names change nothing.
        shapes: shape and type of every tensor of a valid update.
        check: refuses an update that has the right shapes but cannot come from an honest participant.
        zeros: empty sums for at most so many participants.
        decide: the server's decision from the sums.
    """

    contribute: Callable[[Block, BlockStatistics | None, PruneConfig, str], Contribution]
    shapes: Callable[[Block], dict[str, tuple[tuple[int, ...], torch.dtype]]]
    check: Callable[[Block, Mapping[str, Tensor], PruneConfig], None]
    zeros: Callable[[Block, int], Totals]
    decide: Callable[[Totals, Block, PruneConfig], BlockDecision]


def _grouping(config: PruneConfig, group: GroupName) -> Grouping:
    return Grouping(group, config.sparsity, config.n_m)


def _without(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with exact +0.0 where the mask is True."""
    return torch.where(mask, weight.new_zeros(()), weight)


def local_decision(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, fingerprint: str
) -> BlockDecision:
    """A participant's own prune masks and the weights it walks on with.

    Args:
        block: the block, with its weights.
        statistics: of its inputs on the participant's text; None for a criterion that uses no text.
        config: criterion, local group, ties.
        fingerprint: of the participant's text: what random ties are drawn for.
    """
    score = CRITERIA[config.criterion].score
    grouping = _grouping(config, config.local_group)
    decision = BlockDecision({})
    for name, linear in block.linears.items():
        weight = block.matrix(name)
        norm = torch.ones(linear.shape[1]) if statistics is None else statistics[name].norm
        scores = score(weight, norm.to(weight.device))
        seed_parts = (config.seed, "local", fingerprint, name)
        pruned = prune_lowest(scores, weight, grouping, config.ties, seed_parts)
        decision.masks[name] = pruned
        decision.weights[name] = _without(block.tensors[name], linear.oriented(pruned.mask))
    return decision


# Prune masks: the paper's way --------------------------------------------------------------------


def _share_mask(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, fingerprint: str
) -> Contribution:
    own = local_decision(block, statistics, config, fingerprint)
    return Contribution({name: pruned.mask for name, pruned in own.masks.items()}, own)


def _mask_shapes(block: Block) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (linear.shape, torch.bool) for name, linear in block.linears.items()}


def _check_mask(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:
    """A ballot prunes exactly k weights of every local comparison group."""
    grouping = _grouping(config, config.local_group)
    for name, linear in block.linears.items():
        counts = grouping.split(update[name]).sum(dim=1)
        k = grouping.n_pruned(linear.shape)
        wrong = (counts != k).nonzero()
        if wrong.numel():
            first = int(wrong[0])
            raise UpdateError(
                f"the mask of '{name}' prunes {int(counts[first])} weights in comparison group {first} "
                f"({config.local_group}): expected exactly {k} at sparsity {config.sparsity:g}"
            )


def _no_votes(block: Block, max_participants: int) -> Totals:
    """Zero votes, in the smallest integer type that cannot overflow."""
    dtype = vote_dtype(max_participants)
    return Totals(
        {
            name: torch.zeros(linear.shape, dtype=dtype, device=block.tensors[name].device)
            for name, linear in block.linears.items()
        }
    )


def _most_voted(votes: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    """Prune the most-voted weights of every server comparison group, and scale if asked to."""
    grouping = _grouping(config, config.server_group)
    decision = BlockDecision({})
    for name, linear in block.linears.items():
        counts, weight = votes.sums[name], block.tensors[name]
        seed_parts = (config.seed, "server", name)
        pruned = most_voted(counts, block.matrix(name), grouping, config.ties, seed_parts)
        if config.scale_weights:
            weight = scale_kept(weight, linear.oriented(counts), votes.n_participants)
        decision.masks[name] = pruned
        decision.weights[name] = _without(weight, linear.oriented(pruned.mask))
    return decision


SHARING: dict[str, Sharing] = {
    "mask": Sharing(_share_mask, _mask_shapes, _check_mask, _no_votes, _most_voted),
}
