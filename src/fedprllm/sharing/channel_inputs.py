"""Share Gram matrices of only those inputs whose channels can be removed: the second Linear's of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedprllm.models.block import Linear
from fedprllm.sharing.gram_matrices import GRAM
from fedprllm.sharing.interface import (
    Ballot,
    Comparison,
    Linears,
    Norms,
    Seen,
    Shapes,
    Tensors,
    Totals,
)
from fedprllm.sharing.target import Target

__all__ = ["CHANNELS", "channel_readers"]


def channel_readers(linears: Linears) -> dict[str, Linear]:
    """The Linears whose input channels are each computed by themselves, from other Linears' outputs."""
    return {name: linear for name, linear in linears.items() if linear.producers}


def _shapes(linears: Linears) -> Shapes:
    return GRAM.shapes(channel_readers(linears))


def _contribute(seen: Seen, target: Target) -> Tensors:
    block = replace(seen.block, linears=channel_readers(seen.block.linears))
    return GRAM.contribute(replace(seen, block=block), target)


def _check(ballot: Ballot, target: Target) -> None:
    GRAM.check(replace(ballot, linears=channel_readers(ballot.linears)), target)


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:
    assert GRAM.comparison is not None
    return GRAM.comparison.figures(update, channel_readers(linears), n_tokens)


def _outstanding(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:
    assert GRAM.comparison is not None
    return GRAM.comparison.outstanding(figures, norms)


def _zeros(linears: Linears, device: torch.device) -> Totals:
    return GRAM.zeros(channel_readers(linears), device)


CHANNELS = replace(
    GRAM,
    kind="channels",
    noun="sums of products of the MLP's channels",
    content="For the input of each block's second MLP Linear, the sum of products of every pair of channels.",
    wire=GRAM.wire._replace(code=7),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, _outstanding),
    observes=channel_readers,
)
