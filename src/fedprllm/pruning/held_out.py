"""Held-out windows of participants, and the loss on them: exact sums, whatever their order."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from fedprllm.core.fixed_point import Grid
from fedprllm.errors import UpdateError

__all__ = ["LOSSES", "MOST_HELD_OUT", "LossSum", "divided"]

LOSSES = Grid(fraction_bits=20, magnitude_bits=32, n_words=1)
MOST_HELD_OUT = 4
_HELD_OUT = 8  # one window in so many


def divided(
    windows: Int[Tensor, "n window_length"],
) -> tuple[Int[Tensor, "_ window_length"], Int[Tensor, "_ window_length"]]:
    """Windows to learn from, and the last ones, on which only the loss is measured.

    One in eight is held out, at least one and at most four; none if there is a single window.
    """
    n = min(max(1, len(windows) // _HELD_OUT), MOST_HELD_OUT) if len(windows) > 1 else 0
    return windows[: len(windows) - n], windows[len(windows) - n :]


@dataclass(frozen=True)
class LossSum:
    """The sum of the losses of windows.

    Attributes:
        units: The sum in units of ``LOSSES.spacing``.
        n_tokens: Number of predicted tokens.
    """

    units: int = 0
    n_tokens: int = 0

    @classmethod
    def of(cls, loss: float, n_tokens: int) -> LossSum:
        """The loss of one window, in nats, summed over its predicted tokens.

        Raises:
            UpdateError: It is not finite, or not the loss of a model.
        """
        if not 0 <= loss < LOSSES.limit:
            raise UpdateError(
                f"the loss of a window is {loss:g}: expected a number from 0 to {LOSSES.limit:.3g}; compute "
                "in bfloat16 or float32"
            )
        return cls(round(loss / LOSSES.spacing), n_tokens)

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.units + other.units, self.n_tokens + other.n_tokens)

    @property
    def mean(self) -> float:
        """Mean loss per token in nats; NaN if there are no tokens."""
        return self.units * LOSSES.spacing / self.n_tokens if self.n_tokens else float("nan")
