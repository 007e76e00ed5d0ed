"""How a process of ours is set up, before it imports torch."""

from __future__ import annotations

import os

__all__ = ["use_large_pages"]


def use_large_pages() -> None:
    """Let torch ask for memory in large pages, unless the environment already says whether it should.

    A walk allocates gigabytes for every block, and in pages of 4 kB Linux takes longer to hand them out than
    a CPU to fill them. torch reads the variable when it first allocates. A program that imports the library
    sets it for itself (docs/decisions/memory.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
