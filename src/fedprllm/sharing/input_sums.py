"""Share sums of squares of the inputs, from which the server computes the scores of the pooled text.

All that a score such as Wanda's needs from the text is ``sum_x x_j^2`` for each input channel, and these sums
add up over participants. Query, key and value read the same input, as do gate and up; it is shared once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.errors import ModelError, UpdateError
from fedprllm.sharing.bounds import outstanding_sums
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

__all__ = ["SQUARES", "STATISTICS", "distinct_inputs", "on_grid", "pooled_norms"]

# No sum of squares of at least 2^-41 loses a bit of its float32 precision.
SQUARES = Grid(fraction_bits=64, magnitude_bits=48, n_words=2)


def distinct_inputs(linears: Linears) -> dict[str, int]:
    """Width of every distinct input of a block, keyed by the name of the first Linear that reads it."""
    return {linear.source: linear.shape[1] for linear in linears.values()}


def on_grid(grid: Grid, name: str, values: Tensor) -> Tensor:
    """Round sums over a participant's text to numbers that can be added up exactly, as float32.

    Raises:
        ModelError: A sum is beyond the grid's limit.
    """
    if not bool((values.abs() < grid.limit).all()):
        raise ModelError(
            f"a sum over the inputs of '{name}' is {float(values.abs().max()):.3g}: expected less than "
            f"{grid.limit:.3g}, which sums over participants can hold: use fewer windows, or share mask"
        )
    return grid.rounded(values)


def _shapes(linears: Linears) -> Shapes:
    return {name: ((width,), torch.float32) for name, width in distinct_inputs(linears).items()}


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001  one signature for all ways of sharing
    assert seen.statistics is not None, "PruneConfig refuses sums with a criterion that uses no text"
    return {
        name: on_grid(SQUARES, name, seen.statistics[name].sum_of_squares)
        for name in distinct_inputs(seen.block.linears)
    }


def _check(ballot: Ballot, target: Target) -> None:  # noqa: ARG001
    for name in distinct_inputs(ballot.linears):
        if not (ballot.update[name] >= 0).all():
            raise UpdateError(
                f"the sums of squares of '{name}' contain a negative number or NaN: expected numbers >= 0"
            )


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:
    sums = {name: update[name].cpu().to(torch.float64) / n_tokens for name in distinct_inputs(linears)}
    return compared_sums(sums, linears)


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001  added up on the CPU
    widths = distinct_inputs(linears).items()
    return Totals(ExactSums({name: FixedPointSum.zeros(SQUARES, width) for name, width in widths}))


def pooled_norms(totals: Totals, linears: Linears) -> dict[str, Tensor]:
    """``||X_j||_2`` of each Linear's input over the tokens of all participants, float32 [in]."""
    return {name: totals.sums[linear.source].sqrt().to(torch.float32) for name, linear in linears.items()}


def _squares(totals: Totals, linears: Linears) -> Tensors:
    return {name: totals.sums[name] for name in distinct_inputs(linears)}


STATISTICS = Sharing(
    kind="statistics",
    noun="sums over the Linears' inputs",
    content="For each distinct input of the Linears, the sum of squares of each channel.",
    wire=Wire(2, SINGLE, SINGLE, not_negative="sums of squares", grid=SQUARES),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, outstanding_sums),
    squares=_squares,
)
