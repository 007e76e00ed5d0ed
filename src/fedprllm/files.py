"""Files that are whole or absent: written under a temporary name, then renamed."""

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
    """Yield a temporary name beside ``path`` that becomes ``path`` when the block ends well.

    Raises:
        RunError: The disk is full (what was written is removed; the run can go on later).
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
            "Finished blocks are kept: free some space and run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    # safetensors reports the operating system's error in its text only.
    return any(f"(os error {code})" in str(error) for code in _NO_SPACE)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    # The processes of a site that only carry bytes write files too, and have no use for torch.
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        # safetensors makes files that only their owner can read, whatever the umask says.
        temporary.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
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
    """A short name for each source, no two alike: the file's stem, numbered where it is taken.

    Names are safe as names of files on every system: anything but letters, digits, dot, dash and underscore
    becomes a dash, none is empty or begins with a dot, none is much longer than 100 characters, and none
    differs from another in upper and lower case alone.
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
