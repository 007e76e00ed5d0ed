"""Independent pieces of work on a CPU, in as many threads as torch has.

NumPy's and torch's operations and the hashes of the standard library release the interpreter while they work,
so threads serve where the pieces are not tiny. Each of these threads computes alone: torch would start as
many again for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["in_threads", "row_slices"]

# Entries: those of float32 fit the cache of a core. With fewer, threads wait for each other's interpreter.
_AT_ONCE = 2**18

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """The results of ``work`` for each piece, in their order."""
    n_threads = torch.get_num_threads()
    if min(n_threads, len(pieces)) < 2:
        return [work(piece) for piece in pieces]
    try:
        return list(_pool(n_threads).map(work, pieces))
    finally:
        # A thread has a number of its own, but what the last one set is what new threads begin with.
        torch.set_num_threads(n_threads)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to start one, and torch in it, takes longer than many a piece of work."""
    return ThreadPoolExecutor(n_threads, initializer=_compute_alone)


def _compute_alone() -> None:
    # Asked first: torch gives a thread its number when it first needs one, whatever was set before.
    torch.get_num_threads()
    torch.set_num_threads(1)


def row_slices(matrix: Shaped[Tensor, "rows ..."]) -> list[slice]:
    """Pieces for `in_threads`: as many rows as stay in the cache, or all at once on a GPU."""
    n_rows = matrix.shape[0]
    step = n_rows if matrix.device.type != "cpu" else max(1, _AT_ONCE * n_rows // max(1, matrix.numel()))
    return [slice(start, start + step) for start in range(0, n_rows, step)]
