"""What a text may be given as: a path, a dataset, or documents in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import DataError
from fedprllm.files import names_of

__all__ = [
    "Documents",
    "Source",
    "as_sources",
    "describe",
    "is_dataset",
    "is_path",
    "is_plain_text",
    "looks_like_text",
    "named_sources",
    "refuse_text",
]

_LONGEST_NAME = 255  # bytes of a file name on every common file system
_LONGEST_PATH = 4096
_MANY_WORDS = 8  # more than names of files have
_SOME_WORDS = 4


class Documents:
    """Documents in memory. Neither messages nor records ever show them, only their number.

    Args:
        texts: The documents, in order.

    Raises:
        DataError: There is none, or one of them is not a string.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, (str, bytes, Path, Mapping)) or not isinstance(texts, Iterable):
            raise DataError(
                f"Documents takes strings, found {type(texts).__name__}: put a single text in a list"
            )
        self.texts = tuple(self._checked(number, text) for number, text in enumerate(texts))
        if not self.texts:
            raise DataError("Documents: expected at least one string, found none")

    @staticmethod
    def _checked(number: int, text: object) -> str:
        if not isinstance(text, str):
            raise DataError(f"Documents, item {number}: expected a string, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Documents, item {number}: half a surrogate pair at character {error.start}. Remove it"
            ) from None
        return text.removeprefix("\ufeff").replace("\r\n", "\n")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"{len(self)} documents in memory"


# ``Any`` stands for a `datasets.Dataset`: the package is optional.
Source = str | Path | Documents | Any


def is_dataset(value: object) -> bool:
    """Whether a value is a `datasets.Dataset`, without importing the package."""
    needed = ("features", "column_names", "__len__", "__getitem__")
    return not isinstance(value, Mapping) and all(hasattr(value, name) for name in needed)


def describe(source: Any) -> str:
    """A source in words, for messages and records: its path, or how many documents it holds in memory."""
    if is_dataset(source):
        return f"dataset of {len(source)} rows in memory"
    return str(source)


def as_sources(value: object, whose: str = "text") -> list[Source]:
    """One source or a list of sources as a list: a string is one path and never a list of characters.

    Raises:
        DataError: Something else was given, or the list is empty.
    """
    if isinstance(value, (str, os.PathLike, Documents)) or is_dataset(value):
        return [_checked(value, whose)]
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"{whose}: expected a path, Documents([...]), a dataset or a list of these, found "
            f"{type(value).__name__}{_advice(value)}"
        )
    if not value:
        raise DataError(f"{whose}: expected at least one path, found an empty list")
    return [_checked(item, f"{whose}, item {number}") for number, item in enumerate(value)]


def named_sources(texts: object) -> dict[str, list[Source]]:
    """Texts by name: one source, a list of sources, or a mapping from names to these.

    Raises:
        DataError: Something else was given.
    """
    if isinstance(texts, Mapping):
        return {str(name): as_sources(text, f"text '{name}'") for name, text in texts.items()}
    if isinstance(texts, (list, tuple)) and not texts:
        return {}
    sources = as_sources(texts, "texts")
    labels = [source if isinstance(source, (str, Path)) else "in-memory" for source in sources]
    return {name: [source] for name, source in zip(names_of(labels), sources, strict=True)}


def _checked(source: Any, whose: str) -> Source:
    if isinstance(source, str):
        if not source.strip():
            raise DataError(f"{whose}: expected a path, found an empty string")
        refuse_text(source, whose)
        return source
    if isinstance(source, Documents) or is_dataset(source):
        return source
    if isinstance(source, os.PathLike):
        return Path(source)
    raise DataError(f"{whose}: expected a path, found {type(source).__name__}{_advice(source)}")


def _advice(value: object) -> str:
    if isinstance(value, Mapping):
        return ". Name one of its entries"
    return ". Make it a list first" if isinstance(value, Iterable) and not isinstance(value, bytes) else ""


def looks_like_text(value: str) -> bool:
    """Whether a string that is no path seems to be text itself: lines, many words, or longer than a path."""
    names = value.replace("\\", "/").split("/")
    longest = max(len(name.encode(errors="replace")) for name in names)
    too_long = len(value) > _LONGEST_PATH or longest > _LONGEST_NAME
    return "\n" in value or "\0" in value or too_long or len(value.split()) >= _MANY_WORDS


def refuse_text(value: str, whose: str = "") -> None:
    """Refuse text where its path is expected, without quoting it.

    Raises:
        DataError: The string is no path and looks like text.
    """
    if not is_path(value) and looks_like_text(value):
        raise DataError(
            f"{whose}{': ' if whose else ''}expected the path of a text, found a string of {len(value):,} "
            "characters that looks like text itself: give texts as fedprllm.Documents([...])"
        )


def is_path(value: str) -> bool:
    """Whether a string names a file or a folder that exists, or a dataset of the hub."""
    if value.startswith("hf:"):
        return True
    # Not pathlib, which raises for names that are too long.
    return "\0" not in value and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111


def is_plain_text(value: str) -> bool:
    """Whether a string can only be meant as text: it has lines, or several words and no sign of a path."""
    if "\n" in value:
        return True
    signs = "/" in value or "\\" in value or value.startswith("~") or re.search(r"\.\w{1,8}$", value)
    return len(value.split()) >= _SOME_WORDS and not signs
