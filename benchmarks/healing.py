"""Healing: what it recovers, beside the dense model healed the same way, and what a round costs.

Every participant has one kind of text (see `benchmarks.solvers`). The perplexity is the geometric mean over
held-out text of all kinds. The damage is the perplexity minus that of the dense model healed on the same
text in the same rounds, relative to the damage of votes before healing: part of what healing gains is that
a model gets to know the participants' text, and that part is the dense model's gain too.

A round is measured at LLaMA-7B's width with random weights, in a process of its own: its memory, and its CPU
time relative to the bare forward passes of the same windows.

    python -m benchmarks.healing [--texts FOLDER] [--windows 16] [--length 512] [--rounds 100]
        [--losses text dense] [--learning-rates 0.003 0.01] [--norms 1 inf]
        [--device cuda --processes 8] [--quick]
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

from benchmarks._harness import SEED, given, machine
from benchmarks._healed import (
    DENSE,
    STARTS,
    VOTES,
    Healed,
    add_options,
    healed,
    in_processes,
    mean_of,
    perplexities_of,
    pruned,
    workers,
)
from benchmarks._watched import GIB
from benchmarks.large import Watch, make_checkpoint
from benchmarks.solvers import texts_of
from fedprllm import HealConfig
from fedprllm.demo.compare import demo_model
from fedprllm.evaluation.perplexity import window_losses
from fedprllm.healing.in_process import Learner
from fedprllm.healing.participant import HealingText
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.pruning.participant import Participant

_GOALS = (VOTES, "gram with admm, 50 %", "mlp=0.27")
_OPTIONS = ("learning rate", "longest gradient")
_VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser, rounds=100)
    parser.add_argument("--learning-rates", type=float, nargs="*", default=[HealConfig().learning_rate])
    parser.add_argument("--norms", type=float, nargs="*", default=[HealConfig().max_gradient_norm])
    parser.add_argument("--losses", nargs="*", default=["text"], help="text, dense")
    parser.add_argument("--starts", nargs="*", default=list(_GOALS), help=", ".join(STARTS))
    parser.add_argument("--round-only", action="store_true", help="measure no perplexity")
    parser.add_argument("--quality-only", action="store_true", help="measure no memory and time")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the large model")
    parser.add_argument("--folder", type=Path, help="folder with space for the large model")
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
        "device": options.device,
        "dtype": options.dtype,
        "options": given(),
        "rows": [] if options.round_only else _quality(options),
        "round": [] if options.quality_only else [_round(options)],
        "machine": machine(),
    }
    print(json.dumps(result))


# Quality -------------------------------------------------------------------------------------------------


def _quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = resolve_model(options.model or demo_model())
    # Damage is measured in units of the votes', whether they are healed or not.
    starts = list(dict.fromkeys([DENSE, VOTES, *options.starts]))
    with tempfile.TemporaryDirectory() as temporary, workers(options) as pool:
        out = Path(temporary)
        texts, held_out = texts_of(options.texts, out)
        folders = in_processes(pool, pruned, [(start, model, texts, out, options) for start in starts])
        measured = (held_out, options)
        before = in_processes(pool, perplexities_of, [(folder, *measured) for folder in folders])
        ways = [
            Healed(
                start,
                folder,
                model,
                texts,
                held_out,
                options.rounds,
                learning_rate=rate,
                loss=loss,
                max_gradient_norm=norm,
            )
            for start, folder in zip(starts, folders, strict=True)
            if start in (DENSE, *options.starts)
            for loss in options.losses
            for rate in options.learning_rates
            for norm in options.norms
            if not (start == DENSE and loss == "dense")  # it has nothing to approach
        ]
        after = in_processes(
            pool,
            healed,
            [(way, out / f"{number}", options) for number, way in enumerate(ways)],
        )
        names = list(held_out)
        found = dict(zip(starts, before, strict=True))
        unhealed = {start: mean_of(perplexities, names) for start, perplexities in found.items()}
        rows = [
            {
                "start": way.start,
                "loss": way.loss,
                "learning rate": way.learning_rate,
                "longest gradient": way.max_gradient_norm,
                "before": round(unhealed[way.start], 2),
                "healed": round(mean_of(result["perplexities"], names), 2),
                "best round": result["best round"],
                "MB a round": result["MB a round"],
                "curve": result["curve"],
            }
            for way, result in zip(ways, after, strict=True)
        ]
        unit = unhealed[VOTES] - unhealed[DENSE]
        return [row | _damages(row, rows, unit) for row in rows]


def _damages(row: dict[str, Any], rows: list[dict[str, Any]], unit: float) -> dict[str, Any]:
    """Damage before and after healing, relative to that of votes.

    A model that was healed on text is compared with the dense model healed the same way; one that was healed
    towards the dense model, with the dense model as it is.
    """
    if row["start"] == DENSE:
        return {"damage before": "", "damage healed": ""}
    dense = [one for one in rows if one["start"] == DENSE]
    same = next(one for one in dense if all(one[name] == row[name] for name in _OPTIONS))
    reference = same["before"] if row["loss"] == "dense" else same["healed"]
    return {
        "damage before": round((row["before"] - same["before"]) / unit, 3),
        "damage healed": round((row["healed"] - reference) / unit, 3),
    }


def damage(result: dict[str, Any], start: str) -> float:
    """Least damage of a healed model, in units of the votes' before healing; NaN if it was left out."""
    found = [row["damage healed"] for row in result["rows"] if row["start"] == start]
    return float(min(found, default=math.nan))


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
    rows = [{name: value for name, value in row.items() if name != "curve"} for row in result["rows"]]
    return {title: rows, "one round of two windows, one block in memory": result["round"]}


if __name__ == "__main__":
    main()
