"""Write safetensors files of which only a part is in memory at a time.

The library writes tensors that are all in memory at once. A block of a mixture of experts is most of what a
process can hold, so what is made from it on the way to the disk is made piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from fedprllm.files import atomic_path

__all__ = ["Made", "Writable", "made", "write_tensors"]


@dataclass(frozen=True)
class Made:
    """A tensor that is made when it is needed.

    Attributes:
        shape: Its shape.
        dtype: Its precision.
        parts: Makes its parts, of which each continues the one before along the first dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @classmethod
    def like(cls, tensor: Tensor, make: Callable[[], Tensor]) -> Made:
        """A tensor of the shape and precision of another, made in one piece."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: [make()])


Writable = Tensor | Made


def made(tensor: Writable) -> Tensor:
    """The tensor itself, in memory."""
    if isinstance(tensor, Tensor):
        return tensor
    parts = list(tensor.parts())
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(tensor.shape)


def write_tensors(path: Path, tensors: Mapping[str, Writable], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, one tensor after the other.

    Args:
        path: The file.
        tensors: Tensors by name, on any device.
        metadata: Text to keep with them.

    Raises:
        DiskFull: The disk is full.
    """
    # Largest entries first, as the library does it: then every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + _n_bytes(tensor)
        shape = list(tensor.shape)
        header[name] = {"dtype": _code(tensor.dtype), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            assert _write(file, tensor) == _n_bytes(tensor), f"'{name}' is not what its shape says"


def _n_bytes(tensor: Writable) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _write(file: BinaryIO, tensor: Writable) -> int:
    """Write a tensor part by part, and return how many bytes that were."""
    n_written = 0
    for part in [tensor] if isinstance(tensor, Tensor) else tensor.parts():
        n_written += file.write(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        del part  # the next one is made before the name is bound again
    return n_written


@cache
def _code(dtype: torch.dtype) -> str:
    """The name that safetensors gives to a precision."""
    found: str = json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]
    return found
