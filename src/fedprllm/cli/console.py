"""Shared by the federation's commands: terminals, interruption and clean endings."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from fedprllm.errors import ConfigError, FedprllmError, FedprllmWarning, RunError
from fedprllm.files import is_full

__all__ = [
    "Interruption",
    "absolute",
    "attend",
    "console",
    "ending",
    "errors",
    "explain",
    "heed",
    "holding",
    "interruptible",
    "need_flare",
    "need_keys",
    "need_plots",
    "noting",
    "print_sparsity",
    "say_interrupted",
]

console = Console()
errors = Console(stderr=True)
_asked_to_end = Event()


def print_sparsity(record: Any) -> None:
    """Print how much of the model is zero, how much of the blocks is prunable, and what deviated."""
    if (smaller := record.reduction) is not None:
        console.print(
            f"[bold]{smaller.of_blocks:.1%}[/] fewer parameters in the blocks, {smaller.of_model:.1%} in all"
        )
        numbers = " → ".join(f"{n:,}" for n in smaller.n_parameters)
        files = " → ".join(f"{n / 1e6:,.1f} MB" for n in smaller.n_bytes)
        console.print(f"{numbers} parameters, files of {files}")
    if smaller is None or record.n_zeros:
        console.print(f"[bold]{record.sparsity:.2%}[/] of {record.n_prunable:,} weights are zero")
    if record.coverage is not None:
        console.print(f"{record.coverage:.1%} of the blocks' weight matrices are prunable")
    for deviation in record.deviations():
        console.print(f"[yellow]note[/]     {escape(deviation)}", soft_wrap=True)


def need_flare() -> None:
    """Check that the engine is installed.

    Raises:
        ConfigError: NVIDIA FLARE is missing. The message says how to install it.
    """
    _need("federation", "a federation needs NVIDIA FLARE", "nvflare")


def need_keys() -> None:
    """Check that what makes keys and certificates is installed.

    Raises:
        ConfigError: It is missing. The message says how to install it.
    """
    _need("federation", "an identity needs the package cryptography", "cryptography")


def need_plots() -> None:
    """Check that what draws and lays out reports is installed, before anything is computed for one.

    Raises:
        ConfigError: It is missing. The message says how to install it.
    """
    _need("report", "reports and studies need matplotlib and Jinja2", "matplotlib", "jinja2")


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Print what a user should know as notes; other warnings as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FedprllmWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, FedprllmWarning):
                errors.print(f"note     {escape(str(message))}", soft_wrap=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _need(extra: str, sentence: str, *modules: str) -> None:
    from importlib.util import find_spec

    if any(find_spec(module) is None for module in modules):
        raise ConfigError(f"{sentence}: pip install 'fedprllm[{extra}]'")


def absolute(source: str) -> str:
    """Make an existing path absolute, because a federation's processes have other working directories."""
    return str(Path(source).resolve()) if Path(source).exists() else source


# Failures in words ------------------------------------------------------------------------------


class Interruption(BaseException):
    """Ctrl-C. It is no KeyboardInterrupt, which the parser of the command line ends with its own words."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into an `Interruption`. Commands of a federation have their own way (`ending`)."""

    def stop(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interruption from None
    finally:
        signal.signal(signal.SIGINT, before)


def say_interrupted(words: str) -> int:
    """Print that a command was interrupted; returns the exit status."""
    errors.print(f"[yellow]interrupted[/]{': ' if words else ''}{escape(words)}", soft_wrap=True)
    return 130


def explain(error: FedprllmError | OSError) -> int:
    """Print a user's mistake, or what the system refused, in one line; returns the exit status.

    Raises:
        OSError: It is neither about a file nor about space, and therefore a bug.
    """
    if isinstance(error, OSError):
        if error.filename is None and not is_full(error):
            raise error
        named = f"{error.filename}: " if error.filename is not None else ""
        advice = _ADVICE.get(type(error), "")
        words = f"{named}{error.strerror or error}{advice}"
    else:
        words = str(error)
    errors.print(f"[bold red]error:[/] {escape(words)}", soft_wrap=True)
    return 2


_ADVICE: dict[type, str] = {
    PermissionError: "; check its permissions, or name another file or folder",
    NotADirectoryError: "; name a folder",
    FileExistsError: "; a file of this name is in the way of a folder: choose another",
    IsADirectoryError: "; name a file",
    FileNotFoundError: "; check its name",
}


def _leave(status: int) -> None:
    """End this process at once. FLARE's session threads would keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def heed() -> None:
    """Re-raise a pending interrupt, because the engine swallows exceptions."""
    if _asked_to_end.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def ending(
    if_interrupted: str | Callable[[], str] = "the same command continues",
) -> Iterator[None]:
    """Run a command, print a user's mistake, and end the process regardless of the engine's threads.

    SIGTERM and a closed terminal are handled like Ctrl-C: processes that were started are ended first.

    Args:
        if_interrupted: What to tell the user after an interruption.
    """

    def stop(*_: object) -> None:
        _asked_to_end.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        yield
    except (FedprllmError, OSError) as error:
        _leave(explain(error))
    except (KeyboardInterrupt, Interruption):
        _leave(say_interrupted(if_interrupted if isinstance(if_interrupted, str) else if_interrupted()))
    _leave(0)


@contextlib.contextmanager
def holding(kit: Path, in_use: str) -> Iterator[None]:
    """Hold a kit: two processes with one certificate would take each other's place.

    Args:
        kit: The kit.
        in_use: What to tell the user if another process holds it, with ``{kit}``.

    Raises:
        RunError: Another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(kit / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(in_use.format(kit=kit)) from None
    try:
        yield
    finally:
        lock.release()


def attend(
    start: Callable[[], Any], what: str, kit: Path, look: Callable[[], object] = lambda: False
) -> None:
    """Keep a process of the engine running until it ends or the user interrupts it.

    Args:
        start: Starts the process.
        what: Description of the process for messages.
        kit: Folder with the process's logs.
        look: Called every second. The process is ended when it returns True.

    Raises:
        RunError: The process ended with an error.
    """
    from fedprllm.federation.flare.processes import running

    with running(start) as process:
        log = escape(str(kit / "log.txt"))
        errors.print(f"{escape(what)} has started; its log is {log}; press Ctrl-C to stop", soft_wrap=True)
        while (status := process.poll()) is None:
            if look() is True:
                return
            time.sleep(1.0)
    if status:
        raise RunError(f"{what} ended with status {status}: see {kit / 'console.txt'} and {kit / 'log.txt'}")
