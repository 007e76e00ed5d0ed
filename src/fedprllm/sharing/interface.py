"""What every way of sharing provides, and the sums that its updates add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.core.sums import InputStatistics
from fedprllm.models.block import Block, Linear
from fedprllm.models.observe import BlockStatistics, Observation
from fedprllm.sharing.target import Target

__all__ = [
    "BITS",
    "SUMS",
    "Ballot",
    "Linears",
    "Seen",
    "Shapes",
    "Sharing",
    "Tensors",
    "Totals",
    "Wire",
    "update_bytes",
]

Tensors = dict[str, Tensor]
Linears = Mapping[str, Linear]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Seen:
    """What a participant has of a block before it shares anything: nothing of this leaves it.

    Attributes:
        block: The block, unpruned.
        statistics: Sums over the inputs of its Linears; None where the criterion uses no text.
        masks: The participant's own prune masks, [out, in] by weight name; empty where what is shared does
            not depend on them.
    """

    block: Block
    statistics: BlockStatistics | None
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ballot:
    """One participant's update of a block, as it arrived: nothing in it is trusted.

    Attributes:
        linears: The Linears of the block.
        update: Its tensors, of the declared shapes and types.
        model: The model's own tensor of a weight, in the orientation of the checkpoint, read when asked for.
    """

    linears: Linears
    update: Mapping[str, Tensor]
    model: Callable[[str], Tensor]


@dataclass
class Totals:
    """Sums of updates over participants, for one block.

    Attributes:
        sums: Of floating-point tensors, by name.
        votes: Of masks, by name.
        n_participants: Number of updates added so far.
        n_tokens: Number of calibration tokens behind them.
        weight: Sum of what each participant's votes count.
    """

    sums: Tensors = field(default_factory=dict)
    votes: dict[str, PackedVotes] = field(default_factory=dict)
    n_participants: int = 0
    n_tokens: int = 0
    weight: int = 0

    def add(self, update: Mapping[str, Tensor], n_tokens: int, weight: int = 1) -> None:
        """Add one participant's update.

        Args:
            update: Its tensors; what is neither summed nor voted on is passed over.
            n_tokens: Number of calibration tokens it was computed from.
            weight: How many times each of its masks counts; sums weigh what they are.
        """
        for name, total in self.sums.items():
            total += update[name].to(total.device)
        for name, votes in self.votes.items():
            votes.add(pack(update[name]), weight=weight)
        self.n_participants += 1
        self.n_tokens += n_tokens
        self.weight += weight


class Wire(NamedTuple):
    """How the tensors of a kind of update are written in a message (docs/wire-format.md).

    Attributes:
        code: Number of the kind, never used again for another one.
        dtypes: Types that a tensor may have.
        mask_dtypes: Types that a tensor may have whose name ends in ``.mask``.
        not_negative: What the values are, if none of them may be negative.
    """

    code: int
    dtypes: tuple[torch.dtype, ...]
    mask_dtypes: tuple[torch.dtype, ...]
    not_negative: str = ""


BITS = (torch.bool,)
SUMS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sharing:
    """A way of sharing: what leaves a participant of every block, and how it adds up.

    Updates are additive: the server needs nothing but their sum over participants.

    Attributes:
        kind: The word for it in plans, settings, messages and ledgers.
        noun: What is shared, in two or three words, for a sentence.
        content: What an update holds, in one sentence, for the report and the participant's terminal.
        wire: How it is written in a message.
        shapes: Shape and type of every tensor of a valid update, from the Linears of a block.
        contribute: The update of a participant, from what it has seen.
        check: Refuses an update that has the right shapes but cannot come from an honest participant.
        zeros: Empty sums, on a device.
        shares_decision: An update follows from the participant's own prune masks.
        observation: What a participant sums up of the inputs.
    """

    kind: str
    noun: str
    content: str
    wire: Wire
    shapes: Callable[[Linears], Shapes]
    contribute: Callable[[Seen, Target], Tensors]
    check: Callable[[Ballot, Target], None]
    zeros: Callable[[Linears, torch.device], Totals]
    shares_decision: bool = False
    observation: Observation = InputStatistics.zeros


def update_bytes(shapes: Shapes) -> int:
    """Payload of an update in bytes: a bit for each mask entry, for each number the width of its type."""
    return sum(
        (prod(shape) + 7) // 8 if dtype == torch.bool else prod(shape) * dtype.itemsize
        for shape, dtype in shapes.values()
    )
