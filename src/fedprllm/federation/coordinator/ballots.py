"""Updates received over the network: checked before they count, and summed in the order of names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from fedprllm.errors import UpdateError
from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.names import from_wire, to_wire
from fedprllm.models.block import Block
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.aggregate import Aggregate
from fedprllm.pruning.masked_totals import totals_of
from fedprllm.pruning.method import Method
from fedprllm.secure.words import Words
from fedprllm.sharing.as_words import masked_bytes
from fedprllm.sharing.interface import Ballot

__all__ = ["Ballots", "Inbox", "Received"]

_Decided = TypeVar("_Decided")
# Record field -> participant -> length of its update in bytes, or its number of calibration tokens.
Received = dict[str, dict[str, int]]


class Inbox(Protocol):
    """What arrives from participants step by step: updates of blocks, or gradients of rounds.

    Attributes:
        masks: The session of secure aggregation, if updates arrive under masks.
    """

    masks: Masks | None

    @property
    def n_steps(self) -> int:
        """Number of steps."""

    @property
    def follows_server(self) -> bool:
        """Whether participants wait for the decision about a step before they take the next."""

    def path(self, block: int, name: str) -> Path:
        """Path where a participant's update waits until its step is decided."""

    def max_bytes(self, block: int, name: str) -> int:
        """Length in bytes of the longest valid update from a participant for a step."""

    def check(self, block: int, name: str, message: bytes | memoryview) -> None:
        """Check that an update is exactly what was requested.

        Raises:
            UpdateError: It is not.
        """

    def outstanding(self, block: int, names: Sequence[str]) -> dict[str, str]:
        """Why updates that have arrived are out of proportion, by participant."""


class Ballots(Generic[_Decided]):
    """The updates of a run, stored in files by block and participant.

    Args:
        model: The model to prune.
        method: What participants share, and how it becomes a decision.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
        folder: Maps a block index to the folder with its updates, one file ``NAME.update`` per participant.
        masks: The session of secure aggregation, if updates arrive under masks.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        method: Method[_Decided],
        run_id: bytes,
        digest: bytes,
        folder: Callable[[int], Path],
        masks: Masks | None = None,
    ) -> None:
        self.model, self.method, self.masks = model, method, masks
        self._run_id, self._digest, self._folder = run_id, digest, folder

    @property
    def n_steps(self) -> int:
        """Number of blocks."""
        return self.model.n_blocks

    @property
    def follows_server(self) -> bool:
        """Whether participants walk on with the server's decisions."""
        return self.method.strategy.follows_server

    def path(self, block: int, name: str) -> Path:
        """Path where a participant's update waits until its block is decided."""
        return self._folder(block) / f"{name}.update"

    def _expectation(self, block: int, name: str) -> tuple[wire.Expectation, int]:
        linears = self.model.linears[block]
        shapes = {tensor: shape for tensor, (shape, _) in self.method.sharing.shapes(linears).items()}
        expect = wire.Expectation(
            run_id=self._run_id,
            model_fingerprint=self._digest,
            block=block,
            kind=self.method.sharing.kind if self.masks is None else wire.MASKED,
            shapes=to_wire(shapes, linears) if self.masks is None else {"words": (self._n_words(block),)},
            participant=name,
        )
        return expect, wire.max_message_bytes(expect)

    def _n_words(self, block: int) -> int:
        """Length of an update under masks."""
        config, masks = self.method.config, self.masks
        assert masks is not None, "only updates under masks are words"
        max_windows = config.windows if config.weighting == "tokens" else 0
        linears = self.model.linears[block]
        return masked_bytes(self.method.sharing, linears, masks.n_participants, max_windows) // 8

    def max_bytes(self, block: int, name: str) -> int:
        """Length in bytes of the longest valid update from a participant for a block."""
        return self._expectation(block, name)[1]

    def check(self, block: int, name: str, message: bytes | memoryview) -> None:
        """Check that an update is exactly what was requested.

        Raises:
            UpdateError: The update is malformed, differs from the request, or holds impossible values.
        """
        if self.masks is not None:
            self._words(block, name, message)
            return
        update = self._read(block, name, message)
        ballot = Ballot(self.model.linears[block], update.tensors, self._stored)
        self.method.sharing.check(ballot, self.method.target)

    def _words(self, block: int, name: str, message: bytes | memoryview) -> Words:
        """The words of an update under masks. Nothing else about it can be checked."""
        expect, max_bytes = self._expectation(block, name)
        update = wire.decode(message, expect=expect, max_bytes=max_bytes)
        words: Words = update.tensors["words"].numpy().view("<u8")
        return words

    def _stored(self, name: str) -> Tensor:
        return self.model.checkpoint.load([name])[name]

    def _read(self, block: int, name: str, message: bytes | memoryview) -> wire.Update:
        linears = self.model.linears[block]
        expect, max_bytes = self._expectation(block, name)
        update = wire.decode(message, expect=expect, max_bytes=max_bytes)
        update = replace(update, tensors=from_wire(update.tensors, linears))
        for tensor, (_, dtype) in self.method.sharing.shapes(linears).items():
            if update.tensors[tensor].dtype != dtype:
                raise UpdateError(
                    f"'{tensor}' from participant '{name}': expected type {dtype}, "
                    f"found {update.tensors[tensor].dtype}; use the run's configuration"
                )
        self._check_tokens(name, update.n_tokens)
        return update

    def _check_tokens(self, name: str, n_tokens: int) -> None:
        """Check that tokens form whole windows, and no more of them than the run asks for."""
        length, windows = self.method.config.window_length, self.method.config.windows
        assert length is not None
        if n_tokens % length or n_tokens == 0 or (windows and n_tokens > windows * length):
            raise UpdateError(
                f"participant '{name}' claims {n_tokens} tokens: expected 1 to {windows or 'any number of'} "
                f"windows of {length} tokens"
            )

    def outstanding(self, block: int, names: Sequence[str]) -> dict[str, str]:
        """Why updates of a block that have arrived are out of proportion, by participant.

        One update is in memory at a time, because only figures of each are compared. Nothing is read if the
        kind of update has none.

        Args:
            block: Block index.
            names: Participants whose updates of the block are added up together.
        """
        comparison = self.method.sharing.comparison
        if comparison is None or self.masks is not None:
            return {}
        figures = {}
        for name in sorted(names):
            update = self._read(block, name, self.path(block, name).read_bytes())
            figures[name] = comparison.figures(update.tensors, self.model.linears[block], update.n_tokens)
        return comparison.outstanding(figures, self.model.input_norms(block))

    def add_up(self, block: Block, names: Sequence[str]) -> tuple[Aggregate[_Decided], Received]:
        """Sum the updates of a block with one update in memory at a time.

        Args:
            block: The unpruned block.
            names: Participants whose updates have arrived.

        Returns:
            The aggregate, and the length and number of tokens of each update.
        """
        aggregate = Aggregate(block, self.method)
        received: Received = {"update_bytes": {}, "n_tokens": {}}
        if self.masks is not None:
            self._add_up_words(self.masks, aggregate, received)
            return aggregate, received
        for name in sorted(names):
            message = self.path(block.index, name).read_bytes()
            update = self._read(block.index, name, message)
            received["update_bytes"][name], received["n_tokens"][name] = len(message), update.n_tokens
            del message
            aggregate.add(name, update.tensors, update.n_tokens)
            del update
        return aggregate, received

    def _add_up_words(self, masks: Masks, aggregate: Aggregate[_Decided], received: Received) -> None:
        """Sum updates under masks, one in memory at a time, and take the masks off the sum."""
        block = aggregate.block
        names = masks.survivors(block.index)
        total: Words = np.zeros(self._n_words(block.index), "<u8")
        for name in names:
            message = self.path(block.index, name).read_bytes()
            total += self._words(block.index, name, message)
            received["update_bytes"][name] = len(message)
        masks.unmask(block.index, total)
        aggregate.take(totals_of(total, len(names), block, self.method, masks.n_participants), names)
