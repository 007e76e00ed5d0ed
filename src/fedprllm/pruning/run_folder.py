"""The folder of a run; a killed run continues after its last finished block.

RUN/
  run.json                  identity of the run: configuration, model, participants, versions
  blocks/block-0007.json    record of a block (written last: its existence marks the block as finished)
  votes/block-0007.safetensors
  state/hidden-0007.safetensors   hidden states after that block; only the newest are kept
  state/spilled/            hidden states beyond the memory limit, while a process is running
  model/                    the pruned model, moved here as a whole once it is complete
  participants/NAME/model/  the same for each participant, under local-only
  result.json               the result (written last: its existence marks the run as complete)
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from fedprllm.errors import RunBusy, RunError
from fedprllm.files import free_bytes, read_json, save_tensors, write_json
from fedprllm.pruning.records import BlockRecord, Record, RunRecord, SurveyRecord, SurveyRun

__all__ = ["Run", "versions"]


def versions() -> dict[str, str]:
    """Versions of the software that the exact bits of a run depend on."""
    packages = {name: version(name) for name in ("fedprllm", "torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **packages}


class Run:
    """The folder of one run: a context manager that one process can hold at a time.

    Args:
        folder: The run's folder; created if it does not exist.
        identity: Everything that determines the result, as JSON values.
        needed_bytes: Upper bound on what the run will write, checked before anything is computed.

    Raises:
        RunError: The folder holds other files or a run with another identity, or the disk has too little
            free space.
        RunBusy: Another process is working on the run.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], needed_bytes: int = 0) -> None:
        self.folder = folder
        self._identity = dict(identity)
        self._needed_bytes = needed_bytes
        self._lock = FileLock(folder / ".lock")

    @contextmanager
    def when_free(self, wait_s: float) -> Iterator[Run]:
        """Hold the folder, waiting if necessary for a process that may be about to release it.

        Args:
            wait_s: Maximum wait in seconds.

        Raises:
            RunBusy: The folder is still held after ``wait_s`` seconds.
        """
        end = time.monotonic() + wait_s
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self)
                    break
                except RunBusy:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.5)
            yield self

    def __enter__(self) -> Run:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file: expected a folder for the run; choose one with --out")
        manifest = self.folder / "run.json"
        if self.folder.exists() and not manifest.exists() and self._foreign_files():
            raise RunError(
                f"{self.folder} is not a run's folder: it contains {self._foreign_files()[0]!r} but no "
                "run.json; choose another folder with --out"
            )
        if not manifest.exists():
            self._check_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunBusy(
                f"another process is working on {self.folder}: wait for it, or choose another folder with "
                "--out"
            ) from None
        try:
            if manifest.exists():
                self._check_identity(read_json(manifest))
            else:
                write_json(manifest, self._identity)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _foreign_files(self) -> list[str]:
        """What no run writes before ``run.json``; a job of a federation notes first what it was asked."""
        names = (path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        return sorted(name for name in names if name != "federation")

    def _check_space(self) -> None:
        free = free_bytes(self.folder)
        if free < self._needed_bytes:
            raise RunError(
                f"the disk of {self.folder} has {free / 1e9:.1f} GB free, but the run needs up to "
                f"{self._needed_bytes / 1e9:.1f} GB: free some space, or choose another disk with --out"
            )

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        differences = _differences(found, self._identity)
        if differences:
            name, theirs, ours = differences[0]
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise RunError(
                f"{self.folder} belongs to another run: {name} is {theirs!r} there and {ours!r} "
                f"here{more}; choose another folder with --out, or delete this one"
            )

    # Blocks ------------------------------------------------------------------------------------

    def _record_path(self, block: int) -> Path:
        return self.folder / "blocks" / f"block-{block:04d}.json"

    def _hidden_path(self, block: int) -> Path:
        return self.folder / "state" / f"hidden-{block:04d}.safetensors"

    @property
    def spilled_folder(self) -> Path:
        """Folder for hidden states beyond the memory limit."""
        return self.folder / "state" / "spilled"

    def votes_path(self, block: int) -> Path:
        """File with the votes on a block."""
        return self.folder / "votes" / f"block-{block:04d}.safetensors"

    @property
    def n_finished(self) -> int:
        """Number of finished blocks."""
        block = 0
        while self._record_path(block).exists():
            block += 1
        return block

    def finish_block(self, block: int, record: Record, hidden: Mapping[str, Tensor] | None = None) -> None:
        """Save the hidden states and the record, which is written last and marks the block as finished.

        The block's shard and votes must have been written before.
        """
        if hidden:
            save_tensors(self._hidden_path(block), {name: state.cpu() for name, state in hidden.items()})
        write_json(self._record_path(block), record.as_json())
        if block:
            self._hidden_path(block - 1).unlink(missing_ok=True)

    def hidden_after(self, block: int) -> dict[str, Tensor]:
        """The hidden states saved by `finish_block`."""
        return load_file(self._hidden_path(block))

    def records(self) -> list[BlockRecord]:
        """The records of the finished blocks."""
        return [BlockRecord.read(self._record_path(block)) for block in range(self.n_finished)]

    def survey_records(self) -> list[SurveyRecord]:
        """The records of the finished blocks of a survey."""
        return [SurveyRecord.read(self._record_path(block)) for block in range(self.n_finished)]

    # Models and result -------------------------------------------------------------------------

    def model_dir(self, participant: str | None = None) -> Path:
        """Folder of a finished model: the run's own or a participant's."""
        parent = self.folder if participant is None else self.folder / "participants" / participant
        return parent / "model"

    def unfinished_model_dir(self, participant: str | None = None) -> Path:
        """Folder in which a model is written shard by shard until `publish_model` moves it."""
        return self.model_dir(participant).with_name("model.unfinished")

    def publish_model(self, participant: str | None = None) -> None:
        """Move a complete model to its final folder; does nothing if it is already there."""
        unfinished = self.unfinished_model_dir(participant)
        if unfinished.exists():
            unfinished.replace(self.model_dir(participant))

    @property
    def is_complete(self) -> bool:
        """Whether the run is complete, that is, its result exists."""
        return (self.folder / "result.json").exists()

    def finish(self, record: RunRecord | SurveyRun) -> None:
        """Write the result and delete what only an unfinished run needs."""
        write_json(self.folder / "result.json", record.as_json())
        shutil.rmtree(self.folder / "state", ignore_errors=True)


def _differences(found: Any, expected: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two JSON values differ, each with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [*expected, *(key for key in found if key not in expected)]
        return [
            difference
            for key in keys
            for difference in _differences(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == expected else [(name, found, expected)]
