"""What an update tells about a text: the input norms behind a mask, and whether a window is among the text.

Recovery of norms: a Wanda mask prunes ``|W_ij| * norm_j < threshold_i``. From the mask and the weights,
column norms and row thresholds are estimated in turn, so that each column and each row prunes as many weights
as the mask does. The error is the median over channels, relative, after the best common scale.

Membership: is a window of source code among the windows behind an update? Candidates are windows that are and
windows that are not, drawn alike from the same documents. A likelihood ratio of Gaussians over the channels'
sums of squares, with mean and covariance from 192 reference windows of other documents of the same kind; from
masks, with the recovered norms. Of several participants only the total is seen, as with secure aggregation:
the sum of their statistics, or the votes. An AUC of 0.5 is guessing. "Proved absent": windows beyond the sum
in some channel; they rank last.

Inputs of all blocks are those of the unpruned model.

    python -m benchmarks.leakage [--blocks 3] [--length 128] [--targets 1] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import machine
from benchmarks._texts import windows_of
from fedprllm.demo.compare import demo_model
from fedprllm.demo.texts import demo_texts
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.pruning.participant import Participant

_KIND = "code"
_N_REFERENCE = 192
_N_ABSENT = 48
_ROUNDS = 12
_SHRINKAGE = 0.1
_ROOM = 1.1
_CLIP = 8.0  # standard deviations; a few channels would decide otherwise

# Sums of squares of every window, [windows, in], and the weights of one Linear that reads this input.
Input = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--blocks", type=int, default=3, help="blocks whose updates are seen")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--targets", type=int, default=1, help="different sets of windows for each figure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few windows and rows, to check that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = BlockwiseModel(resolve_model(options.model or demo_model()))
    n_windows, n_participants = ((1, 4), (1, 2)) if options.quick else ((1, 4, 16, 64), (1, 4, 8, 32))
    with tempfile.TemporaryDirectory() as temporary:
        file = demo_texts(Path(temporary))[_KIND][0]
        windows = windows_of(model, file, 280 if options.quick else 800, options.length)
    inputs = _observed(model, windows, options.blocks)
    most = len(windows) - _N_REFERENCE
    print(f"{len(windows)} windows of {_KIND}, {len(inputs)} inputs", file=sys.stderr)
    gaussian = Gaussian(torch.cat([sums[most : most + _N_REFERENCE] for sums, _ in inputs], dim=1))
    rows = [
        _row(inputs, gaussian, m, n, most, options.targets)
        for m in n_participants
        for n in n_windows
        if m * n <= most - _N_ABSENT
    ]
    result = {
        "benchmark": "leakage",
        "quick": options.quick,
        "blocks": options.blocks,
        "window_length": options.length,
        "targets": options.targets,
        "rows": rows,
        "machine": machine(),
    }
    print(json.dumps(result))


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    return {"": result["rows"]}


def _observed(model: BlockwiseModel, windows: Tensor, n_blocks: int) -> list[Input]:
    """Sums of squares of each window for every distinct input of the first blocks."""
    participants = [Participant(str(index), window[None]) for index, window in enumerate(windows)]
    for participant, hidden in zip(participants, model.embed(windows), strict=True):
        participant.hidden.fill([hidden])
    inputs = []
    for index in range(n_blocks):
        with model.block(index) as block:
            found = [participant.observe(block, walk_on=True) for participant in participants]
            inputs += [
                (torch.stack([sums[name].sum_of_squares for sums in found]), block.matrix(name).abs())
                for name, linear in block.linears.items()
                if linear.source == name
            ]
    return inputs


def _row(
    inputs: Sequence[Input], model: Gaussian, m: int, n: int, most: int, n_targets: int
) -> dict[str, Any]:
    """One line of the table: ``m`` participants with ``n`` windows each."""
    every = torch.cat([sums for sums, _ in inputs], dim=1)
    scores: dict[str, tuple[list[float], list[float]]] = {"statistics": ([], []), "masks": ([], [])}
    errors: list[float] = []
    absent: list[float] = []
    for target in range(n_targets):
        order = torch.randperm(most, generator=torch.Generator().manual_seed(1000 * n + 10 * m + target))
        members, outside = order[: m * n], every[order[m * n :][:_N_ABSENT]]
        seen = [_seen(sums, weight, members.reshape(m, n)) for sums, weight in inputs]
        errors += [error for _, _, error in seen]
        true = torch.cat([total for total, _, _ in seen])
        for kind, total in (
            ("statistics", true),
            ("masks", torch.cat([from_mask for _, from_mask, _ in seen])),
        ):
            for found, candidates in zip(scores[kind], (every[members[:_N_ABSENT]], outside), strict=True):
                found += model.likelihoods(total, candidates, m * n)
        absent += (outside > true * (1 + 1e-6)).any(dim=1).double().tolist()
    row = {
        "participants": m,
        "windows of each": n,
        "AUC statistics": _auc(*scores["statistics"]),
        "AUC masks": _auc(*scores["masks"]),
        "proved absent by statistics, %": 100 * sum(absent) / len(absent),
        "error of norms from masks, %": 100 * sorted(errors)[len(errors) // 2],
    }
    print(row, file=sys.stderr)
    return row


def _seen(sums: Tensor, weight: Tensor, members: Tensor) -> tuple[Tensor, Tensor, float]:
    """The total sums of squares, those recovered from votes, and the recovery's median relative error."""
    each = torch.stack([sums[windows].sum(dim=0) for windows in members])
    n_pruned = weight.shape[1] // 2
    votes = torch.zeros_like(weight)
    for total in each:
        scores = weight * total.sqrt().to(torch.float32)
        votes.scatter_add_(
            1,
            scores.topk(n_pruned, dim=1, largest=False).indices,
            torch.ones(1, 1).expand_as(scores[:, :n_pruned]),
        )
    norms = _recovered(weight, votes / len(each)).to(torch.float64)
    true = each.sum(dim=0).sqrt()
    ratios = norms / true
    scaled = norms / ratios.median()
    error = float((scaled / true - 1).abs().median())
    return each.sum(dim=0), scaled.square(), error


def _recovered(weight: Tensor, pruned: Tensor) -> Tensor:
    """Column norms, up to a common factor, with which a mask (or a mean of masks) prunes what it does."""
    log_weight = weight.clamp(min=1e-12).log()
    by_row, by_column = (pruned.sum(dim=dim).round().long() for dim in (1, 0))
    norms, limits = torch.zeros(weight.shape[1]), torch.zeros(weight.shape[0])
    for _ in range(_ROUNDS):
        limits = _between((log_weight + norms).sort(dim=1).values, by_row)
        # A column prunes where its norm is below limit - weight: as many of the largest as were pruned.
        room = (limits[:, None] - log_weight).sort(dim=0, descending=True).values
        norms = _between(room.T, by_column)
    return norms.exp()


def _between(in_order: Tensor, counts: Tensor) -> Tensor:
    """Midpoint between the last of the first ``counts`` values of each row and the next one."""
    last = (counts - 1).clamp(min=0, max=in_order.shape[1] - 1)
    following = counts.clamp(max=in_order.shape[1] - 1)
    return (in_order.gather(1, last[:, None]) + in_order.gather(1, following[:, None]))[:, 0] / 2


class Gaussian:
    """Windows of a kind as a Gaussian over all channels, from reference windows.

    The covariance of standardized channels is shrunk towards the identity, because channels far outnumber the
    reference windows; with it, what all text of a kind shares no longer hides a single window.
    """

    def __init__(self, reference: Tensor) -> None:
        self.mean, self.spread = reference.mean(dim=0), reference.std(dim=0).clamp(min=1e-12)
        _, sizes, axes = torch.linalg.svd((reference - self.mean) / self.spread, full_matrices=False)
        variances = (1 - _SHRINKAGE) * sizes.square() / (len(reference) - 1) + _SHRINKAGE
        self._axes, self._excess = axes.T, 1 / _SHRINKAGE - 1 / variances

    def distance(self, total: Tensor, n: float) -> Tensor:
        """Squared Mahalanobis distance of sums over ``n`` windows, [sums, channels], from those expected."""
        # A single window leaves no others, only rounding.
        deviation = (total - n * self.mean) / (self.spread * max(n, 0.05) ** 0.5)
        deviation = deviation.clamp(-_CLIP, _CLIP)
        whole = deviation.square().sum(dim=1) / _SHRINKAGE
        return whole - ((deviation @ self._axes).square() * self._excess).sum(dim=1)

    def likelihoods(self, total: Tensor, candidates: Tensor, n: int) -> list[float]:
        """Logarithm of the likelihood that each candidate is among ``n`` windows, over that it is not.

        Each channel in which a candidate exceeds the total, with room for errors of recovery, counts more
        than any likelihood.
        """
        found: Tensor = self.distance(total[None], n) - self.distance(total - candidates, n - 1)
        n_beyond = (candidates > _ROOM * total).sum(dim=1)
        return (found - 1e9 * n_beyond).tolist()


def _auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Probability that a member scores higher than another; half of it where they are equal."""
    one, other = torch.tensor(members)[:, None], torch.tensor(others)[None]
    return float(((one > other).double() + (one == other).double() / 2).mean())


if __name__ == "__main__":
    main()
