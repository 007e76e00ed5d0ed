"""What the commands of a federation share: terminals, and clean endings."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedprllm.errors import ConfigError, FedprllmError, RunError

__all__ = ["absolute", "attend", "console", "ending", "errors", "heed", "need_flare"]

console = Console()
errors = Console(stderr=True)
_asked_to_end = Event()


def need_flare() -> None:
    """Refuse, with what to install, where the engine is missing.

    Raises:
        ConfigError: NVIDIA FLARE is not installed.
    """
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise ConfigError("a federation needs NVIDIA FLARE: pip install 'fedprllm[federation]'")


def absolute(source: str) -> str:
    """The absolute form of an existing path: processes of a federation have their own working directories."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _leave(status: int) -> None:
    """End at once: FLARE's session threads would keep Python alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def heed() -> None:
    """Re-raise a pending interrupt: the engine swallows exceptions, this one included."""
    if _asked_to_end.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending(if_interrupted: str = "the same command continues") -> Iterator[None]:
    """Print a user's mistake and end the process, whatever threads the engine left.

    A request to end from outside and a closed terminal count as Ctrl-C: what was started is ended first.
    """

    def stop(*_: object) -> None:
        _asked_to_end.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        yield
    except FedprllmError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        _leave(2)
    except KeyboardInterrupt:
        errors.print(f"[yellow]interrupted[/]: {escape(if_interrupted)}", soft_wrap=True)
        _leave(130)
    _leave(0)


def attend(start: Callable[[], Any], what: str, kit: Path, look: Callable[[], object] = lambda: None) -> None:
    """Keep a process of the engine running until it ends or we are interrupted.

    Args:
        start: Starts it.
        what: What the process is, for messages.
        kit: The kit it belongs to.
        look: Called every second.

    Raises:
        RunError: It ended with an error of its own.
    """
    from fedprllm.federation.flare.processes import running

    with running(start) as process:
        errors.print(f"{what} is running, its log is {kit / 'log.txt'}; Ctrl-C ends it", soft_wrap=True)
        while (status := process.poll()) is None:
            look()
            time.sleep(1.0)
    if status:
        raise RunError(f"{what} ended with status {status}: see {kit / 'console.txt'} and {kit / 'log.txt'}")
