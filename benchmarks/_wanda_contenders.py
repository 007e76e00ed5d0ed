"""The processes that benchmarks.llm_compressor measures. Each ends with a line of JSON.

    python _wanda_contenders.py {ours,theirs,bare} MODEL WINDOWS OUT DTYPE THREADS [OFFLOADED]

``theirs`` runs in an environment without this project. Each contender imports only its own packages, and only
inside its function, because imports are part of the cost of a process. OFFLOADED is a folder on disk for
weights beyond 0.5 GB (``theirs`` only).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPARSITY = 0.5
_CPU_BYTES = 500_000_000


def ours(model: str, windows: torch.Tensor, out: Path, dtype: str) -> dict[str, Any]:
    from fedprllm import PruneConfig, prune

    config = PruneConfig(strategy="centralized", sparsity=SPARSITY, dtype=dtype)
    start = time.perf_counter()
    result = prune(model, [windows], config, out=out)
    return {"prune_s": time.perf_counter() - start, "model_dir": str(result.model_dir)}


def theirs(model: str, windows: torch.Tensor, out: Path, dtype: str, offloaded: str = "") -> dict[str, Any]:
    from compressed_tensors.offload import load_offloaded_model
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    if offloaded:
        with load_offloaded_model():
            loaded = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                device_map="auto_offload",
                max_memory={"cpu": _CPU_BYTES},
                offload_folder=offloaded,
            )
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    # One window at a time, in the given order. The head is excluded: we do not prune it, and it is tied to
    # the embeddings.
    data = DataLoader(
        [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    )
    recipe = WandaPruningModifier(sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"])
    start = time.perf_counter()
    # Sequential: each block is calibrated on the outputs of the pruned blocks before it, like our walk.
    oneshot(model=loaded, dataset=data, recipe=recipe, pipeline="sequential")
    seconds = time.perf_counter() - start
    loaded.save_pretrained(out, save_compressed=False)
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    return {
        "prune_s": seconds,
        "model_dir": str(out),
        "versions": {package: version(package) for package in packages},
    }


@torch.no_grad()
def bare(model: str, windows: torch.Tensor, _out: Path, dtype: str) -> dict[str, Any]:
    """Run two forward passes through the blocks over every window, without the head."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval().base_model
    start = time.perf_counter()
    for window in windows:
        for _ in range(2):
            base(input_ids=window[None], use_cache=False)
    return {"prune_s": time.perf_counter() - start}


def main() -> None:
    contender, model, windows, out, dtype, threads, *offloaded = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run = {"ours": ours, "theirs": theirs, "bare": bare}[contender]
    print(json.dumps(run(model, torch.from_numpy(np.load(windows)), Path(out), dtype, *offloaded)))


if __name__ == "__main__":
    main()
