"""Names on the wire: a tensor goes by the module inside its block, for the header names the block.

``model.layers.7.mlp.up_proj.weight`` is ``mlp.up_proj`` there, and its mask beside other tensors
``mlp.up_proj.mask``. Full names would take masks over the 0.1 % that the format may add to their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fedprllm.models.block import Linear

__all__ = ["from_wire", "to_wire"]

_T = TypeVar("_T")
_MASK = ".mask"


def to_wire(values: Mapping[str, _T], linears: Mapping[str, Linear]) -> dict[str, _T]:
    """Rename what is said about a block's Linears from the names of their weights to their paths."""
    return _renamed(values, {name: linear.path for name, linear in linears.items()})


def from_wire(values: Mapping[str, _T], linears: Mapping[str, Linear]) -> dict[str, _T]:
    """The reverse of `to_wire`."""
    return _renamed(values, {linear.path: name for name, linear in linears.items()})


def _renamed(values: Mapping[str, _T], names: Mapping[str, str]) -> dict[str, _T]:
    renamed = {}
    for name, value in values.items():
        stem = name if name in names else name.removesuffix(_MASK)
        renamed[names.get(stem, stem) + name[len(stem) :]] = value
    assert len(renamed) == len(values)
    return renamed
