"""Remove whole input channels of a Linear, and refit the remaining ones: optimal brain surgeon for columns.

A Linear whose input channels are each computed by themselves (the second one of an MLP) can lose channels
altogether: its columns, and the rows of the Linears that compute them. The result is a smaller dense matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedprllm.core.solvers.scaled import Problem

__all__ = ["FewerChannels", "kept_channels", "next_width", "remove_channels"]

_AT_ONCE = 16  # channels removed before the others are ranked anew
_MULTIPLE, _FEWEST_STEPS = 32, 16


@dataclass(frozen=True)
class FewerChannels:
    """A Linear that lost input channels.

    Attributes:
        removed: True for every channel that is removed.
        weight: The refitted columns of the others, in their order.
        n_dead: Number of channels that were zero on every token.
    """

    removed: Bool[Tensor, " in"]
    weight: Float[Tensor, "out kept"]
    n_dead: int


def kept_channels(width: int, fraction: Fraction) -> int:
    """Number of channels that stay if about ``fraction`` of ``width`` is removed.

    It is a multiple of 32, because matrix products are slow at odd widths; of a smaller power of two if
    ``width`` is below 512 or no multiple of 32.

    Args:
        width: Number of channels.
        fraction: Fraction to remove, in [0, 1).
    """
    multiple = _multiple(width)
    return max(1, round((1 - fraction) * width / multiple)) * multiple


def next_width(width: int) -> int:
    """The largest number of channels below ``width`` that `kept_channels` returns."""
    return width - _multiple(width)


def _multiple(width: int) -> int:
    multiple = _MULTIPLE
    while multiple > 1 and (width % multiple or width < multiple * _FEWEST_STEPS):
        multiple //= 2
    return multiple


def remove_channels(problem: Problem, n_removed: int) -> FewerChannels:
    """Remove the input channels whose loss costs least once the others have made up for it.

    With the Gram matrix H, damped, channel j costs ``sum_o W_oj^2 / (H^-1)_jj``. The cheapest set r leaves,
    ``W -= W_r (H^-1_rr)^-1 H^-1_r:`` and ``H^-1 -= H^-1_:r (H^-1_rr)^-1 H^-1_r:``, and the rest is ranked
    anew. At the end the remaining columns S are solved for directly, which removes what rounding added up:
    ``W'_S = (W H)_:S (H_SS)^-1``.

    Args:
        problem: The scaled problem (its damping is part of H); its comparison groups are not used.
        n_removed: Number of channels to remove, less than all.

    Source: Hassibi & Stork, Second order derivatives for network pruning (NeurIPS 1992), for sets of columns;
    Kurtic et al., ZipLM (NeurIPS 2023).
    """
    hessian = problem.hessian.to(torch.float64)
    target = problem.weight.to(torch.float64)
    kept = _ranked_out(target, hessian, n_removed)
    weight = target[:, kept] if not n_removed else _refitted(target @ hessian, hessian, kept)
    dtype = problem.original.dtype
    solution = (weight / problem.norms[kept]).to(dtype)
    original = problem.original[:, kept]
    # Nothing is known about channels that never spoke; without a loss there is nothing to make up for.
    unchanged = problem.dead[kept] if n_removed else torch.ones_like(kept, dtype=torch.bool)
    removed = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    removed[kept] = False
    return FewerChannels(removed, torch.where(unchanged, original, solution), int(problem.dead.sum()))


def _ranked_out(weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], n_removed: int) -> Tensor:
    """Indices, in order, of the channels that remain after the cheapest have been removed set by set."""
    left = torch.arange(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    while n_removed:
        n = min(_AT_ONCE, n_removed)
        costs = weight.square().sum(dim=0) / inverse.diagonal()
        order = costs.argsort(stable=True)
        out, stay = order[:n], order[n:].sort().values
        step = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])
        weight = weight[:, stay] - weight[:, out] @ step
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ step
        left, n_removed = left[stay], n_removed - n
    return left


def _refitted(
    target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], kept: Tensor
) -> Float[Tensor, "out kept"]:
    """The best columns, given that the others are gone."""
    factor = torch.linalg.cholesky(hessian[kept][:, kept])
    return torch.cholesky_solve(target[:, kept].T, factor).T
