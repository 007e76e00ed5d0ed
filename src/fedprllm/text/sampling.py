"""A fair random sample of documents, in one pass and in memory that does not grow with the text."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from itertools import chain

from fedprllm.core.ties import generator
from fedprllm.text.documents import Part
from fedprllm.text.encoding import break_before

__all__ = ["SMALL", "draw_units", "read_at_most"]

SMALL = 2**22  # characters: text up to here is taken whole, whatever is asked for


def read_at_most(parts: Iterator[Part], limit: int) -> tuple[list[Part], Iterator[Part] | None]:
    """Read parts that hold at most ``limit`` characters; the second is all of them if there are more."""
    read: list[Part] = []
    n_characters = 0
    for part in parts:
        read.append(part)
        n_characters += len(part.text)
        if n_characters > limit:
            return [], chain(read, parts)
    return read, None


def draw_units(parts: Iterable[Part], *, unit_length: int, n_characters: int, seed: int) -> list[str]:
    """The first units of a seeded random order of all units of a text.

    A unit is a document, or a piece of about ``unit_length`` characters of a document that is more than
    twice as long. Unit i draws the i-th number of 64 bits from a generator of the seed; the order is that of
    these numbers. Those that come last are forgotten while reading, once the others hold ``n_characters``.

    Args:
        parts: The documents.
        unit_length: Characters of a piece; documents up to twice as long stay whole.
        n_characters: Characters that the drawn units hold together at least, if the text has as many.
        seed: Of the order.
    """
    numbers = random.Random(generator("calibration units", seed).initial_seed())
    heap: list[tuple[int, int, str]] = []  # the last of the order on top
    held = 0
    for place, unit in enumerate(_units(parts, unit_length)):
        number = numbers.getrandbits(64)
        if held >= n_characters and -heap[0][0] < number:
            continue
        heapq.heappush(heap, (-number, -place, unit))
        held += len(unit)
        while held - len(heap[0][2]) >= n_characters:
            held -= len(heapq.heappop(heap)[2])
    return [unit for *_, unit in sorted(heap, reverse=True)]


def _units(parts: Iterable[Part], length: int) -> Iterator[str]:
    """Documents, and the pieces of long ones, without blank ones."""
    text = ""
    for part in parts:
        if part.starts:
            yield from _trimmed(text)
            text = ""
        text += part.text
        start = 0
        while len(text) - start > 2 * length:
            end = break_before(text, start + length // 2, start + length)
            yield from _trimmed(text[start:end])
            start = end
        text = text[start:]
    yield from _trimmed(text)


def _trimmed(text: str) -> Iterator[str]:
    if (trimmed := text.strip("\n")) and not trimmed.isspace():
        yield trimmed
