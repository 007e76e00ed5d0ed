"""Comparison groups: which weights are ranked against each other, and how many of them are pruned.

A weight matrix ``W[out, in]`` is viewed as ``[n_groups, n]``; weights are selected within each row of that
view, and the result is viewed as ``[out, in]`` again.

| group | a group is | n_groups | n |
|---|---|---|---|
| layer | the whole matrix | 1 | out * in |
| row | the inputs of one output neuron | out | in |
| column | the outputs of one input channel | in | out |
| N:M pattern | M consecutive inputs of one output neuron | out * in / M | M |
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor

__all__ = ["GroupName", "Grouping"]

GroupName = Literal["layer", "row", "column"]


@dataclass(frozen=True)
class Grouping:
    """How a matrix is split into comparison groups, and the fraction pruned of each group.

    Attributes:
        group: ``layer``, ``row`` or ``column``; ignored if an N:M pattern is given.
        sparsity: Fraction of each group that is pruned, in [0, 1]; a `Fraction` where it must be exact.
        n_m: ``(N, M)`` keeps at most N nonzeros in M consecutive inputs; None means unstructured.
    """

    group: GroupName
    sparsity: float | Fraction
    n_m: tuple[int, int] | None = None

    @property
    def within_rows(self) -> bool:
        """Whether every group lies within one row."""
        return self.n_m is not None or self.group == "row"

    def group_size(self, shape: tuple[int, int]) -> int:
        """Number of weights per group in a matrix of ``shape`` = (out, in)."""
        if self.n_m:
            return self.n_m[1]
        n_out, n_in = shape
        return {"layer": n_out * n_in, "row": n_in, "column": n_out}[self.group]

    def n_pruned(self, shape: tuple[int, int]) -> int:
        """``k = floor(n * sparsity)`` in exact arithmetic: 0.7 of 90 is 63, where floats give 62."""
        if self.n_m:
            n, m = self.n_m
            return m - n
        return int(self.group_size(shape) * Fraction(str(self.sparsity)))

    def split(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "groups n"]:
        """View a matrix as one row per comparison group; ``column`` makes a contiguous copy."""
        if self.n_m:
            return matrix.reshape(-1, self.n_m[1])
        if self.group == "layer":
            return matrix.reshape(1, -1)
        return matrix if self.group == "row" else matrix.T.contiguous()

    def join(self, grouped: Shaped[Tensor, "groups n"], shape: tuple[int, int]) -> Shaped[Tensor, "out in"]:
        """Inverse of ``split``."""
        if self.n_m or self.group != "column":
            return grouped.reshape(shape)
        return grouped.T.contiguous()
