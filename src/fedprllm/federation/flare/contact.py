"""Which connections a process of FLARE has, written to a small file for whoever shows it.

KIT/fedprllm/contact.json   at a participant: whether the server answers, and since when
KIT/contact.json            at the server: the connected participants, and since when
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from fedprllm.errors import RunError
from fedprllm.federation.flare.policy import Party, party, root
from fedprllm.files import read_json, write_json

__all__ = ["Contact", "contact_path", "is_connected", "note_sites", "read_contact"]

_LOOK_S = 1.0


def contact_path(folder: Path) -> Path:
    """Path of the file in a server's kit, or in a participant's folder with its ledger."""
    return folder / "contact.json"


def read_contact(folder: Path) -> dict[str, Any]:
    """What the file says; empty if there is none yet."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = read_json(contact_path(folder))
        return found
    return {}


def is_connected(core_cell: Any) -> bool:
    """Whether a site's process has a connection to the server."""
    return "server" in core_cell.agents


class Contact:
    """Whether the server answers a participant: a connection alone may be one that it turns away.

    Args:
        folder: The participant's folder with its ledger.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.is_made = False
        self._write()

    def note(self, *, made: bool) -> None:
        """Write down whether the server has answered just now."""
        if made != self.is_made:
            self.is_made = made
            self._write()

    def _write(self) -> None:
        _write(self._folder, {"connected": self.is_made, "since": time.time()})


def note_sites(core_cell: Any, kit: Path) -> None:
    """Write down, endlessly, which participants are connected to a server's process."""
    since: dict[str, float] = {}
    _write(kit, since)
    while True:
        time.sleep(_LOOK_S)
        names = {root(endpoint) for endpoint in list(core_cell.agents) if party(endpoint) is Party.SITE}
        if names != set(since):
            since = {name: since.get(name, time.time()) for name in sorted(names)}
            _write(kit, since)


def _write(folder: Path, content: dict[str, Any]) -> None:
    """Write the file, which nothing depends on: a full disk must not end the process."""
    with contextlib.suppress(OSError, RunError):
        write_json(contact_path(folder), content, durable=False)
