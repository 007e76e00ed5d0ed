"""What a round of healing tells about a text: whether a window is among those behind a sum of gradients.

Candidates are windows that are and windows that are not, drawn alike from the same documents, and the
attacker can compute the gradient of each. A likelihood ratio of Gaussians over all parameters, with mean and
covariance from 160 reference windows of other documents of the same kind (`benchmarks.leakage`). Of several
participants only the sum is seen, as with secure aggregation. An AUC of 0.5 is guessing.

    python -m benchmarks.gradient_leakage [--text FILE] [--length 128] [--targets 4] [--device cuda] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import machine
from benchmarks._texts import windows_of
from benchmarks.leakage import Gaussian, _auc
from fedprllm import HealConfig
from fedprllm.demo.compare import demo_model
from fedprllm.demo.texts import demo_texts
from fedprllm.healing.gradients import window_gradients
from fedprllm.healing.round_sums import RoundSums
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.open_blocks import OpenBlocks
from fedprllm.models.source import resolve_model
from fedprllm.models.tunable import TunableParameters
from fedprllm.pruning.hidden_states import HiddenMemory

_KIND = "code"
_N_REFERENCE = 160
_N_ABSENT = 32
_AT_ONCE = 16  # windows in one walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--text", type=Path, help="text of one kind [the demonstration's source code]")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", type=int, default=4, help="different sets of windows for each figure")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    options = parser.parse_args()
    model = BlockwiseModel(resolve_model(options.model or demo_model()), device=options.device)
    counts = (1, 2) if options.quick else (1, 2, 4, 8, 16, 32)
    n_reference = 16 if options.quick else _N_REFERENCE
    n_wanted = n_reference + 3 * _N_ABSENT
    with tempfile.TemporaryDirectory() as temporary:
        file = options.text or demo_texts(Path(temporary))[_KIND][0]
        windows = windows_of(model, file, n_wanted, options.length)
    gradients = _gradients(model, windows)
    gaussian = Gaussian(gradients[-n_reference:])
    rows = [_row(gradients[:-n_reference], gaussian, n, options.targets) for n in counts]
    result = {
        "benchmark": "gradient_leakage",
        "quick": options.quick,
        "window_length": options.length,
        "device": options.device,
        "parameters": gradients.shape[1],
        "targets": options.targets,
        "rows": rows,
        "machine": machine(),
    }
    print(json.dumps(result))


def _gradients(model: BlockwiseModel, windows: Tensor) -> Tensor:
    """The gradient of each window as it is shared: shortened and rounded; float64 [windows, parameters]."""
    tunable, most = TunableParameters(model), HealConfig().max_gradient_norm
    vector = tunable.initial()
    found: list[Tensor] = []
    with OpenBlocks(model, stay=True) as blocks:
        for some in windows.split(_AT_ONCE):
            walked = (model, tunable, vector, list(some), blocks, HiddenMemory(), lambda _: None)
            for window, (gradient, loss) in zip(some, window_gradients(*walked), strict=True):
                sums = RoundSums.zeros(tunable.n)
                sums.add_window(gradient, loss, len(window) - 1, most)
                found.append(sums.gradient)
            print(f"{len(found)} of {len(windows)} windows", file=sys.stderr)
    return torch.stack(found)


def _row(gradients: Tensor, gaussian: Gaussian, n: int, n_targets: int) -> dict[str, Any]:
    """One line of the table: a sum over n windows, each of another participant."""
    members: list[float] = []
    others: list[float] = []
    for target in range(n_targets):
        order = torch.randperm(len(gradients), generator=torch.Generator().manual_seed(100 * n + target))
        inside, outside = gradients[order[:n]], gradients[order[n:][:_N_ABSENT]]
        total = inside.sum(dim=0)
        for scores, candidates in ((members, inside), (others, outside)):
            far, near = gaussian.distance(total[None], n), gaussian.distance(total - candidates, n - 1)
            scores += (far - near).tolist()
    row = {"participants with a window each": n, "AUC": round(_auc(members, others), 3)}
    print(row, file=sys.stderr)
    return row


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    return {"": result["rows"]}


if __name__ == "__main__":
    main()
