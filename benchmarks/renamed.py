"""One block in memory also where transformers renames tensors: GPT-NeoX beside Llama, of the same shape.

Both have eight blocks of 50 million random weights and an embedding of 50,304 tokens. The files of the
GPT-NeoX have the names under which such models are published, which transformers 5 changes while it loads
them. Each model is pruned one-shot with masks of two participants in a process of its own. The goal is a peak
at most 5 % above the Llama's.

    python -m benchmarks.renamed [--quick] [--folder /big/disk]
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
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from benchmarks._checkpoint import as_it_is, write_random
from benchmarks._harness import machine
from benchmarks._watched import watched_pruning

_COMMON = {"num_hidden_layers": 8, "vocab_size": 50304, "tie_word_embeddings": False}
_SHAPES = {"hidden_size": 2048, "num_attention_heads": 16}
_QUICK = {"hidden_size": 128, "num_attention_heads": 4}


def as_published(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of transformers' GPT-NeoX as the files on the hub have it."""
    yield name.replace("lm_head.", "embed_out."), tensor


def configs(*, quick: bool) -> dict[str, PreTrainedConfig]:
    """The two models; a block of each has 12 times the square of the width, and the Llama 0.6 % more."""
    shape = _COMMON | (_QUICK if quick else _SHAPES)
    width = shape["hidden_size"]
    return {
        "llama": LlamaConfig(**shape, intermediate_size=width * 43 // 16),
        "gpt-neox": GPTNeoXConfig(**shape, intermediate_size=4 * width),
    }


def measured(folder: Path, name: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Prune a model in a process of its own, and watch its memory."""
    n_bytes = write_random(folder / "model", config, as_published if name == "gpt-neox" else as_it_is)
    _, figures = watched_pruning(folder, vocabulary=50304, length=256)
    return {"model": name, "model_bytes": n_bytes, **figures}


def ratio(result: dict[str, Any]) -> float:
    """Peak memory of the GPT-NeoX, as a multiple of the Llama's."""
    llama, neox = (row["peak_anonymous_gib"] for row in result["rows"])
    return float(neox / llama)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use small models, to check that it runs")
    parser.add_argument("--folder", type=Path, help="folder with space for 3 GB")
    options = parser.parse_args()
    rows = []
    for name, config in configs(quick=options.quick).items():
        with tempfile.TemporaryDirectory(prefix="renamed-", dir=options.folder) as folder:
            rows.append(measured(Path(folder), name, config))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
