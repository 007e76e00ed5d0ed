"""How a process of ours asks the system for memory, and gives it back."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["return_freed_memory", "use_large_pages"]


def use_large_pages() -> None:
    """Let torch ask for memory in large pages, unless the environment already says whether it should.

    A walk allocates gigabytes for every block, and in pages of 4 kB Linux takes longer to hand them out than
    a CPU to fill them. torch reads the variable when it first allocates. A program that imports the library
    sets it for itself (docs/decisions/memory.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> None:
    """Return memory that was freed to the system, if the C library keeps it and can be told not to.

    What the many tensors of a block leave behind is scattered over the heap, and glibc returns only its end.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
