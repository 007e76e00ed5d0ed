"""A log of the coordinator's requests to a participant and of refused messages, on disk and in the terminal.

Each line of requests.jsonl is ``{"time", "from", "what", "times", ...}``, plus ``"refused"`` with the reason
for a refused message. Repetitions within a minute are counted and written once, so that no sender can flood
the log.
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
# Keys of an entry that contain text from the sender.
_SENT = ("refused", "reason")
# Distinct refusals written per minute and sender; further ones are counted together.
_MAX_KINDS = 50


@dataclass(frozen=True)
class Refused:
    """A refused message.

    Attributes:
        sender: Address of the sender.
        what: Channel and topic, or the order.
        reason: Why it was refused.
    """

    sender: str
    what: str
    reason: str


class Notes(Protocol):
    """Records the messages a process refused, and the server's refusals of this participant."""

    def note_refused(self, refused: Refused) -> None:
        """Record a refused message."""

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Record that ``sender`` rejects this participant."""


class Unwritten:
    """Notes of a process that keeps no file."""

    def note_refused(self, refused: Refused) -> None:
        """Do nothing."""

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Do nothing."""


@dataclass
class _Seen:
    entry: dict[str, Any]
    written: float
    n_more: int = 0


class RequestLog:
    """Appends lines to a file shared by several processes of a participant.

    Args:
        path: The log file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def note(self, sender: str, what: str, **details: Any) -> None:
        """Record a request before it is carried out.

        Args:
            sender: Name of the sender.
            what: What was requested.
            **details: Further keys of the line.

        Raises:
            RunError: The line cannot be written, so the request must not be carried out.
        """
        self._write({"from": sender, "what": what, **details})

    def note_refused(self, refused: Refused) -> None:
        """Record a refused message. It stays refused even if the line cannot be written."""
        try:
            self._write({"from": refused.sender, "what": refused.what, "refused": refused.reason})
        except RunError:
            return

    def note_turned_away(self, sender: str, reason: str) -> None:
        """Record that the server turned this participant away, to be shown on its terminal."""
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
        """Drop entries that are a minute old, after writing the number of their repetitions."""
        for key, seen in list(self._seen.items()):
            if now - seen.written >= _MINUTE_S:
                del self._seen[key]
                if seen.n_more:
                    self._append(seen.entry, seen.n_more)

    def _within_bounds(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Merge an entry with others if its sender has too many distinct ones."""
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
                f"cannot write {self._path}: {error.strerror}; no request is carried out unless it is logged"
            ) from None


def _key(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """All lines, oldest first; an empty list if there is no log yet.

    Raises:
        RunError: A line is damaged; the message gives its number.
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
    """Yield the lines added since the previous step, endlessly, starting at the end of the file."""
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
    """Format a line for the terminal."""
    if line["what"] == "turned away" and "reason" in line:
        again = f" ({line['times']} more times)" if line["times"] > 1 else ""
        return f"{line['from']} turned this participant away{again}: {line['reason']}"
    details = [
        f"{name} {line[name][:8] if name == 'run' else line[name]}"
        for name in ("run", "block", "job")
        if line.get(name) is not None
    ]
    words = ", ".join([f"{line['from']} asked: {line['what']}", *details])
    if line["times"] > 1:
        words += f" ({line['times']} more times)"
    return words + (f"; refused: {line['refused']}" if "refused" in line else "")
