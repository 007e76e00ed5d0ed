"""SparseGPT: prune, and correct the weights that stay for what was lost (Frantar & Alistarh 2023).

Columns (input channels) are visited from left to right. Pruning the weight ``w`` of column j adds to the
layer's squared error at least ``w^2 / [H_F^-1]_jj``, where F are the columns from j on, and that least is
reached by adding ``-w / [H_F^-1]_jj * [H_F^-1]_j,:`` to the row. With ``H^-1 = U^T U`` (U upper
triangular) all these inverses are at hand: ``[H_F^-1]_j,: = U_jj * U_j,:``.
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

MAX_DAMPING = 10.0  # times the mean diagonal: the data hardly counts any more


@dataclass(frozen=True)
class Reconstruction:
    """A pruned Linear whose remaining weights were corrected.

    Attributes:
        weight: Float32 (float64 if the weight was); exact +0.0 where pruned.
        pruned: The mask.
        damping: What the factorisation needed, as a fraction of the mean diagonal: more than was asked
            for if the Gram matrix was too close to singular.
        n_dead: Input channels that were zero on every token.
    """

    weight: Float[Tensor, "out in"]
    pruned: PruneMask
    damping: float
    n_dead: int


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
    """Prune a Linear from the Gram matrix of its inputs, and update the weights that stay.

    The mask of each block of columns is chosen when it is reached, from the weights as corrected so far:
    the lowest ``w^2 / U_jj^2``. The Hessian is ``H = 2/n X^T X``; its factor 2/n cancels everywhere, so
    the number of tokens is not asked for.

    Differs from the paper's code on purpose:

    * Exactly ``floor(n * sparsity)`` weights of the matrix are pruned, none more where scores are equal.
    * The weights of a dead channel (``H_jj = 0``) are the first to go in their block, by magnitude, and
      those that the sparsity spares keep their value; the code sets all of them to zero.
    * Dead channels do not count in the mean diagonal that scales the damping.
    * A failed factorisation raises the damping tenfold, and the result says so.

    Args:
        weight: As the Linear applies it.
        gram: ``X^T X``; only its upper triangle is read. Its precision is that of the factorisation.
        sparsity: Fraction of the matrix that is pruned, in [0, 1); unused with ``n_m``.
        n_m: Keep at most N non-zeros in M consecutive inputs, chosen every M columns; M divides them.
        block_size: Columns whose mask is chosen together, rounded down to a multiple of M.
        damping: Fraction of the mean diagonal that is added to the diagonal, > 0.
        ties: A key of `TIES`; equal scores are rare outside of weights that are zero.
        seed_parts: What the tie rule ``random`` is a function of.

    Raises:
        ModelError: The Gram matrix cannot be factorised. The caller adds the name of the weight.

    Source: Frantar & Alistarh, SparseGPT (ICML 2023), algorithm 1.
    """
    n_in = weight.shape[1]
    assert n_m is None or n_in % n_m[1] == 0, f"M = {n_m} does not divide {n_in} inputs"
    block_size, width = _widths(block_size, n_m)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dead = (gram.diagonal() == 0).to(weight.device)
    factor, damping = _inverse_factor(gram, damping)
    factor = factor.to(device=weight.device, dtype=dtype)
    selection = _Selection(
        Grouping("layer", sparsity, n_m), factor.diagonal().square(), dead, ties, seed_parts
    )

    # Transposed, so that the weights of one input channel lie side by side in memory.
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
    return Reconstruction(new_weight, PruneMask(mask.T.contiguous(), n_ties), damping, int(dead.sum()))


def _widths(block_size: int, n_m: tuple[int, int] | None) -> tuple[int, int]:
    """Columns whose errors are propagated together, and those whose mask is chosen together."""
    if n_m is None:
        return block_size, block_size
    return max(block_size // n_m[1], 1) * n_m[1], n_m[1]


def _correct(
    columns: Float[Tensor, "in out"],
    mask: Bool[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    errors: Float[Tensor, "in out"],
) -> None:
    """Fill ``errors`` with ``w / U_jj`` of what is pruned, and correct the columns to its right, in place.

    Halves, not single columns: the corrections are then products of matrices, at several times the speed.
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
    """Chooses which weights of a few neighbouring columns go.

    Attributes:
        grouping: An N:M pattern, or the whole matrix at a sparsity.
        inverse_diagonal: ``[H_F^-1]_jj`` of every column j of the matrix.
        dead: True for a channel that was always zero.
    """

    grouping: Grouping
    inverse_diagonal: Float[Tensor, " all_in"]
    dead: Bool[Tensor, " all_in"]
    ties: str
    seed_parts: tuple[object, ...]

    def __call__(self, columns: Float[Tensor, "in out"], first: int) -> tuple[Bool[Tensor, "in out"], int]:
        """The mask of ``columns``, the first of which is column ``first``, and the number of ties."""
        here = slice(first, first + columns.shape[0])
        weight, split = columns.T.contiguous(), self.grouping.split
        loss = weight.square() / self.inverse_diagonal[here]
        # Below every live weight, and in the order of magnitude: losing them costs nothing.
        scores = torch.where(self.dead[here], -1.0 / (1.0 + weight.abs()), loss)
        rule = TIES[self.ties]
        tie_key = None if rule is None else lambda: split(rule(weight, (*self.seed_parts, first)))
        shape = (weight.shape[0], weight.shape[1])
        selected, n_ties = select_lowest(split(scores), self._n_pruned(shape[0], here), tie_key)
        return self.grouping.join(selected, shape).T, n_ties

    def _n_pruned(self, n_out: int, here: slice) -> int:
        """What these columns lose, so that the columns up to here have lost ``floor(n * sparsity)``."""
        up_to_here = self.grouping.n_pruned((n_out, here.stop))
        return up_to_here if self.grouping.n_m else up_to_here - self.grouping.n_pruned((n_out, here.start))


def _inverse_factor(gram: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """The upper triangular U with ``U^T U = (H + damping * mean(diag H) * I)^-1``, and the damping used.

    ``H = R R^T`` with R upper triangular is a Cholesky factorisation from the last column to the first, and
    ``U = R^-1``: one factorisation and one triangular inverse, where the paper's code factorises,
    inverts and factorises again.
    """
    assert damping > 0, f"damping must be positive, found {damping}"
    diagonal = gram.diagonal()
    dead = diagonal == 0
    # In units of the mean diagonal, so that neither tiny nor huge inputs leave the range of float32.
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
        f"the Gram matrix of {len(gram)} inputs cannot be factorised, even with {MAX_DAMPING:g} times its "
        "mean diagonal added: expected finite, positive semi-definite sums of x x^T; if the precision of "
        "the model is float16, try bfloat16 or float32"
    )
