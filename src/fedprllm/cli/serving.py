"""What the server's terminal shows: who is connected, and which run is going on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from fedprllm.cli.line import StatusLine
from fedprllm.files import read_json

__all__ = ["ServerNews"]

# A job writes its progress at least this often.
_FRESH_S = 30.0


class ServerNews:
    """Keeps a line with the connected participants and the run that is going on.

    Args:
        kit: The server's kit.
        line: Where it is shown.
    """

    def __init__(self, kit: Path, line: StatusLine) -> None:
        self._kit, self._line, self._begin = kit, line, time.time()

    def __call__(self) -> None:
        """Show the state."""
        from fedprllm.federation.flare.contact import read_contact

        names = sorted(name for name, since in read_contact(self._kit).items() if since > self._begin)
        words = f"{len(names)} participant{'s' * (len(names) != 1)} connected"
        words += f": {', '.join(names)}" if names else ""
        run, progress = self._run()
        self._line.show(f"{words}; run {run}" if run else words, progress or "; no run is going on")

    def _run(self) -> tuple[str, str]:
        """Name and progress of a run whose job wrote a moment ago; empty if none is going on."""
        for path in sorted(self._kit.glob("runs/*/federation/status.json")):
            folder = path.parent.parent
            with contextlib.suppress(OSError, ValueError, LookupError):
                status = read_json(path)
                if time.time() - status["time"] < _FRESH_S and not (folder / "result.json").exists():
                    steps = status.get("steps", "blocks")
                    decided = f"{status['n_finished']} of {status['n_blocks']} {steps} decided"
                    return folder.name, f": {status['doing']}, {decided}"
        return "", ""
