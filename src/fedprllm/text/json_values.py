"""Read documents from JSON and JSON Lines, holding one value in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedprllm.errors import DataError
from fedprllm.text.columns import names_shown, refuse_ids
from fedprllm.text.decoding import lines_of, read_blocks

__all__ = ["is_json", "read_json_lines", "read_json_list"]

_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 16  # characters; an error this close to the end of the text read so far may be due to the cut
_AT_ONCE = 2**16  # characters


def read_json_lines(path: Path) -> Iterator[str]:
    """Read the documents of a file with one JSON value per line.

    Raises:
        DataError: A line is not JSON or holds no text, or the strings seem to be ids, URLs, paths or numbers.
    """
    return refuse_ids(_lines(path), path)


def _lines(path: Path) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(lines_of(read_blocks(path)), start=1):
        # Concatenated files can have a byte-order mark in the middle.
        if line := line.removeprefix("\ufeff").strip():
            where = f"{path}, line {number}"
            yield _document(_parse(line, where), where)


def read_json_list(path: Path) -> Iterator[str]:
    """Read the documents of a file that holds a single JSON list.

    Raises:
        DataError: The file is not a JSON list, an item holds no text, or the strings seem to be ids, URLs,
            paths or numbers.
    """
    return refuse_ids(_items(path), path)


def _items(path: Path) -> Iterator[tuple[str, bool]]:
    where = f"{path} (if it holds one value per line, name it .jsonl)"
    reader = _Reader(read_blocks(path), where)
    if reader.peek() != "[":
        raise DataError(
            f'{path}: expected a list of strings or of {{"text": ...}}, found {_type(reader.only_value())}. '
            "If it holds one object per line, name it .jsonl"
        )
    for number, value in enumerate(reader.items(), start=1):
        yield _document(value, f"{path}, item {number}")


class _Reader:
    """Reads JSON values from blocks of text.

    Args:
        blocks: The text.
        where: Origin of the text, for errors.
    """

    def __init__(self, blocks: Iterable[str], where: str) -> None:
        self._blocks, self._where = iter(blocks), where
        self._held, self._place, self._n_dropped, self._ended = "", 0, 0, False

    def _more(self, n_characters: int = _AT_ONCE) -> bool:
        """Read more of the text; False if none is left."""
        self._n_dropped += self._place
        pieces, self._place = [self._held[self._place :]], 0
        n_missing = n_characters
        while n_missing > 0 and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            pieces.append(block or "")
            n_missing -= len(block or "")
        self._held = "".join(pieces)
        return n_missing < n_characters

    def _fail(self, message: str, place: int) -> DataError:
        return DataError(f"{self._where}: not JSON: {message} at character {self._n_dropped + place}")

    def peek(self) -> str:
        """The next character other than white space; empty at the end of the text."""
        while True:
            found = _SPACE.match(self._held, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._held):
                return self._held[self._place]
            if not self._more():
                return ""

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            raise self._fail(f"Expecting {' or '.join(map(repr, expected))}", self._place)
        self._place += 1
        return found

    def value(self) -> Any:
        """The next value. At most about twice its length is read and held in memory."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._held) - _CUT
                if self._ended or not cut:
                    raise self._fail(error.msg, error.pos) from None
            except (ValueError, RecursionError):
                raise DataError(f"{self._where}: not JSON: nested too deeply or a number too long") from None
            else:
                if end < len(self._held) or self._ended:
                    self._place = end
                    return value
            self._more(len(self._held) - self._place + _AT_ONCE)

    def items(self) -> Iterator[Any]:
        """Yield the items of a list that must be the whole text."""
        self._take("[")
        if self.peek() == "]":
            self._place += 1
        else:
            while True:
                yield self.value()
                if self._take(",]") == "]":
                    break
        self._end()

    def only_value(self) -> Any:
        """The value that must be the whole text."""
        value = self.value()
        self._end()
        return value

    def _end(self) -> None:
        if self.peek():
            raise self._fail("Extra data", self._place)


def is_json(head: str, *, whole: bool) -> bool:
    """Whether a text is a JSON list or object, or the beginning of one.

    Args:
        head: The beginning of the text.
        whole: Whether ``head`` is the whole text.
    """
    text = head.strip("\ufeff \t\r\n")
    if not text.startswith(("[", "{")):
        return False
    try:
        _, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return not whole and (error.msg.startswith("Unterminated") or error.pos >= len(text) - _CUT)
    except (ValueError, RecursionError):
        return True
    rest = text[end:].lstrip()
    # In JSON Lines, another value follows on the next line.
    return not rest or ("\n" in text[end:][:3] and rest.startswith(text[0]))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f": {error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where}: not JSON{at or ': nested too deeply or a number too long'}") from None


def _type(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {names_shown(value)}" if value else "an empty object"
    return _TYPES.get(type(value), "a string")


def _document(row: object, where: str) -> tuple[str, bool]:
    """The text of a JSON value, and whether its key named it as text."""
    named = isinstance(row, dict) and "text" in row
    text, expected = row, 'a string or {"text": a string}'
    if isinstance(row, dict) and named:
        text, expected = row["text"], 'a string as "text"'
    if not isinstance(text, str):
        raise DataError(f"{where}: expected {expected}, found {_type(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half a surrogate pair at character {error.start}. Remove it"
        ) from None
    return text, named
