"""One block in memory also with experts: two blocks of the shape of Mixtral-8x7B, with random weights.

A block has 1.45 billion weights, 2.7 GiB in bfloat16. It is pruned one-shot with masks of two participants,
from a checkpoint that stores experts one by one (Mixtral's own form) and from one that stores them fused
(transformers' form). The goal is a peak of one block and 1.5 GiB for both.

    python -m benchmarks.experts [--quick] [--folder /big/disk]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig

from benchmarks._checkpoint import as_it_is, write_random
from benchmarks._harness import machine
from benchmarks._watched import GIB, watched_pruning

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


def measured(folder: Path, form: str, shape: dict[str, int]) -> dict[str, Any]:
    """Prune a checkpoint of one form in a process of its own, and watch its memory."""
    config = MixtralConfig(**shape, num_hidden_layers=N_BLOCKS, num_local_experts=8, vocab_size=32000)
    split = as_published if form == "one by one" else as_it_is
    n_bytes = write_random(folder / "model", config, split)
    block = (folder / "model" / f"model-00001-of-{N_BLOCKS + 1:05d}.safetensors").stat().st_size
    watch, figures = watched_pruning(folder, vocabulary=32000, length=512)
    return {
        "form": form,
        "model_bytes": n_bytes,
        "block_gib": round(block / GIB, 3),
        **figures,
        "beyond_a_block_gib": round((watch.anonymous - block) / GIB, 3),
    }


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The figures of memory, by form of the files."""
    return {"": [{key: row[key] for key in row if key != "wall_s"} for row in result["rows"]]}


def beyond_a_block(result: dict[str, Any], form: str) -> float:
    """Peak memory beyond one block, in GiB, with one of the two forms of files."""
    return next(float(row["beyond_a_block_gib"]) for row in result["rows"] if row["form"] == form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use a small model, to check that it runs")
    parser.add_argument("--folder", type=Path, help="folder with space for 15 GB")
    options = parser.parse_args()
    rows = []
    for form in ("one by one", "fused"):
        with tempfile.TemporaryDirectory(prefix="experts-", dir=options.folder) as name:
            rows.append(measured(Path(name), form, _QUICK if options.quick else _SHAPE))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
