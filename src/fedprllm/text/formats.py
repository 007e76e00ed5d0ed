"""File formats by suffix: which are read as text, how, and which are refused."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fedprllm.errors import DataError
from fedprllm.text.decoding import COMPRESSED, read_blocks
from fedprllm.text.json_values import is_json, read_json_lines, read_json_list
from fedprllm.text.tables import read_csv, read_parquet, read_tsv

__all__ = ["format_of", "is_data_file", "is_housekeeping", "read_documents_of", "read_prose"]

_PROSE = {"", ".txt", ".text", ".md", ".markdown", ".mdown", ".rst", ".adoc", ".asciidoc", ".org", ".tex"}
_CODE = {
    f".{suffix}"
    for suffix in [
        "py",
        "pyi",
        "pyx",
        "js",
        "mjs",
        "cjs",
        "jsx",
        "ts",
        "tsx",
        "java",
        "kt",
        "kts",
        "scala",
        "groovy",
        "c",
        "h",
        "cc",
        "cpp",
        "cxx",
        "hh",
        "hpp",
        "hxx",
        "cu",
        "cuh",
        "m",
        "mm",
        "cs",
        "fs",
        "go",
        "rs",
        "swift",
        "rb",
        "php",
        "pl",
        "pm",
        "lua",
        "r",
        "jl",
        "dart",
        "ex",
        "exs",
        "erl",
        "hrl",
        "hs",
        "lhs",
        "ml",
        "mli",
        "clj",
        "cljs",
        "lisp",
        "el",
        "scm",
        "f",
        "f90",
        "f95",
        "f03",
        "for",
        "pas",
        "asm",
        "s",
        "v",
        "sv",
        "vhd",
        "vhdl",
        "sql",
        "sh",
        "bash",
        "zsh",
        "fish",
        "ps1",
        "bat",
        "cmd",
        "awk",
        "sol",
        "zig",
        "nim",
        "cr",
        "vb",
        "proto",
        "cmake",
    ]
}
# Numbers of versions, years and parts are not suffixes: notes.2024, notes.v2.
_NUMBER = re.compile(r"\.v?\d+", re.IGNORECASE)
_SUFFIX = re.compile(r"\.\w{1,12}")

# Files in the folder of a data set or repository that are not part of its text. Words that could also name a
# text count only in the usual spelling of such files: in capitals, or without a suffix.
_HOUSEKEEPING = re.compile(
    r"(?i:(read[-_ ]?me|un)?licen[cs]es?|read[-_ ]?me|copying|copyright|citation|changelog|contributing|"
    r"code[-_]of[-_]conduct|attributions?|disclaimer|terms[-_]of[-_]use|eula|data[-_]?statement|data[-_]?card|dataset[-_]?card|model[-_]?card|data[-_]?sheet)"
    r"([-_. ][\w.+-]{1,24})?"
    r"|(NOTICES?|AUTHORS|CONTRIBUTORS|CHANGES|HISTORY|SECURITY|CREDITS|INSTALL|TODO|MAINTAINERS|PATENTS|"
    r"THIRD[-_]PARTY.*|ACKNOWLEDGE?MENTS|MANIFEST|VERSION|CODEOWNERS|NEWS)([-_.]\w{1,12})?(\.(md|txt|rst|in))?"
    r"|(?i:notices?|authors|contributors|manifest|checksums?|makefile|dockerfile)"
    r"|(?i:(sha\d+|md5)(sums?)?|checksums?|requirements|robots|cmakelists)(\.txt)?"
    r"|(?i:dataset_infos?|dataset_dict|state|croissant|metadata|stats|dataset-metadata|datapackage|manifest|"
    r"package|index|config)\.(json|ya?ml|jsonld)|(?i:citation\.(cff|bib))|[\w.-]*\.(?i:md5|sha1|sha256|sha512|cff)"
)
_DATA_SUFFIXES = {".csv", ".jsonl", ".jsonlines", ".ndjson", ".parquet", ".tab", ".tsv"}
_CARD_KEYS = re.compile(
    r"^(dataset_info|configs|license|task_categories|annotations_creators|size_categories|pretty_name)\s*:",
    re.MULTILINE,
)

# A key right after the first brace; prose never starts like this.
_JSON_START = re.compile(r'\s*\[?\s*\{\s*"[^"\n]{0,100}"\s*:')
_MARKED_UP = ("<!doctype html", "<html", "<?xml", "{\\rtf", "%pdf-")
_STARTS = {
    re.compile(r"WEBVTT\b|\d+\s*\n\d\d:\d\d:\d\d[,.]\d+ -->"): "subtitles: save the speech as plain text",
    re.compile(r"@\w+\s*\{[^\s{},]+,\s*\n"): "a bibliography: save its texts as plain text",
    re.compile(r"BEGIN:V(CALENDAR|CARD)\b"): "a calendar or contacts: save the text as plain text",
}
_TABLE_LINES = 50


def _refusals() -> dict[str, str]:
    """What to do with files that cannot be read as text, by suffix."""
    by_advice = {
        "unpack it and name the files inside": "zip zst tar tgz tbz tbz2 txz 7z rar lz lz4 br z",
        "save it as plain text (.txt)": "doc docx odt pdf rtf epub html htm xhtml xml pptx ppt odp mobi",
        "save it as CSV with a column 'text'": "xls xlsx ods sqlite sqlite3 db sav dta rdata psv",
        "save it as Parquet or JSON Lines with a column 'text'": "arrow feather orc avro h5 hdf5 pkl pickle "
        "npy npz msgpack",
        'save its text as JSON Lines: {"text": ...} on every line': "ipynb jsonld geojson json5 mbox eml "
        "warc",
        "save the speech as plain text (.txt)": "srt vtt ass sub sbv lrc",
        "name files of text": "safetensors gguf pt pth bin onnx exe dll so dylib png jpg jpeg gif webp bmp "
        "tif tiff svg ico mp3 wav flac ogg mp4 avi mkv mov webm ttf woff woff2 class jar pyc o a",
    }
    return {f".{suffix}": advice for advice, suffixes in by_advice.items() for suffix in suffixes.split()}


_REFUSED = _refusals()
_CONVERT = (
    "convert it to plain text (.txt), or to JSON Lines or CSV with a column 'text'; if it is plain text "
    "already, rename it to .txt"
)


def format_of(path: Path) -> str:
    """The suffix that determines how a file is read: in lower case, without a compression suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    while suffixes and _NUMBER.fullmatch(suffixes[-1]):
        suffixes.pop()
    return suffixes[-1] if suffixes and _SUFFIX.fullmatch(suffixes[-1]) else ""


def is_data_file(path: Path) -> bool:
    """Whether a file is in a structured format for several documents, such as CSV or JSON Lines."""
    return format_of(path) in _READERS


def is_housekeeping(path: Path) -> bool:
    """Whether a file describes the other files of its folder: a README, a license, a data set card."""
    return format_of(path) not in _DATA_SUFFIXES and _HOUSEKEEPING.fullmatch(path.name) is not None


def read_documents_of(path: Path) -> Iterator[str]:
    """Read the documents of a file for which `is_data_file` is true.

    Raises:
        DataError: The file does not match its suffix, or holds no text.
    """
    return _READERS[format_of(path)](path)


def read_prose(path: Path) -> Iterator[str]:
    """Read a plain text file, which is one document, in blocks.

    Raises:
        DataError: The suffix is refused, or the content is structured data rather than prose.
    """
    suffix = format_of(path)
    if (advice := _REFUSED.get(suffix)) is not None:
        raise DataError(f"{path}: {suffix} files are not read as text: {advice}")
    if suffix not in _PROSE | _CODE:
        raise DataError(f"{path}: {suffix} is not a supported text format: {_CONVERT}")
    blocks = read_blocks(path)
    first = next(blocks, "")
    second = next(blocks, None)
    # A program may begin with anything.
    if suffix not in _CODE and (found := _structure(path, first, whole=second is None)):
        raise DataError(f"{path}: expected plain text, found {found}")
    yield first
    if second is not None:
        yield second
        yield from blocks


def _structure(path: Path, head: str, *, whole: bool) -> str | None:
    """Describe what a file named like prose seems to be instead, and what to do; None if it is prose.

    Args:
        path: The file.
        head: The beginning of its text.
        whole: Whether ``head`` is the whole text.
    """
    text = head.lstrip("\ufeff \t\r\n")
    if _JSON_START.match(head) or is_json(head, whole=whole):
        return "JSON: name it .jsonl if it has one value on every line, otherwise .json"
    if text[:20].lower().startswith(_MARKED_UP):
        return "a marked-up document: save it as plain text"
    if kind := next((kind for start, kind in _STARTS.items() if start.match(text)), None):
        return kind
    if table := _table(head):
        return table
    if path.name.lower() == "readme.md" and _is_card(head):
        return "a data set card: name the data files instead"
    return None


def _table(head: str) -> str | None:
    lines = [line for line in head.split("\n")[:-1][:_TABLE_LINES] or [head] if line.strip()]
    first = lines[0][:1000] if lines else ""
    names = {"\t": "name it .tsv", ",": "name it .csv", ";": "save it as CSV", "|": "save it as CSV"}
    for separator, advice in names.items():
        cells = first.split(separator)
        names_columns = len(cells) > 1 and all(re.fullmatch(r"\w{1,40}", cell) for cell in cells)
        if names_columns and ("text" in cells or _is_even(lines, separator)):
            return f"a table: {advice}, with a column 'text'"
    # Text indented with tabs is not a table.
    inside = {line.strip("\t").count("\t") for line in lines}
    if len(lines) > 1 and len(inside) == 1 and inside.pop() > 0:
        return "a table: name it .tsv, with a column 'text' in its first line"
    return None


def _is_even(lines: list[str], separator: str) -> bool:
    """Whether there are several rows and all have the same number of cells."""
    try:
        rows = list(csv.reader(lines, delimiter=separator))
    except csv.Error:
        return False
    # In prose, a space follows each comma.
    spaced = any(cell.startswith(" ") for row in rows for cell in row)
    return len(rows) > 1 and len({len(row) for row in rows}) == 1 and not spaced


def _is_card(head: str) -> bool:
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    return front is not None and _CARD_KEYS.search(front[1]) is not None


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".csv": read_csv,
    ".json": read_json_list,
    ".jsonl": read_json_lines,
    ".jsonlines": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".tab": read_tsv,
    ".tsv": read_tsv,
}
