"""The votes a run keeps of a block: their bit planes, as they were counted.

A safetensors file holds for each weight matrix a tensor uint8 [n_planes, ceil(n / 8)]: bit ``i % 8`` of byte
``i // 8`` of plane p is bit p of the votes to prune weight i, counted row by row of [out, in]. Its metadata
holds for each, as JSON, ``shape``, (out, in), and ``transposed``: the checkpoint stores it as [in, out].
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from jaxtyping import Integer
from safetensors import safe_open
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes
from fedprllm.files import save_tensors
from fedprllm.models.block import Linear

__all__ = ["StoredVotes", "save_votes"]


def save_votes(path: Path, votes: Mapping[str, PackedVotes], linears: Mapping[str, Linear]) -> None:
    """Write the votes on a block's Linears, if there are any, whole or not at all."""
    counted = {name: votes[name] for name in linears if name in votes}
    about = {
        name: json.dumps({"shape": linears[name].shape, "transposed": linears[name].transposed})
        for name in counted
    }
    if counted:
        save_tensors(path, {name: packed.planes() for name, packed in counted.items()}, about)


class StoredVotes(Mapping[str, Tensor]):
    """Votes by weight name, each read and counted when it is asked for.

    Args:
        files: Where the votes on each weight are.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Integer[Tensor, "n m"]:
        """Votes in the orientation of the checkpoint, in the smallest type that holds them."""
        with safe_open(self._files[name], framework="pt") as opened:
            about = json.loads(opened.metadata()[name])
            planes = opened.get_tensor(name).clone()
        counts = PackedVotes.of_planes(planes, prod(about["shape"])).counts().reshape(about["shape"])
        return counts.T.contiguous() if about["transposed"] else counts

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
