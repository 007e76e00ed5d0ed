"""Packs what the paper's public code computed: ``python -m tests.make_golden_set ../shared/golden``.

That folder holds the code's final weights in full (12 MB; its README says how they were computed). Every kept
weight is that of the model, or that times a number of quarters, so bits and counts say the same.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.golden.packed import DATA, MODEL, N_PARTICIPANTS, pack_bits, pack_counts

# Which of several equal votes are pruned is random there, so the scaled weights by layer cannot be compared.
LEFT_OUT = ("oneshot_layer_scaled",)


def pack(reference: Path) -> dict[str, torch.Tensor]:
    """The packed outputs; refuses what they could not tell exactly."""
    outputs = load_file(reference / "reference_outputs.safetensors")
    dense = load_file(reference / "tiny-llama" / "model.safetensors")
    packed = {"tokens": outputs.pop("tokens")}
    for name, output in outputs.items():
        kind, _, weight = name.split("/", 2)
        if kind not in LEFT_OUT:
            packed[name] = _packed(kind, output, dense[weight])
    return packed


def _packed(kind: str, output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    if kind == "oneshot_votes":
        return pack_counts(output)
    if kind.endswith("_scaled"):
        quarters = (N_PARTICIPANTS * output / dense).round()
        torch.testing.assert_close(dense * quarters / N_PARTICIPANTS, output, rtol=1e-3, atol=1e-7)
        return pack_counts(quarters)
    zeros = output == 0
    assert torch.equal(dense.masked_fill(zeros, 0), output)
    return pack_bits(zeros)


def main(reference: Path) -> None:
    MODEL.mkdir(parents=True, exist_ok=True)
    for path in (reference / "tiny-llama").iterdir():
        shutil.copyfile(path, MODEL / path.name)
    save_file(pack(reference), DATA / "reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
