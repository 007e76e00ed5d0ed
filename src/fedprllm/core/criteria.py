"""Pruning criteria: scores of how much a weight matters; the lowest scores are pruned.

A criterion is a function ``(weight, norm) -> score`` plus an entry in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CRITERIA", "Criterion", "magnitude", "ria", "wanda"]


def wanda(weight: Float[Tensor, "out in"], norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``S[o, j] = |W[o, j]| * ||X[:, j]||_2`` (Sun et al. 2023, eq. 1; FedPrLLM's local criterion)."""
    return weight.abs() * norm


def magnitude(
    weight: Float[Tensor, "out in"],
    norm: Float[Tensor, " in"],  # noqa: ARG001  one signature for all criteria
) -> Float[Tensor, "out in"]:
    """``S[o, j] = |W[o, j]|`` (Han et al. 2015); needs no calibration text."""
    return weight.abs()


def ria(weight: Float[Tensor, "out in"], norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``S[o, j] = (|W[o, j]| / sum_j |W[o, :]| + |W[o, j]| / sum_o |W[:, j]|) * ||X[:, j]||_2 ^ 0.5``.

    Relative importance and activations (Zhang et al., ICLR 2024); the paper compares scores by layer. A row
    or column of zeros contributes 0. The norm comes from a sum over tokens; the paper's code takes the root
    of a running mean, which differs by one factor per Linear and gives the same ranking. Sums and scores are
    float32 whatever the precision of the weight: a float16 sum over a long row would overflow.
    """
    importance = weight.abs().to(torch.float32)
    row_sum = importance.sum(dim=1, keepdim=True)
    column_sum = importance.sum(dim=0, keepdim=True)
    # If a sum is zero, so is every weight in it, and 0 / 1 gives the intended contribution of 0.
    by_row = importance / row_sum.where(row_sum > 0, 1.0)
    by_column = importance / column_sum.where(column_sum > 0, 1.0)
    return (by_row + by_column) * norm.sqrt()


@dataclass(frozen=True)
class Criterion:
    """A score function and what it depends on.

    Attributes:
        score: ``(weight, norm) -> score``.
        uses_inputs: Whether the score depends on the inputs; if not, no forward pass is needed.
        scores_rows: Whether the scores of a row are independent of all other rows.
    """

    score: Callable[[Float[Tensor, "out in"], Float[Tensor, " in"]], Float[Tensor, "out in"]]
    uses_inputs: bool
    scores_rows: bool


CRITERIA: dict[str, Criterion] = {
    "wanda": Criterion(wanda, uses_inputs=True, scores_rows=True),
    "ria": Criterion(ria, uses_inputs=True, scores_rows=False),
    "magnitude": Criterion(magnitude, uses_inputs=False, scores_rows=True),
}
