"""Finds private keys in the files of a folder: PEM or DER, in base64 or hex, in archives, JSON, pickles."""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization

# A DER sequence that begins with a version, as all private keys do.
_DER = re.compile(rb"\x30[\x80-\x84]?.{1,4}?\x02\x01[\x00\x01]", re.DOTALL)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{60,}(?:(?:\\n|\s)*[A-Za-z0-9+/_-]+)*={0,2}")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){100,}")


def private_keys(folder: Path) -> set[str]:
    """Paths below a folder, with ``!`` before the name of a member of an archive."""
    return {
        path.relative_to(folder).as_posix() + inner
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
        for inner in keys_in(path.read_bytes())
    }


def keys_in(content: bytes) -> Iterator[str]:
    if b"PRIVATE KEY-----" in content or _holds_der(content) or _holds_coded(content):
        yield ""
    for name, member in _members(content):
        yield from (f"!{name}{inner}" for inner in keys_in(member))


def _holds_der(content: bytes) -> bool:
    for found in _DER.finditer(content):
        start = content[found.start() :]
        n_length = start[1] - 0x80 if start[1] >= 0x80 else 0
        length = int.from_bytes(start[2 : 2 + n_length], "big") if n_length else start[1]
        try:
            serialization.load_der_private_key(start[: 2 + n_length + length], password=None)
        except (ValueError, TypeError, NotImplementedError):
            continue
        return True
    return False


def _holds_coded(content: bytes) -> bool:
    for found in _HEX.findall(content):
        if _holds_der(binascii.unhexlify(found)):
            return True
    for found in _BASE64.findall(content):
        letters = re.sub(rb"\\n|\s", b"", found).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
        whole = letters[: len(letters) - (len(letters) % 4 == 1)]
        if _holds_der(base64.b64decode(whole + b"=" * (-len(whole) % 4))):
            return True
    return False


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    for name, unpack in (("gz", gzip.decompress), ("bz2", bz2.decompress), ("xz", lzma.decompress)):
        if content[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            try:
                yield name, unpack(content)
            except (OSError, EOFError, lzma.LZMAError):
                continue
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist())
    elif content[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
