"""Selection of the k lowest scores in every row: ours compared with sort, top-k, k-th value and partition.

    python -m benchmarks.selection [--quick]

Scores are absolute values of normally distributed numbers, in the shapes of the Linears of LLaMA-7B and
SmolLM2-135M, at a sparsity of 0.5. Every contender makes a mask. Contenders that only compare with the k-th
value prune too much where scores are equal. Ours prunes exactly k and counts the ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import SEED, Timing, alternate, arguments, machine, print_json, print_table
from fedprllm.core.selection import select_lowest

LLAMA_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]
SMOLLM2_135M = [(576, 576), (192, 576), (1536, 576), (576, 1536)]


def ours(scores: Tensor, k: int) -> Tensor:
    return select_lowest(scores, k)[0]


def torch_sort(scores: Tensor, k: int) -> Tensor:
    return _marked(scores, scores.sort(dim=1).indices[:, :k])


def torch_topk(scores: Tensor, k: int) -> Tensor:
    return _marked(scores, scores.topk(k, dim=1, largest=False, sorted=False).indices)


def torch_kthvalue(scores: Tensor, k: int) -> Tensor:
    return scores <= scores.kthvalue(k, dim=1, keepdim=True).values


def numpy_partition(scores: Tensor, k: int) -> Tensor:
    values = scores.numpy()
    return torch.from_numpy(values <= np.partition(values, k - 1, axis=1)[:, k - 1 : k])


def _marked(scores: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True)


CONTENDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "select_lowest": ours,
    "torch.sort": torch_sort,
    "torch.topk": torch_topk,
    "torch.kthvalue": torch_kthvalue,
    "numpy.partition": numpy_partition,
}


def bench_shape(shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Measure each contender's seconds, and the bits in which its mask differs from ours (equal scores)."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).abs()
    k = shape[1] // 2
    timings = alternate({name: partial(run, scores, k) for name, run in CONTENDERS.items()}, repeats)
    expected = ours(scores, k)
    assert all(np.count_nonzero(expected.numpy(), axis=1) == k)
    differing = {name: int((run(scores, k) != expected).sum()) for name, run in CONTENDERS.items()}
    return {"shape": shape, "k": k} | {
        "contenders": {
            name: timing.as_json()
            | _ratios(timing, timings["select_lowest"])
            | {"differing_bits": differing[name]}
            for name, timing in timings.items()
        }
    }


def _ratios(timing: Timing, ours_timing: Timing) -> dict[str, float]:
    return {
        "times_ours": timing.seconds / ours_timing.seconds,
        "times_ours_cpu": timing.cpu_seconds / ours_timing.cpu_seconds,
    }


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Build the rows of each table, by title, for the terminal and the page."""
    rows = [
        {
            "shape": "{} x {}".format(*result["shape"]),
            "": name,
            "ms": row["seconds"] * 1e3,
            "CPU ms": row["cpu_seconds"] * 1e3,
            "times ours": row["times_ours"],
            "times ours, CPU": row["times_ours_cpu"],
            "differing bits": row["differing_bits"],
        }
        for result in results["shapes"]
        for name, row in result["contenders"].items()
    ]
    return {"The lowest half of every row": rows}


def main() -> None:
    options = arguments("The k lowest of every row.", repeats=5)
    about = machine()
    shapes = SMOLLM2_135M if options.quick else LLAMA_7B + SMOLLM2_135M
    results = [bench_shape(shape, options.repeats) for shape in shapes]
    for title, rows in tables({"shapes": results}).items():
        print_table(title, rows)
    print_json("selection", options, about, shapes=results)


if __name__ == "__main__":
    main()
