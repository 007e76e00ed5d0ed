"""What a participant has answered, kept so that no answer is ever given in two versions.

An answer is durable before it is sent. A participant that is killed and started again gives the same answer
to the same question, and refuses another question: two different answers of one step could together tell
what each of them hides.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedprllm.errors import SecureError
from fedprllm.files import write_private

__all__ = ["Entry", "FileJournal", "Journal", "MemoryJournal", "once"]

_LENGTHS = 3
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """One step: what was asked, what was answered, and what the participant keeps to itself."""

    question: bytes
    answer: bytes
    kept: bytes = b""


class Journal(Protocol):
    """Where entries are kept."""

    def read(self, step: str) -> Entry | None:
        """The entry of a step, if there is one."""

    def write(self, step: str, entry: Entry) -> None:
        """Keep the entry of a step; it is durable when this returns."""

    def delete(self) -> None:
        """Forget all entries, and with them all keys."""


class MemoryJournal:
    """Entries in memory, for sessions that end with their process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def read(self, step: str) -> Entry | None:
        """See `Journal`."""
        return self._entries.get(step)

    def write(self, step: str, entry: Entry) -> None:
        """See `Journal`."""
        self._entries[step] = entry

    def delete(self) -> None:
        """See `Journal`."""
        self._entries.clear()


class FileJournal:
    """Entries in files that only their owner can read, one file for each step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, step: str) -> Path:
        return self._folder / f"{hashlib.sha256(step.encode()).hexdigest()[:32]}.step"

    def read(self, step: str) -> Entry | None:
        """See `Journal`.

        Raises:
            SecureError: The file is damaged.
        """
        path = self._path(step)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        body, checksum = data[:-32], data[-32:]
        if hashlib.sha256(step.encode() + body).digest() != checksum:
            raise SecureError(f"{path} is damaged: begin the run again, in a new session")
        lengths = [int.from_bytes(body[8 * i : 8 * i + 8], "little") for i in range(_LENGTHS)]
        parts, start = [], _LENGTHS * _LENGTH_BYTES
        for length in lengths:
            parts.append(body[start : start + length])
            start += length
        return Entry(*parts)

    def write(self, step: str, entry: Entry) -> None:
        """See `Journal`."""
        parts = (entry.question, entry.answer, entry.kept)
        body = b"".join([*(len(part).to_bytes(_LENGTH_BYTES, "little") for part in parts), *parts])
        write_private(self._path(step), body + hashlib.sha256(step.encode() + body).digest())

    def delete(self) -> None:
        """See `Journal`."""
        shutil.rmtree(self._folder, ignore_errors=True)


def once(journal: Journal, step: str, question: bytes, make: Callable[[], tuple[bytes, bytes]]) -> Entry:
    """The entry of a step, made now or found.

    Args:
        journal: Where entries are kept.
        step: Name of the step, unique in the session.
        question: Everything that the answer depends on.
        make: Makes the answer and what is kept beside it.

    Raises:
        SecureError: The step was answered to another question.
    """
    entry = journal.read(step)
    if entry is None:
        entry = Entry(question, *make())
        journal.write(step, entry)
    elif entry.question != question:
        raise SecureError(
            f"{step}: asked a second time with another content, which could reveal this participant's update"
        )
    return entry
