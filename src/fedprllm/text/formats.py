"""Files of text by suffix: which are read, how, and which are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedprllm.errors import DataError
from fedprllm.text.decoding import COMPRESSED, lines_of, read_blocks
from fedprllm.text.tables import names_shown, read_csv, read_parquet, read_tsv

__all__ = ["format_of", "is_card", "is_data_file", "is_housekeeping", "read_documents_of", "read_prose"]

_JSON_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
_HOUSEKEEPING = re.compile(
    r"(readme|license|licence|copying|notice|citation|authors|changelog|contributing)(\.(md|txt|rst|cff))?"
    r"|dataset_infos?\.json|state\.json|croissant\.json|metadata\.json",
    re.IGNORECASE,
)
_CARD_KEYS = re.compile(
    r"^(dataset_info|configs|license|task_categories|annotations_creators|size_categories|pretty_name)\s*:",
    re.MULTILINE,
)

# A key right after the first brace; no prose and hardly a program begins like this.
_JSON_START = re.compile(r'\s*\[?\s*\{\s*"[^"\n]{0,100}"\s*:')


def _refusals() -> dict[str, str]:
    """What to do with files by suffix whose content is neither prose nor a table that is read here."""
    by_advice = {
        "unpack it and name the files inside": "zip zst tar tgz tbz2 txz 7z rar lz4 br z",
        "save it as plain text (.txt)": "doc docx odt pdf rtf epub html htm xhtml xml pptx ppt odp mobi",
        "save it as CSV with a column 'text'": "xls xlsx ods sqlite sqlite3 db sav dta rdata",
        "save it as Parquet or JSON Lines with a column 'text'": "arrow feather orc avro h5 hdf5 pkl pickle "
        "npy npz msgpack",
        'save its text as JSON Lines: {"text": ...} on every line': "ipynb jsonld geojson json5 mbox eml",
        "name files of text": "safetensors gguf pt pth bin onnx exe dll so dylib png jpg jpeg gif webp bmp "
        "tif tiff svg ico mp3 wav flac ogg mp4 avi mkv mov webm ttf woff woff2 class jar pyc o a",
    }
    return {f".{suffix}": advice for advice, suffixes in by_advice.items() for suffix in suffixes.split()}


_REFUSED = _refusals()


def format_of(path: Path) -> str:
    """The suffix that tells how a file is read: that before a compression, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if len(suffixes) > 1 else ""
    return suffixes[-1] if suffixes else ""


def is_data_file(path: Path) -> bool:
    """Whether a file holds documents in a structure, as data sets do."""
    return format_of(path) in _READERS


def is_housekeeping(path: Path) -> bool:
    """Whether a file beside data says something about the data: a data set's card, its license."""
    return _HOUSEKEEPING.fullmatch(path.name) is not None


def read_documents_of(path: Path) -> Iterator[str]:
    """The documents of a file whose format holds several of them.

    Raises:
        DataError: The format is refused, or the file is not what its suffix says.
    """
    return _READERS[format_of(path)](path)


def read_prose(path: Path) -> Iterator[str]:
    """A plain text file, which is one document, in blocks.

    Raises:
        DataError: The format is refused by its suffix, or what is found is a structure and not prose.
    """
    suffix = format_of(path)
    if (advice := _REFUSED.get(suffix)) is not None:
        raise DataError(f"{path}: {suffix} files are not read as text: {advice}")
    blocks = read_blocks(path)
    for number, block in enumerate(blocks):
        if number == 0 and (found := _structure(path, block)):
            raise DataError(f"{path}: expected plain text, found {found}")
        yield block


def _structure(path: Path, head: str) -> str | None:
    """What a file that is named like prose seems to be instead, and what to do."""
    start = head.lstrip()[:20].lower()
    if _JSON_START.match(head):
        return "JSON: name it .jsonl if it has one value on every line, otherwise .json"
    if start.startswith(("<!doctype html", "<html", "<?xml", "{\\rtf", "%pdf-")):
        return "a marked-up document: save it as plain text"
    first = head.lstrip().partition("\n")[0][:1000]
    for separator, name in {"\t": ".tsv", ",": ".csv"}.items():
        cells = first.split(separator)
        if len(cells) > 1 and "text" in cells and all(re.fullmatch(r"\w{1,40}", cell) for cell in cells):
            return f"a table: name it {name}"
    if path.name.lower() == "readme.md" and _is_card(head):
        return "the card of a data set: name the files of its data"
    return None


def is_card(path: Path) -> bool:
    """Whether a file is the card of a data set of the hub: a README that begins with its properties."""
    if path.name.lower() != "readme.md":
        return False
    with path.open("rb") as file:
        return _is_card(file.read(2**16).decode("utf-8", "replace").replace("\r\n", "\n"))


def _is_card(head: str) -> bool:
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    return front is not None and _CARD_KEYS.search(front[1]) is not None


# --- JSON -------------------------------------------------------------------------------------------------


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(lines_of(read_blocks(path)), start=1):
        # A byte-order mark stands in the middle where files were put one after the other.
        if line := line.removeprefix("\ufeff").strip():
            where = f"{path}, line {number}"
            yield _json_text(_parse_json(line, where), where)


def _read_json(path: Path) -> Iterator[str]:
    text = "".join(read_blocks(path))
    rows = _parse_json(text, f"{path} (if it holds one value per line, name it .jsonl)")
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: expected a list of strings or of {{"text": ...}}, found {_json_type(rows)}. If it '
            "holds one object per line, name it .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        yield _json_text(row, f"{path}, item {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f": {error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where}: not JSON{at or ': nested too deeply or a number too long'}") from None


def _json_type(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {names_shown(value)}" if value else "an empty object"
    return _JSON_TYPES.get(type(value), "a string")


def _json_text(row: object, where: str) -> str:
    if isinstance(row, dict) and "text" in row:
        text, expected = row["text"], 'a string as "text"'
    else:
        text, expected = row, 'a string or {"text": a string}'
    if not isinstance(text, str):
        raise DataError(f"{where}: expected {expected}, found {_json_type(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half a surrogate pair at character {error.start}. Remove it"
        ) from None
    return text


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".csv": read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": read_parquet,
    ".tsv": read_tsv,
}
