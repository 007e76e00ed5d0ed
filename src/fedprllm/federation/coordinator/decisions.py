"""Finishing a block once all its updates have arrived: pruning it, or counting its outliers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from fedprllm.core.owl import Outliers
from fedprllm.deciding import BlockDecision
from fedprllm.federation.coordinator.ballots import Ballots
from fedprllm.federation.coordinator.results import Publication
from fedprllm.federation.protocol.decision import encode_decision
from fedprllm.files import write_bytes
from fedprllm.pruning.aggregate import decide_and_write
from fedprllm.pruning.records import BlockRecord, SurveyRecord
from fedprllm.pruning.result_writer import ResultWriter
from fedprllm.pruning.run_folder import Run

__all__ = ["BlockDecider", "Pruning", "Surveying"]


class BlockDecider(Protocol):
    """Finishes blocks one after another."""

    def decide(self, index: int, names: Sequence[str], still_in: Sequence[str]) -> None:
        """Sum the updates of a block, decide about it and store the result.

        Args:
            index: Block index.
            names: Participants whose updates have arrived.
            still_in: Participants that take part in the rest of the run.
        """

    def decision(self, index: int) -> bytes | None:
        """Encoded decision about the newest finished block, or None if no participant waits for it."""

    def still_in(self) -> Sequence[str] | None:
        """Participants that took part in the newest finished block; None if there is none."""


class Surveying:
    """Counts the outliers of every block of the unpruned model.

    Args:
        ballots: The participants' updates.
        run: The survey's run folder, open.
    """

    def __init__(self, ballots: Ballots[Outliers], run: Run) -> None:
        self._ballots, self._run = ballots, run

    def decide(self, index: int, names: Sequence[str], still_in: Sequence[str]) -> None:
        """See `BlockDecider`."""
        with self._ballots.model.block(index) as block:
            aggregate, received = self._ballots.add_up(block, names)
            found = aggregate.decide()
        record = SurveyRecord(
            block=index,
            outliers=(found.n_outliers, found.n_scores),
            participants=sorted(names),
            still_in=sorted(still_in),
            update_bytes=received["update_bytes"],
            n_tokens=received["n_tokens"],
        )
        self._run.finish_block(index, record)

    def decision(self, index: int) -> bytes | None:  # noqa: ARG002  the signature of BlockDecider
        """Return None: participants walk over the unpruned model and wait for no decision."""
        return None

    def still_in(self) -> Sequence[str] | None:
        """See `BlockDecider`."""
        return _still_in(self._run.survey_records())


class Pruning:
    """Prunes every block and writes the pruned model.

    Args:
        ballots: The participants' updates.
        run: The run folder, open.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
    """

    def __init__(self, ballots: Ballots[BlockDecision], run: Run, run_id: bytes, digest: bytes) -> None:
        self._ballots, self._run = ballots, run
        self._run_id, self._digest = run_id, digest
        self._publication = Publication(run.folder)
        self._writer = ResultWriter(run.unfinished_model_dir(), ballots.model, ballots.method.config)
        method = ballots.method
        self._is_followed = method.strategy.follows_server and method.uses_inputs

    def decide(self, index: int, names: Sequence[str], still_in: Sequence[str]) -> None:
        """See `BlockDecider`."""
        begin = time.perf_counter()
        with self._ballots.model.block(index) as block:
            aggregate, received = self._ballots.add_up(block, names)

            def announce(decision: BlockDecision) -> None:
                message = encode_decision(decision, block, self._run_id, self._digest)
                write_bytes(self._publication.decision_path(index), message)

            decision = decide_and_write(aggregate, self._writer, announce)
            record = aggregate.record(
                decision,
                still_in=sorted(still_in),
                update_bytes=received["update_bytes"],
                n_tokens=received["n_tokens"],
                total_tokens=None if self._ballots.masks is None else aggregate.totals.n_tokens,
                seconds={"aggregate": time.perf_counter() - begin},
            )
            aggregate.keep(self._run, record, files=[self._publication.decision_path(index)])

    def decision(self, index: int) -> bytes | None:
        """See `BlockDecider`."""
        return self._publication.decision_path(index).read_bytes() if self._is_followed else None

    def still_in(self) -> Sequence[str] | None:
        """See `BlockDecider`."""
        return _still_in(self._run.records())

    def finish(self) -> None:
        """Write the tensors outside the blocks and move the complete model into place."""
        self._writer.finish(self._run.records())
        self._run.publish_model()


def _still_in(records: Sequence[BlockRecord] | Sequence[SurveyRecord]) -> Sequence[str] | None:
    return (records[-1].still_in or ()) if records else None
