"""One block in memory also with experts: two blocks of the shape of Mixtral-8x7B, with random weights.

A block has 1.45 billion weights, 2.7 GiB in bfloat16. It is pruned one-shot with masks of two participants,
from a checkpoint that stores experts one by one (Mixtral's own form) and from one that stores them fused
(transformers' form). The goal is a peak of one block and 1.5 GiB for the first.

    python -m benchmarks.experts [--quick] [--folder /big/disk]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig

from benchmarks._checkpoint import as_it_is, write_random
from benchmarks._harness import SEED, machine
from benchmarks.large import Watch
from fedprllm import PruneConfig, prune

N_BLOCKS = 2
_SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QUICK = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def as_published(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of transformers' Mixtral as the files on the hub have it."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    experts, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for number, expert in enumerate(tensor):
        parts = (
            {"w1": expert.chunk(2)[0], "w3": expert.chunk(2)[1]} if leaf == "gate_up_proj" else {"w2": expert}
        )
        for part, matrix in parts.items():
            yield f"{experts}.{number}.{part}.weight", matrix


def prune_here(model: Path, out: Path) -> None:
    """Prune with two participants of one window each."""
    generator = torch.Generator().manual_seed(SEED)
    windows = {name: torch.randint(32000, (1, 512), generator=generator) for name in ("north", "south")}
    prune(model, windows, PruneConfig(dtype="bfloat16"), out=out)


def measured(folder: Path, form: str, shape: dict[str, int]) -> dict[str, Any]:
    """Prune a checkpoint of one form in a process of its own, and watch its memory."""
    config = MixtralConfig(**shape, num_hidden_layers=N_BLOCKS, num_local_experts=8, vocab_size=32000)
    split = as_published if form == "one by one" else as_it_is
    n_bytes = write_random(folder / "model", config, split)
    block = (folder / "model" / f"model-00001-of-{N_BLOCKS + 1:05d}.safetensors").stat().st_size
    command = [
        sys.executable,
        "-m",
        "benchmarks.experts",
        "--prune",
        str(folder / "model"),
        str(folder / "run"),
    ]
    start = time.perf_counter()
    with subprocess.Popen(command) as child, Watch(child.pid) as watch:
        if child.wait():
            raise SystemExit(f"pruning failed with status {child.returncode}")
    return {
        "form": form,
        "model_bytes": n_bytes,
        "block_gib": round(block / 2**30, 3),
        "peak_anonymous_gib": round(watch.anonymous / 2**30, 3),
        "peak_resident_gib": round(watch.resident / 2**30, 3),
        "beyond_a_block_gib": round((watch.anonymous - block) / 2**30, 3),
        "wall_s": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prune", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="use a small model, to check that it runs")
    parser.add_argument("--folder", type=Path, help="folder with space for 15 GB")
    options = parser.parse_args()
    if options.prune:
        prune_here(*options.prune)
        return 0
    rows = []
    for form in ("one by one", "fused"):
        with tempfile.TemporaryDirectory(prefix="experts-", dir=options.folder) as name:
            rows.append(measured(Path(name), form, _QUICK if options.quick else _SHAPE))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
