"""From text to token windows, and from windows to participants.

Text is read from plain files, JSON, JSON Lines, CSV, Parquet, folders and Hugging Face datasets. Token ids
are int64; a window is a row of ``window_length`` of them. Messages name files, lines and columns, and never
quote a document.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fedprllm.core.ties import generator
from fedprllm.errors import ConfigError, DataError, did_you_mean

__all__ = [
    "Bos",
    "Tokenizer",
    "adds_bos",
    "evaluation_windows",
    "fingerprint",
    "partition",
    "read_documents",
    "token_windows",
]

Bos = Literal["auto", "every", "start", "never"]
_SEPARATOR = "\n\n"
_HUB = re.compile(r"hf:(?P<name>[^:\[\]]+)(?::(?P<config>[^:\[\]]+))?:(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?)")
_STRINGS = {"string", "large_string", "string_view"}
_NAMES_SHOWN = 20


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers has it."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Encode a text; ``input_ids`` of the result are its token ids."""


# --- text -------------------------------------------------------------------------------------------------


def read_documents(source: str | Path) -> list[str]:
    """Read the documents of one source, in order, without the blank ones.

    A plain text file is one document, whatever its suffix (UTF-8; a byte-order mark is dropped, line ends
    become LF). ``.jsonl`` holds one string or one ``{"text": ...}`` per line, ``.json`` a list of those,
    ``.csv`` and ``.parquet`` a column ``text``. A folder is a dataset of ``datasets.save_to_disk``, or all
    files below it by name, hidden ones left out. ``hf:NAME:SPLIT`` and ``hf:NAME:CONFIG:SPLIT`` are datasets
    of the hub.

    Raises:
        DataError: missing, unreadable, empty, not text, malformed, without a text column, or a package that
            reads it is not installed.
    """
    return [document for document in _read(source) if document.strip()]


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


def _json_text(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        found = f"an object with {_names(row)}" if isinstance(row, dict) else type(row).__name__
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


# --- windows ----------------------------------------------------------------------------------------------


def token_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    n_windows: int,
    window_length: int,
    seed: int,
    bos: Bos,
) -> Int[Tensor, "n_windows window_length"]:
    """Cut text into calibration windows that do not overlap.

    Documents are joined by a blank line, since few are as long as a window. All of them are taken in order
    if ``n_windows`` is 0; otherwise they are visited in a seeded random order until they hold enough tokens,
    and a seeded random choice of the resulting windows is kept, in order. Text for fewer windows than asked
    gives fewer: the number is the caller's to see.

    Args:
        sources: what `read_documents` reads, pooled.
        tokenizer: any of transformers.
        n_windows: most windows to return; 0 means all.
        window_length: tokens per window, a BOS token included.
        seed: of the order and of the choice.
        bos: ``auto``: in every window if the tokenizer adds one by itself, otherwise none (Gemma needs it in
            every window); ``every``; ``start``: before the joined text only; ``never``.

    Raises:
        DataError: a source cannot be read, or all text is too short for one window.
        ConfigError: a BOS token is asked for and the tokenizer has none, or a number is out of range.
    """
    _check_lengths(window_length)
    if n_windows < 0:
        raise ConfigError(f"n_windows must be at least 0 (0 takes all text), found {n_windows}")
    place = _bos_place(tokenizer, bos)
    documents = [document for source in sources for document in read_documents(source)]
    random = generator("calibration windows", seed)
    if n_windows:
        documents = [documents[i] for i in torch.randperm(len(documents), generator=random)]
        ids = _encode_enough(tokenizer, documents, n_windows * window_length)
    else:
        ids = _encode(tokenizer, _SEPARATOR.join(documents))
    windows = _cut(ids, window_length, place, tokenizer.bos_token_id)
    if not len(windows):
        raise DataError(
            f"text too short for one window: {', '.join(map(str, sources)) or 'no source'} give {len(ids)} "
            f"tokens, one window needs {window_length - (place != 'never')}. Add text or use a smaller "
            "--window-length"
        )
    if 0 < n_windows < len(windows):
        kept = torch.randperm(len(windows), generator=random)[:n_windows]
        windows = windows[kept.sort().values]
    return windows


def evaluation_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    window_length: int,
    bos: Bos,
    max_tokens: int | None = None,
) -> list[Int[Tensor, " tokens"]]:
    """Cut text into the windows on which the literature measures perplexity (GPTQ, SparseGPT, Wanda).

    All documents in order, joined by blank lines, in windows that do not overlap; the last, partial one is
    dropped. Blank documents count here: the published numbers on WikiText-2 join them too. Text shorter than
    one window gives a single shorter window.

    Args:
        sources: what `read_documents` reads, pooled.
        tokenizer: any of transformers.
        window_length: tokens per window, a BOS token included.
        bos: as in `token_windows`; the literature's protocol for Llama is ``start``.
        max_tokens: use only this many tokens from the beginning of the text.

    Raises:
        DataError: a source cannot be read, or all text is shorter than two tokens.
        ConfigError: a BOS token is asked for and the tokenizer has none, or a number is out of range.
    """
    _check_lengths(window_length, max_tokens)
    place = _bos_place(tokenizer, bos)
    documents = [document for source in sources for document in _read(source)]
    ids = _encode(tokenizer, _SEPARATOR.join(documents))[:max_tokens]
    length = min(window_length, len(ids) + (place != "never"))
    if length < 2:
        raise DataError(
            f"text too short to measure a perplexity: {', '.join(map(str, sources)) or 'no source'} give "
            f"{len(ids)} tokens, at least 2 are needed. Add text"
        )
    return list(_cut(ids, length, place, tokenizer.bos_token_id))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def fingerprint(windows: Int[Tensor, "n_windows window_length"]) -> str:
    """SHA-256, in hex, of the shape and the ids as little-endian int64."""
    values = windows.cpu().numpy().astype("<i8")
    return hashlib.sha256(np.array(values.shape, dtype="<i8").tobytes() + values.tobytes()).hexdigest()


def _check_lengths(window_length: int, max_tokens: int | None = None) -> None:
    if window_length < 2:
        raise ConfigError(f"window_length must be at least 2 tokens, found {window_length}")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, found {max_tokens}")


def _bos_place(tokenizer: Tokenizer, bos: Bos) -> Literal["every", "start", "never"]:
    if bos not in get_args(Bos):
        raise ConfigError(f"unknown value of bos: {did_you_mean(bos, get_args(Bos))}")
    if bos == "auto":
        return "every" if adds_bos(tokenizer) else "never"
    if bos != "never" and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"bos '{bos}' needs a beginning-of-sequence token, and this tokenizer has none: use auto or never"
        )
    return bos


def _encode(tokenizer: Tokenizer, text: str) -> Int[Tensor, " tokens"]:
    """Token ids of a text as a whole: its pieces could be cut differently where they meet."""
    # verbose=False: the text is longer than the model's limit on purpose.
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _encode_enough(tokenizer: Tokenizer, documents: Sequence[str], n_tokens: int) -> Int[Tensor, " tokens"]:
    """Token ids of the first documents, joined: as many as give ``n_tokens``, or all of them."""
    n_characters = list(accumulate(len(document) + len(_SEPARATOR) for document in documents))
    characters_per_token = 2.0
    while True:
        wanted = math.ceil(characters_per_token * n_tokens)
        n_documents = 1 + sum(end < wanted for end in n_characters[:-1])
        ids = _encode(tokenizer, _SEPARATOR.join(documents[:n_documents]))
        if len(ids) >= n_tokens or n_documents >= len(documents):
            return ids
        # A tenth more than the rate so far, so that every turn asks for a tenth more text at least.
        characters_per_token = 1.1 * n_characters[n_documents - 1] / max(len(ids), 1)


def _cut(
    ids: Int[Tensor, " tokens"], window_length: int, place: str, bos_id: int | None
) -> Int[Tensor, "n_windows window_length"]:
    """Windows that do not overlap; the last, partial one is dropped."""
    if place == "start":
        ids = F.pad(ids, (1, 0), value=bos_id)
    n_text = window_length - (place == "every")
    windows = ids[: len(ids) // n_text * n_text].view(-1, n_text)
    return F.pad(windows, (1, 0), value=bos_id) if place == "every" else windows


# --- participants -----------------------------------------------------------------------------------------


def partition(
    windows_by_file: Sequence[Int[Tensor, "_ window_length"]],
    n_participants: int,
    *,
    method: Literal["iid", "file", "dirichlet"],
    alpha: float,
    seed: int,
) -> list[Int[Tensor, "_ window_length"]]:
    """Deal windows out to participants: each goes to exactly one, and everyone gets at least one.

    ``iid`` deals all windows out at random, sizes differ by at most one. ``file`` gives file i to participant
    ``i mod n``. ``dirichlet`` draws for each file its shares ``p ~ Dir(alpha, ..., alpha)`` over the
    participants (Hsu et al. 2019, with files for classes); small alpha: each file to few participants.

    Args:
        windows_by_file: the windows of each file.
        n_participants: how many to deal out to.
        method: a key of the table above.
        alpha: concentration of ``dirichlet``; the others do not look at it.
        seed: of the draw.

    Raises:
        DataError: fewer windows, or for ``file`` fewer files with windows, than participants.
        ConfigError: the method is unknown, or a number is out of range.
    """
    if method not in _PARTITIONS:
        raise ConfigError(f"unknown value of partition: {did_you_mean(method, _PARTITIONS)}")
    if n_participants < 1:
        raise ConfigError(f"the number of participants must be at least 1, found {n_participants}")
    sizes = [len(windows) for windows in windows_by_file]
    if sum(sizes) < n_participants:
        raise DataError(
            f"{n_participants} participants need at least one window each, found {sum(sizes)} in "
            f"{len(sizes)} files. Add text, shorten the windows or take fewer participants"
        )
    owners = _PARTITIONS[method](sizes, n_participants, alpha, seed)
    windows = torch.cat(list(windows_by_file))
    return [windows[owners == participant] for participant in range(n_participants)]


# A function (sizes, n_participants, alpha, seed) -> owners: the participant of each window, files in order.
Owners = Int[Tensor, " n_windows"]


def _iid(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:  # noqa: ARG001
    n_windows = sum(sizes)
    owners = torch.empty(n_windows, dtype=torch.int64)
    order = torch.randperm(n_windows, generator=generator("partition iid", seed))
    owners[order] = torch.arange(n_windows) % n_participants
    return owners


def _by_file(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:  # noqa: ARG001
    owners = torch.repeat_interleave(torch.arange(len(sizes)) % n_participants, torch.tensor(sizes))
    if len(set(owners.tolist())) < n_participants:
        raise DataError(
            f"partition 'file' gives whole files: {n_participants} participants need one with text each, "
            f"found {sum(map(bool, sizes))}. Add files, take fewer participants or another partition"
        )
    return owners


def _dirichlet(sizes: Sequence[int], n_participants: int, alpha: float, seed: int) -> Owners:
    if not 0 < alpha < math.inf:
        raise ConfigError(f"alpha must be greater than 0 and finite, found {alpha:g}: for example 0.5")
    random = np.random.default_rng(generator("partition dirichlet", seed).initial_seed())
    everyone = np.arange(n_participants)
    owners = np.concatenate(
        [
            random.permutation(
                np.repeat(
                    everyone, _largest_remainder(size, random.dirichlet(np.full(n_participants, alpha)))
                )
            )
            for size in sizes
        ]
    )
    for participant in everyone:
        if participant not in owners:
            richest = np.bincount(owners, minlength=n_participants).argmax()
            owners[np.flatnonzero(owners == richest)[-1]] = participant
    return torch.from_numpy(owners)


def _largest_remainder(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total``: ``floor(total * share)``, the rest to the largest remainders."""
    exact = total * shares
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts


_PARTITIONS: dict[str, Callable[[Sequence[int], int, float, int], Owners]] = {
    "iid": _iid,
    "file": _by_file,
    "dirichlet": _dirichlet,
}
