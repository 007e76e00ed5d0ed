"""Time and peak memory of reading text: 2 calibration windows of 64 tokens from files of 5 MB to 1 GB.

The files are made on the fly from Python's own documentation, and read in processes of their own with the
tokenizer of the small model of the tests; evaluation reads 256 tokens. Goals: a text of 51 MB takes less than
5 seconds and 1 GB, in whichever format.

    python -m benchmarks.text [--quick] [--repeats 3]
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from benchmarks._harness import SEED, arguments, in_fresh_process, machine, print_json, print_table, rss_bytes
from fedprllm.evaluation.perplexity import load_tokenizer
from fedprllm.text.windows import evaluation_windows, token_windows

_TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "small-model"
_SIZES_MB = (5, 51, 1000)
_QUICK_MB = (5,)
_N_WINDOWS, _WINDOW_LENGTH, _EVAL_TOKENS = 2, 64, 256


def main() -> None:
    options = arguments(__doc__ or "", repeats=3)
    about = machine()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for megabytes in _QUICK_MB if options.quick else _SIZES_MB:
            for name, write in _WRITERS.items():
                path = Path(temporary) / f"text.{name}"
                write(path, megabytes)
                rows += [_row(path, megabytes, purpose, options.repeats) for purpose in _PURPOSES]
                print(f"{megabytes} MB {name} done", file=sys.stderr)
                path.unlink()
    print_table("Reading text", rows)
    print_json("text", options, about, rows=rows)


def tables(result: Mapping[str, Any]) -> Mapping[str, list[dict[str, Any]]]:
    """The rows of the page's section."""
    return {"": list(result["rows"])}


def worst(result: Mapping[str, Any], figure: str, megabytes: int = 51) -> float:
    """A figure of the format where it is largest."""
    return max(float(row[figure]) for row in result["rows"] if row["MB"] == megabytes)


def _row(path: Path, megabytes: int, purpose: str, repeats: int) -> dict[str, Any]:
    found = [in_fresh_process(_measured, path, purpose) for _ in range(repeats)]
    return {
        "format": path.suffix.removeprefix("."),
        "MB": megabytes,
        "for": purpose,
        "seconds": median(seconds for seconds, _, _ in found),
        "peak_mb": median(peak for _, peak, _ in found) / 1e6,
        "of_text_mb": median(grown for _, _, grown in found) / 1e6,
    }


def _measured(path: Path, purpose: str) -> tuple[float, int, int]:
    """Seconds, the peak of the process, and what it grew by."""
    tokenizer = load_tokenizer(_TOKENIZER)
    tokenizer("a")
    before = rss_bytes()
    start = time.perf_counter()
    _PURPOSES[purpose](path, tokenizer)
    seconds = time.perf_counter() - start
    peak = rss_bytes(peak=True)
    return seconds, peak, max(peak - before, 0)


def _calibrate(path: Path, tokenizer: Any) -> None:
    windows = token_windows(
        [path], tokenizer, n_windows=_N_WINDOWS, window_length=_WINDOW_LENGTH, seed=SEED, bos="auto"
    )
    assert windows.shape == (_N_WINDOWS, _WINDOW_LENGTH)


def _evaluate(path: Path, tokenizer: Any) -> None:
    windows = evaluation_windows(
        [path], tokenizer, window_length=_WINDOW_LENGTH, bos="auto", max_tokens=_EVAL_TOKENS
    )
    assert len(windows) == _EVAL_TOKENS // _WINDOW_LENGTH


_PURPOSES: dict[str, Callable[[Path, Any], None]] = {"calibration": _calibrate, "evaluation": _evaluate}


def _documents(megabytes: int) -> Iterator[str]:
    """Topics of Python's reference again and again, each with its number: no two are equal."""
    from pydoc_data.topics import topics

    n_bytes = 0
    for number, name in enumerate(cycle(sorted(topics))):
        document = f"{number}. {topics[name].strip()}"
        n_bytes += len(document.encode())
        if n_bytes > megabytes * 1e6:
            return
        yield document


def _write_text(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{document}\n\n" for document in _documents(megabytes))


def _write_json_lines(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in _documents(megabytes))


def _write_json(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, document in enumerate(_documents(megabytes)):
            file.write(("[" if number == 0 else ",\n") + json.dumps(document))
        file.write("]")


def _write_csv(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text"])
        rows.writerows([document] for document in _documents(megabytes))


def _write_parquet(path: Path, megabytes: int) -> None:
    # One row group, as large as they come: what is in memory must not grow with it.
    schema = pa.schema({"text": pa.string()})
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        rows = pa.RecordBatch.from_pydict({"text": list(_documents(megabytes))}, schema)
        writer.write_table(pa.Table.from_batches([rows]), row_group_size=2**30)


_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "txt": _write_text,
    "jsonl": _write_json_lines,
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
}


if __name__ == "__main__":
    main()
