"""Share the number of outlying scores of each block, from which OWL allocates sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import wanda
from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.core.owl import Outliers, outliers
from fedprllm.errors import UpdateError
from fedprllm.models.block import Block
from fedprllm.sharing.bounds import FEWEST, others_median
from fedprllm.sharing.interface import (
    COUNTS,
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

__all__ = ["OUTLIERS", "WHOLE", "block_outliers", "check_count", "n_weights", "outlier_total"]

_COUNT = "outliers"
WHOLE = Grid(fraction_bits=0, magnitude_bits=53, n_words=2)
# A participant's share of outlying scores is at most this multiple of the others' median, to which half a
# percent of the scores is added, because small counts differ more (docs/decisions/bounds.md).
_FACTOR = 4.0
_FLOOR = 0.005


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
    return {_COUNT: ((1,), torch.int64)}


def _contribute(seen: Seen, target: Target) -> Tensors:
    statistics = seen.statistics
    assert statistics is not None, "a survey always looks at the inputs"
    norms = {name: statistics[name].norm for name in seen.block.linears}
    found = block_outliers(seen.block, norms, target.config)
    return {_COUNT: torch.tensor([found.n_outliers])}


def _check(ballot: Ballot, target: Target) -> None:
    check_count(ballot, target, 1)


def check_count(ballot: Ballot, target: Target, n_participants: int) -> None:
    """Refuse a number of outliers that so many participants cannot have counted.

    Raises:
        UpdateError: It is negative or too large.
    """
    # At most 1 / m of all scores can exceed m times their mean.
    most = n_participants * int(n_weights(ballot.linears) / target.config.owl_m)
    count = int(ballot.update[_COUNT][0])
    if not 0 <= count <= most:
        raise UpdateError(f"the number of outliers in a block must lie in 0 to {most}, found {count}")


def _figures(update: Mapping[str, Tensor], linears: Linears, n_tokens: int) -> Tensors:  # noqa: ARG001
    return {_COUNT: update[_COUNT].cpu().to(torch.float64) / n_weights(linears)}


def _outstanding(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:  # noqa: ARG001
    if len(figures) < FEWEST:
        return {}
    shares = torch.stack([figures[name][_COUNT] for name in figures])
    limits = _FACTOR * (others_median(shares) + _FLOOR)
    return {
        name: f"{share:.3%} of the block's scores are outliers: expected at most {limit:.3%}, "
        f"{_FACTOR:g} times the sum of {_FLOOR:.1%} and the other participants' median"
        for name, share, limit in zip(figures, shares[:, 0].tolist(), limits[:, 0].tolist(), strict=True)
        if share > limit
    }


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001
    return Totals(ExactSums({_COUNT: FixedPointSum.zeros(WHOLE, 1)}))


def outlier_total(totals: Totals) -> int:
    """Total number of outliers that the participants counted."""
    return int(totals.sums[_COUNT][0])


OUTLIERS = Sharing(
    kind="outliers",
    noun="numbers of outlying scores",
    content="For each block, the number of outlying scores.",
    wire=Wire(5, COUNTS, COUNTS, not_negative="counts", grid=WHOLE),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    comparison=Comparison(_figures, _outstanding),
)
