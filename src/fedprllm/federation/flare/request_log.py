"""What the coordinator asked of a participant, and what was refused: one line each, on disk and terminal.

REQUESTS.jsonl: ``{"time", "from", "what", "times", ...}``, and ``"refused"`` with the reason where it was.
What repeats within a minute is counted, and written once; nothing that somebody sends makes it grow faster.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fedprllm.errors import DiskFull, RunError
from fedprllm.files import append_line, is_full

__all__ = ["REQUESTS", "Notes", "Refused", "RequestLog", "Unwritten", "follow", "read_requests", "sentence"]

REQUESTS = "requests.jsonl"

_MINUTE_S = 60.0
# Parts of an entry that hold words of whoever is at the other end.
_SENT = ("refused", "reason")
# Different refusals that are written within a minute; further ones are counted together.
_MAX_KINDS = 50


@dataclass(frozen=True)
class Refused:
    """A message that was refused: who sent it, as what, and why it was refused."""

    sender: str
    what: str
    reason: str


class Notes(Protocol):
    """Where a process writes down what it refused, and what refused it."""

    def note_refused(self, refused: Refused) -> None:
        """Write down what was refused."""

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Write down that ``sender`` wants nothing from this participant."""


class Unwritten:
    """Notes of a process that has no file for them."""

    def note_refused(self, refused: Refused) -> None:
        """Write nothing."""

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Write nothing."""


@dataclass
class _Seen:
    entry: dict[str, Any]
    written: float
    n_more: int = 0


class RequestLog:
    """Appends lines to a file that several processes of a participant share.

    Args:
        path: File of the lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def note(self, sender: str, what: str, **details: Any) -> None:
        """Write down what was asked, before it is done.

        Raises:
            RunError: The line could not be written, so it must not be done.
        """
        self._write({"from": sender, "what": what, **details})

    def note_refused(self, refused: Refused) -> None:
        """Write down what was refused; it stays refused if the disk is full."""
        try:
            self._write({"from": refused.sender, "what": refused.what, "refused": refused.reason})
        except RunError:
            return

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Write down that the server turned this participant away, for its terminal."""
        with contextlib.suppress(RunError):
            self._write({"from": sender, "what": "turned away", "reason": reason})

    def _write(self, entry: dict[str, Any]) -> None:
        with self._lock:
            now = time.monotonic()
            self._forget(now)
            if not entry.keys().isdisjoint(_SENT) and _key(entry) not in self._seen:
                entry = self._within_bounds(entry)
            seen = self._seen.get(_key(entry))
            if seen is not None:
                seen.n_more += 1
                return
            self._append(entry, 1)
            self._seen[_key(entry)] = _Seen(entry, now)

    def _forget(self, now: float) -> None:
        """What was first seen a minute ago is written with its count, and may be written again."""
        for key, seen in list(self._seen.items()):
            if now - seen.written >= _MINUTE_S:
                del self._seen[key]
                if seen.n_more:
                    self._append(seen.entry, seen.n_more)

    def _within_bounds(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a sender sends in too many forms is counted as one."""
        n_kinds = sum(seen.entry["from"] == entry["from"] for seen in self._seen.values())
        if n_kinds < _MAX_KINDS:
            return entry
        return {"from": entry["from"], "what": "more", "refused": "too many to list: see the log"}

    def _append(self, entry: dict[str, Any], times: int) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry, "times": times}
        try:
            append_line(self._path, json.dumps(line))
        except OSError as error:
            kind = DiskFull if is_full(error) else RunError
            raise kind(
                f"cannot write {self._path}: {error.strerror}; nothing is done for the coordinator without it"
            ) from None


def _key(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """Every line, oldest first; none if nothing was asked yet.

    Raises:
        RunError: A line is damaged (numbered).
    """
    if not path.exists():
        return []
    return [
        _parse(path, number, line)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        raise RunError(f"{path}: line {number} is damaged") from None
    return parsed


def follow(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Endlessly, the lines that were added since the last time, from now on."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        lines = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            position += len(whole)
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        yield lines


def sentence(line: dict[str, Any]) -> str:
    """A line as it is shown on the terminal."""
    if line["what"] == "turned away" and "reason" in line:
        again = f" ({line['times']} times more)" if line["times"] > 1 else ""
        return f"{line['from']} turned this participant away{again}: {line['reason']}"
    details = [
        f"{name} {line[name][:8] if name == 'run' else line[name]}"
        for name in ("run", "block", "job")
        if line.get(name) is not None
    ]
    words = ", ".join([f"{line['from']} asked: {line['what']}", *details])
    if line["times"] > 1:
        words += f" ({line['times']} times more)"
    return words + (f"; refused: {line['refused']}" if "refused" in line else "")
