"""Decide with a solver: prune, and correct the remaining weights so that the outputs change least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.solvers.admm import admm
from fedprllm.core.solvers.alps import alps
from fedprllm.core.solvers.scaled import Problem, Solve, damping_for
from fedprllm.core.solvers.sparsegpt import Reconstruction, sparsegpt
from fedprllm.deciding.decision import UNREACHED, BlockDecision
from fedprllm.errors import ModelError
from fedprllm.models.block import Block, GivenWeights, Linear
from fedprllm.sharing.interface import Totals
from fedprllm.sharing.target import Target

__all__ = ["by_admm", "by_alps", "by_sparsegpt", "few_tokens"]

# Fewer tokens per input channel than this give Gram matrices that a solver fits too closely.
_FEW_TOKENS = 4

_SolveLinear = Callable[[Tensor, Tensor, Linear, int], Reconstruction]


def by_sparsegpt(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """SparseGPT on the summed Gram matrices (Frantar & Alistarh 2023)."""
    config = target.config

    def solve(weight: Tensor, gram: Tensor, linear: Linear, n_tokens: int) -> Reconstruction:  # noqa: ARG001
        return sparsegpt(
            weight,
            gram,
            target.sparsity(linear),
            config.n_m,
            ties=config.ties,
            seed_parts=(config.seed, "server", linear.name),
        )

    return _by_solver(totals, block, solve)


def by_admm(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """ADMM with a gradual mask on the summed Gram matrices (Boza 2024)."""
    return _by_solver(totals, block, _scaled(admm, target))


def by_alps(totals: Totals, block: Block, target: Target) -> BlockDecision:
    """ALPS on the summed Gram matrices (Meng et al. 2024)."""
    return _by_solver(totals, block, _scaled(alps, target))


def _scaled(solve_problem: Solve, target: Target) -> _SolveLinear:
    """A solver of the scaled problem, with damping that depends on the number of tokens."""
    config = target.config

    def solve(weight: Tensor, gram: Tensor, linear: Linear, n_tokens: int) -> Reconstruction:
        grouping = Grouping("layer", target.sparsity(linear), config.n_m)
        damping = damping_for(n_tokens, len(gram))
        seed_parts = (config.seed, "server", linear.name)
        return solve_problem(Problem.of(weight, gram, grouping, damping, config.ties, seed_parts))

    return solve


def _by_solver(totals: Totals, block: Block, solve: _SolveLinear) -> BlockDecision:
    masks, weights, notes = {}, {}, []
    source, gram = "", torch.empty(0)
    for name, linear in block.linears.items():
        if source != linear.source:
            source, gram = linear.source, totals.sums[linear.source]
        try:
            result = solve(block.matrix(name), gram, linear, totals.n_tokens)
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from None
        # Channels that are all zero are pruned by magnitude, and there is nothing to correct.
        unreached = linear.family and not gram.any()
        notes += [f"{name}: {UNREACHED}"] if unreached else _notes(name, result, totals.n_tokens, len(gram))
        masks[name] = result.pruned
        weights[name] = linear.stored(result.weight).to(linear.dtype).contiguous()
    return BlockDecision(masks, GivenWeights(weights), notes)


def _notes(name: str, result: Reconstruction, n_tokens: int, width: int) -> list[str]:
    notes = []
    if result.damping_raised:
        notes.append(f"{name}: damping raised to {result.damping:g} times the mean diagonal")
    if result.n_dead:
        notes.append(f"{name}: {result.n_dead} input channels were zero on every token")
    return notes + few_tokens(name, n_tokens, width)


def few_tokens(name: str, n_tokens: int, width: int) -> list[str]:
    """A note if there are too few tokens for a Linear's Gram matrix.

    Args:
        name: Name of the weight.
        n_tokens: Number of tokens behind the Gram matrix.
        width: Number of inputs.
    """
    if n_tokens < width:
        return [
            f"{name}: {n_tokens} tokens are fewer than its {width} inputs, too few for a solver: share "
            "statistics, or use more text"
        ]
    if n_tokens < _FEW_TOKENS * width:
        return [f"{name}: {n_tokens} tokens are few for a solver with {width} inputs"]
    return []
