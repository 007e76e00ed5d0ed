"""Run independent pieces of CPU work in as many threads as torch uses.

NumPy's and torch's operations and the standard library's hashes release the GIL while they work, so threads
help unless the pieces are tiny. Each thread is limited to a single torch thread of its own; otherwise torch
would start a full set of threads for every one of them.
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

# Matrix entries per piece: in float32 they fit a core's cache. With fewer, threads mostly wait for the GIL.
_AT_ONCE = 2**18

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """Apply ``work`` to each piece and return the results in order."""
    n_threads = torch.get_num_threads()
    if min(n_threads, len(pieces)) < 2:
        return [work(piece) for piece in pieces]
    try:
        return list(_pool(n_threads).map(work, pieces))
    finally:
        # Each thread has its own thread count, but new threads inherit the count that was set last.
        torch.set_num_threads(n_threads)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that are kept alive: starting one with torch often takes longer than a piece of work."""
    return ThreadPoolExecutor(n_threads, initializer=_compute_alone)


def _compute_alone() -> None:
    # Read the count first: torch initializes it on first use in a thread, overwriting an earlier setting.
    torch.get_num_threads()
    torch.set_num_threads(1)


def row_slices(matrix: Shaped[Tensor, "rows ..."]) -> list[slice]:
    """Pieces for `in_threads`: as many rows as fit the cache, or all rows at once on a GPU."""
    n_rows = matrix.shape[0]
    step = n_rows if matrix.device.type != "cpu" else max(1, _AT_ONCE * n_rows // max(1, matrix.numel()))
    return [slice(start, start + step) for start in range(0, n_rows, step)]
