"""One participant of a run: it observes each block on its own text and walks on.

The same class serves a participant among others in one process, the one participant that holds all text
(centralized), and a site of a federation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from fedprllm.core.sums import InputStatistics
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, Weights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.observe import BlockStatistics, Observation, observing
from fedprllm.pruning.hidden_states import HiddenStates
from fedprllm.pruning.records import ParticipantRecord
from fedprllm.text.windows import fingerprint

__all__ = ["Participant"]


class Participant:
    """Someone's calibration windows, and the hidden states of the walk over them.

    Attributes:
        name: for messages and files.
        windows: int64 token ids, [n_windows, window_length].
        fingerprint: SHA-256 of the windows.
        sources: where the text came from, for the record.
        hidden: one tensor [1, window_length, hidden_size] per window: the input of the next block. All in
            memory, unless states with a limit are put in their place.
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
        self.hidden = HiddenStates()

    @property
    def n_tokens(self) -> int:
        """Number of calibration tokens."""
        return self.windows.numel()

    def describe(self) -> ParticipantRecord:
        """What the run's record says of this participant: no text, no token ids."""
        return ParticipantRecord(
            sources=self.sources,
            n_windows=self.windows.shape[0],
            window_length=self.windows.shape[1],
            fingerprint=self.fingerprint,
        )

    def enter(self, model: BlockwiseModel) -> None:
        """Embed the windows: the start of the walk."""
        self.hidden.fill(model.embed(self.windows))

    def observe(
        self, block: Block, observation: Observation = InputStatistics.zeros, *, walk_on: bool = False
    ) -> BlockStatistics:
        """Sum up the inputs of the block's Linears over this participant's windows, and only those.

        Args:
            block: the block, unpruned.
            observation: what is summed up.
            walk_on: feed the next block from this very pass: from the unpruned block.

        Raises:
            ModelError: an activation is NaN or infinite, or a Linear was never used (both named).
        """
        statistics: BlockStatistics = {}
        with observing(block, statistics, observation):
            for number, hidden in enumerate(self.hidden):
                output = block.forward(hidden)
                if walk_on:
                    self.hidden[number] = output
        for name in block.linears:
            if name not in statistics:
                raise ModelError(f"'{name}' took no part in the forward pass of its block: cannot score it")
            if not torch.isfinite(statistics[name].sum_of_squares).all():
                raise ModelError(
                    f"the inputs of '{name}' hold NaN or infinity on the text of participant "
                    f"'{self.name}': if the precision is float16, try bfloat16 or float32"
                )
        return statistics

    def advance(self, block: Block, weights: Weights) -> None:
        """Feed the windows through the block with ``weights`` in place of its own."""
        with block.replaced(weights):
            for number, hidden in enumerate(self.hidden):
                self.hidden[number] = block.forward(hidden)
