"""What all computing processes of a participant have in common: how they start, fail, end and are limited."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fedprllm.federation.plan import SiteSettings

__all__ = [
    "Failed",
    "end_with_parent",
    "is_out_of_memory",
    "lift_memory_limit",
    "limit_resources",
    "start_python",
]


class Failed(Exception):  # noqa: N818  it carries a status and is not a defect
    """Work at a participant cannot continue.

    Attributes:
        code: Reason, as the coordinator hears it.
        tensor: Name of the first tensor or setting of the model that differs.
        value: The participant's value of that setting, if it is a number.
    """

    def __init__(self, code: str, tensor: str = "", message: str = "", value: float | None = None) -> None:
        super().__init__(message or code)
        self.code, self.tensor, self.value = code, tensor, value


def start_python(module: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a module in a process of its own, which ends when this process does (`end_with_parent`).

    Args:
        module: The module to run.
        arguments: Its arguments.
        log: File to which its output is appended.
    """
    with log.open("ab") as output:
        # The standard input is a pipe, whose other end closes with this process.
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def end_with_parent() -> None:
    """End this process when the parent, at the other end of standard input, is gone for any reason."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def limit_resources(settings: SiteSettings) -> None:
    """Keep to the number of threads and the memory that the participant grants."""
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    if settings.memory_gb is not None:
        import resource

        # This limit covers data and private mappings: all tensors, but not the mapped checkpoint.
        limit = int(settings.memory_gb * 1e9)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def lift_memory_limit() -> None:
    """Let the process have memory again, to say that it had too little."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether a computation failed for lack of memory: on the CPU, only torch's words show it."""
    return isinstance(error, MemoryError) or "alloc" in str(error) or "out of memory" in str(error)
