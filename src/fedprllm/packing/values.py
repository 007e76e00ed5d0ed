"""Packing the values of a tensor: one bit says which are not zero, and only those are stored, by bytes.

A value is zero if all of its bits are: -0.0 is stored like any other number, so packing loses nothing. The
sign of a floating-point number is moved behind its exponent and mantissa, so that the exponents, which
repeat, are bytes of their own and compress well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import zstandard

from fedprllm.errors import ModelError

__all__ = ["CHUNK_VALUES", "pack_bytes", "pack_values", "unpack_bytes", "unpack_values"]

CHUNK_VALUES = 2**22  # bounds the memory: values are packed in chunks of this many
_LEVEL = 9
_SEGMENT = struct.Struct("<BI")  # how it is stored, number of stored bytes
_COUNT = struct.Struct("<I")
_RAW, _ZSTD = 0, 1
_UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}

Read = Callable[[int], bytes]


def pack_bytes(data: bytes) -> bytes:
    """Pack at most 4 GiB of bytes as one segment: compressed, or as they are if that is shorter."""
    compressed = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=False).compress(data)
    if len(compressed) < len(data):
        return _SEGMENT.pack(_ZSTD, len(compressed)) + compressed
    return _SEGMENT.pack(_RAW, len(data)) + data


def unpack_bytes(read: Read, n_bytes: int) -> bytes:
    """Read a segment that holds ``n_bytes``.

    Raises:
        ModelError: It holds another number of bytes, or cannot be decompressed. No more than ``n_bytes`` are
            ever decompressed.
    """
    method, n_stored = _SEGMENT.unpack(read(_SEGMENT.size))
    if method not in (_RAW, _ZSTD) or n_stored > n_bytes or (method == _RAW and n_stored != n_bytes):
        raise ModelError(f"expected a segment of {n_bytes} bytes, found {n_stored} bytes of kind {method}")
    stored = read(n_stored)
    if method == _RAW:
        return stored
    try:
        with zstandard.ZstdDecompressor().stream_reader(BytesIO(stored)) as reader:
            data = reader.read(n_bytes + 1)
    except zstandard.ZstdError as error:
        raise ModelError(f"a segment cannot be decompressed: {error}") from None
    if len(data) != n_bytes:
        raise ModelError(f"expected a segment of {n_bytes} bytes, found {len(data)} after decompression")
    return data


def pack_values(data: bytes, itemsize: int, *, floating: bool, write: Callable[[bytes], object]) -> None:
    """Pack one chunk of values.

    Args:
        data: The values, little-endian, at most `CHUNK_VALUES`.
        itemsize: Bytes per value: 1, 2, 4 or 8.
        floating: The values are floating-point numbers.
        write: Called with the packed bytes, in order.
    """
    values = np.frombuffer(data, _UNSIGNED[itemsize])
    is_kept = values != 0
    kept = values[is_kept]
    write(_COUNT.pack(len(kept)))
    write(pack_bytes(np.packbits(is_kept, bitorder="little").tobytes()))
    if floating:
        kept = _rotate_left(kept, 1)
    planes = kept.view(np.uint8).reshape(-1, itemsize)
    for index in range(itemsize):
        write(pack_bytes(np.ascontiguousarray(planes[:, index]).tobytes()))


def unpack_values(read: Read, n_values: int, itemsize: int, *, floating: bool) -> bytes:
    """Reverse `pack_values`.

    Raises:
        ModelError: The chunk is damaged, or could not have been written by `pack_values`.
    """
    (n_kept,) = _COUNT.unpack(read(_COUNT.size))
    if n_kept > n_values:
        raise ModelError(f"expected at most {n_values} values in a chunk, found {n_kept}")
    bits = np.frombuffer(unpack_bytes(read, (n_values + 7) // 8), np.uint8)
    is_kept = np.unpackbits(bits, bitorder="little").view(bool)
    if is_kept[n_values:].any() or int(is_kept.sum()) != n_kept:
        raise ModelError(f"expected a mask of {n_values} values with {n_kept} set bits, found another one")
    planes = np.empty((n_kept, itemsize), np.uint8)
    for index in range(itemsize):
        planes[:, index] = np.frombuffer(unpack_bytes(read, n_kept), np.uint8)
    kept = planes.reshape(-1).view(_UNSIGNED[itemsize])
    if floating:
        kept = _rotate_left(kept, 8 * itemsize - 1)
    values = np.zeros(n_values, _UNSIGNED[itemsize])
    values[is_kept[:n_values]] = kept
    if int(np.count_nonzero(values)) != n_kept:
        raise ModelError("a value that is stored must not be zero")
    return bytes(values.tobytes())


def _rotate_left(values: np.ndarray, n_bits: int) -> np.ndarray:
    left, right = n_bits, 8 * values.dtype.itemsize - n_bits
    rotated: np.ndarray = np.bitwise_or(np.left_shift(values, left), np.right_shift(values, right))
    return rotated


def copy_exactly(source: BinaryIO, n_bytes: int) -> bytes:
    """Read exactly ``n_bytes``.

    Raises:
        ModelError: The file ends earlier.
    """
    data = source.read(n_bytes)
    if len(data) != n_bytes:
        raise ModelError(f"the file ends too early: expected {n_bytes} more bytes, found {len(data)}")
    return data
