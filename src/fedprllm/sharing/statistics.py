"""Share sums over the inputs instead of masks: the server computes what a pooled text would give.

A score such as Wanda's needs of the text only ``sum_x x_j^2`` per input channel, and these sums add up over
participants. Query, key and value read one input, as do gate and up: it is shared once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.core.sparsegpt import sparsegpt
from fedprllm.core.statistics import GramStatistics
from fedprllm.errors import ModelError, UpdateError
from fedprllm.models.blocks import Block, Linear
from fedprllm.participant import BlockStatistics
from fedprllm.sharing.base import (
    BlockDecision,
    Contribution,
    Shapes,
    Sharing,
    Totals,
    decision_by_score,
    sparsity_of,
)

__all__ = ["GRAM", "STATISTICS", "pooled_norms"]


def _inputs(linears: Mapping[str, Linear]) -> dict[str, int]:
    """The distinct inputs of a block, named after the first Linear that reads them, and their widths."""
    return {linear.source: linear.shape[1] for linear in linears.values()}


# Sums of squares ------------------------------------------------------------------------------------


def _contribute(
    block: Block,
    statistics: BlockStatistics | None,
    config: PruneConfig,  # noqa: ARG001  one signature for all ways of sharing
    fingerprint: str,  # noqa: ARG001
) -> Contribution:
    assert statistics is not None, "checked by PruneConfig: a criterion without inputs shares no sums"
    return Contribution(
        {name: statistics[name].sum_of_squares.to(torch.float32) for name in _inputs(block.linears)}
    )


def _shapes(linears: Mapping[str, Linear]) -> Shapes:
    return {name: ((width,), torch.float32) for name, width in _inputs(linears).items()}


def _check(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:  # noqa: ARG001
    for name in _inputs(block.linears):
        if not (update[name] >= 0).all():
            raise UpdateError(f"the sums of squares of '{name}' hold a negative number or NaN")


def _zeros(block: Block) -> Totals:
    device = next(iter(block.tensors.values())).device
    return Totals(
        {
            name: torch.zeros(width, dtype=torch.float64, device=device)
            for name, width in _inputs(block.linears).items()
        }
    )


def _decide(totals: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    """Prune as if all text were in one place: the local group is what scores are compared in."""
    norms = pooled_norms(totals, block)
    return decision_by_score(block, norms, config, ("server",), counts_close=True)


def pooled_norms(totals: Totals, block: Block) -> dict[str, Tensor]:
    """``||X_j||_2`` of the input of each Linear over everyone's tokens, float32."""
    return {
        name: totals.sums[linear.source].sqrt().to(torch.float32) for name, linear in block.linears.items()
    }


STATISTICS = Sharing("statistics", _contribute, _shapes, _check, _zeros, _decide, by_input=True)


# Gram matrices --------------------------------------------------------------------------------------


def _contribute_gram(
    block: Block,
    statistics: BlockStatistics | None,
    config: PruneConfig,  # noqa: ARG001
    fingerprint: str,  # noqa: ARG001
) -> Contribution:
    assert statistics is not None
    update = {}
    for name in _inputs(block.linears):
        sums = statistics[name]
        assert isinstance(sums, GramStatistics)
        update[name] = sums.gram.to(torch.float32)
    return Contribution(update)


def _gram_shapes(linears: Mapping[str, Linear]) -> Shapes:
    return {name: ((width, width), torch.float32) for name, width in _inputs(linears).items()}


def _check_gram(block: Block, update: Mapping[str, Tensor], config: PruneConfig) -> None:  # noqa: ARG001
    for name in _inputs(block.linears):
        gram = update[name]
        if not (gram.diagonal() >= 0).all():
            raise UpdateError(f"the Gram matrix of '{name}' has a negative number on its diagonal")
        if not torch.allclose(gram, gram.T, rtol=1e-3, atol=1e-3 * float(gram.abs().max())):
            raise UpdateError(f"the Gram matrix of '{name}' is not symmetric")


def _zero_grams(block: Block) -> Totals:
    device = next(iter(block.tensors.values())).device
    return Totals(
        {
            name: torch.zeros(width, width, dtype=torch.float32, device=device)
            for name, width in _inputs(block.linears).items()
        }
    )


def _decide_by_sparsegpt(totals: Totals, block: Block, config: PruneConfig) -> BlockDecision:
    """SparseGPT on the summed Gram matrices: prunes, and corrects the weights that stay."""
    masks, weights, notes = {}, {}, []
    for name, linear in block.linears.items():
        seed_parts = (config.seed, "server", name)
        try:
            result = sparsegpt(
                block.matrix(name),
                totals.sums[linear.source],
                sparsity_of(config, linear),
                config.n_m,
                ties=config.ties,
                seed_parts=seed_parts,
            )
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from None
        if result.damping > 0.01:
            notes.append(f"{name}: damping raised to {result.damping:g} of the mean diagonal")
        if result.n_dead:
            notes.append(f"{name}: {result.n_dead} input channels were zero on every token")
        masks[name] = result.pruned
        stored = linear.oriented(result.weight).to(block.tensors[name].dtype)
        weights[name] = stored.contiguous()
    return BlockDecision(masks, weights, notes)


GRAM = Sharing(
    "gram",
    _contribute_gram,
    _gram_shapes,
    _check_gram,
    _zero_grams,
    _decide_by_sparsegpt,
    observation=partial(GramStatistics.zeros, dtype=torch.float32),
    by_input=True,
)
