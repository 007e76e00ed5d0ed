"""Time spent per phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock(defaultdict[str, float]):
    """Seconds per phase: ``with clock.phase("observe"): ...`` adds to one of them."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the ``with`` block to a phase."""
        start = time.perf_counter()
        yield
        self[name] += time.perf_counter() - start
