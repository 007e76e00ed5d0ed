"""Independent pieces of work on a CPU, in as many threads as torch has.

NumPy's and torch's operations and the hashes of the standard library release the interpreter while they work,
so threads serve where the pieces are not tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["in_threads"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """The results of ``work`` for each piece, in their order."""
    n_threads = min(torch.get_num_threads(), len(pieces))
    if n_threads < 2:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, pieces))
