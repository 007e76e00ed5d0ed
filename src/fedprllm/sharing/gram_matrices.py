"""Share Gram matrices ``X^T X`` of the inputs, from which a solver corrects the remaining weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedprllm.core.sums import GramStatistics
from fedprllm.errors import UpdateError
from fedprllm.sharing.bounds import outstanding_sums
from fedprllm.sharing.input_sums import distinct_inputs
from fedprllm.sharing.interface import (
    SUMS,
    Ballot,
    Comparison,
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

__all__ = ["GRAM"]

_ROUNDING = 1e-6


def _shapes(linears: Linears) -> Shapes:
    return {name: ((width, width), torch.float32) for name, width in distinct_inputs(linears).items()}


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001  one signature for all ways of sharing
    assert seen.statistics is not None, "PruneConfig refuses sums with a criterion that uses no text"
    update = {}
    for name in distinct_inputs(seen.block.linears):
        sums = seen.statistics[name]
        assert isinstance(sums, GramStatistics)
        update[name] = sums.gram.to(torch.float32)
    return update


def _check(ballot: Ballot, target: Target) -> None:  # noqa: ARG001
    for name in distinct_inputs(ballot.linears):
        gram = ballot.update[name]
        if not (gram.diagonal() >= 0).all():
            raise UpdateError(
                f"the Gram matrix of '{name}' has a negative number on its diagonal: expected sums of squares"
            )
        if not torch.allclose(gram, gram.T, rtol=1e-3, atol=1e-3 * float(gram.abs().max())):
            raise UpdateError(f"the Gram matrix of '{name}' is not symmetric: expected X^T X")
        if not _is_positive(gram):
            raise UpdateError(
                f"the Gram matrix of '{name}' has a negative eigenvalue: expected X^T X, which never has one"
            )


def _is_positive(gram: Tensor) -> bool:
    """Whether no eigenvalue is more negative than rounding explains; one Cholesky factorization in float64.

    In a sum of float32 products over n channels, each entry is off by a few units in the last place of the
    largest diagonal entry, and each eigenvalue therefore by at most n times that.
    """
    values = gram.to(torch.float64)
    values = (values + values.T) / 2
    rounding = _ROUNDING * len(values) * float(values.diagonal().max())
    shifted = values + rounding * torch.eye(len(values), dtype=torch.float64, device=values.device)
    return not rounding or int(torch.linalg.cholesky_ex(shifted).info) == 0


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:
    """The diagonals: with no negative eigenvalue, no other entry is larger than its two."""
    sums = {
        name: update[name].diagonal().cpu().to(torch.float64) / n_tokens for name in distinct_inputs(linears)
    }
    return compared_sums(sums, linears)


def _zeros(linears: Linears, device: torch.device) -> Totals:
    return Totals(
        {
            name: torch.zeros(width, width, dtype=torch.float32, device=device)
            for name, width in distinct_inputs(linears).items()
        }
    )


def _squares(totals: Totals, linears: Linears) -> Tensors:
    return {name: totals.sums[name].diagonal() for name in distinct_inputs(linears)}


GRAM = Sharing(
    kind="gram",
    noun="sums of products of the Linears' inputs",
    content="For each distinct input of the Linears, the sum of products of every pair of channels.",
    wire=Wire(3, SUMS, SUMS),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, outstanding_sums),
    observation=partial(GramStatistics.zeros, dtype=torch.float32),
    squares=_squares,
)
