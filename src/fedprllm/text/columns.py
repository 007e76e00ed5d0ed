"""Find the column of a table that holds the text, and refuse columns of ids, paths or labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from fedprllm.errors import DataError

__all__ = ["choose_column", "names_shown", "refuse_ids"]

_STRING_TYPE = re.compile(r"(large_)?string(_view)?|dictionary<values=(large_)?string(_view)?,.*>")
_NAMES_SHOWN = 20
_LOOKED_AT = 200  # rows
# Column names that indicate text.
_TEXT_NAMES = re.compile(
    r"(.*[_ .-])?(texts?|body|content|contents|document|documents|sentence|sentences|paragraph|passage|story|"
    r"article|abstract|summary|note|notes|transcript|prose|completion|dialog|dialogue|conversation|essay|report|"
    r"code|markdown|raw_content|utterance|review|comment|post|message)|texts?[_.-]\w+",
    re.IGNORECASE,
)
# Column names that indicate something else, whatever the values look like.
_OTHER_NAMES = re.compile(
    r"(.*[_ .-])?(id|ids|uuid|guid|idx|index|key|hash|sha\d*|md5|digest|checksum|ur[li]s?|link|links|href|"
    r"doi|isbn|path|paths|file|files|filename|file_?name|folder|dir|name|names|label|labels|class|category|categories|tag|"
    r"tags|type|kind|split|source|sources|origin|domain|lang|language|locale|author|authors|user|username|"
    r"email|date|time|timestamp|created|updated|year|license|licence|title|titles|headline|subject|status|"
    r"version|code_language|country|city|gender|image|audio|video)|__.*__",
    re.IGNORECASE,
)
_OTHER_ENDS = re.compile(r".*[a-z](Id|ID|Url|URL|Path|Name|Label|Hash|Date)")
_NOT_TEXT = {
    "hashes or ids": re.compile(
        r"[0-9a-fA-F]{16,}|\{?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\}?|sha\d+[:-][0-9a-fA-F]+"
        r"|[A-Za-z0-9+/]{40,}={0,2}"
    ),
    "URLs": re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|www\.\S+|mailto:\S+|doi:\S+|10\.\d{4,}/\S+"),
    "paths": re.compile(
        r"(~|\.{0,2})[/\\][^\n]*|[A-Za-z]:[/\\][^\n]*|\S*[/\\]\S+|\S*[/\\][^\n]*\.[A-Za-z0-9]{1,5}|\S+\.[A-Za-z0-9]{1,5}"
    ),
    "numbers or dates": re.compile(r"[-+]?[\d.,:/TZ \-+%]+|\d{4}-\d\d-\d\d.*"),
    "e-mail addresses": re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+"),
}


def choose_column(
    kinds: Sequence[tuple[str, str]], source: object
) -> tuple[str, Callable[..., Iterator[str]]]:
    """Choose the column ``text``, or else the only column of strings.

    Args:
        kinds: Name and type of every column.
        source: Origin of the table, for errors.

    Returns:
        The name of the column, and a function that passes its values on. That function raises `DataError` if
        the values seem to be ids, paths or labels.

    Raises:
        DataError: ``text`` has another type or occurs twice, there is no single column of strings, or the
            name of that column indicates something other than text.
    """
    named = [kind for name, kind in kinds if name == "text"]
    if len(named) > 1:
        raise DataError(f"{source}: expected one column 'text', found {len(named)}. Rename the others")
    if named and not _STRING_TYPE.fullmatch(named[0]):
        raise DataError(f"{source}: expected strings in the column 'text', found {named[0][:60]}")
    if named:
        return "text", lambda values: iter(values)
    strings = [name for name, kind in kinds if _STRING_TYPE.fullmatch(kind)]
    found = names_shown([name for name, _ in kinds])
    if len(strings) != 1:
        raise DataError(
            f"{source}: expected a column 'text' or a single column of strings, found {found}. Rename the "
            "column that holds the text to 'text'"
        )
    name = strings[0]
    advice = f"found {found}. Rename the column that holds the text to 'text'"
    if _OTHER_NAMES.fullmatch(name) or _OTHER_ENDS.fullmatch(name):
        raise DataError(
            f"{source}: expected a column 'text', but the only column of strings, {names_shown([name])}, is "
            f"named like a column of ids, labels or paths: {advice}"
        )
    is_named = _TEXT_NAMES.fullmatch(name) is not None

    def checked(values: Iterable[str]) -> Iterator[str]:
        rest = iter(values)
        head = list(islice(rest, _LOOKED_AT))
        kind = _kind_of(head, 6) or (None if is_named or _is_prose(head) else "labels or short strings")
        if kind:
            raise DataError(
                f"{source}: expected a column 'text', but the only column of strings, {names_shown([name])}, "
                f"seems to hold {kind}: {advice}"
            )
        return chain(head, rest)

    return name, checked


def refuse_ids(documents: Iterable[tuple[str, bool]], source: object) -> Iterator[str]:
    """Pass documents on unless the first of them are all ids, URLs, paths or numbers.

    Args:
        documents: Each document, and whether its key named it as text.
        source: Origin of the documents, for errors.

    Yields:
        The documents.

    Raises:
        DataError: The first documents are all ids, URLs, paths or numbers, and no key named them as text.
    """
    rest = iter(documents)
    head = list(islice(rest, _LOOKED_AT))
    if not any(named for _, named in head) and (kind := _kind_of([text for text, _ in head], 30)):
        raise DataError(
            f"{source}: expected documents, found strings that seem to be {kind}: choose the file that "
            'holds the text; if these strings are the text, write each as {"text": ...}'
        )
    yield from (text for text, _ in chain(head, rest))


def _kind_of(values: Sequence[str], n_repeated: int) -> str | None:
    """Describe what all of the values are instead of text; None if they may be text.

    Args:
        values: The values.
        n_repeated: Number of values from which frequent repetitions indicate labels.
    """
    given = [value.strip() for value in values if value and not value.isspace()]
    for kind, pattern in _NOT_TEXT.items():
        if given and all(len(value) <= 4096 and pattern.fullmatch(value) for value in given):
            return kind
    if len(given) >= n_repeated and max(map(len, given)) < 60 and 3 * len(set(given)) <= len(given):
        return "labels"
    return None


def _is_prose(values: Sequence[str]) -> bool:
    """Whether at least half of the values have several words, or many letters in a script without spaces."""
    given = [value.strip() for value in values if value and not value.isspace()]
    several = sum(
        len(value.split()) >= 5 or sum(letter > "\u0e00" and letter.isalpha() for letter in value) >= 10
        for value in given
    )
    return 2 * several >= len(given) and len(set(given)) > len(given) // 10


def names_shown(names: Iterable[object]) -> str:
    """List names of columns or keys for an error; anything that does not look like a name is only counted."""
    given = [str(name) for name in names]
    shown = [name for name in given if re.fullmatch(r"[\w.-]{1,30}", name)][:_NAMES_SHOWN]
    others = len(given) - len(shown)
    return ", ".join([*shown, f"{others} others"] if others and shown else shown) or f"{others} others"
