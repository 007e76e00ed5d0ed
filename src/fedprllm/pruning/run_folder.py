"""The folder of a run; a killed run continues after its last finished block.

RUN/
  run.json                  identity of the run: configuration, model, participants, versions
  blocks/block-0007.json    record of a block (written last: its existence marks the block as finished)
  votes/block-0007.safetensors
  sums/block-0007.safetensors    sums of squares of its inputs, where participants share sums
  state/hidden-0007.safetensors   hidden states after that block; only the newest are kept
  state/spilled/            hidden states beyond the memory limit, while a process is running
  model/                    the pruned model, moved here as a whole once it is complete
  participants/NAME/model/  the same for each participant, under local-only
  choice.json, candidates/  what was measured to choose a structure (`fedprllm.pruning.choice`)
  result.json               the result (written last: its existence marks the run as complete)

Every file is on the disk before a record names it, and the records hold the digests of the files and of
themselves. A run that continues checks them, and computes again what is damaged.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import ConfigDict
from safetensors.torch import load_file
from torch import Tensor

from fedprllm.errors import DiskFull, FedprllmWarning, RunBusy, RunError
from fedprllm.files import (
    file_digest,
    free_bytes,
    is_full,
    read_sealed,
    remove_temporary,
    rename,
    save_tensors,
    write_sealed,
)
from fedprllm.pruning.records import BlockRecord, Record, RunRecord, SurveyRecord

__all__ = ["Run", "check_files", "versions"]


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
    def when_free(self, wait_s: float) -> Iterator[Self]:
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

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file: expected a folder for the run; choose one with --out")
        manifest = self.folder / "run.json"
        if self.folder.exists() and not manifest.exists() and self._foreign_files():
            raise RunError(
                f"{self.folder} is not a run's folder: it contains {self._foreign_files()[0]!r} but no "
                "run.json; choose another folder with --out"
            )
        is_new = not self.folder.exists()
        self._make()
        if not manifest.exists():
            self._check_space(is_new=is_new)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunBusy(
                f"another process is working on {self.folder}: wait for it, or choose another folder with "
                "--out"
            ) from None
        try:
            if manifest.exists():
                self._check_identity(_identity_in(manifest))
            else:
                write_sealed(manifest, self._identity)
            remove_temporary(self.folder)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _make(self) -> None:
        """Make the folder, and try whether files can be written in it.

        Raises:
            RunError: They cannot. The message says why.
        """
        probe = self.folder / f".{os.getpid()}.probe.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            kind = DiskFull if is_full(error) else RunError
            raise kind(
                f"{self.folder} cannot be written ({error.strerror}): choose another folder with --out"
            ) from None

    def _foreign_files(self) -> list[str]:
        """What no run writes before ``run.json``; a job of a federation notes first what it was asked."""
        names = (path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        return sorted(name for name in names if name != "federation")

    def _check_space(self, *, is_new: bool) -> None:
        free = free_bytes(self.folder)
        if free < self._needed_bytes:
            if is_new:
                self.folder.rmdir()
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

    def sums_path(self, block: int) -> Path:
        """File with the sums of squares of a block's inputs."""
        return self.folder / "sums" / f"block-{block:04d}.safetensors"

    @property
    def n_finished(self) -> int:
        """Number of finished blocks."""
        block = 0
        while self._record_path(block).exists():
            block += 1
        return block

    def finish_block(
        self,
        block: int,
        record: BlockRecord | SurveyRecord,
        hidden: Mapping[str, Tensor] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """Save the hidden states and the record, which is written last and marks the block as finished.

        Args:
            block: Block index, whose shard, votes and sums must have been written before.
            record: Its record, to which the digests of its files are added.
            hidden: Hidden states after the block.
            files: Further files that belong to the block.
        """
        if hidden:
            save_tensors(self._hidden_path(block), {name: state.cpu() for name, state in hidden.items()})
        digests = {
            "files": self.digests([*(path for path in self._files_of(block) if path.exists()), *files]),
            "newest": self.digests([self._hidden_path(block)] if hidden else []),
        }
        record = record.model_copy(update={name: found or None for name, found in digests.items()})
        write_sealed(self._record_path(block), record.as_json())
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

    def kept(self, name: str, what: str) -> dict[str, Any] | None:
        """What an earlier process stored before the first block; None if there is nothing.

        Args:
            name: Name of the file.
            what: What happens again if it is damaged.

        Warns:
            FedprllmWarning: It is damaged.
        """
        try:
            return read_sealed(self.folder / name)
        except FileNotFoundError:
            return None
        except RunError as error:
            warnings.warn(FedprllmWarning(f"{error}; {what} again"), stacklevel=3)
            return None

    # Damage ------------------------------------------------------------------------------------

    def _files_of(self, block: int) -> list[Path]:
        """The files of a block that belong to the result: its votes or sums, and its shard in every model."""
        shards = self.folder.glob(f"**/model.unfinished/model-{block + 2:05d}-of-*.safetensors")
        return [self.votes_path(block), self.sums_path(block), *sorted(shards)]

    def digests(self, paths: Sequence[Path]) -> dict[str, str]:
        """Digests by the path that each file has in the complete run."""
        return {
            path.relative_to(self.folder).as_posix().replace("model.unfinished/", "model/"): file_digest(path)
            for path in paths
        }

    def damage(self) -> tuple[int, str] | None:
        """The first finished block with a missing or damaged file, and the file in words."""
        numbers = sorted(int(path.stem[-4:]) for path in self.folder.glob("blocks/block-????.json"))
        for block in range(self.n_finished):
            try:
                record = _Vouching.model_validate(read_sealed(self._record_path(block)))
                is_newest = block == self.n_finished - 1
                check_files(self.folder, {**(record.files or {}), **((is_newest and record.newest) or {})})
            except RunError as error:
                return block, str(error)
        if numbers and numbers[-1] >= self.n_finished:
            return self.n_finished, f"{self._record_path(self.n_finished)} is missing"
        return None

    def forget_damaged(self, restarts: bool = True) -> None:
        """Forget finished blocks of an incomplete run that cannot be relied on, and say so.

        Args:
            restarts: Begin again at the first block, because the input of a later one is not kept.

        Warns:
            FedprllmWarning: Something is damaged. The warning names it and what is computed again.
        """
        if (found := self.damage()) is None:
            return
        block, what = found
        first = 0 if restarts else block
        warnings.warn(
            FedprllmWarning(f"{what}; the run continues and computes everything from block {first} on again"),
            stacklevel=2,
        )
        (self.folder / "result.json").unlink(missing_ok=True)
        # Backwards: what a kill leaves must be without gaps.
        for path in sorted(self.folder.glob("blocks/block-????.json"), reverse=True):
            if int(path.stem[-4:]) >= first:
                path.unlink()
        for path in self.folder.glob("state/hidden-*.safetensors"):
            path.unlink()

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
            rename(unfinished, self.model_dir(participant))

    def reopen_model(self, participant: str | None = None) -> None:
        """Move a model back whose run was killed before its result: its last files are written again."""
        final, unfinished = self.model_dir(participant), self.unfinished_model_dir(participant)
        if final.exists() and not unfinished.exists():
            rename(final, unfinished)

    def model_files(self, models: Mapping[str, str]) -> dict[str, str]:
        """Digests of the files of complete models that belong to no block, by relative path.

        The model cards are left out, since their readers may complete them.
        """
        known = {path for record in self.records() for path in record.files or {}}
        paths = [path for folder in models.values() for path in sorted((self.folder / folder).rglob("*"))]
        found = [path for path in paths if path.is_file() and path.name != "README.md"]
        return self.digests([path for path in found if path.relative_to(self.folder).as_posix() not in known])

    @property
    def is_complete(self) -> bool:
        """Whether the run is complete, that is, its result exists."""
        return (self.folder / "result.json").exists()

    def check_result(self) -> None:
        """Check every file that the result of a complete run names.

        Raises:
            RunError: One is missing or damaged; the message names it and what to do.
        """
        path = self.folder / "result.json"
        try:
            record = RunRecord.read(path)
            for files in (record.files, *(block.files for block in record.blocks)):
                check_files(self.folder, files or {})
        except RunError as error:
            raise RunError(
                f"{error}. The run was complete: restore the file, or delete {path} and repeat the command "
                "to have the missing part computed again"
            ) from None

    def finish(self, record: Record) -> None:
        """Write the result and delete what only an unfinished run needs."""
        write_sealed(self.folder / "result.json", record.as_json())
        shutil.rmtree(self.folder / "state", ignore_errors=True)


class _Vouching(Record):
    """The part of a block's record that vouches for files."""

    model_config = ConfigDict(extra="ignore")

    files: dict[str, str] | None = None
    newest: dict[str, str] | None = None


def _identity_in(manifest: Path) -> dict[str, Any]:
    try:
        return read_sealed(manifest)
    except RunError as error:
        raise RunError(
            f"{error}. It tells which run the folder belongs to: restore it, or delete the folder "
            f"{manifest.parent} and run again"
        ) from None


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Check files of a run against their digests.

    Args:
        folder: The run's folder.
        digests: SHA-256 by path relative to the folder. A model's folder may still have its unfinished name.

    Raises:
        RunError: A file is missing or differs; the message names it.
    """
    for name, expected in digests.items():
        path = folder / name
        if not path.exists():
            parent = path.parent.with_name("model.unfinished") if path.parent.name == "model" else path.parent
            path = parent / path.name
        if not path.exists():
            raise RunError(f"{folder / name} is missing")
        if file_digest(path) != expected:
            raise RunError(f"{path} is damaged: it is not as the run wrote it")


def _differences(found: Any, expected: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two JSON values differ, each with both values."""
    if name.rpartition(".")[2] in ("source", "sources"):
        # Where a model or a text lies; what it holds is compared by its fingerprint.
        return []
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = [*expected, *(key for key in found if key not in expected)]
        return [
            difference
            for key in keys
            for difference in _differences(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == expected else [(name, found, expected)]
