"""Documents from files, folders and data sets.

Text is read from plain files, JSON, JSON Lines, CSV, Parquet, folders and Hugging Face datasets. Messages
name files, lines and columns, and never quote a document.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedprllm.errors import DataError, did_you_mean

__all__ = ["Documents", "read_documents"]

_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?)")
_STRINGS = {"string", "large_string", "string_view"}
_NAMES_SHOWN = 20


class Documents:
    """Texts that a program holds in memory, in place of a path.

    Args:
        texts: One string for each document.

    Raises:
        DataError: There is none that is not blank, or one of them is not a string.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, (str, bytes)):
            raise DataError("documents must be a list of strings, found one string: wrap it in a list")
        self.texts = list(texts)
        for number, text in enumerate(self.texts, start=1):
            if not isinstance(text, str):
                raise DataError(f"document {number} in memory: expected a string, found {_type_of(text)}")
        if not any(text.strip() for text in self.texts):
            raise DataError("the documents in memory hold no text: expected at least one that is not blank")

    def __str__(self) -> str:
        """What a record calls them: never their text."""
        n = len(self.texts)
        return f"{n} document{'' if n == 1 else 's'} in memory"

    __repr__ = __str__

    @classmethod
    def of_dataset(cls, dataset: Any) -> Documents:
        """The text column of a ``datasets.Dataset`` (the column ``text``, or the only one of strings)."""
        return cls(_dataset_column(dataset, "the dataset in memory"))


def read_documents(source: str | Path | Documents, *, keep_blank: bool = False) -> list[str]:
    """Read the documents of one source, in order, without the blank ones unless they are asked for.

    A plain text file is one document, whatever its suffix (UTF-8; a byte-order mark is dropped, line ends
    become LF). ``.jsonl`` holds one string or one ``{"text": ...}`` per line, ``.json`` a list of those,
    ``.csv`` and ``.parquet`` a column ``text``. A folder is a dataset of ``datasets.save_to_disk``, or all
    files below it by name, hidden ones left out. ``hf:NAME:SPLIT`` and ``hf:NAME:CONFIG:SPLIT`` are datasets
    of the hub.

    Raises:
        DataError: Missing, unreadable, empty, not text, malformed, without a text column, or a package that
            reads it is not installed.
    """
    documents = source.texts if isinstance(source, Documents) else _read(source)
    return [document for document in documents if keep_blank or document.strip()]


def _read(source: str | Path) -> list[str]:
    """The documents of one source, blank ones included; at least one is not blank."""
    path = Path(source)
    try:
        if str(source).startswith("hf:"):
            documents = _read_hub(str(source))
        elif path.is_dir():
            documents = _read_folder(path)
        elif path.exists():
            documents = _read_file(path)
        else:
            raise DataError(_missing(path))
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or source}: {error.strerror or error}. Check its permissions"
        ) from error
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text: expected at least one document that is not blank")
    return documents


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file or folder: {path} (its folder {path.parent} does not exist either)"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if len(names) > _NAMES_SHOWN:
        names = difflib.get_close_matches(path.name, names, n=_NAMES_SHOWN, cutoff=0.5)
    if not names:
        return f"no such file or folder: {path}"
    return f"no such file or folder in {path.parent}: {did_you_mean(path.name, names)}"


def _read_file(path: Path) -> list[str]:
    return _READERS.get(path.suffix.lower(), _read_text)(path)


def _read_folder(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise DataError(
            f"{folder} is a dataset with splits: name the folder of one of them inside it: {_names(splits)}"
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        datasets = _optional("datasets", folder)
        return _dataset_column(_load(folder, datasets.load_from_disk, str(folder)), folder)
    return [document for path in sorted(_files(folder), key=Path.as_posix) for document in _read_file(path)]


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; hidden files and folders are left out, links to folders not followed."""

    def fail(error: OSError) -> None:
        # Without this, os.walk passes over a folder that it may not list.
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _decode(path: Path) -> str:
    data = path.read_bytes()
    advice = "Convert or unpack it, or leave it out"
    if (offset := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path} is not text: expected UTF-8, found a NUL byte at byte offset {offset}. {advice}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text: expected UTF-8, found byte 0x{data[error.start]:02x} at byte offset "
            f"{error.start}. {advice}"
        ) from None
    # The same text must give the same windows whichever system wrote the file.
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_text(path: Path) -> list[str]:
    return [_decode(path)]


def _read_json_lines(path: Path) -> list[str]:
    documents = []
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            documents.append(_json_text(_parse_json(line, where), where))
    return documents


def _read_json(path: Path) -> list[str]:
    rows = _parse_json(_decode(path), f"{path} (if it holds one value per line, name it .jsonl)")
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: expected a list of strings or of {{"text": ...}}, found {type(rows).__name__}. If it '
            "holds one object per line, name it .jsonl"
        )
    return [_json_text(row, f"{path}, item {number}") for number, row in enumerate(rows, start=1)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON: {reason}") from None


def _type_of(value: object) -> str:
    """The name of a type for users who do not write Python."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _json_text(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        found = _type_of(text)
        if isinstance(row, dict):
            found = f'"text": {found}' if "text" in row else f"an object with {_names(row)}"
        raise DataError(f'{where}: expected a string or {{"text": a string}}, found {found}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half a surrogate pair at character {error.start}. Remove it"
        ) from None
    return text


def _read_csv(path: Path) -> list[str]:
    text = _decode(path)
    # The module's limit is global and 131,072 characters by default; a document may be longer.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        # strict: a quote that is never closed must not swallow the rest of the file.
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = list(rows.fieldnames or [])
        if columns and "text" not in columns:
            raise DataError(f"{path}: expected a column 'text', found {_names(columns)}. Rename one")
        documents = []
        for row in rows:
            if row["text"] is None:
                raise DataError(f"{path}, line {rows.line_num}: the row ends before its column 'text'")
            documents.append(row["text"])
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return documents


def _read_parquet(path: Path) -> list[str]:
    pyarrow, parquet = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            strings = [name for name, kind in fields.items() if str(kind) in _STRINGS]
            column = _text_column(strings, list(fields), path)
            return [text or "" for text in file.read(columns=[column]).column(column).to_pylist()]
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _read_hub(source: str) -> list[str]:
    match = _HUB.fullmatch(source)
    if match is None:
        raise DataError(
            f"unknown dataset '{source}': expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, for example "
            "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"
        )
    datasets = _optional("datasets", source)
    load = datasets.load_dataset
    return _dataset_column(_load(source, load, match["name"], match["config"], split=match["split"]), source)


def _load(source: str | Path, load: Callable[..., Any], *args: object, **options: object) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:
        # Arrow, the hub client and the dataset's own builder have no common error of their own.
        raise DataError(f"cannot load dataset {source}: {error}. Check its name and the network") from error


def _dataset_column(dataset: Any, source: str | Path) -> list[str]:
    kinds = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind in _STRINGS]
    return [text or "" for text in dataset[_text_column(strings, list(kinds), source)]]


def _text_column(strings: list[str], columns: list[str], source: str | Path) -> str:
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise DataError(
            f"{source}: expected a column 'text' or a single column of strings, found {_names(columns)}. "
            "Rename the one that holds the text"
        )
    return strings[0]


def _names(names: Iterable[str]) -> str:
    # Shortened: without a header, the names of columns are the first row of the text.
    shown = [name if len(name) <= 30 else f"{name[:30]}..." for name in names]
    more = ", ..." if len(shown) > _NAMES_SHOWN else ""
    return ", ".join(shown[:_NAMES_SHOWN]) + more or "none"


def _optional(module: str, source: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"reading {source} needs the package {package}: pip install fedprllm[data]"
        ) from error


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
