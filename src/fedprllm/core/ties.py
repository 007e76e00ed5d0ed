"""Tie rules: which of several equal scores or vote counts is pruned first.

A rule is a function ``(weight, seed_parts) -> keys``; the lowest key is pruned first, and among equal keys
the lowest index. A rule means the same in every comparison group, local or server.
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
    """A CPU generator seeded by its arguments, for example (seed, participant, weight)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _random(weight: Float[Tensor, "out in"], seed_parts: SeedParts) -> Float[Tensor, "out in"]:
    """Seeded uniform keys (the paper's code draws unseeded ones for ``layer``)."""
    keys = torch.rand(weight.shape, generator=generator(*seed_parts))
    return keys.to(weight.device)


def _magnitude(
    weight: Float[Tensor, "out in"],
    seed_parts: SeedParts,  # noqa: ARG001  one signature for all rules
) -> Float[Tensor, "out in"]:
    """Smaller ``|W|`` first; every participant knows W, so this reveals nothing."""
    return weight.abs()


TieRule = Callable[[Float[Tensor, "out in"], SeedParts], Float[Tensor, "out in"]]

# None orders by index, in row-major order (as the paper's code does in row and column mode).
TIES: dict[str, TieRule | None] = {"index": None, "random": _random, "magnitude": _magnitude}
