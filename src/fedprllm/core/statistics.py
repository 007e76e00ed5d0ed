"""What a participant observes of the inputs of a Linear: sums over its tokens, never means.

Sums of different participants merge by addition, and the sums of disjoint texts are the sums of the
pooled text. They are kept in float64: adding float32 sums of windows in any order then gives the same
float32 result in all but a vanishing share of cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["InputStatistics"]


@dataclass
class InputStatistics:
    """Running sums over the tokens that reached one input of a block.

    Attributes:
        sum_of_squares: ``sum_x x_j^2`` per input channel j.
        n_tokens: number of tokens summed over.
    """

    sum_of_squares: Float[Tensor, " in"]
    n_tokens: int = 0

    @classmethod
    def zeros(cls, n_inputs: int) -> InputStatistics:
        """Statistics of no tokens."""
        return cls(torch.zeros(n_inputs, dtype=torch.float64))

    def add(self, inputs: Float[Tensor, "... in"]) -> None:
        """Add the tokens of one forward pass, in the precision of float32 per pass."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        norms = torch.linalg.vector_norm(flat, dim=0)
        self.sum_of_squares += norms.cpu().to(torch.float64).square()
        self.n_tokens += flat.shape[0]

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Statistics of the union of two disjoint sets of tokens."""
        return InputStatistics(self.sum_of_squares + other.sum_of_squares, self.n_tokens + other.n_tokens)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """``||X_j||_2`` per input channel, float32."""
        return self.sum_of_squares.sqrt().to(torch.float32)
