"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fedprllm.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "atomic_path",
    "distinct_names",
    "free_bytes",
    "names_of",
    "read_json",
    "save_tensors",
    "write_json",
    "write_private",
    "write_text",
]

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` that becomes ``path`` when the block ends well.

    Raises:
        RunError: the disk is full (what was written is removed; the run can go on later).
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


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, at no moment anybody else; whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds ``path`` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# Suffixes that tell how a text is stored; what follows any other dot belongs to the name.
_SUFFIXES = re.compile(r"(\.(txt|text|md|jsonl?|ndjson|csv|tsv|parquet))?(\.(gz|bz2|xz))?$", re.IGNORECASE)
_LONGEST_NAME = 80  # bytes: leaves room for what the names of files add to it
# Files cannot have these names on Windows, whatever the suffix.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def names_of(sources: Sequence[str | Path], reserved: Collection[str] = ()) -> list[str]:
    """A distinct name for each source: that of the file without the suffix, numbered where taken.

    Args:
        sources: Paths, and texts of the hub (``hf:...``).
        reserved: Names to give to none of them.
    """
    return distinct_names([_stem(source) for source in sources], reserved)


def distinct_names(wanted: Sequence[str], reserved: Collection[str] = ()) -> list[str]:
    """Names of files for each of the wanted names, distinct on every file system.

    Anything but letters, digits, dot, dash and underscore becomes a dash; dots at either end are dropped;
    long names are cut and end with a digest of the whole. Names that differ only in case are not distinct:
    the first keeps the name, the others get the lowest free number from 2 on.

    Args:
        wanted: The names, in order.
        reserved: Names to give to none of them.
    """
    safe = [_safe(name) for name in wanted]
    forbidden = {_key(name) for name in reserved} | _DEVICES
    taken = forbidden | {_key(name) for name in safe}
    kept: set[str] = set()
    names = []
    for name in safe:
        key = _key(name)
        if key in kept or key in forbidden or key.split(".")[0] in _DEVICES:
            number = next(n for n in count(2) if _key(_numbered(name, n)) not in taken)
            name = _numbered(name, number)
        kept.add(_key(name))
        taken.add(_key(name))
        names.append(name)
    return names


def _numbered(name: str, number: int) -> str:
    # Windows looks at what stands before the first dot.
    device, dot, rest = name.partition(".")
    return f"{device}-{number}{dot}{rest}" if _key(device) in _DEVICES else f"{name}-{number}"


def _key(name: str) -> str:
    """What file systems compare: some ignore case, or how an accent is written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(source: str | Path) -> str:
    if str(source).startswith("hf:"):
        return str(source)
    path = Path(os.path.expanduser(source))  # noqa: PTH111  a home that does not exist is no error here
    # "." and ".." are folders with a name.
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return _SUFFIXES.sub("", name, count=1) or name


def _safe(name: str) -> str:
    safe = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip(".") or "text"
    if len(safe.encode()) <= _LONGEST_NAME:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
