"""What the coordinator needs of a transport, and the ways a run ends early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedprllm.errors import RunError

__all__ = ["Channel", "Interrupted", "QuorumLost"]


class Channel(Protocol):
    """How messages reach participants: the engine's part."""

    def present(self) -> set[str]:
        """Names of the participants that can be asked at all."""

    def ask(self, names: Sequence[str], message: bytes, timeout_s: float) -> dict[str, bytes]:
        """Answers of those that answered in time, by name; the name is authenticated."""


class QuorumLost(RunError):  # noqa: N818  what happened, not a defect
    """Too few participants are left; everything is kept, and the run can be continued."""


class Interrupted(Exception):  # noqa: N818
    """A participant is gone that may come back: another job continues the run."""
