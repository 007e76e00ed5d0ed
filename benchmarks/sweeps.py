"""Cost of a one-shot federation as a function of its windows, its participants and the model's blocks.

Each number is increased while the other two stay fixed. The goal is a straight line. The points alternate,
with one run of each per repeat, so that a slow minute of the machine distorts no line. The model is
SmolLM2-135M, or its first blocks; windows have 256 tokens, and masks are shared.

    python -m benchmarks.sweeps [--quick]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks._harness import SEED, arguments, machine, print_json, print_table
from fedprllm import PruneConfig, prune
from fedprllm.demo.compare import demo_model
from fedprllm.models.source import resolve_model


class Job(NamedTuple):
    """Size of a run: windows per participant, participants, and blocks of the model."""

    windows: int
    participants: int
    blocks: int


# Varied size -> the sizes of the run, and the values of the varied size.
SWEEPS = {
    "windows": (Job(1, 1, 30), (1, 2, 4, 8)),
    "participants": (Job(1, 1, 30), (1, 2, 4, 8)),
    "blocks": (Job(2, 2, 30), (5, 10, 20, 30)),
}
QUICK = {
    "windows": (Job(1, 1, 2), (1, 2, 4)),
    "participants": (Job(1, 1, 2), (1, 2, 4)),
    "blocks": (Job(1, 1, 2), (1, 2, 3)),
}


def first_blocks(model: Path, n_blocks: int, folder: Path) -> Path:
    """Write a copy of the model that has only its first blocks."""
    folder.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_blocks}))
    later = tuple(f"model.layers.{block}." for block in range(n_blocks, config["num_hidden_layers"]))
    with safe_open(model / "model.safetensors", "pt") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys() if not name.startswith(later)}  # noqa: SIM118
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def run(job: Job, model: Path, length: int, out: Path) -> float:
    """Measure one run in seconds."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape = (job.windows, length)
    generator = torch.Generator().manual_seed(SEED)
    participants = [
        torch.randint(config["vocab_size"], shape, generator=generator) for _ in range(job.participants)
    ]
    start = time.perf_counter()
    prune(model, participants, PruneConfig(), out=out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def fitted(values: list[int], seconds: list[float]) -> dict[str, Any]:
    """Fit a line through the points by least squares. Returns it with its coefficient of determination."""
    slope, intercept = np.polyfit(values, seconds, 1)
    left = np.square(np.array(seconds) - (slope * np.array(values) + intercept)).sum()
    r2 = 1 - left / np.square(np.array(seconds) - np.mean(seconds)).sum()
    return {"slope_s": float(slope), "intercept_s": float(intercept), "r2": float(r2)}


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Build the rows of each table, by title, for the terminal and the page."""
    rows = [
        {
            "raised": name,
            "beside": ", ".join(f"{what} {n}" for what, n in sweep["job"].items() if what != name),
            "seconds": ", ".join(f"{n}: {s:.2f}" for n, s in zip(sweep["n"], sweep["seconds"], strict=True)),
            "s for one more": sweep["slope_s"],
            "s for none": sweep["intercept_s"],
            "r²": f"{sweep['r2']:.4f}",
        }
        for name, sweep in results["sweeps"].items()
    ]
    return {f"Windows of {results['window_length']} tokens, medians of {results['repeats']}": rows}


def main() -> None:
    options = arguments("Cost against windows, participants and blocks.", repeats=3)
    about = machine()
    sweeps, length = (QUICK, 64) if options.quick else (SWEEPS, 256)
    jobs = {name: [job._replace(**{name: n}) for n in values] for name, (job, values) in sweeps.items()}
    seconds: dict[Job, list[float]] = {job: [] for of_sweep in jobs.values() for job in of_sweep}
    with tempfile.TemporaryDirectory(prefix="sweeps-") as temporary:
        folder = Path(temporary)
        whole = resolve_model(demo_model())
        models = {n: first_blocks(whole, n, folder / f"{n}-blocks") for n in {job.blocks for job in seconds}}
        smallest = min(seconds)
        run(smallest, models[smallest.blocks], length, folder / "warm")
        for repeat in range(options.repeats):
            for job, measured in seconds.items():
                measured.append(run(job, models[job.blocks], length, folder / "run"))
            print(f"round {repeat + 1} of {options.repeats} done", file=sys.stderr)
    results = {}
    for name, (job, values) in sweeps.items():
        medians = [median(seconds[point]) for point in jobs[name]]
        results[name] = {
            "job": job._asdict(),
            "n": list(values),
            "seconds": medians,
            "all_seconds": [seconds[point] for point in jobs[name]],
            **fitted(list(values), medians),
        }
    found = {"window_length": length, "sweeps": results}
    for title, rows in tables(found | {"repeats": options.repeats}).items():
        print_table(title, rows)
    print_json("sweeps", options, about, **found)


if __name__ == "__main__":
    main()
