"""ALPS: ADMM whose penalty grows until the mask stands still (Meng et al., NeurIPS 2024)."""

from __future__ import annotations

import torch

from fedprllm.core.solvers.scaled import Problem
from fedprllm.core.solvers.sparsegpt import Reconstruction

__all__ = ["alps"]

_FIRST_PENALTY = 0.1
_CHECK_EVERY = 3
_MAX_STEPS = 300
# Growth of the penalty if the mask changed by more than this fraction; at 0 it stands still.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(problem: Problem) -> Reconstruction:
    """Prune a Linear and update its remaining weights; slower and a little better than ADMM.

    One eigendecomposition serves every penalty.

    Args:
        problem: The scaled problem.

    Source: Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models (NeurIPS 2024), algorithm 1.
    """
    values, vectors = torch.linalg.eigh(problem.hessian.to(torch.float64))
    values, vectors = values.clamp_min(0).to(problem.weight.dtype), vectors.to(problem.weight.dtype)
    kept, dual, penalty = problem.weight, torch.zeros_like(problem.weight), _FIRST_PENALTY
    pruned = problem.lowest(kept, 1.0)
    checked = pruned.mask
    for step in range(1, _MAX_STEPS + 1):
        free = problem.target - dual + penalty * kept
        solution = ((free @ vectors) / (values + penalty)) @ vectors.T
        candidate = solution + dual / penalty
        pruned = problem.lowest(candidate, 1.0)
        kept = candidate.masked_fill(pruned.mask, 0.0)
        dual = dual + penalty * (solution - kept)
        if step % _CHECK_EVERY:
            continue
        changed = int((pruned.mask ^ checked).sum()) / pruned.mask.numel()
        checked = pruned.mask
        growth = next((growth for least, growth in _GROWTH if changed > least), None)
        if growth is None:
            break
        penalty *= growth
    return problem.reconstruction(problem.refit(kept, pruned.mask), pruned)
