"""Run the benchmarks one after the other and write docs/benchmarks.md: ``make bench``.

python -m benchmarks [NAME ...]     only these; the others keep their last results
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedprllm.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"

_FEDERATION = (
    "same_bits",
    "payload_bytes",
    "update_overhead_percent",
    "wire_overhead_percent",
    "in_process_s_per_block",
    "in_process_one_thread_s_per_block",
    "federated_s_per_block",
    "until_first_update_s",
    "peak_resident_mb",
    "peak_anonymous_mb",
)

# What each command measures, and the figures of its JSON that the page shows.
BENCHMARKS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "one-shot-2048": (
        "One-shot federation of SmolLM2-135M, 2 participants with 2 windows of 2048 tokens, float32, against "
        "its bare forward passes (goal 1.3)",
        ["benchmarks.one_shot", "--participants", "2", "--length", "2048", "--repeats", "1"],
        ("forward_s", "federation_s", "ratio"),
    ),
    "one-shot-512": (
        "The same with 4 participants and 2 windows of 512 tokens (goal 2)",
        ["benchmarks.one_shot", "--participants", "4", "--length", "512", "--repeats", "2"],
        ("forward_s", "federation_s", "ratio"),
    ),
    "memory": (
        "Peak memory of the process against the number of participants (1 window of 512 tokens each)",
        ["benchmarks.memory"],
        ("peak_mb_by_participants", "block_mb", "model_mb"),
    ),
    "statistics-exact": (
        "Weights of SmolLM2-135M that shared sums treat otherwise than pooled text: 4 participants, 2 "
        "windows of 256 tokens each (goal: at most one in a million)",
        ["benchmarks.statistics_exact"],
        ("n_prunable", "differing", "differing_per_million", "close"),
    ),
    "federation": (
        "A federated run on one machine's loopback against the same run in one process: SmolLM2-135M, masks, "
        "4 participants with 2 windows of 256 tokens",
        ["benchmarks.federation"],
        _FEDERATION,
    ),
    "federation-large": (
        "The same with updates of 238 MB (weights and masks of two wide random blocks), 2 and 4 participants",
        ["benchmarks.federation", "--large-updates"],
        _FEDERATION,
    ),
}


def main(names: list[str]) -> None:
    for name in names or BENCHMARKS:
        title, command, _ = BENCHMARKS[name]
        print(f"{name}: {title}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
        )
        write_json(RESULTS / f"{name}.json", json.loads(done.stdout.splitlines()[-1]))
    write_text(ROOT / "docs" / "benchmarks.md", _page())


def _page() -> str:
    parts = [
        "# Benchmarks",
        "Written by `make bench`; each section by the command it names. Ratios are measured side by side in "
        "one run; the JSON behind them is in [benchmarks/](benchmarks/).",
    ]
    for name, (title, command, figures) in BENCHMARKS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        measured = json.loads(file.read_text(encoding="utf-8"))
        rows = "\n".join(f"| {figure} | {_shown(measured[figure])} |" for figure in figures)
        machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items() if value)
        table = f"| figure | measured |\n|---|---:|\n{rows}"
        parts.append(f"## {title}\n\n`python -m {' '.join(command)}`\n\n{table}\n\n{machine}")
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
