"""Pack a message of numbers, many of them zeros, and unpack it again bit by bit.

docs/packed-format.md specifies the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO

from fedprllm.errors import ModelError
from fedprllm.packing.values import (
    CHUNK_VALUES,
    copy_exactly,
    pack_bytes,
    pack_values,
    unpack_bytes,
    unpack_values,
)

__all__ = ["is_packed", "pack_message", "unpack_message"]

_MAGIC = b"FEDPMSG\0"
_HEAD = struct.Struct("<8sBIQI")  # magic, bytes per value, bytes before the values, of the values, after them
_ITEM_BYTES = (1, 2, 4, 8)


def pack_message(message: bytes, n_before: int, n_after: int, itemsize: int) -> bytes:
    """Pack a message, or return it as it is if that is not longer.

    Args:
        message: The message. It must not begin like a packed one.
        n_before: Number of bytes before the values.
        n_after: Number of bytes after them.
        itemsize: Bytes per value, 1, 2, 4 or 8: of floating-point numbers, but for 1.
    """
    assert not is_packed(message), "a message is packed once"
    n_bytes = len(message) - n_before - n_after
    assert n_bytes >= 0, f"{n_before} + {n_after} bytes around the values of a message of {len(message)}"
    assert n_bytes % itemsize == 0, f"{n_bytes} bytes are no whole number of values"
    parts = [_HEAD.pack(_MAGIC, itemsize, n_before, n_bytes, n_after), pack_bytes(message[:n_before])]
    for start, size in _chunks(n_bytes, itemsize):
        chunk = message[n_before + start : n_before + start + size]
        if itemsize == 1:
            parts.append(pack_bytes(chunk))
        else:
            pack_values(chunk, itemsize, floating=True, write=parts.append)
    packed = b"".join([*parts, pack_bytes(message[len(message) - n_after :])])
    return packed if len(packed) < len(message) else message


def is_packed(data: bytes) -> bool:
    """Whether `pack_message` packed the bytes; otherwise they are the message itself."""
    return data[: len(_MAGIC)] == _MAGIC


def unpack_message(data: bytes, max_bytes: int) -> bytes:
    """Reverse `pack_message`.

    Args:
        data: From an untrusted sender.
        max_bytes: Length of the longest message to accept. No more is ever decompressed.

    Raises:
        ModelError: The data is damaged, or the message longer.
    """
    if not is_packed(data):
        return data
    source = BytesIO(data)

    def read(n_bytes: int) -> bytes:
        return copy_exactly(source, n_bytes)

    _, itemsize, n_before, n_bytes, n_after = _HEAD.unpack(read(_HEAD.size))
    if itemsize not in _ITEM_BYTES or n_bytes % itemsize:
        raise ModelError(f"{n_bytes} bytes cannot be values of {itemsize} bytes")
    if n_before + n_bytes + n_after > max_bytes:
        raise ModelError(
            f"expected a message of at most {max_bytes} bytes, found {n_before + n_bytes + n_after}"
        )
    message = bytearray(unpack_bytes(read, n_before))
    for _, size in _chunks(n_bytes, itemsize):
        message += (
            unpack_bytes(read, size)
            if itemsize == 1
            else unpack_values(read, size // itemsize, itemsize, floating=True)
        )
    message += unpack_bytes(read, n_after)
    if source.read(1):
        raise ModelError("there are bytes behind its end")
    return bytes(message)


def _chunks(n_bytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """First byte and number of bytes of each chunk."""
    most = CHUNK_VALUES * itemsize
    for start in range(0, n_bytes, most):
        yield start, min(most, n_bytes - start)
