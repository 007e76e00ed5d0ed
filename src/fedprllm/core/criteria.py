"""Pruning criteria: how much a weight matters; the lowest scores are pruned.

A criterion is a function ``(weight, norm) -> score`` and a line in `CRITERIA`.
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
    """``S[o, j] = |W[o, j]|`` (Han et al. 2015): needs no text."""
    return weight.abs()


def ria(weight: Float[Tensor, "out in"], norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``S[o, j] = (|W[o, j]| / sum_j |W[o, :]| + |W[o, j]| / sum_o |W[:, j]|) * ||X[:, j]||_2 ^ 0.5``.

    Relative importance and activations (Zhang et al., ICLR 2024), compared by layer in the paper. A row
    or column of zeros contributes 0. The norm is that of the sum over tokens; the paper's code takes the
    root of a running mean, which differs by one factor per Linear and ranks the same. Sums and scores are
    float32 whatever the precision of the weight: a float16 sum of a long row would overflow.
    """
    importance = weight.abs().to(torch.float32)
    row_sum = importance.sum(dim=1, keepdim=True)
    column_sum = importance.sum(dim=0, keepdim=True)
    # Where a sum is zero so is every weight under it, and 0 / 1 is the contribution wanted.
    by_row = importance / row_sum.where(row_sum > 0, 1.0)
    by_column = importance / column_sum.where(column_sum > 0, 1.0)
    return (by_row + by_column) * norm.sqrt()


@dataclass(frozen=True)
class Criterion:
    """A score function.

    Attributes:
        score: ``(weight, norm) -> score``.
        uses_inputs: Whether it looks at the inputs; if not, no forward pass is needed.
        scores_rows: The scores of a row depend on no other row.
    """

    score: Callable[[Float[Tensor, "out in"], Float[Tensor, " in"]], Float[Tensor, "out in"]]
    uses_inputs: bool
    scores_rows: bool


CRITERIA: dict[str, Criterion] = {
    "wanda": Criterion(wanda, uses_inputs=True, scores_rows=True),
    "ria": Criterion(ria, uses_inputs=True, scores_rows=False),
    "magnitude": Criterion(magnitude, uses_inputs=False, scores_rows=True),
}
