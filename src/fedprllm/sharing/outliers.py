"""Before pruning starts, count outliers: how much each block is to lose (OWL) depends on them.

A survey is a way of sharing whose decision is a count. It walks the unpruned model once. Who shares masks or
weights shares one count for each block; who shares sums shares the sums of the unpruned model, and the
server counts as if all text were in one place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.allocation import Outliers, outliers
from fedprllm.core.criteria import wanda
from fedprllm.errors import UpdateError
from fedprllm.models.blocks import Block, Linear
from fedprllm.participant import BlockStatistics
from fedprllm.sharing.base import Contribution, Shapes, Sharing, Totals
from fedprllm.sharing.statistics import STATISTICS, pooled_norms

__all__ = ["SURVEYS"]

_COUNT = "outliers"


def _n_weights(linears: Mapping[str, Linear]) -> int:
    return sum(linear.shape[0] * linear.shape[1] for linear in linears.values())


def _count(block: Block, norms: Mapping[str, Tensor], config: PruneConfig) -> Outliers:
    """Outlying Wanda scores of a block, whatever the criterion it is pruned by."""
    return outliers(
        lambda: (wanda(block.matrix(name), norms[name].to(block.tensors[name].device)) for name in norms),
        config.owl_m,
    )


def _contribute(
    block: Block,
    statistics: BlockStatistics | None,
    config: PruneConfig,
    fingerprint: str,  # noqa: ARG001  one signature for all ways of sharing
) -> Contribution:
    assert statistics is not None, "a survey always looks at the inputs"
    found = _count(block, {name: statistics[name].norm for name in block.linears}, config)
    # float64 holds every whole number up to 2^53.
    return Contribution({_COUNT: torch.tensor([found.n_outliers], dtype=torch.float64)})


def _shapes(linears: Mapping[str, Linear]) -> Shapes:  # noqa: ARG001
    return {_COUNT: ((1,), torch.float64)}


def _check(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:  # noqa: ARG001
    count, most = float(update[_COUNT][0]), _n_weights(block.linears)
    if not (0 <= count <= most and count.is_integer()):
        raise UpdateError(
            f"the number of outliers of block {block.index} must be a whole number up to {most}, "
            f"found {count:g}"
        )


def _zeros(block: Block) -> Totals:  # noqa: ARG001
    return Totals({_COUNT: torch.zeros(1, dtype=torch.float64)})


def _decide(totals: Totals, block: Block, config: PruneConfig) -> Outliers:  # noqa: ARG001
    return Outliers(int(totals.sums[_COUNT][0]), totals.n_participants * _n_weights(block.linears))


def _decide_from_sums(totals: Totals, block: Block, config: PruneConfig) -> Outliers:
    return _count(block, pooled_norms(totals, block), config)


_COUNTS = Sharing("outliers", _contribute, _shapes, _check, _zeros, _decide)
_SUMS = Sharing(
    "statistics",
    STATISTICS.contribute,
    STATISTICS.shapes,
    STATISTICS.check,
    STATISTICS.zeros,
    _decide_from_sums,
    by_input=True,
)

# By what participants share when they prune.
SURVEYS: dict[str, Sharing[Outliers]] = {
    "mask": _COUNTS,
    "statistics": _SUMS,
    "gram": _SUMS,
    "weights": _COUNTS,
}
