"""Atomic file writes: a file gets its name only once it is complete, so it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fedprllm.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["atomic_path", "free_bytes", "names_of", "read_json", "save_tensors", "write_json", "write_text"]

_LONGEST_NAME = 100
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename it to ``path`` when the ``with`` block succeeds.

    Raises:
        RunError: The disk is full. The incomplete file is removed, and the run can be resumed later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise RunError(
            f"no space left while writing {path}: {free_bytes(path.parent) / 1e6:.0f} MB are free. "
            "Finished blocks are kept; free some space and run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    # safetensors reports the operating system's error only in its message.
    return any(f"(os error {code})" in str(error) for code in _NO_SPACE)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    # Imported here because site processes that only pass bytes on write files too, without needing torch.
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        # safetensors creates files that only their owner can read, whatever the umask.
        temporary.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds ``path`` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def names_of(sources: Sequence[str | Path]) -> list[str]:
    """A unique short name for each source: the stem of the file, with a number if it is taken.

    The names work as file names on every system. Any character other than letters, digits, dot, dash and
    underscore becomes a dash; no name is empty, begins with a dot, is much longer than 100 characters, or
    differs from another one only in case.
    """
    names: list[str] = []
    taken: set[str] = set()
    for source in sources:
        stem = str(source) if str(source).startswith("hf:") else Path(source).stem
        base = re.sub(r"[^\w.-]+", "-", stem).strip(".")[:_LONGEST_NAME] or "text"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
