"""SparseGPT: prune, and correct the remaining weights for what was lost (Frantar & Alistarh 2023).

Columns (input channels) are visited from left to right. Let F be the columns from j on. Pruning the weight
``w`` of column j adds at least ``w^2 / [H_F^-1]_jj`` to the layer's squared error, and adding
``-w / [H_F^-1]_jj * [H_F^-1]_j,:`` to the row attains this minimum. A single factorization ``H^-1 = U^T U``
(U upper triangular) yields all these inverses: ``[H_F^-1]_j,: = U_jj * U_j,:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import PruneMask
from fedprllm.core.selection import select_lowest
from fedprllm.core.ties import TIES
from fedprllm.errors import ModelError

__all__ = ["Reconstruction", "sparsegpt"]

MAX_DAMPING = 10.0  # times the mean diagonal; at that point the data hardly matters


@dataclass(frozen=True)
class Reconstruction:
    """A pruned Linear whose remaining weights were corrected.

    Attributes:
        weight: The new weights in float32 (float64 if the original was); exact +0.0 where pruned.
        pruned: The prune mask.
        damping: Damping that the factorization needed, as a fraction of the mean diagonal; more than
            requested if the Gram matrix was too close to singular.
        n_dead: Number of input channels that were zero on every token.
        damping_raised: Whether the damping had to be raised.
    """

    weight: Float[Tensor, "out in"]
    pruned: PruneMask
    damping: float
    n_dead: int
    damping_raised: bool = False


def sparsegpt(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    sparsity: float | Fraction,
    n_m: tuple[int, int] | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    ties: str = "index",
    seed_parts: tuple[object, ...] = (),
) -> Reconstruction:
    """Prune a Linear using the Gram matrix of its inputs, and update the remaining weights.

    The mask of each block of columns is chosen when that block is reached, from the weights as corrected so
    far: those with the lowest ``w^2 / U_jj^2``. The Hessian is ``H = 2/n X^T X``; its factor 2/n cancels
    everywhere, so the number of tokens is not needed.

    Differs from the paper's code on purpose:

    * Exactly ``floor(n * sparsity)`` weights of the matrix are pruned, even if scores are equal.
    * The weights of a dead channel (``H_jj = 0``) are pruned first in their block, smallest magnitude first,
      and those that the sparsity spares keep their value; the code sets all of them to zero.
    * Dead channels are left out of the mean diagonal that scales the damping.
    * If the factorization fails, the damping is raised tenfold, and the result reports the value used.

    Args:
        weight: The weights as the Linear applies them.
        gram: ``X^T X``; only its upper triangle is read. The factorization uses its precision.
        sparsity: Fraction of the matrix that is pruned, in [0, 1); unused with ``n_m``.
        n_m: Keep at most N nonzeros in M consecutive inputs, chosen every M columns; M divides the number of
            inputs.
        block_size: Number of columns whose mask is chosen together, rounded down to a multiple of M.
        damping: Fraction of the mean diagonal that is added to the diagonal, > 0.
        ties: A key of `TIES`; equal scores are rare except for weights that are zero.
        seed_parts: Seed of the tie rule ``random``.

    Raises:
        ModelError: The Gram matrix cannot be factorized. The caller adds the name of the weight.

    Source: Frantar & Alistarh, SparseGPT (ICML 2023), algorithm 1.
    """
    n_in = weight.shape[1]
    assert n_m is None or n_in % n_m[1] == 0, f"M = {n_m} does not divide {n_in} inputs"
    block_size, width = _widths(block_size, n_m)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dead = (gram.diagonal() == 0).to(weight.device)
    asked = damping
    factor, damping = _inverse_factor(gram, damping)
    factor = factor.to(device=weight.device, dtype=dtype)
    selection = _Selection(
        Grouping("layer", sparsity, n_m), factor.diagonal().square(), dead, ties, seed_parts
    )

    # Transposed, so that the weights of an input channel are contiguous in memory.
    columns = weight.detach().to(dtype).T.contiguous()
    mask = torch.zeros_like(columns, dtype=torch.bool)
    n_ties = 0
    for start in range(0, n_in, block_size):
        end = min(start + block_size, n_in)
        errors = torch.empty_like(columns[start:end])
        for first in range(start, end, width):
            here = slice(first, min(first + width, end))
            mask[here], ties_here = selection(columns[here], first)
            n_ties += ties_here
            errors_here = errors[here.start - start : here.stop - start]
            _correct(columns[here], mask[here], factor[here, here], errors_here)
            columns[here.stop : end].addmm_(factor[here, here.stop : end].T, errors_here, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    # Filled, not multiplied: a pruned negative weight must become +0.0.
    new_weight = columns.masked_fill_(mask, 0.0).T.contiguous()
    pruned = PruneMask(mask.T.contiguous(), n_ties)
    return Reconstruction(new_weight, pruned, damping, int(dead.sum()), damping > asked)


def _widths(block_size: int, n_m: tuple[int, int] | None) -> tuple[int, int]:
    """Number of columns whose errors are propagated together, and whose mask is chosen together."""
    if n_m is None:
        return block_size, block_size
    return max(block_size // n_m[1], 1) * n_m[1], n_m[1]


def _correct(
    columns: Float[Tensor, "in out"],
    mask: Bool[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    errors: Float[Tensor, "in out"],
) -> None:
    """Set ``errors`` to ``w / U_jj`` of the pruned weights and correct the columns to their right in place.

    Recurses on halves instead of single columns: the corrections become matrix products, which are several
    times faster.
    """
    n_columns = len(columns)
    if n_columns == 1:
        torch.mul(columns, mask, out=errors).div_(factor)
        return
    left, right = slice(0, n_columns // 2), slice(n_columns // 2, n_columns)
    _correct(columns[left], mask[left], factor[left, left], errors[left])
    columns[right].addmm_(factor[left, right].T, errors[left], alpha=-1)
    _correct(columns[right], mask[right], factor[right, right], errors[right])


@dataclass(frozen=True)
class _Selection:
    """Selects the weights to prune in a few neighboring columns.

    Attributes:
        grouping: An N:M pattern, or the whole matrix with its sparsity.
        inverse_diagonal: ``[H_F^-1]_jj`` of every column j of the matrix.
        dead: True for a channel that was always zero.
        ties: A key of `TIES`.
        seed_parts: Seed of the tie rule ``random``.
    """

    grouping: Grouping
    inverse_diagonal: Float[Tensor, " all_in"]
    dead: Bool[Tensor, " all_in"]
    ties: str
    seed_parts: tuple[object, ...]

    def __call__(self, columns: Float[Tensor, "in out"], first: int) -> tuple[Bool[Tensor, "in out"], int]:
        """The mask of ``columns``, which begin at column ``first`` of the matrix, and the number of ties."""
        here = slice(first, first + columns.shape[0])
        weight, split = columns.T.contiguous(), self.grouping.split
        loss = weight.square() / self.inverse_diagonal[here]
        # Pruning dead weights costs nothing: they score below all live weights, in order of magnitude.
        scores = torch.where(self.dead[here], -1.0 / (1.0 + weight.abs()), loss)
        rule = TIES[self.ties]
        tie_key = None if rule is None else lambda: split(rule(weight, (*self.seed_parts, first)))
        shape = (weight.shape[0], weight.shape[1])
        selected, n_ties = select_lowest(split(scores), self._n_pruned(shape[0], here), tie_key)
        return self.grouping.join(selected, shape).T, n_ties

    def _n_pruned(self, n_out: int, here: slice) -> int:
        """Number of weights to prune here, so that all columns so far have lost ``floor(n * sparsity)``."""
        up_to_here = self.grouping.n_pruned((n_out, here.stop))
        return up_to_here if self.grouping.n_m else up_to_here - self.grouping.n_pruned((n_out, here.start))


def _inverse_factor(gram: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """The upper triangular U with ``U^T U = (H + damping * mean(diag H) * I)^-1``, and the damping used.

    ``H = R R^T`` with R upper triangular is a Cholesky factorization from the last column to the first, and
    ``U = R^-1``: one factorization and one triangular inverse, where the paper's code factorizes, inverts
    and factorizes again.
    """
    assert damping > 0, f"damping must be positive, found {damping}"
    diagonal = gram.diagonal()
    dead = diagonal == 0
    # In units of the mean diagonal, so that neither tiny nor huge inputs exceed the range of float32.
    unit = 1.0 if dead.all() else diagonal[~dead].mean()
    hessian = (gram / unit).flip(0, 1)
    hessian.diagonal().masked_fill_(dead.flip(0), 1.0)
    while damping <= MAX_DAMPING and not (diagonal < 0).any():
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping
        damping *= 10
    raise ModelError(
        f"the Gram matrix of {len(gram)} inputs cannot be factorized, even with {MAX_DAMPING:g} times its "
        "mean diagonal added: expected finite, positive semidefinite sums of x x^T; if the run uses dtype "
        "float16, try bfloat16 or float32"
    )
