"""Statistics of the inputs of a Linear: sums over a participant's tokens, never means.

Participants' sums merge by addition: the sums of disjoint texts add up to those of the pooled text. They are
kept in float64, so that adding the float32 sums of windows in any order rounds to the same float32 result in
all but a vanishing fraction of cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ChangeStatistics", "ExpertStatistics", "GramStatistics", "InputStatistics"]


@dataclass
class InputStatistics:
    """Running sums over the tokens that reached one input of a block.

    Attributes:
        sum_of_squares: ``sum_x x_j^2`` for each input channel j, float64.
        n_tokens: Number of tokens summed over.
    """

    sum_of_squares: Float[Tensor, " in"]
    n_tokens: int = 0

    @classmethod
    def zeros(cls, n_inputs: int) -> InputStatistics:
        """Statistics over no tokens."""
        return cls(torch.zeros(n_inputs, dtype=torch.float64))

    def add(self, inputs: Float[Tensor, "... in"]) -> None:
        """Add the tokens of one forward pass, which are summed in float32."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        norms = torch.linalg.vector_norm(flat, dim=0)
        self.sum_of_squares += norms.cpu().to(torch.float64).square()
        self.n_tokens += flat.shape[0]

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Statistics of the union of two disjoint sets of tokens."""
        return InputStatistics(self.sum_of_squares + other.sum_of_squares, self.n_tokens + other.n_tokens)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """``||X_j||_2`` of each input channel, float32."""
        return self.sum_of_squares.sqrt().to(torch.float32)


@dataclass
class GramStatistics:
    """Running sum of outer products over the tokens that reached one input of a block (SparseGPT).

    Attributes:
        gram: ``X^T X = sum_x x x^T``, in float64 or, at half the size, float32.
        n_tokens: Number of tokens summed over.
    """

    gram: Float[Tensor, "in in"]
    n_tokens: int = 0

    @classmethod
    def zeros(
        cls, n_inputs: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> GramStatistics:
        """Statistics over no tokens; ``8 * n_inputs^2`` bytes in float64."""
        return cls(torch.zeros(n_inputs, n_inputs, dtype=dtype, device=device))

    def add(self, inputs: Float[Tensor, "... in"]) -> None:
        """Add the tokens of one forward pass, which are summed in float32."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.gram += (flat.T @ flat).to(self.gram.device)
        self.n_tokens += flat.shape[0]

    def __add__(self, other: GramStatistics) -> GramStatistics:
        """Statistics of the union of two disjoint sets of tokens."""
        return GramStatistics(self.gram + other.gram, self.n_tokens + other.n_tokens)

    @property
    def sum_of_squares(self) -> Float[Tensor, " in"]:
        """``sum_x x_j^2`` for each input channel j: the diagonal, in float64 as in `InputStatistics`."""
        return self.gram.diagonal().cpu().to(torch.float64)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """``||X_j||_2`` of each input channel, float32."""
        return self.sum_of_squares.sqrt().to(torch.float32)


@dataclass
class ChangeStatistics:
    """Running sum over tokens of how far a block turns their hidden states (block influence).

    Attributes:
        total: ``sum_x 1 - cos(x, block(x))``, from 0 to 2 for each token.
        n_tokens: Number of tokens summed over.

    Source: Men et al., ShortGPT (arXiv 2403.03853), equation 2.
    """

    total: float = 0.0
    n_tokens: int = 0

    def add(self, before: Float[Tensor, "... hidden"], after: Float[Tensor, "... hidden"]) -> None:
        """Add the tokens of one forward pass, compared in float32."""
        cosines = torch.cosine_similarity(before.to(torch.float32), after.to(torch.float32), dim=-1)
        self.total += float((1.0 - cosines).clamp_min(0.0).to(torch.float64).sum())
        self.n_tokens += cosines.numel()


@dataclass
class ExpertStatistics:
    """Running sums over tokens of what each expert of a block adds to them.

    Every summand is rounded to a multiple of ``UNIT``. Whole numbers add up exactly, so the sums do not
    depend on how the text is divided among participants.

    Attributes:
        sums: ``sum_x g(x) ||f(x)||_2`` over the tokens x that reach an expert f with router weight g, in
            units of ``UNIT``: whole numbers in float64, [experts]; exact below 2^53.
        counts: Number of these tokens, int64 [experts].

    Source: Lasby et al., REAP the Experts (arXiv 2510.13999).
    """

    UNIT: ClassVar[float] = 2.0**-24

    sums: Float[Tensor, " experts"]
    counts: Int[Tensor, " experts"]

    @classmethod
    def zeros(cls, n_experts: int) -> ExpertStatistics:
        """The sums over no tokens."""
        return cls(torch.zeros(n_experts, dtype=torch.float64), torch.zeros(n_experts, dtype=torch.int64))

    def add(
        self, number: int, outputs: Float[Tensor, "tokens hidden"], weights: Float[Tensor, " tokens"]
    ) -> None:
        """Add the outputs of one expert and the router's weights for them, measured in float32."""
        norms = torch.linalg.vector_norm(outputs.to(torch.float32), dim=-1)
        added = (norms * weights.to(torch.float32).abs()).cpu().to(torch.float64)
        self.sums[number] += torch.round(added / self.UNIT).sum()
        self.counts[number] += len(added)
