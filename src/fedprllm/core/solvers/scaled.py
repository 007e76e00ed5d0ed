"""What the solvers that choose a mask gradually have in common: the scaled problem, and the refit of a mask.

Minimize ``1/2 tr(Z H Z^T) - tr(B Z^T)`` over weights Z that are zero where pruned, with ``B = W H``. Every
input channel is scaled to the same norm ``n_j = sqrt(H_jj)``: ``H / (n n^T)`` has ones on its diagonal, the
scaled weights ``W n`` are Wanda's scores, and the damping is a fraction of each channel's own sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import PruneMask, prune_lowest
from fedprllm.core.solvers.sparsegpt import Reconstruction
from fedprllm.errors import ModelError

__all__ = ["Problem", "damping_for"]

_REFIT_STEPS = 10
# Damping with at least `_PLENTY` tokens per input channel; with fewer it grows in proportion.
_DAMPING, _PLENTY, _MAX_DAMPING = 0.1, 16, 1.0

Mask = Bool[Tensor, "out in"]
Matrix = Float[Tensor, "out in"]


def damping_for(n_tokens: int, width: int) -> float:
    """Damping as a fraction of each channel's sum of squares: more where there are few tokens.

    Args:
        n_tokens: Number of tokens behind the Gram matrix.
        width: Number of input channels.
    """
    return min(_MAX_DAMPING, _DAMPING * max(1.0, _PLENTY * width / max(n_tokens, 1)))


@dataclass
class Problem:
    """One Linear's reconstruction, with every input channel scaled to the same norm.

    Attributes:
        weight: Scaled weights, float32.
        hessian: Scaled Gram matrix with damping, float32; ones plus the damping on its diagonal.
        target: ``weight @ hessian``.
        damping: Damping as a fraction of the diagonal.
    """

    original: Matrix
    norms: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    weight: Matrix
    hessian: Float[Tensor, "in in"]
    target: Matrix
    damping: float
    grouping: Grouping
    ties: str
    seed_parts: tuple[object, ...]

    @classmethod
    def of(
        cls,
        weight: Matrix,
        gram: Float[Tensor, "in in"],
        grouping: Grouping,
        damping: float,
        ties: str,
        seed_parts: tuple[object, ...],
    ) -> Problem:
        """Scale a Linear's problem.

        Args:
            weight: The weights as the Linear applies them.
            gram: ``X^T X``.
            grouping: Comparison groups and their sparsity.
            damping: Fraction of each channel's sum of squares that is added to it, > 0.
            ties: A key of `TIES`.
            seed_parts: Seed of the tie rule ``random``.

        Raises:
            ModelError: The Gram matrix has a negative or infinite diagonal. The caller adds the name.
        """
        assert damping > 0, f"damping must be positive, found {damping}"
        dtype = torch.promote_types(weight.dtype, torch.float32)
        diagonal = gram.diagonal().to(torch.float64)
        if not torch.isfinite(diagonal).all() or bool((diagonal < 0).any()):
            raise ModelError(
                f"the Gram matrix of {len(gram)} inputs cannot be used: expected finite sums of squares on "
                "its diagonal; if the run uses dtype float16, try bfloat16 or float32"
            )
        dead = diagonal == 0
        norms = diagonal.sqrt().masked_fill(dead, 1.0)
        hessian = gram.to(torch.float64) / norms[:, None] / norms
        hessian = ((hessian + hessian.T) / 2).to(weight.device)
        hessian.diagonal().fill_(1.0 + damping)
        dead, norms = dead.to(weight.device), norms.to(device=weight.device, dtype=dtype)
        original = weight.detach().to(dtype)
        scaled = (original * norms).masked_fill_(dead, 0.0)
        hessian = hessian.to(dtype)
        return cls(
            original, norms, dead, scaled, hessian, scaled @ hessian, damping, grouping, ties, seed_parts
        )

    def lowest(self, values: Matrix, progress: float) -> PruneMask:
        """Select the weights of lowest magnitude.

        Args:
            values: Scaled weights.
            progress: Fraction of the final number of zeros; 1 selects exactly that number.
        """
        # Weights of dead channels cost nothing and go first, in order of magnitude.
        scores = torch.where(self.dead, -1.0 / (1.0 + self.original.abs()), values.abs())
        return prune_lowest(scores, self.original, self._partial(progress), self.ties, self.seed_parts)

    def _partial(self, progress: float) -> Grouping:
        if progress >= 1:
            return self.grouping
        if self.grouping.n_m is not None:
            n, m = self.grouping.n_m
            return Grouping("layer", 0.0, (m - int((m - n) * progress), m))
        return Grouping(self.grouping.group, float(Fraction(str(self.grouping.sparsity))) * progress)

    def refit(self, start: Matrix, mask: Mask, n_steps: int = _REFIT_STEPS) -> Matrix:
        """Improve the kept weights of a mask by conjugate gradients, all rows at once.

        The diagonal of the Hessian is constant, so that preconditioning by it would change nothing.
        """
        solution = start.masked_fill(mask, 0.0)
        residual = (self.target - solution @ self.hessian).masked_fill_(mask, 0.0)
        direction, energy = residual.clone(), residual.square().sum(dim=1, keepdim=True)
        for _ in range(n_steps):
            image = (direction @ self.hessian).masked_fill_(mask, 0.0)
            curvature = (direction * image).sum(dim=1, keepdim=True)
            step = torch.where(curvature > 0, energy / curvature, 0.0)
            solution += step * direction
            residual -= step * image
            before, energy = energy, residual.square().sum(dim=1, keepdim=True)
            direction = residual + torch.where(before > 0, energy / before, 0.0) * direction
        return solution

    def reconstruction(self, solution: Matrix, pruned: PruneMask) -> Reconstruction:
        """Undo the scaling. Rows that lose nothing, and kept weights of dead channels, keep their value."""
        unchanged = self.dead | ~pruned.mask.any(dim=1, keepdim=True)
        weight = torch.where(unchanged, self.original, solution / self.norms)
        weight = weight.masked_fill_(pruned.mask, 0.0)
        return Reconstruction(weight, pruned, self.damping, int(self.dead.sum()))


Solve = Callable[[Problem], Reconstruction]
