"""Share the number of outlying scores of each block, from which OWL allocates sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import wanda
from fedprllm.core.owl import Outliers, outliers
from fedprllm.errors import UpdateError
from fedprllm.models.block import Block
from fedprllm.sharing.interface import Ballot, Linears, Seen, Shapes, Sharing, Tensors, Totals, Wire
from fedprllm.sharing.target import Target

__all__ = ["OUTLIERS", "block_outliers", "n_weights", "outlier_total"]

_COUNT = "outliers"


def n_weights(linears: Linears) -> int:
    """Number of prunable weights of a block."""
    return sum(linear.n_weights for linear in linears.values())


def block_outliers(block: Block, norms: Mapping[str, Tensor], config: PruneConfig) -> Outliers:
    """Count the outlying Wanda scores of a block, whatever criterion it is pruned by."""
    return outliers(
        lambda: (wanda(block.matrix(name), norms[name].to(block.tensors[name].device)) for name in norms),
        config.owl_m,
    )


def _shapes(linears: Linears) -> Shapes:  # noqa: ARG001  one signature for all ways of sharing
    return {_COUNT: ((1,), torch.float64)}


def _contribute(seen: Seen, target: Target) -> Tensors:
    statistics = seen.statistics
    assert statistics is not None, "a survey always looks at the inputs"
    norms = {name: statistics[name].norm for name in seen.block.linears}
    found = block_outliers(seen.block, norms, target.config)
    # float64 holds every integer up to 2^53.
    return {_COUNT: torch.tensor([found.n_outliers], dtype=torch.float64)}


def _check(ballot: Ballot, target: Target) -> None:
    # At most 1 / m of all scores can exceed m times their mean.
    count, most = float(ballot.update[_COUNT][0]), int(n_weights(ballot.linears) / target.config.owl_m)
    if not (0 <= count <= most and count.is_integer()):
        raise UpdateError(
            f"the number of outliers in a block must be a whole number from 0 to {most}, found {count:g}"
        )


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001
    return Totals({_COUNT: torch.zeros(1, dtype=torch.float64)})


def outlier_total(totals: Totals) -> int:
    """Total number of outliers that the participants counted."""
    return int(totals.sums[_COUNT][0])


OUTLIERS = Sharing(
    kind="outliers",
    noun="numbers of outlying scores",
    content="For each block, the number of outlying scores.",
    wire=Wire(5, (torch.float64,), (torch.float64,), not_negative="counts"),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
)
