"""Healing: what it recovers, beside the dense model healed the same way, and what a round costs.

Every participant has one kind of text (see `benchmarks.solvers`). The perplexity is the geometric mean over
held-out text of all kinds. The damage is the perplexity minus that of the dense model healed on the same
text in the same rounds, relative to the damage of votes before healing: part of what healing gains is that
a model gets to know the participants' text, and that part is the dense model's gain too.

A round is measured at LLaMA-7B's width with random weights, in a process of its own: its memory, and its CPU
time relative to the bare forward passes of the same windows.

    python -m benchmarks.healing [--texts FOLDER] [--windows 16] [--length 512] [--rounds 40] [--quick]
    python -m benchmarks.healing --round-only [--blocks 4] [--folder /big/disk]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import SEED, machine
from benchmarks._watched import GIB
from benchmarks.large import Watch, make_checkpoint
from benchmarks.solvers import _measured, _texts
from fedprllm import HealConfig, PruneConfig, heal, prune
from fedprllm.demo.compare import demo_model
from fedprllm.evaluation.perplexity import window_losses
from fedprllm.healing.in_process import Learner
from fedprllm.healing.participant import HealingText
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.pruning.participant import Participant

_STARTS: dict[str, dict[str, Any]] = {
    "votes, 50 %": {},
    "gram with admm, 50 %": {"share": "gram", "strategy": "iterative"},
    "mlp=0.27": {"structure": "mlp=0.27", "strategy": "iterative"},
}
_VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows for pruning")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=HealConfig().learning_rate)
    parser.add_argument("--starts", nargs="*", default=list(_STARTS), help=", ".join(_STARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes")
    parser.add_argument("--round-only", action="store_true", help="measure no perplexity")
    parser.add_argument("--quality-only", action="store_true", help="measure no memory and time")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the large model")
    parser.add_argument("--folder", type=Path, help="folder with space for the large model")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    parser.add_argument("--measure-round", nargs=2, metavar=("MODEL", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_round:
        print(json.dumps(_one_round(Path(options.measure_round[0]), int(options.measure_round[1]))))
        return
    if options.quick:
        options.windows, options.length, options.rounds, options.blocks = 1, 64, 2, 1
    result = {
        "benchmark": "healing",
        "quick": options.quick,
        "windows": options.windows,
        "window_length": options.length,
        "rounds": options.rounds,
        "learning_rate": options.learning_rate,
        "device": options.device,
        "rows": [] if options.round_only else _quality(options),
        "round": [] if options.quality_only else [_round(options)],
        "machine": machine(),
    }
    print(json.dumps(result))


# Quality -------------------------------------------------------------------------------------------------


def _quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = resolve_model(options.model or demo_model())
    with tempfile.TemporaryDirectory() as temporary:
        texts, held_out = _texts(options.texts, Path(temporary))
        starts = {"dense": model}
        for start in options.starts:
            config = PruneConfig(
                windows=options.windows,
                window_length=options.length,
                dtype=options.dtype,
                device=options.device,
                **_STARTS[start],
            )
            starts[start] = prune(model, texts, config, out=Path(temporary) / start).model_dir
        rows: list[dict[str, Any]] = []
        for start, folder in starts.items():
            config = HealConfig(
                rounds=options.rounds,
                learning_rate=options.learning_rate,
                window_length=options.length,
                dtype=options.dtype,
                device=options.device,
            )
            healed = heal(folder, texts, config, out=Path(temporary) / f"{start}, healed")
            before, after = (
                _measured(one, held_out, options.length, options) for one in (folder, healed.model_dir)
            )
            rows.append(
                {
                    "start": start,
                    "before": round(before, 2),
                    "healed": round(after, 2),
                    "best round": healed.record.best_round,
                    "MB a round": round(healed.record.update_bytes / 1e6, 2),
                }
            )
            print(rows[-1], file=sys.stderr)
        return [row | _damages(row, rows) for row in rows]


def _damages(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Damage before and after healing, relative to that of votes; empty where it is not defined."""
    dense = rows[0]
    votes = next((one for one in rows if one["start"].startswith("votes")), None)
    if votes is None or row is dense:
        return {"damage before": "", "damage healed": ""}
    unit = votes["before"] - dense["before"]
    return {
        "damage before": round((row["before"] - dense["before"]) / unit, 3),
        "damage healed": round((row["healed"] - dense["healed"]) / unit, 3),
    }


def damage(result: dict[str, Any], start: str) -> float:
    """Damage of a healed model, in units of the votes' damage before healing; NaN if it was left out."""
    return float(next((row["damage healed"] for row in result["rows"] if row["start"] == start), math.nan))


# Cost of a round -----------------------------------------------------------------------------------------


def _round(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a round at LLaMA-7B's width in a process of its own."""
    shape = "tiny" if options.quick else "llama-7b"
    with tempfile.TemporaryDirectory(prefix="healing-", dir=options.folder) as folder:
        n_bytes = make_checkpoint(Path(folder), shape, options.blocks)
        words = [
            sys.executable,
            "-m",
            "benchmarks.healing",
            "--measure-round",
            f"{folder}/model",
            str(options.length),
        ]
        with (
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child,
            Watch(child.pid) as watch,
        ):
            output, _ = child.communicate()
            if child.returncode:
                raise SystemExit(f"a round failed with status {child.returncode}")
    return {
        "shape": shape,
        "blocks": options.blocks,
        "model_gib": round(n_bytes / GIB, 2),
        **json.loads(output.splitlines()[-1]),
        "peak_anonymous_gib": round(watch.anonymous / GIB, 2),
        "peak_resident_gib": round(watch.resident / GIB, 2),
    }


def _one_round(folder: Path, length: int) -> dict[str, Any]:
    """A round of two participants with a window each, one block in memory, and the bare forward passes."""
    generator = torch.Generator().manual_seed(SEED)
    windows = torch.randint(_VOCABULARY, (2, length), generator=generator)
    model = BlockwiseModel(folder)
    # So little memory that no block stays.
    config = HealConfig(rounds=1, window_length=length, memory_limit=2**30)
    texts = [HealingText(Participant(f"p{number}", windows[number : number + 1])) for number in range(2)]
    times = {}
    begin = time.process_time()
    window_losses(model, list(windows))
    times["forward_cpu_s"] = round(time.process_time() - begin, 1)
    with Learner(model, config, folder / "states") as learner:
        begin = time.process_time()
        learner.contribute(texts, learner.tunable.initial(), 0)
        times["round_cpu_s"] = round(time.process_time() - begin, 1)
    return {
        "parameters": learner.tunable.n,
        **times,
        "round / forward": round(times["round_cpu_s"] / max(times["forward_cpu_s"], 0.1), 2),
    }


# The page ------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's tables."""
    title = (
        f"perplexity before and after {result['rounds']} rounds of one window of {result['window_length']} "
        f"tokens a participant, pruned with {result['windows']} windows, on {result['device']}"
    )
    return {title: result["rows"], "one round of two windows, one block in memory": result["round"]}


if __name__ == "__main__":
    main()
