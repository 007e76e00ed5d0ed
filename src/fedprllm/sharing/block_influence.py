"""Share how far each block turns the hidden states, from which the server chooses the blocks to drop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.core.fixed_point import FixedPointSum
from fedprllm.errors import UpdateError
from fedprllm.sharing.input_sums import SQUARES, on_grid
from fedprllm.sharing.interface import (
    SINGLE,
    Ballot,
    Comparison,
    ExactSums,
    Linears,
    Norms,
    Seen,
    Shapes,
    Sharing,
    Tensors,
    Totals,
    Wire,
)
from fedprllm.sharing.target import Target

__all__ = ["INFLUENCE", "influence_of"]

_NAME = "influence"
_MOST = 2.0  # of one token: 1 - cos


def _shapes(linears: Linears) -> Shapes:  # noqa: ARG001  one signature for all ways of sharing
    return {_NAME: ((1,), torch.float32)}


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001
    assert seen.change is not None, "PruneConfig refuses influence with a criterion that uses no text"
    return {_NAME: on_grid(SQUARES, _NAME, torch.tensor([seen.change.total], dtype=torch.float64))}


def _check(ballot: Ballot, target: Target) -> None:  # noqa: ARG001
    total = float(ballot.update[_NAME][0])
    if not total >= 0:
        raise UpdateError(f"the {_NAME} of a block must be a sum of numbers >= 0, found {total:g}")


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:  # noqa: ARG001
    return {_NAME: update[_NAME].cpu().to(torch.float64) / n_tokens}


def _outstanding(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:  # noqa: ARG001
    means = {name: float(figure[_NAME][0]) for name, figure in figures.items()}
    return {
        name: f"the {_NAME} of the block is {mean:.4g} per token: expected at most {_MOST:g} for any text"
        for name, mean in means.items()
        if mean > _MOST
    }


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001
    return Totals(ExactSums({_NAME: FixedPointSum.zeros(SQUARES, 1)}))


def influence_of(totals: Totals) -> float:
    """Mean of ``1 - cos(input, output)`` over the tokens of all participants."""
    return float(totals.sums[_NAME][0]) / totals.n_tokens


INFLUENCE = Sharing(
    kind="influence",
    noun="how far each block turns the hidden states",
    content="For each block, one number: the sum over tokens of how far it turns their hidden states.",
    wire=Wire(10, SINGLE, SINGLE, not_negative="sums", grid=SQUARES),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, _outstanding),
    observes=lambda linears: {},  # noqa: ARG005
    watches_change=True,
)
