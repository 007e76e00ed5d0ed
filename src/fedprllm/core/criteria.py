"""Pruning criteria: how much a weight matters; the lowest scores are pruned.

A criterion is a function ``(weight, norm) -> score`` and a line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["CRITERIA", "Criterion", "magnitude", "wanda"]


def wanda(weight: Float[Tensor, "out in"], norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """``S[o, j] = |W[o, j]| * ||X[:, j]||_2`` (Sun et al. 2023, eq. 1; FedPrLLM's local criterion)."""
    return weight.abs() * norm


def magnitude(
    weight: Float[Tensor, "out in"],
    norm: Float[Tensor, " in"],  # noqa: ARG001  one signature for all criteria
) -> Float[Tensor, "out in"]:
    """``S[o, j] = |W[o, j]|`` (Han et al. 2015): needs no text."""
    return weight.abs()


@dataclass(frozen=True)
class Criterion:
    """A score function and whether it looks at the inputs (if not, no forward pass is needed)."""

    score: Callable[[Float[Tensor, "out in"], Float[Tensor, " in"]], Float[Tensor, "out in"]]
    uses_inputs: bool


CRITERIA: dict[str, Criterion] = {
    "wanda": Criterion(wanda, uses_inputs=True),
    "magnitude": Criterion(magnitude, uses_inputs=False),
}
