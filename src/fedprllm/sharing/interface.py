"""The interface of a way of sharing, and the sums that updates add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.core.sums import ChangeStatistics, ExpertStatistics, InputStatistics
from fedprllm.errors import UpdateError
from fedprllm.models.block import Block, Linear
from fedprllm.models.norms import InputNorm
from fedprllm.models.observe import BlockStatistics, Observation
from fedprllm.sharing.target import Target

__all__ = [
    "BITS",
    "COUNTS",
    "SINGLE",
    "Ballot",
    "Comparison",
    "ExactSums",
    "Linears",
    "Norms",
    "Seen",
    "Shapes",
    "Sharing",
    "Tensors",
    "Totals",
    "Wire",
    "all_linears",
    "compared_sums",
    "update_bytes",
]

Tensors = dict[str, Tensor]
Linears = Mapping[str, Linear]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Norms = Mapping[str, InputNorm]


@dataclass(frozen=True)
class Seen:
    """What a participant knows about a block before it shares anything; none of this is sent as it is.

    Attributes:
        block: The block, unpruned.
        statistics: Sums over the inputs of its Linears; None if the criterion uses no text.
        masks: The participant's own prune masks, [out, in] by weight name; empty if the update does not
            depend on them.
        change: How far the block turns hidden states; None if the update does not depend on it.
        experts: What the block's experts add to their tokens; None if the update does not depend on it.
    """

    block: Block
    statistics: BlockStatistics | None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    change: ChangeStatistics | None = None
    experts: ExpertStatistics | None = None


@dataclass(frozen=True)
class Ballot:
    """One participant's update of a block, as received: its values are not trusted.

    Attributes:
        linears: The Linears of the block.
        update: Tensors of the update, in the declared shapes and types.
        model: Reads the model's original tensor of a weight by name, in the orientation of the checkpoint.
    """

    linears: Linears
    update: Mapping[str, Tensor]
    model: Callable[[str], Tensor]


class ExactSums(Mapping[str, Tensor]):
    """Sums of fixed-point numbers by name: added up as integers, read as floating-point tensors.

    Args:
        parts: The running sums.
        read: Turns the sum of a name into the tensor that decisions read; by default it is read as it is.
    """

    def __init__(
        self, parts: Mapping[str, FixedPointSum], read: Callable[[Tensor], Tensor] = lambda total: total
    ) -> None:
        self.parts, self._read = parts, read

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add one participant's numbers.

        Raises:
            UpdateError: A sum exceeds what can be held; the message names the tensor.
        """
        for name, total in self.parts.items():
            try:
                total.add(update[name])
            except UpdateError as error:
                raise UpdateError(f"'{name}': {error}") from None

    def holding(self, parts: Mapping[str, FixedPointSum]) -> ExactSums:
        """Other sums that are read alike."""
        return ExactSums(parts, self._read)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self.parts[name].value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass
class Totals:
    """Sums of updates over participants, for one block.

    Attributes:
        sums: Sums of numbers, by name.
        votes: Vote counts from masks, by name.
        n_participants: Number of updates added so far.
        n_tokens: Number of calibration tokens behind those updates.
        weight: Sum of the participants' voting weights.
        apart: Each update with its number of tokens, for a decision that needs more than sums; None if sums
            are enough.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    votes: dict[str, PackedVotes] = field(default_factory=dict)
    n_participants: int = 0
    n_tokens: int = 0
    weight: int = 0
    apart: list[tuple[Mapping[str, Tensor], int]] | None = None

    def add(self, update: Mapping[str, Tensor], n_tokens: int, weight: int = 1) -> None:
        """Add one participant's update.

        Args:
            update: Tensors of the update; those that are neither summed nor voted on are ignored.
            n_tokens: Number of calibration tokens the update was computed from.
            weight: Number of votes that each of its masks counts for; sums are added unweighted.
        """
        if isinstance(self.sums, ExactSums):
            self.sums.add(update)
        for name, votes in self.votes.items():
            votes.add(pack(update[name]), weight=weight)
        if self.apart is not None:
            self.apart.append((update, n_tokens))
        self.n_participants += 1
        self.n_tokens += n_tokens
        self.weight += weight


class Wire(NamedTuple):
    """How the tensors of a kind of update are written in a message (docs/wire-format.md).

    Attributes:
        code: Number of the kind; never reused for another kind.
        dtypes: Types that a tensor may have.
        mask_dtypes: Types that a tensor whose name ends in ``.mask`` may have.
        not_negative: Name of the values if none of them may be negative; otherwise empty.
        grid: The numbers that sums may hold; None if any finite number is allowed.
    """

    code: int
    dtypes: tuple[torch.dtype, ...]
    mask_dtypes: tuple[torch.dtype, ...]
    not_negative: str = ""
    grid: Grid | None = None


class Comparison(NamedTuple):
    """How the updates of a block are compared with each other before they are added up.

    Attributes:
        figures: Returns what is compared of an update, small and per token, given its number of tokens.
        outstanding: Returns why an update is refused, by participant, given the figures of all participants
            and the known normalizations of the block's inputs.
    """

    figures: Callable[[Mapping[str, Tensor], Linears, int], Tensors]
    outstanding: Callable[[Mapping[str, Tensors], Norms], dict[str, str]]


def all_linears(linears: Linears) -> Linears:
    """The Linears themselves."""
    return linears


BITS = (torch.bool,)
SINGLE = (torch.float32,)
COUNTS = (torch.int64,)


@dataclass(frozen=True)
class Sharing:
    """A way of sharing: what a participant sends for each block, and how updates add up.

    Updates are additive: the server needs only their sum over participants.

    Attributes:
        kind: Name of the kind of update in plans, settings, messages and ledgers.
        noun: Short noun phrase for what is shared, used inside sentences.
        content: One sentence on what an update contains, for the report and the participant's terminal.
        wire: How an update is written in a message.
        shapes: Returns the shape and type of every tensor of a valid update, given the Linears of a block.
        contribute: Makes a participant's update from what it has seen.
        check: Refuses an update that has the right shapes but cannot come from an honest participant.
        zeros: Returns empty sums on a device.
        comparison: How updates are compared with each other; None if `check` alone bounds what one can do.
        shares_decision: Whether an update follows from the participant's own prune masks.
        observation: Makes empty statistics of the inputs, which the participant then sums up.
        observes: Returns the Linears whose inputs are summed up.
        watches_change: Whether an update depends on how far the block turns hidden states.
        watches_experts: Whether an update depends on what the block's experts add to their tokens.
        squares: Returns the sum of squares of each channel, [in] by the name of the first Linear that reads
            the input, if the totals contain it.
    """

    kind: str
    noun: str
    content: str
    wire: Wire
    shapes: Callable[[Linears], Shapes]
    contribute: Callable[[Seen, Target], Mapping[str, Tensor]]
    check: Callable[[Ballot, Target], None]
    zeros: Callable[[Linears, torch.device], Totals]
    comparison: Comparison | None = None
    shares_decision: bool = False
    observation: Observation = InputStatistics.zeros
    observes: Callable[[Linears], Linears] = all_linears
    watches_change: bool = False
    watches_experts: bool = False
    squares: Callable[[Totals, Linears], Tensors] | None = None


def compared_sums(sums: Tensors, linears: Linears) -> Tensors:
    """Add up what is not compared between participants by itself: the sums of a block's experts.

    A router may send one participant's text to an expert that another's never reaches, so the sums of a
    single expert are no measure. Those of all experts are one, because each token reaches equally many.

    Args:
        sums: Sums over each distinct input, by the name of the first Linear that reads it.
        linears: The Linears of the block.

    Returns:
        The sums to compare, by name; with ``*`` in place of the expert for those of all experts.
    """
    found: Tensors = {}
    for name, values in sums.items():
        together = linears[name].family or name
        found[together] = found[together] + values if together in found else values
    return found


def update_bytes(shapes: Shapes) -> int:
    """Payload of an update in bytes: one bit per mask entry, and the size of its type per number."""
    return sum(
        (prod(shape) + 7) // 8 if dtype == torch.bool else prod(shape) * dtype.itemsize
        for shape, dtype in shapes.values()
    )
