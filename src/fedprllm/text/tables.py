"""Documents in the column of a table: CSV, TSV, Parquet and datasets."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprllm.errors import DataError
from fedprllm.text.columns import choose_column
from fedprllm.text.decoding import lines_of, open_bytes, read_blocks

__all__ = ["optional", "read_csv", "read_dataset", "read_parquet", "read_tsv"]

_ROWS = 1000
# Of Parquet: without a buffer, the column of a whole row group is in memory, and a file may have only one.
_BUFFER_BYTES, _BATCH_ROWS = 2**20, 64
_FIELD_LIMIT = min(sys.maxsize, 2**31 - 1)  # what a C long holds on every system
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
# A CSV file without header has text where names are expected: only these are ever shown.
_COMMON_COLUMNS = re.compile(
    r"texts?|body|contents?|documents?|sentence|paragraph|story|title|label|id|index|url|date|name|author|source"
    r"|lang|language|prompt|completion|question|answer|instruction|input|output",
    re.IGNORECASE,
)


def read_csv(path: Path) -> Iterator[str]:
    """The column ``text`` of a table separated by commas."""
    return _read_separated(path, ",")


def read_tsv(path: Path) -> Iterator[str]:
    """The column ``text`` of a table separated by tabs; quoted like CSV."""
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Iterator[str]:
    # strict: a quote that is never closed must not swallow the rest of the file.
    reader = csv.reader(
        (line + "\n" for line in lines_of(read_blocks(path))), delimiter=separator, strict=True
    )
    rows = _rows(reader, path)
    header = next(rows, None)
    if header is None:
        return
    column = _csv_column(header, path, separator)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {reader.line_num} (row {number}): expected {len(header)} cells, found "
                f"{len(row)}. Put text that holds {_SEPARATORS[separator]} in double quotes"
            )
        yield row[column]


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    while True:
        # The module's limit is global and 131,072 characters by default; a document may be longer.
        limit = csv.field_size_limit(_FIELD_LIMIT)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield row


def _csv_column(header: list[str], path: Path, separator: str) -> int:
    if (found := header.count("text")) == 1:
        return header.index("text")
    if found:
        raise DataError(f"{path}: expected one column 'text', found {found}. Rename or remove the others")
    for other, name in _SEPARATORS.items():
        if other != separator and len(header) == 1 and other in header[0]:
            advice = "name it .tsv" if other == "\t" else f"separate them by {_SEPARATORS[separator]}"
            raise DataError(f"{path}: its columns are separated by {name}: {advice}")
    known = [name for name in header if _COMMON_COLUMNS.fullmatch(name.strip())]
    others = [f"{len(header) - len(known)} others"] if len(known) < len(header) else []
    raise DataError(
        f"{path}: expected a column 'text' in line 1, found {', '.join([*known, *others])}. Name the column "
        "that holds the text so"
    )


def read_parquet(path: Path) -> Iterator[str]:
    """The column of strings of a Parquet file, read in batches; nulls are blank."""
    pyarrow, parquet = optional("pyarrow", path), optional("pyarrow.parquet", path)
    with open_bytes(path) as opened:
        try:
            with parquet.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                kinds = [(field.name, str(field.type)) for field in file.schema_arrow]
                column, checked = choose_column(kinds, path)
                batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False)
                yield from checked(text or "" for batch in batches for text in batch.column(0).to_pylist())
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{path} is not a Parquet file or is damaged ({type(error).__name__}): copy or download it "
                "again"
            ) from None


def read_dataset(dataset: Any, source: object) -> Iterator[str]:
    """The column of strings of a `datasets.Dataset`, read in batches; nulls are blank."""
    if dataset.features is None:
        raise DataError(f"{source}: expected a dataset with columns, found none")
    kinds = [
        (name, str(getattr(kind, "dtype", type(kind).__name__))) for name, kind in dataset.features.items()
    ]
    column, checked = choose_column(kinds, source)
    if hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns([column])
    starts = range(0, len(dataset), _ROWS)
    yield from checked(text or "" for start in starts for text in dataset[start : start + _ROWS][column])


def optional(module: str, source: object) -> Any:
    """Import a package that only some formats need.

    Raises:
        DataError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"reading {source} needs the package {package}: pip install fedprllm[data]"
        ) from error
