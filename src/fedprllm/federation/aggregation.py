"""From the updates of one block, as they came over the wire, to the decision and the pruned shard.

The same sums and the same decision as in one process (`fedprllm.sharing`), read from files one update at
a time and in the order of names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedprllm import wire
from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.errors import UpdateError
from fedprllm.federation.agreement import Agreement
from fedprllm.federation.decisions import encode_decision
from fedprllm.federation.in_process import block_record
from fedprllm.federation.naming import from_wire, to_wire
from fedprllm.federation.spool import write_bytes
from fedprllm.models.blocks import Block, BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.participant import find_shared_inputs
from fedprllm.runs import Run
from fedprllm.sharing import SHARING, SURVEYS, Sharing, Totals
from fedprllm.votes import save_votes

__all__ = ["BlockAggregator"]


class _OnDemand(dict[str, Tensor]):
    """The tensors of a block, each read when a check asks for it: most checks need only shapes."""

    def __init__(self, model: BlockwiseModel) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, name: str) -> Tensor:
        self[name] = self._model.checkpoint.load([name])[name].to(self._model.device)
        return self[name]


def _no_forward(index: int, hidden: Tensor) -> Tensor:
    raise AssertionError(f"a check computes nothing: block {index}, {tuple(hidden.shape)}")


class BlockAggregator:
    """Checks updates, and decides blocks from those that passed.

    Args:
        model: the model to prune.
        config: how, resolved.
        run: the open folder of the run.
        run_id: 16 bytes.
        digest: 32 bytes that name the model's weights.
        updates_folder: block to the folder with its updates, one file ``NAME.update`` each.
        survey: count outliers instead of pruning.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        config: PruneConfig,
        run: Run,
        run_id: bytes,
        digest: bytes,
        updates_folder: Callable[[int], Path],
        survey: bool = False,
    ) -> None:
        self.model, self.config, self.run = model, config, run
        self._run_id, self._digest, self._updates_folder = run_id, digest, updates_folder
        self._survey = SURVEYS[config.share] if survey else None
        self.sharing: Sharing[Any] = self._survey or SHARING[config.share]
        if self.sharing.by_input:
            find_shared_inputs(model)
        self.writer = None if survey else CheckpointWriter(run.unfinished_model_dir(), model.n_blocks)

    @property
    def walks_on(self) -> bool:
        """Participants need each decision for the next block."""
        return CRITERIA[self.config.criterion].uses_inputs

    def _expectation(self, index: int, name: str) -> tuple[wire.Expectation, int]:
        linears = self.model.linears[index]
        shapes = self.sharing.shapes(linears)
        expect = wire.Expectation(
            run_id=self._run_id,
            model_fingerprint=self._digest,
            block=index,
            kind=self.sharing.kind,
            shapes=to_wire({tensor: shape for tensor, (shape, _) in shapes.items()}, linears),
            participant=name,
        )
        return expect, wire.max_message_bytes(expect)

    def _read(self, block: Block, name: str, message: bytes | memoryview) -> wire.Update:
        expect, max_bytes = self._expectation(block.index, name)
        update = wire.decode(message, expect=expect, max_bytes=max_bytes)
        update = replace(update, tensors=from_wire(update.tensors, block.linears))
        for tensor, (_, dtype) in self.sharing.shapes(block.linears).items():
            if update.tensors[tensor].dtype != dtype:
                raise UpdateError(
                    f"'{tensor}' of participant '{name}' has type {update.tensors[tensor].dtype}: "
                    f"expected {dtype}"
                )
        self._check_tokens(name, update.n_tokens)
        return update

    def _check_tokens(self, name: str, n_tokens: int) -> None:
        """A participant has whole windows, and no more of them than the run asks for."""
        length, windows = self.config.window_length, self.config.windows
        assert length is not None
        if n_tokens % length or n_tokens == 0 or (windows and n_tokens > windows * length):
            raise UpdateError(
                f"participant '{name}' claims {n_tokens} tokens: expected 1 to {windows or 'any number of'} "
                f"windows of {length}"
            )

    def _weight(self, n_tokens: int) -> int:
        """What one participant's vote counts."""
        return n_tokens if self.config.weighting == "tokens" else 1

    def max_update_bytes(self, index: int, name: str) -> int:
        """Length of the longest valid update of a block by a participant."""
        return self._expectation(index, name)[1]

    def check(self, index: int, name: str, message: bytes | memoryview) -> None:
        """Refuse an update that is not exactly what was asked for.

        Raises:
            UpdateError: what is wrong with it.
        """
        tensors = _OnDemand(self.model)
        block = Block(index, self.model.linears[index], tensors, self.model.skeleton, _no_forward)
        update = self._read(block, name, message)
        self.sharing.check(block, update.tensors, self.config)

    def decide(self, index: int, names: Sequence[str], still_in: Sequence[str]) -> None:
        """Add up the updates of a block, decide about it, and keep the result: the block is finished.

        Args:
            index: of the block.
            names: whose updates are there.
            still_in: who takes part in what follows.
        """
        begin = time.perf_counter()
        folder = self._updates_folder(index)
        n_bytes: dict[str, int] = {}
        n_tokens: dict[str, int] = {}
        with self.model.block(index) as block:
            totals = self.sharing.zeros(block)
            agreement = Agreement(block, self.config.seed)
            for name in sorted(names):
                message = (folder / f"{name}.update").read_bytes()
                update = self._read(block, name, message)
                n_bytes[name], n_tokens[name] = len(message), update.n_tokens
                del message
                totals.add(update.tensors, self._weight(update.n_tokens))
                agreement.add(update.tensors)
                del update  # before the next one is read: one at a time
            about = {"participants": sorted(names), "still_in": sorted(still_in)}
            sent = {"update_bytes": n_bytes, "n_tokens": n_tokens}
            if self._survey is not None:
                found = self._survey.decide(totals, block, self.config)
                counts = {"block": index, "outliers": [found.n_outliers, found.n_scores]}
                self.run.finish_block(index, counts | about | sent)
                return
            record = self._prune(block, totals, agreement)
            seconds = {"aggregate": time.perf_counter() - begin}
            record |= about | sent | {"seconds": seconds}
            save_votes(self.run.votes_path(index), totals.votes, block.linears)
            self.run.finish_block(index, record)

    def _prune(self, block: Block, totals: Totals, agreement: Agreement) -> dict[str, Any]:
        """Write the pruned block, and the message for those who wait for it."""
        assert self.writer is not None
        decided = self.sharing.decide(totals, block, self.config)
        message = encode_decision(decided, block, self._run_id, self._digest)
        decided.take_effect(block)
        self.writer.write(block.index, block.tensors)
        write_bytes(self._decision_path(block.index), message)
        self._decision_path(block.index - 1).unlink(missing_ok=True)
        return block_record(block, totals, decided, {}, agreement)

    def _decision_path(self, index: int) -> Path:
        return self.run.folder / "federation" / f"decision-{index:04d}"

    def decision(self, index: int) -> bytes:
        """The message that tells participants what was decided about the newest finished block."""
        return self._decision_path(index).read_bytes()

    def finish(self) -> None:
        """Write what is outside the blocks and move the complete model to its place."""
        assert self.writer is not None
        if not self.run.model_dir().exists():
            self.writer.write(None, self.model.checkpoint.load(self.model.names_outside_blocks()))
            self.writer.finish(self.model.folder)
            self.run.publish_model()
        for path in (self.run.folder / "federation").glob("decision-*"):
            path.unlink()


def people_of(records: Sequence[Mapping[str, Any]], window_length: int) -> dict[str, dict[str, Any]]:
    """What the result says of each participant that counted: no more than its updates said."""
    people: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, n_tokens in record["n_tokens"].items():
            person = people.setdefault(
                name,
                {
                    "sources": ["kept by the participant"],
                    "n_windows": n_tokens // window_length,
                    "window_length": window_length,
                    "fingerprint": None,
                    "n_blocks": 0,
                    "update_bytes": 0,
                },
            )
            person["n_blocks"] += 1
            person["update_bytes"] += record["update_bytes"][name]
    return people
