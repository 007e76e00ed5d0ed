"""ADMM: choose the mask gradually while the weights are refit, then refit those that are left (Boza 2024)."""

from __future__ import annotations

import torch

from fedprllm.core.solvers.scaled import Problem
from fedprllm.core.solvers.sparsegpt import Reconstruction

__all__ = ["admm"]

_ITERATIONS = 15
_PENALTY = 1.0


def admm(problem: Problem, n_iterations: int = _ITERATIONS) -> Reconstruction:
    """Prune a Linear and update its remaining weights.

    Step i of T prunes the weights of lowest magnitude, up to the fraction ``1 - (1 - i/T)^3`` of the final
    number, from the current solution and the sum of its deviations so far. One inverse serves all steps.

    Args:
        problem: The scaled problem.
        n_iterations: Number of steps T.

    Source: Boza, Fast and Effective Weight Update for Pruned Large Language Models (TMLR 2024), algorithms 1
    and 2.
    """
    inverse = _regularized_inverse(problem)
    solution, deviation = problem.weight, torch.zeros_like(problem.weight)
    for step in range(1, n_iterations + 1):
        candidate = solution + deviation
        pruned = problem.lowest(candidate, 1 - (1 - step / n_iterations) ** 3)
        masked = candidate.masked_fill(pruned.mask, 0.0)
        deviation = candidate - masked
        solution = (problem.target + _PENALTY * (masked - deviation)) @ inverse
    return problem.reconstruction(problem.refit(masked, pruned.mask), pruned)


def _regularized_inverse(problem: Problem) -> torch.Tensor:
    hessian = problem.hessian.to(torch.float64, copy=True)
    hessian.diagonal().add_(_PENALTY)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return inverse.to(problem.hessian.dtype)
