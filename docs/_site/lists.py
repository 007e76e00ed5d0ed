"""Hook of the documentation site: lists as code hosts read them (CommonMark).

The site's Markdown wants an empty line before a list, and whatever belongs to an item four spaces in.
CommonMark wants it below the item's first letter, and no empty line.
"""

from __future__ import annotations

import re
from typing import Any

_MARK = re.compile(r"([*+-]|\d{1,9}[.)]) +(?=\S)")
_FENCE = re.compile(r"(```+|~~~+)")
_INDENT = " " * 4


def adapted(lines: list[str], in_item: bool = False) -> list[str]:
    """Lines of a page, or of an item of a list, with lists as the site's Markdown reads them."""
    done: list[str] = []
    in_list = after_blocks = False
    while lines:
        if fence := _FENCE.match(lines[0]):
            taken = _to_end_of_fence(lines, fence[1])
            done += lines[:taken]
        elif (mark := _MARK.match(lines[0])) and _begins(mark[1], done, in_list):
            taken = _length_of_item(lines, len(mark[0]))
            item = _item(mark[0], lines[:taken])
            if done and done[-1] and (after_blocks or not (in_list or in_item)):
                done.append("")
            done += item
            in_list, after_blocks = True, "" in item
            lines = lines[taken:]
            continue
        else:
            taken = 1
            done.append(lines[0])
            in_list = in_list and not lines[0].strip()
        lines = lines[taken:]
    return done


def _begins(mark: str, done: list[str], in_list: bool) -> bool:
    """Whether a mark begins an item here. Within a paragraph, a number other than 1 is part of the text."""
    after_text = bool(done and done[-1].strip()) and not in_list
    return not (after_text and mark[0].isdigit() and mark[:-1] != "1")


def _to_end_of_fence(lines: list[str], fence: str) -> int:
    for number, line in enumerate(lines[1:], 1):
        if line.startswith(fence) and not line.strip(fence[0]).strip():
            return number + 1
    return len(lines)


def _length_of_item(lines: list[str], width: int) -> int:
    """Number of lines of an item: those indented at least as far as its text, and empty ones between."""
    length = 1
    for number, line in enumerate(lines[1:], 1):
        if line.startswith(" " * width) and line.strip():
            length = number + 1
        elif line.strip():
            break
    return length


def _item(mark: str, lines: list[str]) -> list[str]:
    first, *others = adapted([line[len(mark) :] for line in lines], in_item=True)
    return [f"{mark}{first}", *(f"{_INDENT}{line}" if line else "" for line in others)]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Adapt the lists of a page."""
    return "\n".join(adapted(markdown.split("\n")))
