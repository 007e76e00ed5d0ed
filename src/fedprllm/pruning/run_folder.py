"""A run is a folder; a killed run continues at the last finished block.

RUN/
  run.json                  what is run: configuration, model, participants, versions
  blocks/block-0007.json    record of a finished block (written last: its existence means finished)
  votes/block-0007.safetensors
  state/hidden-0007.safetensors   hidden states after that block; only the newest is kept
  state/spilled/            hidden states that exceed the memory limit, while a process works
  model/                    the pruned model, moved here whole when it is complete
  participants/NAME/model/  the same for each participant, under local-only
  result.json               the manifest: written last, its existence means the run is complete
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
    """Versions of what the bits of a run depend on."""
    packages = {name: version(name) for name in ("fedprllm", "torch", "transformers", "safetensors")}
    return {"python": platform.python_version(), **packages}


class Run:
    """The folder of one run, held by one process at a time (use it as a context manager).

    Args:
        folder: The run's folder; made if it does not exist.
        identity: Everything that determines the result, as JSON values.
        needed_bytes: What the run will write at most, checked before anything is computed.

    Raises:
        RunError: The folder holds something else, another configuration's run or a run that another
            process works on; or the disk has too little space.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], needed_bytes: int = 0) -> None:
        self.folder = folder
        self._identity = dict(identity)
        self._needed_bytes = needed_bytes
        self._lock = FileLock(folder / ".lock")

    @contextmanager
    def when_free(self, wait_s: float) -> Iterator[Run]:
        """Hold the folder, waiting for a process that holds it but may be about to end.

        Raises:
            RunBusy: It is still held after ``wait_s`` seconds.
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
            raise RunError(f"{self.folder} is a file: name a folder for the run")
        manifest = self.folder / "run.json"
        if self.folder.exists() and not manifest.exists() and self._foreign_files():
            raise RunError(
                f"{self.folder} holds {self._foreign_files()[0]!r} and no run.json: it is not the folder "
                "of a run; name another one with --out"
            )
        if not manifest.exists():
            self._check_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunBusy(
                f"another process works on {self.folder}: wait for it, or use another --out"
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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _foreign_files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))

    def _check_space(self) -> None:
        free = free_bytes(self.folder)
        if free < self._needed_bytes:
            raise RunError(
                f"the disk of {self.folder} has {free / 1e9:.1f} GB free, the run needs up to "
                f"{self._needed_bytes / 1e9:.1f} GB: free some, or choose another disk with --out"
            )

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        differences = _differences(found, self._identity)
        if differences:
            name, theirs, ours = differences[0]
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise RunError(
                f"{self.folder} belongs to another run: {name} is {theirs!r} there and {ours!r} "
                f"here{more}; name another folder with --out, or delete that one"
            )

    # Blocks ------------------------------------------------------------------------------------

    def _record_path(self, block: int) -> Path:
        return self.folder / "blocks" / f"block-{block:04d}.json"

    def _hidden_path(self, block: int) -> Path:
        return self.folder / "state" / f"hidden-{block:04d}.safetensors"

    @property
    def spilled_folder(self) -> Path:
        """Where hidden states go for which there is no memory."""
        return self.folder / "state" / "spilled"

    def votes_path(self, block: int) -> Path:
        """Where the votes of a block are kept."""
        return self.folder / "votes" / f"block-{block:04d}.safetensors"

    @property
    def n_finished(self) -> int:
        """Number of blocks that need not be computed again."""
        block = 0
        while self._record_path(block).exists():
            block += 1
        return block

    def finish_block(self, block: int, record: Record, hidden: Mapping[str, Tensor] | None = None) -> None:
        """Keep what a block gave; the record is written last and makes the block finished.

        Its shard and its votes are written before.
        """
        if hidden:
            save_tensors(self._hidden_path(block), {name: state.cpu() for name, state in hidden.items()})
        write_json(self._record_path(block), record.as_json())
        if block:
            self._hidden_path(block - 1).unlink(missing_ok=True)

    def hidden_after(self, block: int) -> dict[str, Tensor]:
        """The hidden states that `finish_block` kept."""
        return load_file(self._hidden_path(block))

    def records(self) -> list[BlockRecord]:
        """The records of the finished blocks."""
        return [BlockRecord.read(self._record_path(block)) for block in range(self.n_finished)]

    def survey_records(self) -> list[SurveyRecord]:
        """The records of the finished blocks of a survey."""
        return [SurveyRecord.read(self._record_path(block)) for block in range(self.n_finished)]

    # Models and result -------------------------------------------------------------------------

    def model_dir(self, participant: str | None = None) -> Path:
        """Where a finished model is: the run's own, or a participant's."""
        parent = self.folder if participant is None else self.folder / "participants" / participant
        return parent / "model"

    def unfinished_model_dir(self, participant: str | None = None) -> Path:
        """Where a model grows shard by shard until `publish_model` moves it."""
        return self.model_dir(participant).with_name("model.unfinished")

    def publish_model(self, participant: str | None = None) -> None:
        """Move a complete model to its place; harmless if that was done before."""
        unfinished = self.unfinished_model_dir(participant)
        if unfinished.exists():
            unfinished.replace(self.model_dir(participant))

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return (self.folder / "result.json").exists()

    def finish(self, record: RunRecord | SurveyRun) -> None:
        """Write the manifest and drop what only an unfinished run needs."""
        write_json(self.folder / "result.json", record.as_json())
        shutil.rmtree(self.folder / "state", ignore_errors=True)


def _differences(found: Any, expected: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two JSON values differ, with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [*expected, *(key for key in found if key not in expected)]
        return [
            difference
            for key in keys
            for difference in _differences(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == expected else [(name, found, expected)]
