"""Remove whole input channels of a Linear, and refit the remaining ones: optimal brain surgeon for columns.

A Linear whose input channels are each computed by themselves (the second one of an MLP) can lose channels
altogether: its columns, and the rows of the Linears that compute them. The result is a smaller dense matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedprllm.core.solvers.scaled import Problem

__all__ = ["FewerChannels", "kept_channels", "next_width", "remove_channels", "remove_units"]

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
    state = _State.of(problem)
    for start in range(0, n_removed, _AT_ONCE):
        costs = state.weight.square().sum(dim=0) / state.inverse.diagonal()
        order = costs.masked_fill(state.removed, torch.inf).argsort(stable=True)
        state.remove(order[: min(_AT_ONCE, n_removed - start)])
    return _refitted(problem, state.removed)


def remove_units(
    problem: Problem, units: Int[Tensor, " in"], groups: Int[Tensor, " units"], n_removed: int
) -> FewerChannels:
    """Remove whole units of input channels (heads), from every group equally many.

    Unit u with channels c costs ``tr(W_:c (H^-1_cc)^-1 W_:c^T)``. The cheapest unit of every group leaves,
    and the rest is ranked anew, as in `remove_channels`.

    Args:
        problem: The scaled problem.
        units: Unit of each channel.
        groups: Group of each unit.
        n_removed: Number of units to remove, a multiple of the number of groups.
    """
    units, group_of = units.to(problem.weight.device), groups.tolist()
    n_groups = max(group_of) + 1
    assert n_removed % n_groups == 0, f"{n_removed} units from {n_groups} groups"
    state = _State.of(problem)
    for _ in range(n_removed // n_groups):
        cheapest: dict[int, tuple[float, int]] = {}
        for unit in sorted(set(units[~state.removed].tolist())):
            cost = state.cost((units == unit).nonzero().flatten())
            group = group_of[unit]
            cheapest[group] = min(cheapest.get(group, (cost, unit)), (cost, unit))
        gone = torch.tensor([unit for _, unit in cheapest.values()], device=units.device)
        state.remove(torch.isin(units, gone).nonzero().flatten())
    return _refitted(problem, state.removed)


@dataclass
class _State:
    """A problem from which channels have been removed; float64.

    Attributes:
        weight: Columns, corrected for the loss of the removed ones.
        inverse: Inverse of the Gram matrix of the channels that are left; zeros elsewhere, up to rounding.
        removed: Which channels are gone.
    """

    weight: Float[Tensor, "out in"]
    inverse: Float[Tensor, "in in"]
    removed: Bool[Tensor, " in"]

    @classmethod
    def of(cls, problem: Problem) -> _State:
        hessian = problem.hessian.to(torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        # A copy, because it is changed in place.
        weight = problem.weight.to(torch.float64, copy=True)
        return cls(weight, inverse, torch.zeros_like(problem.dead))

    def cost(self, channels: Tensor) -> float:
        """Loss of accuracy if the channels go together."""
        columns = self.weight[:, channels]
        solved = torch.linalg.solve(self.inverse[channels][:, channels], columns.T)
        return float((columns.T * solved).sum())

    def remove(self, channels: Tensor) -> None:
        """Remove channels, and let the others make up for them."""
        rows = self.inverse[channels]
        step = torch.linalg.solve(rows[:, channels], rows)
        self.weight.addmm_(self.weight[:, channels], step, alpha=-1)
        self.inverse.addmm_(self.inverse[:, channels], step, alpha=-1)
        self.removed[channels] = True


def _refitted(problem: Problem, removed: Bool[Tensor, " in"]) -> FewerChannels:
    """The best columns of the channels that are kept, given that the others are gone."""
    kept = (~removed).nonzero().flatten()
    original, n_dead = problem.original[:, kept], int(problem.dead.sum())
    if not removed.any():
        return FewerChannels(removed, original, n_dead)
    hessian = problem.hessian.to(torch.float64)
    target = (problem.weight.to(torch.float64) @ hessian)[:, kept]
    factor = torch.linalg.cholesky(hessian[kept][:, kept])
    weight = torch.cholesky_solve(target.T, factor).T / problem.norms[kept]
    # Nothing is known about channels that are zero on every token.
    weight = torch.where(problem.dead[kept], original, weight.to(original.dtype))
    return FewerChannels(removed, weight, n_dead)
