"""The words all ways of sharing use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import prod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.core.criteria import CRITERIA, Criterion
from fedprllm.core.groups import Grouping, GroupName
from fedprllm.core.masks import PruneMask, prune_by_score
from fedprllm.core.statistics import InputStatistics
from fedprllm.models.blocks import Block, Linear, PrunedWeights, put
from fedprllm.participant import BlockStatistics, Observation
from fedprllm.strategies import Strategy

__all__ = [
    "BlockDecision",
    "Contribution",
    "Sharing",
    "Totals",
    "decision_by_score",
    "grouping_of",
    "local_decision",
    "sparsity_of",
    "update_bytes",
]

_Decision = TypeVar("_Decision")
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class BlockDecision:
    """What a block loses: one participant's own decision, or the server's.

    Attributes:
        masks: the prune mask of each Linear, as [out, in].
        weights: the pruned weights, in the orientation and precision of the checkpoint; each may be made
            only when it is asked for (`PrunedWeights`).
        notes: what went another way than asked for, in words.
    """

    masks: dict[str, PruneMask]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take_effect(self, block: Block) -> None:
        """Put the pruned weights in the place of the block's own, which nobody needs any more."""
        for name in self.weights:
            put(self.weights, name, block.tensors[name])
        self.weights = {name: block.tensors[name] for name in self.weights}


@dataclass
class Contribution:
    """What one participant makes of a block.

    Attributes:
        update: the tensors it shares, and nothing else of its own leaves it.
        own: its own decision, with which it walks on unless it follows the server; None where a
            participant alone decides nothing.
    """

    update: Tensors
    own: BlockDecision | None = None


@dataclass
class Totals:
    """Sums of updates over participants, for one block.

    Attributes:
        sums: of floating tensors, by name.
        votes: of masks, by name.
        n_participants: number of updates added so far.
        weight: sum of the participants' weights: their number, or that of their tokens.
    """

    sums: Tensors = field(default_factory=dict)
    votes: dict[str, PackedVotes] = field(default_factory=dict)
    n_participants: int = 0
    weight: int = 0

    def add(self, update: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add one participant's update; masks count ``weight`` times, sums weigh what they are."""
        for name, total in self.sums.items():
            total += update[name].to(total.device)
        for name, votes in self.votes.items():
            votes.add(pack(update[name]), weight=weight)
        self.n_participants += 1
        self.weight += weight


@dataclass(frozen=True)
class Sharing(Generic[_Decision]):
    """A way of sharing.

    Attributes:
        kind: of its updates, as in `fedprllm.wire`.
        contribute: ``(block, statistics, config, fingerprint)`` to what a participant shares; the
            fingerprint of its text seeds random ties, so that order and names change nothing.
        shapes: shape and type of every tensor of a valid update, from the Linears of a block.
        check: refuses an update that has the right shapes but cannot come from an honest participant.
        zeros: empty sums.
        decide: the server's decision from the sums: what the block loses, or of a survey its outliers.
        decides_alone: a contribution holds a decision of the participant's own.
        observation: what a participant sums up of the inputs.
        by_input: updates hold one tensor for each distinct input of the block, not for each Linear.
    """

    kind: str
    contribute: Callable[[Block, BlockStatistics | None, PruneConfig, str], Contribution]
    shapes: Callable[[Mapping[str, Linear]], Shapes]
    check: Callable[[Block, Mapping[str, Tensor], PruneConfig], None]
    zeros: Callable[[Block], Totals]
    decide: Callable[[Totals, Block, PruneConfig], _Decision]
    decides_alone: bool = False
    observation: Observation = InputStatistics.zeros
    by_input: bool = False

    def walks_densely(self, strategy: Strategy) -> bool:
        """Whether participants walk on with the unpruned block.

        So does who neither decides alone nor waits for the server.
        """
        return strategy.server_votes and not (self.decides_alone or strategy.follows_server)


def update_bytes(shapes: Shapes) -> int:
    """Payload of an update: a bit for each entry of a mask, the width of its type for each number."""
    return sum(
        (prod(shape) + 7) // 8 if dtype == torch.bool else prod(shape) * dtype.itemsize
        for shape, dtype in shapes.values()
    )


def grouping_of(config: PruneConfig, group: GroupName, linear: Linear) -> Grouping:
    """A comparison group of a Linear, under its own sparsity, the configuration's, or an N:M pattern."""
    return Grouping(group, sparsity_of(config, linear), config.n_m)


def sparsity_of(config: PruneConfig, linear: Linear) -> float | Fraction:
    """What a Linear loses: its own share where the blocks do not all lose the same."""
    return config.sparsity if linear.sparsity is None else linear.sparsity


def decision_by_score(
    block: Block,
    norms: Mapping[str, Tensor] | None,
    config: PruneConfig,
    seed_parts: tuple[object, ...],
    *,
    counts_close: bool = False,
) -> BlockDecision:
    """Prune the lowest scores of every local comparison group.

    Args:
        block: the block, with its weights.
        norms: ``||X_j||_2`` of the input of each Linear; None for a criterion that uses no text.
        config: criterion, local group, ties.
        seed_parts: what random ties are drawn for, besides the weight.
        counts_close: count the prunes that rounding may decide.
    """
    criterion = CRITERIA[config.criterion]
    masks = {}
    for name, linear in block.linears.items():
        weight = linear.oriented(block.tensors[name])
        norm = torch.ones(linear.shape[1]) if norms is None else norms[name]
        masks[name] = prune_by_score(
            partial(_scores, criterion, norm.to(weight.device)),
            weight,
            grouping_of(config, config.local_group, linear),
            config.ties,
            (config.seed, *seed_parts, name),
            scores_rows=criterion.scores_rows,
            counts_close=counts_close,
        )
    return BlockDecision(masks, PrunedWeights(block, {name: pruned.mask for name, pruned in masks.items()}))


def _scores(criterion: Criterion, norm: Tensor, weight: Tensor) -> Tensor:
    return criterion.score(weight, norm)


def local_decision(
    block: Block, statistics: BlockStatistics | None, config: PruneConfig, fingerprint: str
) -> BlockDecision:
    """A participant's own prune masks and the weights it walks on with."""
    norms = None if statistics is None else {name: sums.norm for name, sums in statistics.items()}
    return decision_by_score(block, norms, config, ("local", fingerprint))
