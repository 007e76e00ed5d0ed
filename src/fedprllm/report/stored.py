"""How large a model's files are, and at most are once packed, read from their headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

__all__ = ["Stored", "stored"]

_PACKED = ".fedpack"  # what `fedprllm pack` appends to a folder's name


@dataclass(frozen=True)
class Stored:
    """The files of a model.

    Attributes:
        n_bytes: Size of its weight files.
        packed_at_most: Size that `fedprllm.packing` stays below, apart from the headers of its segments: one
            bit for each value, and the values that are not zero as they are.
        packed: Size of the packed file beside the folder; None if there is none.
    """

    n_bytes: int
    packed_at_most: int
    packed: int | None


def stored(folder: Path, n_zeros: int) -> Stored | None:
    """What a model's folder holds; None if it is not there or its files cannot be read.

    Args:
        folder: The model's folder.
        n_zeros: Number of zeros known to be among its values.
    """
    paths = sorted(folder.glob("*.safetensors"))
    try:
        tensors = [tensor for path in paths for tensor in _tensors(path)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    if not any(n_values for n_values, _ in tensors):
        return None
    n_values, n_bytes = (sum(column) for column in zip(*tensors, strict=True))
    narrowest = min(of_tensor // values for values, of_tensor in tensors if values)
    packed = folder.with_name(folder.name + _PACKED)
    return Stored(
        sum(path.stat().st_size for path in paths),
        n_bytes - n_zeros * narrowest + n_values // 8,
        packed.stat().st_size if packed.is_file() else None,
    )


def _tensors(path: Path) -> Iterator[tuple[int, int]]:
    """Number of values and of bytes of each tensor in a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path}: the header is longer than the file")
        header = json.loads(file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            yield prod(about["shape"]), end - begin
