"""Documents from files, folders, data sets and memory, part by part.

Messages name files, lines and columns, and never quote a document.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedprllm.errors import DataError, FedprllmWarning, did_you_mean
from fedprllm.text.columns import names_shown
from fedprllm.text.formats import is_data_file, is_housekeeping, read_documents_of, read_prose
from fedprllm.text.sources import Documents, Source, describe, is_dataset, refuse_text
from fedprllm.text.tables import optional, read_dataset

__all__ = ["Part", "joined", "left_out", "parts_of", "read_documents", "say_left_out"]

_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?)")
_NAMES_SHOWN = 20
_SEPARATOR = "\n\n"
_JOINED = 2**16  # characters


class Part(NamedTuple):
    """A stretch of a document; long documents come in several."""

    text: str
    starts: bool


def read_documents(source: Source, *, keep_blank: bool = False) -> list[str]:
    """Read the documents of one source, in order, without the blank ones unless they are asked for.

    See docs/method.md, "What is read as text". ``hf:NAME:SPLIT`` and ``hf:NAME:CONFIG:SPLIT`` are data sets
    of the hub.

    Raises:
        DataError: missing, unreadable, empty, not text, malformed, without a text column, or a package that
            reads it is not installed.
    """
    documents: list[list[str]] = []
    for part in parts_of([source], keep_blank=keep_blank):
        if part.starts:
            documents.append([])
        documents[-1].append(part.text)
    return ["".join(document) for document in documents]


def parts_of(sources: Sequence[Source], *, keep_blank: bool = False) -> Iterator[Part]:
    """The documents of some sources in order, read as they are asked for.

    Raises:
        DataError: As `read_documents`; a source without text is found when it has been read to its end.
    """
    for source in sources:
        holds_text = False
        try:
            parts = _parts(source)
            for part in parts if keep_blank else _without_blank(parts):
                holds_text = holds_text or not _is_blank(part.text)
                yield part
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename or describe(source)}: {error.strerror or error}. "
                "Check its permissions"
            ) from error
        if not holds_text:
            raise DataError(
                f"{describe(source)} holds no text: expected at least one document that is not blank"
            )


def joined(parts: Iterable[Part]) -> Iterator[str]:
    """The text of documents joined by blank lines, in blocks that are not tiny."""
    pending: list[str] = []
    n_characters = 0
    for number, part in enumerate(parts):
        pending.append(_SEPARATOR + part.text if part.starts and number else part.text)
        n_characters += len(pending[-1])
        if n_characters >= _JOINED:
            yield "".join(pending)
            pending, n_characters = [], 0
    yield "".join(pending)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _without_blank(parts: Iterable[Part]) -> Iterator[Part]:
    """Leave blank documents out, and keep the blank beginnings of others."""
    held: list[str] = []
    begun = False
    for part in parts:
        if part.starts:
            held, begun = [], False
        if begun:
            yield Part(part.text, starts=False)
        elif _is_blank(part.text):
            held.append(part.text)
        else:
            begun = True
            yield Part("".join([*held, part.text]), starts=True)


def _parts(source: Source) -> Iterator[Part]:
    """The documents of one source, blank ones included."""
    if isinstance(source, Documents):
        return _whole(source.texts)
    if is_dataset(source):
        return _whole(read_dataset(source, describe(source)))
    if str(source).startswith("hf:"):
        return _whole(_read_hub(str(source)))
    path = _path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path)
    raise DataError(_missing(path))


def _whole(documents: Iterable[str]) -> Iterator[Part]:
    return (Part(document, starts=True) for document in documents)


def _path(source: str | Path) -> Path:
    refuse_text(str(source))
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise DataError(f"cannot find {source}: {error}") from None


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file or folder: {path} (its folder {path.parent} does not exist either)"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if len(names) > _NAMES_SHOWN:
        names = difflib.get_close_matches(path.name, names, n=_NAMES_SHOWN, cutoff=0.5)
    if not names:
        return f"no such file or folder: {path}"
    return f"no such file or folder in {path.parent}: {did_you_mean(path.name, names)}"


def _read_file(path: Path) -> Iterator[Part]:
    if path.exists() and not path.is_file():
        # Text is read more than once.
        raise DataError(
            f"{path} is neither a file nor a folder but a pipe or a device: save its text as a file"
        )
    if is_data_file(path):
        return _whole(read_documents_of(path))
    return (Part(block, starts=number == 0) for number, block in enumerate(read_prose(path)))


def _read_folder(folder: Path) -> Iterator[Part]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise DataError(
            f"{folder} is a dataset with splits: name the folder of one of them inside it: "
            f"{names_shown(splits)}"
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        datasets = optional("datasets", folder)
        return _whole(read_dataset(_load(folder, datasets.load_from_disk, str(folder)), folder))
    files = _files(folder)
    texts = [path for path in files if not is_housekeeping(path)]
    if files and not texts:
        raise DataError(
            f"{folder} holds no text but only files that describe some: {_listed(folder, files)}. Name the "
            "files of text; one of these, named by itself, is read"
        )
    return (part for path in texts for part in _read_file(path))


def left_out(sources: Sequence[Source]) -> list[str]:
    """One sentence for each folder of which files are left out, because they describe its texts."""
    found = []
    for source in sources:
        if isinstance(source, (str, Path)) and Path(source).expanduser().is_dir():
            folder = Path(source).expanduser()
            if names := [path for path in _files(folder) if is_housekeeping(path)]:
                found.append(f"{folder}: {_listed(folder, names)} left out: not texts but files about them")
    return found


def say_left_out(sources: Sequence[Source]) -> None:
    """Warn of files that `left_out` names.

    Warns:
        FedprllmWarning: There are some.
    """
    for note in left_out(sources):
        warnings.warn(FedprllmWarning(note), stacklevel=3)


def _listed(folder: Path, files: Sequence[Path]) -> str:
    shown = [path.relative_to(folder).as_posix() for path in files[:_NAMES_SHOWN]]
    return ", ".join([*shown, f"{len(files) - len(shown)} more"] if len(files) > len(shown) else shown)


def _files(folder: Path) -> list[Path]:
    """The files below a folder, by name."""
    return sorted(_walk(folder), key=Path.as_posix)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder; hidden files and folders are left out, links to folders not followed."""

    def fail(error: OSError) -> None:
        # Without this, os.walk passes over a folder that it may not list.
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _read_hub(source: str) -> Iterator[str]:
    match = _HUB.fullmatch(source)
    if match is None:
        raise DataError(
            f"unknown dataset '{source}': expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, for example "
            "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"
        )
    datasets = optional("datasets", source)
    dataset = _load(source, datasets.load_dataset, match["name"], match["config"], split=match["split"])
    return read_dataset(dataset, source)


def _load(source: str | Path, load: Callable[..., Any], *args: object, **options: object) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:
        # Arrow, the hub client and the dataset's own builder have no common error of their own.
        raise DataError(f"cannot load dataset {source}: {error}. Check its name and the network") from error
