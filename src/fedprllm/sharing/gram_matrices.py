"""Share Gram matrices ``X^T X`` of the inputs, from which a solver corrects the remaining weights.

A Gram matrix is symmetric, so its upper triangle is shared: row after row, each from the diagonal on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.core.sums import GramStatistics
from fedprllm.errors import ModelError, UpdateError
from fedprllm.sharing.bounds import outstanding_sums
from fedprllm.sharing.input_sums import distinct_inputs, on_grid
from fedprllm.sharing.interface import (
    SINGLE,
    Ballot,
    Comparison,
    ExactSums,
    Linears,
    Seen,
    Shapes,
    Sharing,
    Tensors,
    Totals,
    Wire,
    compared_sums,
)
from fedprllm.sharing.target import Target

__all__ = ["GRAM", "PRODUCTS", "square", "triangle"]

# The largest sum of one window of SmolLM2-135M is 2^25; 128 participants may each reach the limit.
PRODUCTS = Grid(fraction_bits=22, magnitude_bits=34, n_words=1)
_SMALLEST = 2.0**-14  # mean sum of squares that rounding to the grid changes by at most 0.2 %
_ROUNDING = 1e-6


def triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a square matrix, row by row: [n, n] becomes [n (n + 1) / 2]."""
    return matrix[_upper(len(matrix), matrix.device)]


def square(upper: Tensor) -> Tensor:
    """The symmetric matrix with the given upper triangle; reverses `triangle`."""
    width = (isqrt(8 * len(upper) + 1) - 1) // 2
    matrix = torch.zeros(width, width, dtype=upper.dtype, device=upper.device)
    matrix[_upper(width, upper.device)] = upper
    return matrix + matrix.triu(diagonal=1).T


def _upper(width: int, device: torch.device) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool, device=device).triu()


def _n_entries(width: int) -> int:
    return width * (width + 1) // 2


def _diagonal(upper: Tensor, width: int) -> Tensor:
    """The diagonal of the matrix with the given upper triangle, float64 on the CPU."""
    rows = torch.arange(width)
    return upper[(rows * width - rows * (rows - 1) // 2).to(upper.device)].cpu().to(torch.float64)


def _shapes(linears: Linears) -> Shapes:
    widths = distinct_inputs(linears).items()
    return {name: ((_n_entries(width),), torch.float32) for name, width in widths}


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001  one signature for all ways of sharing
    assert seen.statistics is not None, "PruneConfig refuses sums with a criterion that uses no text"
    update = {}
    for name in distinct_inputs(seen.block.linears):
        sums = seen.statistics[name]
        assert isinstance(sums, GramStatistics)
        _check_size(name, float(sums.sum_of_squares.mean()))
        update[name] = on_grid(PRODUCTS, name, triangle(sums.gram))
    return update


def _check_size(name: str, mean: float) -> None:
    """Refuse inputs so small that the grid would round them visibly.

    Raises:
        ModelError: They are.
    """
    if 0 < mean < _SMALLEST:
        raise ModelError(
            f"the sums of squares of the inputs of '{name}' are {mean:.3g} on average: expected at least "
            f"{_SMALLEST:.3g} for Gram matrices: use more windows, or share statistics or mask"
        )


def _check(ballot: Ballot, target: Target) -> None:  # noqa: ARG001
    for name, width in distinct_inputs(ballot.linears).items():
        upper = ballot.update[name]
        if not (_diagonal(upper, width) >= 0).all():
            raise UpdateError(
                f"the Gram matrix of '{name}' has a negative number on its diagonal: expected sums of squares"
            )
        if not _is_positive(square(upper)):
            raise UpdateError(
                f"the Gram matrix of '{name}' has a negative eigenvalue: expected X^T X, which never has one"
            )


def _is_positive(gram: Tensor) -> bool:
    """Whether no eigenvalue is more negative than rounding explains; one Cholesky factorization in float64.

    In a sum of float32 products over n channels, each entry is off by a few units in the last place of the
    largest diagonal entry or of the grid, and each eigenvalue therefore by at most n times that.
    """
    values = gram.to(torch.float64)
    largest = float(values.diagonal().max())
    rounding = len(values) * (_ROUNDING * largest + PRODUCTS.spacing) if largest else 0.0
    shifted = values + rounding * torch.eye(len(values), dtype=torch.float64, device=values.device)
    return not rounding or int(torch.linalg.cholesky_ex(shifted).info) == 0


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:
    """The diagonals: with no negative eigenvalue, no other entry is larger than its two."""
    widths = distinct_inputs(linears).items()
    sums = {name: _diagonal(update[name], width) / n_tokens for name, width in widths}
    return compared_sums(sums, linears)


def _zeros(linears: Linears, device: torch.device) -> Totals:
    sums = {
        name: FixedPointSum.zeros(PRODUCTS, _n_entries(width), device)
        for name, width in distinct_inputs(linears).items()
    }
    return Totals(ExactSums(sums, square))


def _squares(totals: Totals, linears: Linears) -> Tensors:
    return {name: totals.sums[name].diagonal() for name in distinct_inputs(linears)}


GRAM = Sharing(
    kind="gram",
    noun="sums of products of the Linears' inputs",
    content="For each distinct input of the Linears, the sum of products of every pair of channels.",
    wire=Wire(3, SINGLE, SINGLE, grid=PRODUCTS),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, outstanding_sums),
    observation=partial(GramStatistics.zeros, dtype=torch.float32),
    squares=_squares,
)
