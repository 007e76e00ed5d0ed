"""Files that are complete or absent: written under a temporary name, flushed to disk, then renamed.

Files that a run relies on have a digest, so that damage is noticed before they are used: JSON files contain
it (`write_sealed`), and for other files it is kept in the record that names them (`file_digest`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fedprllm.errors import DataError, DiskFull, RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "append_line",
    "atomic_path",
    "distinct_names",
    "file_digest",
    "flush_file",
    "free_bytes",
    "is_full",
    "names_of",
    "read_json",
    "read_sealed",
    "remove_temporary",
    "rename",
    "save_tensors",
    "sealed",
    "unsealed",
    "write_bytes",
    "write_json",
    "write_private",
    "write_sealed",
    "write_text",
]

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SEAL = "sha256"
_DAMAGED = "is damaged: its content does not match its digest"


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which is renamed to ``path`` if the block succeeds.

    Args:
        path: The file to write.
        durable: Flush the file and its folder to disk, so that the file survives a power failure. Turn it off
            only for files that can be lost.

    Raises:
        DiskFull: The disk is full. The temporary file is removed, and the run can continue later.
    """
    _make_folder(path.parent, durable=durable)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            flush_file(temporary)
        temporary.replace(path)
        if durable:
            _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise DiskFull(
            f"no space left while writing {path}: {free_bytes(path.parent) / 1e6:.0f} MB are free. "
            "Finished blocks are kept: free some space, then run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path, *, durable: bool) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing if durable else ():
        _flush_folder(made.parent)


def flush_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    if os.name == "nt":  # Windows cannot open folders and does not need this
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder, and flush the parent folders of both names to disk."""
    path.replace(target)
    for folder in {path.parent, target.parent}:
        _flush_folder(folder)


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files that killed processes left below a folder."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to the disk; if that fails, the file is as it was.

    Raises:
        OSError: The line could not be written.
    """
    data = f"{line}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    if isinstance(error, DiskFull):
        return True
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    # safetensors gives the operating system's error only as text.
    return any(f"(os error {code})" in str(error) for code in _NO_SPACE)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write a safetensors file atomically."""
    # Imported here because processes that only transport messages also write files, without needing torch.
    from safetensors.torch import save_file

    with atomic_path(path, durable=durable) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        # safetensors creates files that only their owner can read, regardless of the umask.
        temporary.chmod(mode)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", durable=durable)


def write_private(path: Path, content: bytes) -> None:
    """Write a file atomically that at no time anyone but its owner can read."""
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "wb") as file:
            file.write(content)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# Digests ---------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of its other keys added as ``sha256``."""
    values = {name: value for name, value in values.items() if name != _SEAL}
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return {**values, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def unsealed(value: Any, path: Path, *, required: bool = True) -> dict[str, Any]:
    """Check a sealed JSON object and return it without the digest.

    Args:
        value: The object.
        path: File it was read from, for errors.
        required: Whether to refuse an object without a digest.

    Raises:
        RunError: The digest does not match the content, or is required and missing.
    """
    if not isinstance(value, dict) or (required and _SEAL not in value):
        raise RunError(f"{path} has no digest: it is damaged or was written by another version of fedprllm")
    # Compare the values exactly as read: JSON has several ways to write the same number.
    if _SEAL in value and sealed(value)[_SEAL] != value[_SEAL]:
        raise RunError(f"{path} {_DAMAGED}")
    return {name: one for name, one in value.items() if name != _SEAL}


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest atomically."""
    write_json(path, sealed(json.loads(json.dumps(values))))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file written by `write_sealed`, without the digest.

    Raises:
        RunError: The file is damaged.
        FileNotFoundError: The file does not exist.
    """
    try:
        value = read_json(path)
    except (ValueError, RecursionError):
        raise RunError(f"{path} {_DAMAGED}") from None
    return unsealed(value, path)


# Space and names -------------------------------------------------------------------------------------------


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path``, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# Suffixes that give the format of a text; anything after another dot belongs to the name.
_SUFFIXES = re.compile(
    r"(\.(txt|text|md|jsonl?|jsonlines|ndjson|csv|tsv|tab|parquet))?(\.(gz|bz2|xz|lzma))?$", re.IGNORECASE
)
_LONGEST_NAME = 80  # bytes; leaves room for prefixes and suffixes of file names
# Windows does not allow files with these names, whatever their suffix.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def names_of(sources: Sequence[str | Path], reserved: Collection[str] = ()) -> list[str]:
    """A distinct name for each source: its file name without the suffix, numbered if it is taken.

    Args:
        sources: Paths and Hugging Face data sets (``hf:...``).
        reserved: Names that must not be used.

    Raises:
        DataError: A name has no letter, digit or underscore.
    """
    return distinct_names([_stem(source) for source in sources], reserved)


def distinct_names(wanted: Sequence[str], reserved: Collection[str] = ()) -> list[str]:
    """Turn names into file names that are distinct on every file system.

    Characters other than letters, digits, dots, dashes and underscores become dashes, and dots at either end
    are dropped. Long names are cut and end with a digest of the full name. Names that differ only in case
    count as equal: the first keeps its name, and the others get the lowest free number, starting at 2.

    Args:
        wanted: The names, in order.
        reserved: Names that must not be used.

    Raises:
        DataError: A name has no letter, digit or underscore.
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
    # Windows compares only the part before the first dot.
    device, dot, rest = name.partition(".")
    return f"{device}-{number}{dot}{rest}" if _key(device) in _DEVICES else f"{name}-{number}"


def _key(name: str) -> str:
    """A key that is equal for names that some file system treats as the same (case, Unicode form)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(source: str | Path) -> str:
    if str(source).startswith("hf:"):
        return str(source)
    path = Path(os.path.expanduser(source))  # noqa: PTH111  an unknown home folder is no error here
    # "." and ".." stand for folders that have a name.
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return _SUFFIXES.sub("", name, count=1) or name


def _safe(name: str) -> str:
    safe = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip(".").lstrip("-.")
    if not re.search(r"\w", safe):
        raise DataError(
            f"'{name}' cannot name a participant or a text: expected at least one letter or digit, found "
            "none. Rename the file, or choose a name yourself"
        )
    if len(safe.encode()) <= _LONGEST_NAME:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{safe.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
