"""From the bytes of a file to text, block by block; what is not text is refused by name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fedprllm.errors import DataError

__all__ = ["COMPRESSED", "lines_of", "open_bytes", "read_blocks"]

_BLOCK = 2**18  # bytes

COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
}
_UNPACK = "unpack it and name the files inside"
_DECOMPRESS = "name it {}, or decompress it"
# What a file is by its first bytes, whatever it is called, and what to do.
_KINDS = {
    b"PK\x03\x04": ("a ZIP archive or an office document", f"{_UNPACK}, or save it as plain text (.txt)"),
    b"PK\x05\x06": ("an empty ZIP archive", _UNPACK),
    b"\x1f\x8b": ("compressed with gzip", _DECOMPRESS.format(".gz")),
    b"BZh91AY": ("compressed with bzip2", _DECOMPRESS.format(".bz2")),
    b"\xfd7zXZ\0": ("compressed with xz", _DECOMPRESS.format(".xz")),
    b"\x5d\0\0": ("compressed with lzma", _DECOMPRESS.format(".lzma")),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "decompress it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a": ("a RAR archive", _UNPACK),
    b"PAR1\x15": ("a Parquet file", "name it .parquet"),
    b"ARROW1\0": ("an Arrow file", "save it as Parquet with a column 'text'"),
    b"%PDF-": ("a PDF", "save it as plain text (.txt)"),
    b"\xd0\xcf\x11\xe0": ("an office document", "save it as plain text (.txt)"),
    b"SQLite format 3\0": ("an SQLite database", "save the text as CSV with a column 'text'"),
    b"\x89HDF": ("an HDF5 file", "save the text as Parquet with a column 'text'"),
    b"WARC/1": ("a web archive", 'save its text as JSON Lines: {"text": ...} on every line'),
    b"!<arch>\n": ("an archive", _UNPACK),
    b"GGUF\3\0": ("a model", "name files of text"),
    b"\x89PNG": ("an image", "name files of text"),
    b"\xff\xd8\xff": ("an image", "name files of text"),
}
_TAR_PLACE, _TAR = 257, b"ustar"
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer: fetch the file itself with git lfs pull",
    b"/annex/objects/": "a git-annex pointer: fetch the file itself with git annex get",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed, and refuse what only points at a file.

    Raises:
        DataError: It is a pointer of Git LFS or git-annex.
    """
    with path.open("rb") as file:
        head = file.read(64)
    for start, what in _POINTERS.items():
        if head.startswith(start):
            raise DataError(f"{path} is {what}")
    unpack = COMPRESSED.get(path.suffix.lower())
    file_: IO[bytes] = unpack(path, "rb") if unpack else path.open("rb")
    return file_


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks: UTF-8, a byte-order mark dropped, line ends as LF.

    Raises:
        DataError: The file is not UTF-8 text, or its compression is damaged.
    """
    # The same text must give the same windows whichever system wrote the file.
    carried = ""
    first = True
    for text in _decoded(path):
        block = (carried + (text.removeprefix("\ufeff") if first else text)).replace("\r\n", "\n")
        first = False
        carried = "\r" if block.endswith("\r") else ""
        if block := block.removesuffix("\r") if carried else block:
            yield block
    if carried:
        yield carried


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in _bytes_of(path):
        if offset == 0:
            _refuse_other_unicode(path, block)
            refuse_other_kinds(path, block)
        if (found := block.find(b"\0")) >= 0:
            raise DataError(_not_text(path, f"a NUL byte at byte offset {offset + found}"))
        start = offset - len(decoder.getstate()[0])
        offset += len(block)
        if text := _decode(decoder, block, path, start, final=False):
            yield text
    _decode(decoder, b"", path, offset - len(decoder.getstate()[0]), final=True)


def _bytes_of(path: Path) -> Iterator[bytes]:
    try:
        with open_bytes(path) as file:
            while block := file.read(_BLOCK):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path} is damaged or not compressed as its name says: it cannot be decompressed. Copy or "
            "download it again"
        ) from None


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, start: int, *, final: bool) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at byte offset {start + error.start}"
        raise DataError(_not_text(path, byte)) from None


def _not_text(path: Path, found: str) -> str:
    return f"{path} is not text: expected UTF-8, found {found}. Convert or unpack it, or leave it out"


def _refuse_other_unicode(path: Path, block: bytes) -> None:
    for mark, encoding in _MARKS.items():
        if block.startswith(mark):
            raise DataError(f"{path} is {encoding} text: expected UTF-8. Save it as UTF-8")


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Refuse by its first bytes what is no text at all.

    Raises:
        DataError: It is an archive, compressed, or another kind of file; the message says which.
    """
    found = next((kind for start, kind in _KINDS.items() if head.startswith(start)), None)
    if head[_TAR_PLACE : _TAR_PLACE + len(_TAR)] == _TAR:
        found = ("a tar archive", _UNPACK)
    if found:
        what, advice = found
        raise DataError(f"{path} is {what}: expected text. {advice[0].upper()}{advice[1:]}")


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text, without their LF; other line ends are part of the text."""
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    pending: list[str] = []
    for block in blocks:
        head, *rest = block.split("\n")
        pending.append(head)
        if rest:
            yield "".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if last := "".join(pending):
        yield last
