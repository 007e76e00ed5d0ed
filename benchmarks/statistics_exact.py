"""Shared sums compared with pooled text: mask bits that differ between the two, on SmolLM2-135M.

Four participants with the demonstration's texts share sums of squares block by block. The resulting model is
compared with the model pruned on their pooled windows. The scores of both are equal up to floating-point
rounding. Goal: at most one weight in a million is treated differently.

    python -m benchmarks.statistics_exact [--windows 2] [--length 256] [--allocation uniform]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

from benchmarks._harness import machine
from fedprllm import PruneConfig, PruneResult, prune
from fedprllm.demo.compare import demo_model
from fedprllm.demo.texts import demo_texts
from fedprllm.models.source import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=2, help="windows per participant")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--allocation", default="uniform", choices=("uniform", "owl"))
    options = parser.parse_args()

    runs = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        participants = {name: files[0] for name, files in demo_texts(folder / "texts").items()}
        model = resolve_model(demo_model())
        for name, way in {
            "statistics": {"share": "statistics", "strategy": "iterative"},
            "centralized": {"strategy": "centralized"},
        }.items():
            config = PruneConfig(
                **way, windows=options.windows, window_length=options.length, allocation=options.allocation
            )
            runs[name] = prune(model, participants, config, out=folder / name)
            print(f"{name} done", file=sys.stderr)
        differing = _differing(runs["statistics"], runs["centralized"])
    shared = runs["statistics"].record
    close = sum(linear.n_close or 0 for _, linear in shared.linears())
    print(
        json.dumps(
            {
                "benchmark": "statistics_exact",
                "participants": len(participants),
                "windows": options.windows,
                "window_length": options.length,
                "allocation": options.allocation,
                "n_prunable": shared.n_prunable,
                "differing": differing,
                "differing_per_million": 1e6 * differing / shared.n_prunable,
                "close": close,
                "update_bytes_per_block": shared.update_bytes_per_block[0],
                "machine": machine(),
            }
        )
    )


def _differing(one: PruneResult, other: PruneResult) -> int:
    """Count the weights that are zero in exactly one of the two models."""
    left, right = (
        {name: file for file in run.model_dir.glob("*.safetensors") for name in _names(file)}
        for run in (one, other)
    )
    n = 0
    for name in one.sparsity:
        with safe_open(left[name], "pt") as a, safe_open(right[name], "pt") as b:
            n += int(((a.get_tensor(name) == 0) != (b.get_tensor(name) == 0)).sum())
    return n


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


if __name__ == "__main__":
    main()
