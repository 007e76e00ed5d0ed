"""Text that comes with Python, of three kinds, so that tests have real text and ship none.

Each kind has parts that the small model (`tests/make_small_model.py`) never saw. They are told apart by name,
so they stay apart in versions of Python whose texts differ.
"""

from __future__ import annotations

import os
import unicodedata
from functools import cache
from pathlib import Path
from typing import Literal
from zlib import crc32

Kind = Literal["prose", "code", "tables"]
KINDS: tuple[Kind, ...] = ("prose", "code", "tables")
# Modules that are one file in every version of Python we support.
_MODULES = ("argparse", "ast", "difflib", "doctest", "optparse", "statistics", "tarfile", "typing")
_HELD_OUT_MODULES = ("configparser", "csv", "mailbox", "textwrap")


@cache
def library_text(kind: Kind, held_out: bool = False) -> str:
    """Reference prose, source code or tables; ``held_out``: those that the small model never saw."""
    return {"prose": _prose, "code": _code, "tables": _tables}[kind](held_out)


def _prose(held_out: bool) -> str:
    from pydoc_data.topics import topics

    names = [name for name in sorted(topics) if (crc32(name.encode()) % 10 == 1) == held_out]
    return "\n\n".join(topics[name] for name in names)


def _code(held_out: bool) -> str:
    library = Path(os.__file__).parent
    names = _HELD_OUT_MODULES if held_out else _MODULES
    return "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)


def _tables(held_out: bool) -> str:
    """Characters with code point, name and category, a row each; sixteen neighbors stay together."""
    rows = []
    for code in range(0x20, 0x3000):
        name = unicodedata.name(chr(code), "")
        if name and (code // 16 % 10 == 9) == held_out:
            rows.append(f"{code:04X};{name};{unicodedata.category(chr(code))}\n")
    return "".join(rows)
