"""Pack a model's folder into one file, and unpack it again bit by bit. docs/packed-format.md specifies it.

Both directions stream: at most one chunk of values is in memory. The reader trusts nothing: names cannot
lead out of the folder, nothing is decompressed beyond its declared length, and checksums cover every file and
the whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from fedprllm.errors import ConfigError, ModelError, RunError
from fedprllm.files import atomic_path, free_bytes, rename
from fedprllm.packing.values import (
    CHUNK_VALUES,
    copy_exactly,
    pack_bytes,
    pack_values,
    unpack_bytes,
    unpack_values,
)

__all__ = ["Packed", "pack", "unpack"]

VERSION = 1
_MAGIC = b"FEDPACK\0"
_HEAD = struct.Struct("<8sHHIQ")  # magic, version, flags, number of files, bytes of all files
_FILE = struct.Struct("<HBQ")  # length of the name, kind, bytes of the file
_HEADER_LENGTH = struct.Struct("<Q")
_PLAIN, _SAFETENSORS = 0, 1
_DIGEST_BYTES = 32
_PLAIN_CHUNK = 2**22
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_FLOATING = {"F16", "BF16", "F32", "F64"}


class Packed(NamedTuple):
    """What packing or unpacking did.

    Attributes:
        n_files: Number of files.
        n_bytes: Size of the folder in bytes.
        n_packed_bytes: Size of the packed file in bytes.
    """

    n_files: int
    n_bytes: int
    n_packed_bytes: int


class _Tensor(NamedTuple):
    dtype: str
    n_bytes: int


def pack(folder: Path, out: Path) -> Packed:
    """Pack a model's folder into one file.

    Args:
        folder: A Hugging Face folder. All of its files are packed, zeros of safetensors files as one bit.
        out: The file to write.

    Raises:
        ConfigError: The folder holds no model, or ``out`` lies in it.
        ModelError: A safetensors file is damaged.
        RunError: The disk is full.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model's folder: it has no config.json; name RUN/model")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} lies in the folder that is packed: name a file outside of {folder}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    n_bytes = sum(path.stat().st_size for path in files)
    with atomic_path(out) as temporary, temporary.open("wb") as target:
        writer = _Writer(target)
        writer(_HEAD.pack(_MAGIC, VERSION, 0, len(files), n_bytes))
        for path in files:
            _pack_file(path, path.relative_to(folder).as_posix(), writer)
        target.write(writer.digest.digest())
    return Packed(len(files), n_bytes, out.stat().st_size)


def unpack(packed: Path, out: Path) -> Packed:
    """Unpack a file into a folder, bit by bit as it was packed.

    Args:
        packed: A file written by `pack`.
        out: The folder to write, which must not exist yet. It appears when it is whole.

    Raises:
        ConfigError: ``packed`` does not exist, or ``out`` does.
        ModelError: The file is damaged, or not a packed model.
        RunError: The disk has too little space.
    """
    if not packed.is_file():
        raise ConfigError(f"there is no file {packed}: name a file that 'fedprllm pack' wrote")
    if out.exists():
        raise ConfigError(f"{out} exists: name a folder that does not exist yet")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with packed.open("rb") as source:
            n_files, n_bytes = _unpack_all(source, unfinished)
        rename(unfinished, out)
    except ModelError as error:
        raise ModelError(f"{packed} is damaged or not a packed model: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Packed(n_files, n_bytes, packed.stat().st_size)


# Writing ---------------------------------------------------------------------------------------


class _Writer:
    """Writes bytes and digests them."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.digest = hashlib.sha256()

    def __call__(self, data: bytes) -> None:
        self._target.write(data)
        self.digest.update(data)


class _Reader:
    """Reads bytes and digests them."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.digest = hashlib.sha256()

    def __call__(self, n_bytes: int) -> bytes:
        data = copy_exactly(self._source, n_bytes)
        self.digest.update(data)
        return data


def _pack_file(path: Path, name: str, write: _Writer) -> None:
    is_safetensors = path.suffix == ".safetensors"
    encoded, size = name.encode(), path.stat().st_size
    write(_FILE.pack(len(encoded), _SAFETENSORS if is_safetensors else _PLAIN, size))
    write(encoded)
    with path.open("rb") as source:
        read = _Reader(source)
        try:
            (_pack_safetensors if is_safetensors else _pack_plain)(read, size, write)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
    write(read.digest.digest())


def _pack_plain(read: _Reader, size: int, write: _Writer) -> None:
    for start in range(0, size, _PLAIN_CHUNK):
        write(pack_bytes(read(min(_PLAIN_CHUNK, size - start))))


def _pack_safetensors(read: _Reader, size: int, write: _Writer) -> None:
    (n_header,) = _HEADER_LENGTH.unpack(read(_HEADER_LENGTH.size))
    if n_header > min(size, _MAX_HEADER_BYTES):
        raise ModelError(
            f"expected a header of at most {min(size, _MAX_HEADER_BYTES)} bytes, found {n_header}"
        )
    header = read(n_header)
    write(_HEADER_LENGTH.pack(n_header))
    write(pack_bytes(header))
    for dtype, n_bytes in _chunks(_tensors(header, size - _HEADER_LENGTH.size - n_header)):
        pack_values(read(n_bytes), _ITEM_BYTES[dtype], floating=dtype in _FLOATING, write=write)


def _tensors(header: bytes, n_data_bytes: int) -> list[_Tensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises:
        ModelError: The header is not one, or its tensors do not fill the file.
    """
    try:
        entries: dict[str, Any] = json.loads(header)
        spans = sorted(
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]), str(entry["dtype"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelError("its header is not that of a safetensors file") from None
    end, tensors = 0, []
    for first, last, dtype in spans:
        if dtype not in _ITEM_BYTES:
            raise ModelError(f"type {dtype} is unknown to this version of the format")
        if first != end or last < first or (last - first) % _ITEM_BYTES[dtype]:
            raise ModelError("its tensors do not lie one behind the other")
        tensors.append(_Tensor(dtype, last - first))
        end = last
    if end != n_data_bytes:
        raise ModelError(f"expected {end} bytes of tensors, found {n_data_bytes}")
    return tensors


def _chunks(tensors: list[_Tensor]) -> Iterator[_Tensor]:
    """The chunks in which tensors are packed, each of one type."""
    for tensor in tensors:
        most = CHUNK_VALUES * _ITEM_BYTES[tensor.dtype]
        for start in range(0, tensor.n_bytes, most):
            yield _Tensor(tensor.dtype, min(most, tensor.n_bytes - start))


# Reading ---------------------------------------------------------------------------------------


def _unpack_all(source: BinaryIO, folder: Path) -> tuple[int, int]:
    read = _Reader(source)
    magic, version, flags, n_files, n_bytes = _HEAD.unpack(read(_HEAD.size))
    if magic != _MAGIC:
        raise ModelError("it does not begin like one")
    if (version, flags) != (VERSION, 0):
        raise ModelError(f"expected version {VERSION}, found {version}; use a newer version of fedprllm")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if free_bytes(folder.parent) < n_bytes:
        raise RunError(
            f"the disk of {folder.parent} has {free_bytes(folder.parent) / 1e9:.1f} GB free, and the model "
            f"takes {n_bytes / 1e9:.1f} GB: free some space, or name a folder on another disk"
        )
    folder.mkdir()
    last, left = "", n_bytes
    for _ in range(n_files):
        n_name, kind, size = _FILE.unpack(read(_FILE.size))
        name = _checked_name(read(n_name), last)
        if kind not in (_PLAIN, _SAFETENSORS) or size > left:
            raise ModelError(f"the entry of {name} is not valid")
        last, left = name, left - size
        _unpack_file(read, folder / name, kind, size)
    if left:
        raise ModelError(f"{left} bytes are missing")
    found = read.digest.digest()
    if copy_exactly(source, _DIGEST_BYTES) != found or source.read(1):
        raise ModelError("its checksum does not match")
    return n_files, n_bytes


def _checked_name(encoded: bytes, last: str) -> str:
    """A file's name, which lies inside the folder.

    Raises:
        ModelError: It does not, or is out of order.
    """
    try:
        name = encoded.decode()
    except UnicodeDecodeError:
        raise ModelError("the name of a file is not UTF-8") from None
    path = PurePosixPath(name)
    parts = name.split("/")
    inside = not path.is_absolute() and "\\" not in name and "\0" not in name and ":" not in name
    if not inside or any(part in ("", ".", "..") for part in parts) or parts <= last.split("/"):
        raise ModelError(f"{name[:80]!r} cannot be the next file's name")
    return name


def _unpack_file(read: _Reader, path: Path, kind: int, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as target:
        write = _Writer(target)
        (_unpack_safetensors if kind == _SAFETENSORS else _unpack_plain)(read, size, write)
    if read(_DIGEST_BYTES) != write.digest.digest():
        raise ModelError(f"the checksum of {path.name} does not match")


def _unpack_plain(read: _Reader, size: int, write: _Writer) -> None:
    for start in range(0, size, _PLAIN_CHUNK):
        write(unpack_bytes(read, min(_PLAIN_CHUNK, size - start)))


def _unpack_safetensors(read: _Reader, size: int, write: _Writer) -> None:
    (n_header,) = _HEADER_LENGTH.unpack(read(_HEADER_LENGTH.size))
    if n_header > min(size, _MAX_HEADER_BYTES):
        raise ModelError(
            f"expected a header of at most {min(size, _MAX_HEADER_BYTES)} bytes, found {n_header}"
        )
    header = unpack_bytes(read, n_header)
    write(_HEADER_LENGTH.pack(n_header))
    write(header)
    for dtype, n_bytes in _chunks(_tensors(header, size - _HEADER_LENGTH.size - n_header)):
        item_bytes = _ITEM_BYTES[dtype]
        write(unpack_values(read, n_bytes // item_bytes, item_bytes, floating=dtype in _FLOATING))
