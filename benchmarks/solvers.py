"""What sums can do better than votes: SmolLM2-135M pruned by each way of sharing and each solver.

Every participant has one kind of text. The perplexity is the geometric mean over held-out text of all kinds.
The damage is the perplexity minus that of the dense model, relative to the damage by votes. Votes are
one-shot, as in the paper; sums are shared block by block, on the hidden states of the pruned model.

A folder of texts holds NAME.jsonl, the text of participant NAME, and NAME-held.jsonl, its held-out text.
Without one, the participants have the demonstration's four kinds of text.

    python -m benchmarks.solvers [--texts FOLDER] [--windows 16] [--length 512] [--device cuda] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import given, machine
from fedprllm import PruneConfig, evaluate, prune
from fedprllm.demo.compare import demo_model
from fedprllm.demo.texts import demo_texts
from fedprllm.models.source import resolve_model

_SUMS = {"strategy": "iterative"}
_GRAM = {**_SUMS, "share": "gram"}
_WAYS: dict[str, dict[str, Any]] = {
    "votes": {},
    "statistics": {**_SUMS, "share": "statistics"},
    "gram, sparsegpt": {**_GRAM, "solver": "sparsegpt"},
    "gram, admm": {**_GRAM, "solver": "admm"},
    "gram, alps": {**_GRAM, "solver": "alps"},
}
_N_EVALUATION_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--ways", nargs="*", default=list(_WAYS), help=", ".join(_WAYS))
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes [float32]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    options = parser.parse_args()
    n_windows, length = (1, 64) if options.quick else (options.windows, options.length)
    model = resolve_model(options.model or demo_model())
    with tempfile.TemporaryDirectory() as temporary:
        texts, held_out = texts_of(options.texts, Path(temporary))
        dense = _measured(model, held_out, length, options)
        rows = [_row("dense", dense, dense, dense)]
        for way in options.ways:
            config = PruneConfig(
                windows=n_windows,
                window_length=length,
                pattern=options.pattern,
                dtype=options.dtype,
                device=options.device,
                **_WAYS[way],
            )
            out = Path(temporary) / way
            start = time.perf_counter()
            result = prune(model, texts, config, out=out)
            took = time.perf_counter() - start
            server = sum(block.seconds.get("aggregate", 0.0) for block in result.record.blocks)
            found = _measured(result.model_dir, held_out, length, options)
            votes = next((row["perplexity"] for row in rows if row["way"] == "votes"), found)
            rows.append(_row(way, found, dense, votes, took, server))
            print(rows[-1], file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "solvers",
                "quick": options.quick,
                "participants": sorted(texts),
                "windows": n_windows,
                "window_length": length,
                "pattern": options.pattern,
                "dtype": options.dtype,
                "options": given(),
                "device": options.device,
                "rows": rows,
                "machine": machine() | gpu_name(options.device),
            }
        )
    )


def gpu_name(device: str) -> dict[str, str]:
    """Name of the GPU, if there is one at work."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}


def texts_of(folder: Path | None, temporary: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Each participant's text, and its held-out text."""
    if folder is None:
        files = demo_texts(temporary / "texts")
        return {kind: file for kind, (file, _) in files.items()}, {
            kind: held for kind, (_, held) in files.items()
        }
    held_out = {path.stem.removesuffix("-held"): path for path in sorted(folder.glob("*-held.jsonl"))}
    return {name: folder / f"{name}.jsonl" for name in held_out}, held_out


def losses_of(
    model: Path, held_out: Mapping[str, Path], length: int, options: argparse.Namespace
) -> dict[str, float]:
    """Mean negative log-likelihood on each text, in nats per token."""
    found = evaluate(
        model,
        held_out,
        window_length=length,
        max_tokens=_N_EVALUATION_TOKENS,
        dtype=options.dtype,
        device=options.device,
    )
    return {text.text: text.nll for text in found}


def _measured(model: Path, held_out: Mapping[str, Path], length: int, options: argparse.Namespace) -> float:
    """Geometric mean of the perplexities."""
    found = losses_of(model, held_out, length, options)
    return math.exp(sum(found.values()) / len(found))


def _row(
    way: str, found: float, dense: float, votes: float, took: float | None = None, server: float | None = None
) -> dict[str, Any]:
    damage = None if found == dense else round((found - dense) / (votes - dense), 3)
    return {
        "way": way,
        "perplexity": round(found, 2),
        "damage / that of votes": damage,
        "seconds": None if took is None else round(took, 1),
        "of these the server's": None if server is None else round(server, 1),
    }


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    rows = [{name: "" if value is None else value for name, value in row.items()} for row in result["rows"]]
    device = result["machine"].get("gpu", result["device"])
    title = f"{len(result['participants'])} kinds of text ({', '.join(result['participants'])}), on {device}"
    if result["device"] != "cpu":
        title += f" (`--texts FOLDER --device {result['device']}`)"
    return {title: rows}


def damage(result: dict[str, Any], way: str) -> float:
    """Damage of a way of sharing, relative to that of votes."""
    return float(next(row["damage / that of votes"] for row in result["rows"] if row["way"] == way))


def server_time(result: dict[str, Any], way: str) -> float:
    """Time of a solver in the server, relative to SparseGPT's."""
    seconds = {row["way"]: row["of these the server's"] for row in result["rows"]}
    return float(seconds[way] / seconds["gram, sparsegpt"])


if __name__ == "__main__":
    main()
