"""Quantizing together: what the participants' sums are worth to llama.cpp as an importance matrix.

SmolLM2-135M, a GGUF file whose weights have 4 bits and are taken apart again, is quantized anew by
llama.cpp's own `llama-quantize`: without an importance matrix, with that of one participant's text, and with
that of all participants' sums (`prune --share statistics --sparsity 0`, `export --imatrix`).
Its own `llama-perplexity` measures each model on held-out text of each kind, in windows of 512 tokens of
which it scores the second half. Rows of the table are geometric means over the kinds of text: on the text of
the participant whose matrix it is, and on the others'.

llama.cpp is not part of this project: name the folder with its tools.

    python -m benchmarks.quantize --tools llama.cpp/build/bin [--texts FOLDER] [--kinds 4] [--windows 16]
        [--types Q4_K_M Q2_K] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks._harness import given, machine
from benchmarks.solvers import texts_of
from fedprllm import PruneConfig, prune
from fedprllm.demo.compare import demo_model
from fedprllm.export.imatrix import export_importance_matrix
from fedprllm.models.source import resolve_model
from fedprllm.text.documents import joined, parts_of

_LENGTH = 512
_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-quantize")
    parser.add_argument("--model", type=Path, default=None, help="GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts, as in benchmarks.solvers")
    parser.add_argument("--kinds", type=int, default=4, help="kinds of text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=16, help="windows to measure on, per kind")
    parser.add_argument("--threads", type=int, default=2, help="threads of llama-perplexity")
    parser.add_argument("--types", nargs="*", default=["Q4_K_M", "Q2_K"])
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes [float32]")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.chunks, options.kinds = 1, 2, 2
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(_result(options, Path(temporary))))


def _result(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    source = options.model or demo_model()
    folder = resolve_model(source)
    texts, held_out = texts_of(options.texts, scratch)
    kinds = _spread(sorted(texts), options.kinds)
    plain = {kind: _plain(held_out[kind], scratch / f"{kind}.txt") for kind in kinds}
    plain_model = scratch / "model.gguf"
    _run([options.tools / "llama-quantize", "--allow-requantize", source, plain_model, "F32"])
    matrices = _matrices(options, folder, {kind: texts[kind] for kind in kinds}, scratch)
    found = {"float32": _measured(options, plain_model, plain)}
    sizes = {"float32": plain_model.stat().st_size}
    for kind in options.types:
        for name, matrix in ({"no matrix": None} | matrices).items():
            quantized = scratch / "quantized.gguf"
            how = [] if matrix is None else ["--imatrix", matrix]
            _run([options.tools / "llama-quantize", *how, plain_model, quantized, kind])
            label = f"{kind}, {name}"
            found[label] = _measured(options, quantized, plain)
            sizes[label] = quantized.stat().st_size
            print(label, found[label], file=sys.stderr)
    return {
        "benchmark": "quantize",
        "quick": options.quick,
        "options": given(),
        "kinds": kinds,
        "types": options.types,
        "windows": options.windows,
        "chunks": options.chunks,
        "dtype": options.dtype,
        "perplexity": found,
        "bytes": sizes,
        "machine": machine(),
    }


def _spread(kinds: Sequence[str], n: int) -> list[str]:
    """As many kinds of text, spread over the alphabet."""
    return [kinds[place * len(kinds) // n] for place in range(min(n, len(kinds)))]


def _plain(source: Path, target: Path) -> Path:
    """Documents as one plain text, as llama-perplexity reads it."""
    target.write_text("".join(joined(parts_of([source]))), encoding="utf-8")
    return target


def _matrices(
    options: argparse.Namespace, folder: Path, texts: Mapping[str, Path], scratch: Path
) -> dict[str, Path]:
    """The importance matrix of each participant alone, and of all together."""
    found = {}
    for name, own in {**{kind: {kind: path} for kind, path in texts.items()}, "all": texts}.items():
        config = PruneConfig(
            share="statistics",
            sparsity=0.0,
            windows=options.windows,
            window_length=_LENGTH,
            dtype=options.dtype,
        )
        result = prune(folder, own, config, out=scratch / f"run-{name}")
        matrix = scratch / f"{name}.imatrix.gguf"
        export_importance_matrix(result.out, matrix)
        shutil.rmtree(result.out)
        found[name] = matrix
    return found


def _measured(
    options: argparse.Namespace, model: Path, texts: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """Perplexity and its standard error by llama-perplexity, for each kind of text."""
    found = {}
    for kind, path in texts.items():
        tool = options.tools / "llama-perplexity"
        # As they are in the file: other layouts need instructions that some virtual machines lack.
        how = ["-c", _LENGTH, "--chunks", options.chunks, "-t", options.threads, "--no-repack"]
        log = _run([tool, "-m", model, "-f", path, *how])
        match = _ESTIMATE.search(log)
        if match is None:
            raise SystemExit(f"{tool} gave no perplexity of {kind}:\n{log[-2000:]}")
        found[kind] = {"perplexity": float(match[1]), "error": float(match[2])}
    return found


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with status {done.returncode}:\n{log[-2000:]}")
    return log


# The page ------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table: geometric means of perplexities over the kinds of text."""
    rows = [_row("float32", result["bytes"]["float32"], result, ["float32"] * 2)]
    for kind in result["types"]:
        for name, which in (("no matrix", "no matrix"), ("all participants'", "all")):
            label = f"{kind}, {which}"
            rows.append(_row(f"{kind}, {name}", result["bytes"][label], result, [label] * 2))
        rows.append(_row_alone(kind, result))
    title = f"{len(result['kinds'])} kinds of text ({', '.join(result['kinds'])}), by llama-perplexity"
    return {title: rows}


def _row(name: str, n_bytes: int, result: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    own, others = (_mean([result["perplexity"][label][kind] for kind in result["kinds"]]) for label in labels)
    return {
        "": name,
        "MB": round(n_bytes / 1e6, 1),
        "perplexity on own text": own,
        "on the others' text": others,
    }


def _row_alone(kind: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A participant's own matrix: its model on its own kind of text, and on the others'."""
    kinds, found = result["kinds"], result["perplexity"]
    own = [found[f"{kind}, {name}"][name] for name in kinds]
    others = [found[f"{kind}, {name}"][other] for name in kinds for other in kinds if other != name]
    n_bytes = mean(result["bytes"][f"{kind}, {name}"] for name in kinds)
    return {
        "": f"{kind}, one's own",
        "MB": round(n_bytes / 1e6, 1),
        "perplexity on own text": _mean(own),
        "on the others' text": _mean(others),
    }


def _mean(found: Sequence[Mapping[str, float]]) -> float:
    """Geometric mean of perplexities."""
    return round(math.exp(mean(math.log(each["perplexity"]) for each in found)), 2)


def gain(result: Mapping[str, Any], kind: str) -> float:
    """Perplexity with everybody's matrix relative to that without one."""
    together, without = (
        _mean([result["perplexity"][f"{kind}, {name}"][text] for text in result["kinds"]])
        for name in ("all", "no matrix")
    )
    return together / without


if __name__ == "__main__":
    main()
