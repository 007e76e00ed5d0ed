"""Publishing a run's result, and handing it to participants when they ask for it.

RUN/result/
  block-0007.decision   what participants need to build the block from their dense model
  receivers.json        names of the participants that may fetch the result
  manifest.json         digests of all of it (written last: its existence marks the result as published)
  outcomes/NAME.json    what a participant reported: whether it has the model, and its perplexities
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedprllm.errors import UpdateError
from fedprllm.federation.protocol.messages import pack
from fedprllm.federation.protocol.results import (
    Manifest,
    Measured,
    Offer,
    ResultReply,
    ResultRequest,
    read_manifest,
    read_result_request,
)
from fedprllm.files import read_json, write_json, write_sealed
from fedprllm.healing.records import HealRecord, is_healing
from fedprllm.pruning.model_card import write_model_card
from fedprllm.pruning.records import RunRecord

__all__ = ["Publication", "ResultServer", "outcomes"]

_MAX_OFFERS = 100  # the newest
_MISSING = pack(ResultReply(code="no such result"))


class Publication:
    """The files of a run's result.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "result"

    def decision_path(self, block: int) -> Path:
        """Path of the decision about a block."""
        return self.folder / f"block-{block:04d}.decision"

    @property
    def manifest_path(self) -> Path:
        """Path of the manifest."""
        return self.folder / "manifest.json"

    @property
    def is_published(self) -> bool:
        """Whether participants can fetch the result."""
        return self.manifest_path.exists() and (self.run / "result.json").exists()

    @property
    def receivers(self) -> list[str]:
        """Names of the participants that may fetch the result."""
        path = self.folder / "receivers.json"
        return list(read_json(path)) if path.exists() else []

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            UpdateError: It is damaged.
        """
        return read_manifest(self.manifest_path.read_bytes())

    def publish(self, manifest: Manifest, receivers: Sequence[str]) -> None:
        """Write the manifest, once all decisions have been written."""
        write_json(self.folder / "receivers.json", sorted(receivers))
        write_json(self.manifest_path, manifest.model_dump(mode="json"))

    def decision_digests(self, n_blocks: int) -> list[str]:
        """SHA-256 of each decision message."""
        return [
            hashlib.sha256(self.decision_path(block).read_bytes()).hexdigest() for block in range(n_blocks)
        ]

    def outcome_path(self, name: str) -> Path:
        """Path of what a participant reported."""
        return self.folder / "outcomes" / f"{name}.json"


def outcomes(run: Path) -> dict[str, dict[str, Any]]:
    """What became of the result at each participant that may fetch it; empty where it has not reported.

    Args:
        run: The run's folder.
    """
    publication = Publication(run)
    paths = {name: publication.outcome_path(name) for name in publication.receivers}
    return {name: read_json(path) if path.exists() else {} for name, path in paths.items()}


class ResultServer:
    """Answers participants that ask for results.

    Args:
        runs: The server's folder of runs.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._lock = threading.Lock()

    def answer(self, name: str, message: bytes) -> bytes:
        """Answer a request. Any failure becomes an answer too, never an exception.

        Args:
            name: Name of the participant, authenticated by the connection.
            message: The request.
        """
        with self._lock:
            try:
                return self._answer(name, read_result_request(message))
            except UpdateError as error:
                print(f"refused a request of participant {name} for a result: {error}", file=sys.stderr)
                return pack(ResultReply(code="bad request"))
            except Exception as error:  # noqa: BLE001  the server must outlive any failure here
                traceback.print_exception(error)
                return pack(ResultReply(code="internal"))

    def _answer(self, name: str, request: ResultRequest) -> bytes:
        if request.op == "list":
            offers = [offer.model_dump(mode="json") for offer, _ in self._offered(name)]
            return pack(ResultReply(), json.dumps(offers[-_MAX_OFFERS:]).encode())
        offered = self._offered(name)
        publication = next((found for offer, found in offered if offer.run == request.run), None)
        if publication is None:
            return _MISSING
        if request.op == "manifest":
            return pack(ResultReply(), publication.manifest_path.read_bytes())
        if request.op == "block":
            path = publication.decision_path(request.block)
            return pack(ResultReply(), path.read_bytes()) if path.exists() else _MISSING
        self._note(publication, name, request)
        return pack(ResultReply())

    def _offered(self, name: str) -> Iterator[tuple[Offer, Publication]]:
        """Published results that a participant may fetch, oldest first."""
        paths = sorted(self._runs.glob("*/result/manifest.json"), key=lambda path: path.stat().st_mtime)
        for path in paths:
            publication = Publication(path.parent.parent)
            if publication.is_published and name in publication.receivers:
                run_id = (publication.run / ".run-id").read_text(encoding="utf-8").strip()
                yield Offer(run=run_id, name=publication.run.name), publication

    def _note(self, publication: Publication, name: str, request: ResultRequest) -> None:
        """Store what a participant reports, and add its perplexities to the run's record."""
        outcome = request.outcome
        if outcome == "received" and request.digest != publication.manifest().digest:
            outcome = "result differs"
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "outcome": outcome,
            **request.model_dump(mode="json", include={"dense", "pruned"}, exclude_none=True),
        }
        write_json(publication.outcome_path(name), line)
        if request.dense and request.pruned:
            _record_evaluation(publication.run)


def _record_evaluation(run: Path) -> None:
    """Write the perplexities that participants reported into the run's record and model card."""
    reported = {name: found for name, found in sorted(outcomes(run).items()) if "pruned" in found}
    evaluation = {
        model: [Measured(**found[key]).perplexity(name) for name, found in reported.items()]
        for model, key in (("dense", "dense"), ("model", "pruned"))
    }
    path = run / "result.json"
    if is_healing(run):
        evaluation = {"before": evaluation["dense"], "healed": evaluation["model"]}
        write_sealed(path, HealRecord.read(path).model_copy(update={"evaluation": evaluation}).as_json())
        return
    record = RunRecord.read(path).model_copy(update={"evaluation": evaluation})
    write_sealed(path, record.as_json())
    write_model_card(run / "model", record)
