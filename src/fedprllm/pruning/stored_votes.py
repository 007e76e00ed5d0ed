"""The votes on a block, stored as the bit planes in which they were counted.

A safetensors file holds one tensor uint8 [n_planes, ceil(n / 8)] for each weight matrix: bit ``i % 8`` of
byte ``i // 8`` of plane p is bit p of the number of votes to prune weight i, where weights are numbered row
by row of [out, in]. The file's metadata holds, for each matrix, a JSON object with its ``shape`` (out, in)
and ``transposed``, which is true if the checkpoint stores the matrix as [in, out].
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from jaxtyping import Integer
from safetensors import safe_open
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes
from fedprllm.errors import RunError
from fedprllm.files import file_digest
from fedprllm.models.block import Linear
from fedprllm.models.tensor_file import Made, write_tensors

__all__ = ["StoredVotes", "save_votes"]


def save_votes(path: Path, votes: Mapping[str, PackedVotes], linears: Mapping[str, Linear]) -> None:
    """Write the votes on a block's Linears atomically; without votes, no file is written."""
    counted = {name: votes[name] for name in linears if name in votes}
    about = {
        name: json.dumps({"shape": linears[name].shape, "transposed": linears[name].transposed})
        for name in counted
    }
    if counted:
        write_tensors(path, {name: _planes(packed) for name, packed in counted.items()}, about)


def _planes(votes: PackedVotes) -> Made:
    """The planes of the votes on one matrix, which are not copied."""
    planes = votes.each_plane()
    return Made((len(planes), planes[0].numel() if planes else 0), torch.uint8, lambda: planes)


class StoredVotes(Mapping[str, Tensor]):
    """Votes by weight name, read and counted on access.

    Args:
        files: The file with the votes on each weight, by weight name.
        digests: SHA-256 of these files, where it is known.
    """

    def __init__(self, files: Mapping[str, Path], digests: Mapping[Path, str] | None = None) -> None:
        self._files = files
        self._unchecked = dict(digests or {})

    def __getitem__(self, name: str) -> Integer[Tensor, "n m"]:
        """Votes in the checkpoint's orientation, in the smallest integer type that holds them.

        Raises:
            RunError: The file with the votes is missing or damaged.
        """
        self._check(self._files[name])
        with safe_open(self._files[name], framework="pt") as opened:
            about = json.loads(opened.metadata()[name])
            planes = opened.get_tensor(name).clone()
        counts = PackedVotes.of_planes(planes, prod(about["shape"])).counts().reshape(about["shape"])
        return counts.T.contiguous() if about["transposed"] else counts

    def _check(self, path: Path) -> None:
        if not path.exists():
            raise RunError(f"{path} is missing: restore it, or run again in another folder")
        if path in self._unchecked and file_digest(path) != self._unchecked[path]:
            raise RunError(f"{path} is damaged: restore it, or run again in another folder")
        self._unchecked.pop(path, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
