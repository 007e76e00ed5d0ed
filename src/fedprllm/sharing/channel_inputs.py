"""Share Gram matrices of only those inputs whose channels are removed: the MLPs', the heads', or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedprllm.models.block import Linear
from fedprllm.sharing.gram_matrices import GRAM
from fedprllm.sharing.interface import Ballot, Comparison, Linears, Seen, Shapes, Sharing, Tensors, Totals
from fedprllm.sharing.target import Target

__all__ = ["CHANNELS", "HEADS", "PARTS", "channel_readers"]

Parts = tuple[str, ...]
_CONTENTS = {
    "mlp": "For the input of each block's second MLP Linear, the sum of products of every pair of channels.",
    "heads": "For the input of each block's output projection of attention, the sum of products of every "
    "pair of channels.",
}


def channel_readers(linears: Linears, parts: Parts) -> dict[str, Linear]:
    """The Linears whose input channels belong to one of the parts and can be removed."""
    return {
        name: linear
        for name, linear in linears.items()
        if linear.channels is not None and linear.channels.part in parts
    }


def _shapes(parts: Parts, linears: Linears) -> Shapes:
    return GRAM.shapes(channel_readers(linears, parts))


def _contribute(parts: Parts, seen: Seen, target: Target) -> Mapping[str, Tensor]:
    block = replace(seen.block, linears=channel_readers(seen.block.linears, parts))
    return GRAM.contribute(replace(seen, block=block), target)


def _check(parts: Parts, ballot: Ballot, target: Target) -> None:
    GRAM.check(replace(ballot, linears=channel_readers(ballot.linears, parts)), target)


def _figures(parts: Parts, update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:
    assert GRAM.comparison is not None
    return GRAM.comparison.figures(update, channel_readers(linears, parts), n_tokens)


def _zeros(parts: Parts, linears: Linears, device: torch.device) -> Totals:
    return GRAM.zeros(channel_readers(linears, parts), device)


def _row(kind: str, code: int, parts: Parts, of: str) -> Sharing:
    """Gram matrices as `GRAM` shares them, but of fewer inputs."""
    assert GRAM.comparison is not None
    return replace(
        GRAM,
        kind=kind,
        noun=f"sums of products of the channels of {of}",
        content=" ".join(_CONTENTS[part] for part in parts),
        wire=GRAM.wire._replace(code=code),
        shapes=partial(_shapes, parts),
        contribute=partial(_contribute, parts),
        check=partial(_check, parts),
        zeros=partial(_zeros, parts),
        comparison=Comparison(partial(_figures, parts), GRAM.comparison.outstanding),
        observes=partial(channel_readers, parts=parts),
        squares=None,  # of a dense model that the smaller one no longer is
    )


CHANNELS = _row("channels", 7, ("mlp",), "the MLPs")
HEADS = _row("heads", 8, ("heads",), "the heads")
PARTS = _row("parts", 9, ("mlp", "heads"), "the MLPs and heads")
