"""A participant's folder for one run, its spool, and the ledger of everything sent and received.

RUN/
  job.json                        the coordinator's request
  fingerprints.json               identity of the coordinator's model
  text.json                       fingerprint of the windows that the run began with
  notes.json                      what the participant should know about its text, such as too little of it
  left-out.json                   why the run goes on without this participant
  question.json, answer.json      what the participant was asked, and its answer
  status.json                     state of the computation
  owner                           token of the process that may compute here
  updates/block-0007.update       the update, as `fedprllm.federation.protocol.update` writes it
  updates/block-0007.json         summary of the update, for the ledger, with the update's digest
  decisions/block-0007.decision   the coordinator's decision (iterative), which holds its own digest
  state/hidden-0007.safetensors   hidden states after that block; only the newest file is kept
  state/hidden-0007.json          the digest of the hidden states
  secure/                         the answers and keys of secure aggregation
  worker.log                      log of the computation; never sent

Files are either complete or absent, and a file that a disk has damaged is noticed and made again. A killed
computation can therefore continue, and resent updates have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedprllm.errors import DiskFull, RunError
from fedprllm.files import append_line, file_digest, is_full, read_sealed, write_bytes, write_sealed

__all__ = ["LEDGER", "Spool", "append_ledger", "read_ledger"]

LEDGER = "ledger.jsonl"


class Spool:
    """One participant's folder for one run.

    Args:
        folder: The folder, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of a file directly in the folder."""
        return self.folder / name

    def update_path(self, block: int) -> Path:
        """Path of a block's update."""
        return self.folder / "updates" / f"block-{block:04d}.update"

    def summary_path(self, block: int) -> Path:
        """Path of the summary of a block's update."""
        return self.folder / "updates" / f"block-{block:04d}.json"

    def decision_path(self, block: int) -> Path:
        """Path of the coordinator's decision about a block."""
        return self.folder / "decisions" / f"block-{block:04d}.decision"

    def hidden_path(self, block: int) -> Path:
        """Path of the hidden states after a block."""
        return self.folder / "state" / f"hidden-{block:04d}.safetensors"

    @property
    def spilled_folder(self) -> Path:
        """Folder for hidden states that exceed the memory limit."""
        return self.folder / "state" / "spilled"

    @property
    def n_ready(self) -> int:
        """Number of consecutive blocks, counted from the first, whose updates are ready."""
        block = 0
        while self.update_path(block).exists():
            block += 1
        return block

    @property
    def n_walked(self) -> int:
        """Number of blocks that the computation has walked through."""
        numbers = [
            int(path.stem.rpartition("-")[2]) for path in self.folder.glob("state/hidden-*.safetensors")
        ]
        return max(numbers, default=-1) + 1

    @property
    def owner(self) -> str:
        """Token of the process that may compute here."""
        path = self.path("owner")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        """The last status that the computation reported."""
        status = self.known("status.json")
        return {"state": "idle"} if status is None else status

    def leave(self, reason: str) -> None:
        """Record that the run goes on without this participant."""
        if self.known("left-out.json") != {"reason": reason}:
            write_sealed(self.path("left-out.json"), {"reason": reason})

    def known(self, name: str) -> dict[str, Any] | None:
        """A sealed file directly in the folder; None if there is none or it is damaged."""
        try:
            return read_sealed(self.path(name))
        except (FileNotFoundError, RunError):
            return None

    def set_status(
        self, state: str, code: str = "", tensor: str = "", message: str = "", value: float | None = None
    ) -> None:
        """Record the state of the computation.

        Args:
            state: State, as in `fedprllm.federation.protocol.messages.Reply`.
            code: Reason for a failure, sent to the coordinator.
            tensor: Name of the first tensor or setting of the model that differs.
            message: Explanation for the participant, never sent.
            value: The participant's value of that setting, if it is a number.
        """
        status = {"state": state, "code": code, "tensor": tensor, "message": message, "value": value}
        write_sealed(self.path("status.json"), status)

    def keep_update(self, block: int, message: bytes, summary: Mapping[str, Any]) -> None:
        """Write a block's update after its summary for the ledger."""
        digest = hashlib.sha256(message).hexdigest()
        write_sealed(self.summary_path(block), {**summary, "digest": digest})
        write_bytes(self.update_path(block), message)

    def update(self, block: int) -> tuple[dict[str, Any], bytes] | None:
        """A block's summary and update; None if it is not ready, or damaged."""
        try:
            summary, message = read_sealed(self.summary_path(block)), self.update_path(block).read_bytes()
        except (FileNotFoundError, RunError):
            return None
        return (summary, message) if hashlib.sha256(message).hexdigest() == summary["digest"] else None

    def keep_hidden(self, block: int, save: Callable[[Path], None]) -> None:
        """Write the hidden states after a block, and delete those before it."""
        path = self.hidden_path(block)
        save(path)
        write_sealed(path.with_suffix(".json"), {"digest": file_digest(path)})
        for old in (self.hidden_path(block - 1), self.hidden_path(block - 1).with_suffix(".json")):
            old.unlink(missing_ok=True)

    def drop_damaged(self) -> list[str]:
        """Delete damaged updates and hidden states, so that they are computed again; returns their names."""
        dropped = []
        for path in sorted(self.folder.glob("updates/block-*")):
            block = int(path.stem[-4:])
            if path.suffix in (".update", ".json") and self.update(block) is None:
                dropped.append(path.name)
                path.unlink()
        for path in sorted(self.folder.glob("state/hidden-*.safetensors")):
            try:
                whole = read_sealed(path.with_suffix(".json"))["digest"] == file_digest(path)
            except (FileNotFoundError, RunError):
                whole = False
            if not whole:
                dropped.append(path.name)
                path.unlink()
        return dropped

    def forget(self, block: int) -> None:
        """Delete a block's update and all hidden states, so that both are computed again."""
        self.update_path(block).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def clear(self) -> None:
        """Delete updates, decisions, hidden states and keys. The request and the log remain."""
        for name in ("updates", "decisions", "state", "secure"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


# The ledger: one line per message ---------------------------------------------------------------


def append_ledger(
    path: Path,
    run: str,
    block: int | None,
    summary: Mapping[str, Any],
    data: bytes,
    *,
    received: bool = False,
) -> None:
    """Record a message in the ledger before it is sent, or when it was received; flush the line to disk.

    Args:
        path: The ledger.
        run: Id of the run in hexadecimal digits.
        block: Block index; None for a manifest.
        summary: ``kind``, ``n_tokens`` and ``shapes`` of the update.
        data: The message.
        received: It came in, as a part of a result.

    Raises:
        RunError: The line could not be written, so an update must not be sent (`DiskFull` if that is why).
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "direction": "received" if received else "sent",
        "run": run,
        "block": block,
        "kind": summary["kind"],
        "n_tokens": summary["n_tokens"],
        "shapes": summary["shapes"],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        append_line(path, json.dumps(line))
    except OSError as error:
        kind = DiskFull if is_full(error) else RunError
        raise kind(
            f"cannot write the ledger {path}: {error.strerror}; nothing is sent until it can be written"
        ) from None


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read the ledger: every update sent and every part of a result received, oldest first.

    Raises:
        RunError: There is no ledger, or one of its lines is damaged.
    """
    if not path.exists():
        raise RunError(f"there is no ledger at {path}: nothing was sent from this kit")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise RunError(f"{path}: line {number} is damaged: expected a JSON object") from None
    return lines
