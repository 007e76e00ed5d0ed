"""Progress reporting: the library reports steps, and the command line draws bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Progress", "silent"]

Advance = Callable[[int], None]
# ``with progress("pruning", 30) as advance: ... advance(1)``; the number is the total number of steps.
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:  # noqa: ARG001  the signature of Progress
    """Report nothing."""
    yield lambda _: None
