"""What the coordinator requires of a transport, and the ways in which a run ends early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedprllm.errors import RunError

__all__ = ["Channel", "Interrupted", "QuorumLost"]


class Channel(Protocol):
    """Transport to the participants, implemented on top of the engine."""

    def present(self) -> set[str]:
        """Names of the participants that can currently be reached."""

    def ask(self, names: Sequence[str], message: bytes, timeout_s: float) -> dict[str, bytes]:
        """Send a message and wait for the answers.

        Args:
            names: Participants to ask.
            message: The request, as `fedprllm.federation.protocol.messages.pack` writes it.
            timeout_s: Seconds to wait.

        Returns:
            Answers that arrived in time, by authenticated name.
        """


class QuorumLost(RunError):  # noqa: N818  what happened, not a defect
    """Too few participants are left. Everything is kept, and the run can be continued."""


class Interrupted(Exception):  # noqa: N818
    """A participant disappeared but may come back, or the job was stopped. Another job continues the run."""
