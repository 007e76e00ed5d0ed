"""A participant's folder of one run: what its computation left, and what was sent of it.

RUN/
  job.json                        what the coordinator asked for
  fingerprints.json               SHA-256 of each tensor of the coordinator's model
  status.json                     where the computation stands
  owner                           token of the process that may compute here
  updates/block-0007.update       what may leave, as `fedprllm.federation.protocol.update` writes it
  updates/block-0007.json         the same in words, for the ledger
  decisions/block-0007.decision   what the coordinator decided (iterative)
  state/hidden-0007.safetensors   hidden states after that block; only the newest is kept
  worker.log                      the computation's own words; never sent

Files are whole or absent, so a killed computation continues, and sends the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedprllm.errors import RunError
from fedprllm.files import atomic_path, read_json, write_json

__all__ = ["Spool", "append_ledger", "read_ledger", "write_bytes"]


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


class Spool:
    """The folder of one run at one participant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, what: str) -> Path:
        """Path of one of the files directly in the folder."""
        return self.folder / what

    def update_path(self, block: int) -> Path:
        """What may leave about a block."""
        return self.folder / "updates" / f"block-{block:04d}.update"

    def summary_path(self, block: int) -> Path:
        """The same in words."""
        return self.folder / "updates" / f"block-{block:04d}.json"

    def decision_path(self, block: int) -> Path:
        """What the coordinator decided about a block."""
        return self.folder / "decisions" / f"block-{block:04d}.decision"

    def hidden_path(self, block: int) -> Path:
        """The hidden states after a block."""
        return self.folder / "state" / f"hidden-{block:04d}.safetensors"

    @property
    def spilled_folder(self) -> Path:
        """Where hidden states go for which there is no memory."""
        return self.folder / "state" / "spilled"

    @property
    def n_ready(self) -> int:
        """Number of blocks, from the first one, whose update is ready."""
        block = 0
        while self.update_path(block).exists():
            block += 1
        return block

    @property
    def n_walked(self) -> int:
        """Number of blocks whose hidden states are behind the participant."""
        numbers = [
            int(path.stem.rpartition("-")[2]) for path in self.folder.glob("state/hidden-*.safetensors")
        ]
        return max(numbers, default=-1) + 1

    @property
    def owner(self) -> str:
        """Token of the process that may compute here."""
        path = self.path("owner")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        """What the computation said last."""
        path = self.path("status.json")
        return read_json(path) if path.exists() else {"state": "idle"}

    def set_status(
        self, state: str, code: str = "", tensor: str = "", message: str = "", value: float | None = None
    ) -> None:
        """Say where the computation stands; ``message`` is for the participant and never sent."""
        status = {"state": state, "code": code, "tensor": tensor, "message": message, "value": value}
        write_json(self.path("status.json"), status)

    def forget(self, block: int) -> None:
        """Drop a block's update and the walk behind it: both are computed again."""
        self.update_path(block).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def clear(self) -> None:
        """Drop everything but what was asked for and the log."""
        for name in ("updates", "decisions", "state"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


# The ledger: one line for every update that was sent ------------------------------------------------


def append_ledger(path: Path, run: str, block: int, summary: Mapping[str, Any], data: bytes) -> None:
    """Write down, before it is sent, that an update leaves; flushed to the disk.

    Raises:
        RunError: The line could not be written, so the update must not be sent.
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "run": run,
        "block": block,
        "kind": summary["kind"],
        "n_tokens": summary["n_tokens"],
        "shapes": summary["shapes"],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(line) + "\n")
            ledger.flush()
            os.fsync(ledger.fileno())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; nothing is sent without it") from None


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Every update that was sent, oldest first.

    Raises:
        RunError: There is no ledger, or a line of it is damaged (numbered).
    """
    if not path.exists():
        raise RunError(f"there is no ledger at {path}: nothing was sent from here")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise RunError(f"{path}: line {number} is damaged") from None
    return lines
