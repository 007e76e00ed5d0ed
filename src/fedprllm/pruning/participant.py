"""One participant of a run: it observes each block on its own text and computes the next block's input.

The same class represents one of several participants in a process, the single participant that holds all text
(``centralized``), and a site of a federation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Int
from torch import Tensor

from fedprllm.core.sums import ChangeStatistics, ExpertStatistics, InputStatistics
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, Weights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.experts import observing_experts
from fedprllm.models.observe import BlockStatistics, Observation, observing, tokens_of_experts
from fedprllm.pruning.hidden_states import HiddenStates
from fedprllm.pruning.records import ExpertsRecord, ParticipantRecord
from fedprllm.text.windows import fingerprint

__all__ = ["Participant"]


class Participant:
    """A participant's calibration windows and the hidden states of its walk.

    Attributes:
        name: Name used in messages and files.
        windows: Token ids, int64 [n_windows, window_length].
        fingerprint: SHA-256 of the windows.
        sources: Where the text came from, for the record.
        notes: Sentences about its text that its owner should read.
        reached: How far its text reached the experts of each block that it has observed; without experts,
            empty.
        hidden: The next block's input, one tensor [1, window_length, hidden_size] per window. All of them are
            in memory unless replaced by `HiddenStates` with a memory limit.
    """

    def __init__(
        self,
        name: str,
        windows: Int[Tensor, "n_windows window_length"],
        sources: Sequence[str] = ("token windows",),
    ) -> None:
        self.name = name
        self.windows = windows
        self.fingerprint = fingerprint(windows)
        self.sources = list(sources)
        self.notes: list[str] = []
        self.reached: dict[int, ExpertsRecord] = {}
        self.hidden = HiddenStates()

    @property
    def n_tokens(self) -> int:
        """Number of calibration tokens."""
        return self.windows.numel()

    def describe(self) -> ParticipantRecord:
        """This participant's entry in the run's record; it holds neither text nor token ids."""
        return ParticipantRecord(
            sources=self.sources,
            n_windows=self.windows.shape[0],
            window_length=self.windows.shape[1],
            fingerprint=self.fingerprint,
        )

    def enter(self, model: BlockwiseModel) -> None:
        """Start the walk by embedding the windows."""
        self.hidden.fill(model.embed(self.windows))

    def observe(
        self,
        block: Block,
        observation: Observation = InputStatistics.zeros,
        *,
        walk_on: bool = False,
        change: ChangeStatistics | None = None,
        experts: ExpertStatistics | None = None,
    ) -> BlockStatistics:
        """Sum statistics of the Linears' inputs over this participant's windows.

        Args:
            block: The unpruned block.
            observation: Creates the statistics to sum.
            walk_on: Use the output of this pass, through the unpruned block, as the next block's input.
            change: Statistics to which how far the block turns hidden states is added.
            experts: Statistics to which what the block's experts add to their tokens is added.

        Raises:
            ModelError: An activation is NaN or infinite, or a Linear was never used; the message names the
                weight.
        """
        statistics: BlockStatistics = {}
        with ExitStack() as stack:
            stack.enter_context(observing(block, statistics, observation))
            if experts is not None and block.experts:
                stack.enter_context(observing_experts(block.experts[0], experts))
            for number, hidden in enumerate(self.hidden):
                output = block.forward(hidden)
                if change is not None:
                    change.add(hidden, output)
                if walk_on:
                    self.hidden[number] = output
        totals = [] if change is None else [change.total]
        totals += [] if experts is None else experts.sums.tolist()
        if not all(map(math.isfinite, totals)):
            raise ModelError(
                f"the output of block {block.index} contains NaN or infinity on the text of participant "
                f"'{self.name}': if the precision is float16, try bfloat16 or float32"
            )
        for name in block.linears:
            linear = block.linears[name]
            if name not in statistics and linear.family:
                # The text reached other experts only.
                statistics[name] = observation(linear.shape[1])
            if name not in statistics:
                raise ModelError(
                    f"'{name}' took no part in the forward pass of its block, so it cannot be scored"
                )
            if not torch.isfinite(statistics[name].sum_of_squares).all():
                raise ModelError(
                    f"the inputs of '{name}' contain NaN or infinity on the text of participant "
                    f"'{self.name}': if the precision is float16, try bfloat16 or float32"
                )
        if n_tokens := tokens_of_experts(block, statistics):
            self.reached[block.index] = ExpertsRecord.of(n_tokens)
        return statistics

    def advance(self, block: Block, weights: Weights) -> None:
        """Pass the hidden states through the block with ``weights`` in place of its own."""
        with block.replaced(weights):
            for number, hidden in enumerate(self.hidden):
                self.hidden[number] = block.forward(hidden)
