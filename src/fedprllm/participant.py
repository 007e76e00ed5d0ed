"""One participant of a run: it observes each block on its own text and walks on.

The same class serves a participant among others in one process, the one participant that holds all text
(centralized), and a site of a federation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedprllm.calibration import fingerprint
from fedprllm.core.statistics import GramStatistics, InputStatistics
from fedprllm.errors import ModelError
from fedprllm.hidden import HiddenStates
from fedprllm.models.blocks import Block, BlockwiseModel

__all__ = ["BlockStatistics", "Observation", "Participant", "find_shared_inputs"]

# Statistics of the input of each Linear of a block, by weight name. Linears that read the same tensor
# (query, key and value; gate and up) share one object.
BlockStatistics = dict[str, InputStatistics | GramStatistics]
# Makes empty statistics for an input of so many channels.
Observation = Callable[[int], InputStatistics | GramStatistics]


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

    def describe(self) -> dict[str, Any]:
        """What the run's record says of this participant: no text, no token ids."""
        return {
            "sources": self.sources,
            "n_windows": self.windows.shape[0],
            "window_length": self.windows.shape[1],
            "fingerprint": self.fingerprint,
        }

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
        with _Observer(block, statistics, observation):
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

    def advance(self, block: Block, weights: Mapping[str, Tensor]) -> None:
        """Feed the windows through the block with ``weights`` in place of its own."""
        with block.replaced(weights):
            for number, hidden in enumerate(self.hidden):
                self.hidden[number] = block.forward(hidden)


class _Observer(ExitStack):
    """Adds the input of every Linear of a block to its statistics while the context is open."""

    def __init__(self, block: Block, statistics: BlockStatistics, observation: Observation) -> None:
        super().__init__()
        self._statistics, self._observation = statistics, observation
        self._last_input: Tensor | None = None
        self._last_name = ""
        for name, linear in block.linears.items():
            self.callback(linear.module.register_forward_pre_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001  torch's signature
            inputs = args[0]
            if inputs is self._last_input:
                # The Linear before this one read the very same tensor and has already counted it.
                self._statistics[name] = self._statistics[self._last_name]
                return
            if name not in self._statistics:
                self._statistics[name] = self._observation(inputs.shape[-1])
            self._statistics[name].add(inputs)
            self._last_input, self._last_name = inputs, name

        return add


def find_shared_inputs(model: BlockwiseModel) -> None:
    """Note in the model's Linears which of them read the same input, from one pass of two tokens."""
    (hidden,) = model.embed([torch.zeros(2, dtype=torch.int64)])
    statistics: BlockStatistics = {}
    with model.block(0) as block, _Observer(block, statistics, InputStatistics.zeros):
        block.forward(hidden)
    first_kind: dict[int, str] = {}
    kinds = {}
    for name, linear in block.linears.items():
        if name in statistics:
            kinds[linear.kind] = first_kind.setdefault(id(statistics[name]), linear.kind)
    for of_block in model.linears:
        names = {linear.kind: name for name, linear in of_block.items()}
        for name, linear in of_block.items():
            source = names.get(kinds.get(linear.kind, linear.kind), name)
            of_block[name] = replace(linear, source=source)
