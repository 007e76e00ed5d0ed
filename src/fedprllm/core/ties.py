"""Tie rules: which of several entries with equal scores or equal votes is pruned first.

A rule is a function ``(weight, seed_parts) -> keys``; the lowest key is pruned first, equal keys go by
the lowest index. One meaning in every comparison group, local and server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["TIES", "generator"]

SeedParts = tuple[object, ...]


def generator(*parts: object) -> torch.Generator:
    """A CPU generator that is a function of its arguments, for example (seed, participant, weight)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _random(weight: Float[Tensor, "out in"], seed_parts: SeedParts) -> Float[Tensor, "out in"]:
    """Seeded uniform keys (what the paper's code does for ``layer``, without its seed)."""
    keys = torch.rand(weight.shape, generator=generator(*seed_parts))
    return keys.to(weight.device)


def _magnitude(
    weight: Float[Tensor, "out in"],
    seed_parts: SeedParts,  # noqa: ARG001  one signature for all rules
) -> Float[Tensor, "out in"]:
    """Smaller ``|W|`` first; every party knows W, so this costs no privacy."""
    return weight.abs()


TieRule = Callable[[Float[Tensor, "out in"], SeedParts], Float[Tensor, "out in"]]

# None: by index, the rows from the top and each from the left (the paper's code in row and column mode).
TIES: dict[str, TieRule | None] = {"index": None, "random": _random, "magnitude": _magnitude}
