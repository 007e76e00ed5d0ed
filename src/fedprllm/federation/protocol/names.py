"""Tensor names on the wire: paths relative to the block, because the header identifies the block.

``model.layers.7.mlp.up_proj.weight`` becomes ``mlp.up_proj``, and its mask, where both are sent,
``mlp.up_proj.mask``. With full names, the overhead of masks would exceed the format's limit of 0.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fedprllm.models.block import Linear

__all__ = ["from_wire", "to_wire"]

_T = TypeVar("_T")
_MASK = ".mask"


def to_wire(values: Mapping[str, _T], linears: Mapping[str, Linear]) -> dict[str, _T]:
    """Rename keys from the names of the Linears' weights to their paths inside the block."""
    return _renamed(values, {name: linear.path for name, linear in linears.items()})


def from_wire(values: Mapping[str, _T], linears: Mapping[str, Linear]) -> dict[str, _T]:
    """Rename keys from paths inside the block to the names of the Linears' weights; reverses `to_wire`."""
    return _renamed(values, {linear.path: name for name, linear in linears.items()})


def _renamed(values: Mapping[str, _T], names: Mapping[str, str]) -> dict[str, _T]:
    renamed = {}
    for name, value in values.items():
        stem = name if name in names else name.removesuffix(_MASK)
        renamed[names.get(stem, stem) + name[len(stem) :]] = value
    assert len(renamed) == len(values)
    return renamed
