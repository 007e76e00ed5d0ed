"""Fingerprints of a model's tensors: a SHA-256 for each tensor, and one over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.progress import Progress, silent

__all__ = ["first_difference", "model_digest", "tensor_fingerprints"]


def tensor_fingerprints(model: BlockwiseModel, progress: Progress = silent) -> dict[str, str]:
    """SHA-256 of every tensor by name: first those outside blocks, then block by block.

    Raises:
        ModelError: A weight contains NaN or infinity; the message names it.
    """
    stored = [name for name in model.skeleton.state_dict() if name in model.checkpoint]
    blocks = [[name for name in stored if name.startswith(f"{block}.")] for block in model.block_names]
    groups = [model.names_outside_blocks(), *blocks]
    table: dict[str, str] = {}
    with progress("checking the weights", len(groups)) as advance:
        for names in groups:
            table |= model.checkpoint.fingerprints(names)
            advance(1)
    return table


def model_digest(table: Mapping[str, str]) -> bytes:
    """A single SHA-256 (32 bytes) over the names and values, in table order."""
    digest = hashlib.sha256()
    for name, value in table.items():
        digest.update(f"{name}={value}\n".encode())
    return digest.digest()


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Name of the first entry that is missing, extra or has a different value; None if there is none."""
    for name, value in expected.items():
        if found.get(name) != value:
            return name
    return next((name for name in found if name not in expected), None)
