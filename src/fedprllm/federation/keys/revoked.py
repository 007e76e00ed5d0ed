"""Participants and certificates that the server refuses although they have not expired.

SERVER_KIT/revoked.json: ``{"names": {"north": "2026-..."}, "serials": ["1f3c...", ...]}``. The coordinator's
commands write it. The server, its job process and ``fedprllm federation run`` reread it whenever it changes,
so a revocation needs no restart.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from fedprllm.errors import RunError
from fedprllm.files import read_json, write_json

__all__ = ["REVOKED", "Revoked", "RevokedFile", "check_server_here", "readmit", "revoke", "supersede"]

REVOKED = "revoked.json"
# FLARE's own list: read when the server starts, written while it runs.
_FLARE_LIST = "disabled_clients.json"


@dataclass(frozen=True)
class Revoked:
    """The participants and certificates that the server refuses.

    Attributes:
        names: Time of revocation (UTC, ISO 8601) by participant.
        serials: Serial numbers, in hexadecimal, of certificates replaced by one with another key.
    """

    names: dict[str, str] = field(default_factory=dict)
    serials: frozenset[str] = frozenset()


class RevokedFile:
    """A server's list, reread when it changes.

    Args:
        server_kit: Folder of the server's kit.
    """

    def __init__(self, server_kit: Path) -> None:
        self._path = server_kit / REVOKED
        self._lock = threading.Lock()
        self._state: tuple[int, int, int] | None = None
        self._revoked = Revoked()

    def read(self) -> Revoked:
        """Return the current list.

        Raises:
            RunError: The file is damaged.
        """
        with self._lock:
            state = self._stat()
            if state != self._state:
                self._revoked = Revoked() if state is None else _parse(self._path)
                self._state = state
            return self._revoked

    def names(self) -> set[str]:
        """The participants that are currently revoked."""
        return set(self.read().names)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        # A replaced file has a new inode, even if the clock is too coarse to show the change.
        return found.st_ino, found.st_mtime_ns, found.st_size


def _parse(path: Path) -> Revoked:
    try:
        content = read_json(path)
        names = {str(name): str(since) for name, since in content["names"].items()}
        return Revoked(names, frozenset(str(serial) for serial in content["serials"]))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RunError(
            f"{path} is damaged, so the revoked participants are unknown: restore it from your backup, or "
            "delete it and run 'fedprllm federation revoke NAME' again for every revoked participant"
        ) from None


def revoke(server_kit: Path, name: str) -> None:
    """Refuse a participant from now on, with any certificate."""
    _change(server_kit, add={name: datetime.now(UTC).isoformat(timespec="seconds")})


def readmit(server_kit: Path, name: str) -> None:
    """Admit a revoked participant again; replaced certificates stay refused."""
    _change(server_kit, remove=name)
    path = server_kit / _FLARE_LIST
    if path.exists():
        listed = read_json(path)["disabled_clients"]
        write_json(path, {"disabled_clients": [other for other in listed if other != name]})


def supersede(server_kit: Path, serials: list[str]) -> None:
    """Refuse certificates whose holder has replaced its key, from now on."""
    _change(server_kit, serials=serials)


def _change(
    server_kit: Path,
    add: dict[str, str] | None = None,
    remove: str | None = None,
    serials: list[str] | None = None,
) -> None:
    check_server_here(server_kit)
    with FileLock(server_kit / f".{REVOKED}.lock"):
        before = RevokedFile(server_kit).read()
        names = (add or {}) | before.names
        names.pop(remove or "", None)
        write_json(
            server_kit / REVOKED, {"names": names, "serials": sorted(before.serials | set(serials or []))}
        )


def check_server_here(server_kit: Path) -> None:
    """Check that the server's kit is on this machine, because only there the server reads the list.

    Raises:
        RunError: The server's kit is not on this machine.
    """
    if not server_kit.is_dir():
        raise RunError(
            f"{server_kit} does not exist: the list of revoked participants and certificates is part of the "
            "server's kit, so run this command on the server's machine"
        )
