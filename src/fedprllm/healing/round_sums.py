"""What participants add up in a round: integers, so that the sum is exact whatever its order."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedprllm.core.fixed_point import Grid
from fedprllm.errors import UpdateError
from fedprllm.pruning.held_out import LOSSES, LossSum

__all__ = ["GRADIENTS", "RoundSums", "n_words", "round_bytes"]

# A window's gradient has 24 significant bits in float32; coarser than the grid only where it is above 1.
GRADIENTS = Grid(fraction_bits=24, magnitude_bits=24, n_words=1)
_N_FIGURES = 4
_FLOAT32_SLACK = 1 + 1e-5  # a clipped gradient is as long as it may be up to rounding


def n_words(n: int) -> int:
    """Number of words that a participant shares in a round, for n parameters."""
    return n + _N_FIGURES


def round_bytes(n: int) -> int:
    """Payload of what a participant shares in a round, in bytes, for n parameters."""
    return n_words(n) * torch.int64.itemsize


class RoundSums:
    """Sums over windows: of the gradient and the loss, and of the loss on held-out windows.

    Args:
        words: The gradient in units of ``GRADIENTS.spacing``, then the loss in units of ``LOSSES.spacing``,
            its number of tokens, and both for held-out windows; int64 [n + 4].
    """

    def __init__(self, words: Int[Tensor, " n_plus_4"]) -> None:
        self.words = words

    @classmethod
    def zeros(cls, n: int) -> RoundSums:
        """The sums over no windows, for n parameters."""
        return cls(torch.zeros(n_words(n), dtype=torch.int64))

    def add_window(
        self, gradient: Float[Tensor, " n"], loss: float, n_tokens: int, max_norm: float = math.inf
    ) -> None:
        """Add the gradient of the sum of a window's losses, and that sum.

        Args:
            gradient: The gradient.
            loss: The sum.
            n_tokens: Number of predicted tokens of the window.
            max_norm: Longest gradient per token (Euclidean norm); a longer one is shortened to it.

        Raises:
            UpdateError: A number is not finite or too large.
        """
        rounded = GRADIENTS.rounded(_clipped(gradient.detach().cpu(), max_norm * n_tokens))
        if not bool((rounded.abs() < GRADIENTS.limit).all()):
            raise UpdateError(
                f"a gradient holds NaN or a number of {GRADIENTS.limit:.3g} or more: expected the gradient "
                "of a loss; compute in bfloat16 or float32, or lower the learning rate"
            )
        self.words[:-_N_FIGURES] += GRADIENTS.words(rounded)[0]
        self._add_figures(-4, loss, n_tokens)

    def add_held_out(self, loss: float, n_tokens: int) -> None:
        """Add the sum of the losses of a held-out window."""
        self._add_figures(-2, loss, n_tokens)

    def _add_figures(self, place: int, loss: float, n_tokens: int) -> None:
        if not 0 <= loss < LOSSES.limit:
            raise UpdateError(
                f"the loss of a window is {loss:g}: expected a number from 0 to {LOSSES.limit:.3g}; compute "
                "in bfloat16 or float32, or lower the learning rate"
            )
        self.words[place] += round(loss / LOSSES.spacing)
        self.words[place + 1] += n_tokens

    def __add__(self, other: RoundSums) -> RoundSums:
        return RoundSums(self.words + other.words)

    @property
    def gradient(self) -> Float[Tensor, " n"]:
        """Gradient of the mean loss per token, float64; zeros if there are no tokens."""
        total = self.words[:-_N_FIGURES].to(torch.float64) * GRADIENTS.spacing
        return total / max(self.n_tokens, 1)

    def exceeds(self, n_windows: int, max_norm: float = math.inf) -> bool:
        """Whether the gradient is longer than the clipped gradients of that many windows can add up to."""
        words = self.words[:-_N_FIGURES]
        low, high = (int(extreme) for extreme in torch.aminmax(words))
        if max(-low, high) > n_windows * GRADIENTS.limit / GRADIENTS.spacing:
            return True
        # Rounding moves each entry of a window's gradient by at most half a unit.
        rounding = n_windows * math.sqrt(words.numel()) * GRADIENTS.spacing
        norm = float(words.to(torch.float64).norm()) * GRADIENTS.spacing
        return norm > max_norm * self.n_tokens * _FLOAT32_SLACK + rounding

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens behind the gradient."""
        return int(self.words[-3])

    @property
    def n_held_out(self) -> int:
        """Number of predicted tokens of held-out windows."""
        return int(self.words[-1])

    @property
    def loss(self) -> float:
        """Mean loss per token in nats; NaN if there are no tokens."""
        return LossSum(int(self.words[-4]), self.n_tokens).mean

    @property
    def held_out_loss(self) -> float:
        """Mean loss per token of held-out windows in nats; NaN if there are none."""
        return LossSum(int(self.words[-2]), self.n_held_out).mean


def _clipped(gradient: Float[Tensor, " n"], max_norm: float) -> Float[Tensor, " n"]:
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return gradient * (max_norm / norm) if norm > max_norm else gradient
