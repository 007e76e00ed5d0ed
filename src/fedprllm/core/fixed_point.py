"""Exact sums: floating-point numbers on a grid, added up as integers.

A float32 number that is a whole multiple of ``2^-f`` is an integer in units of ``2^-f``. Integers add up
exactly, so a sum over participants depends neither on their order nor on how they are grouped, and it is the
same whether it was added up in the clear or under masks (`fedprllm.secure`).

An integer is stored as one or two int64 words. The lower of two words holds 56 bits, so that the words of up
to 128 numbers can be added up separately, without carrying from one into the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from fedprllm.errors import UpdateError

__all__ = ["MAX_SUMMANDS", "FixedPointSum", "Grid"]

_LOW_BITS = 56
_SUM_BITS = 62  # one more addition of a number below 2^62 cannot overflow a word
MAX_SUMMANDS = 2 ** (63 - _LOW_BITS)


@dataclass(frozen=True)
class Grid:
    """The numbers that an update may hold: whole multiples of ``2^-fraction_bits``, within limits.

    Attributes:
        fraction_bits: Minus the binary logarithm of the spacing.
        magnitude_bits: Binary logarithm of the limit, which every magnitude must stay below.
        n_words: Number of 64-bit words that hold a sum of such numbers.
    """

    fraction_bits: int
    magnitude_bits: int
    n_words: int

    @property
    def spacing(self) -> float:
        """Difference between neighboring numbers."""
        return 2.0**-self.fraction_bits

    @property
    def limit(self) -> float:
        """Every magnitude is below this number."""
        return 2.0**self.magnitude_bits

    def rounded(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Round to the nearest float32 numbers of the grid; values beyond the limit stay beyond it."""
        single = values.to(torch.float32)
        return torch.round(single / self.spacing) * self.spacing

    def holds(self, values: Num[Tensor, " n"]) -> bool:
        """Whether all numbers lie on the grid and within its limit; NaN and infinity do not."""
        if not values.is_floating_point():
            low, high = (int(extreme) for extreme in torch.aminmax(values))
            return max(-low, high) < self.limit
        within = values.abs() < self.limit
        return bool((within & (torch.round(values / self.spacing) * self.spacing == values)).all())

    def words(self, values: Num[Tensor, " n"]) -> Int[Tensor, "words n"]:
        """The integers that numbers of the grid stand for, lowest word first."""
        if self.n_words == 1:
            return (values.to(torch.float32) / self.spacing).to(torch.int64)[None]
        magnitude = values.to(torch.float64).abs()
        unit = self.spacing * 2.0**_LOW_BITS
        high = torch.floor(magnitude / unit)
        words = torch.stack([(magnitude - high * unit) / self.spacing, high]).to(torch.int64)
        return words * values.sign().to(torch.int64)

    def numbers(self, words: Int[Tensor, "words n"]) -> Float[Tensor, " n"]:
        """The numbers that sums of integers stand for: float32 for one word, float64 for two."""
        if self.n_words == 1:
            return words[0].to(torch.float32) * self.spacing
        low, high = _carried(words)
        sign = torch.where(high < 0, -1, 1)  # of a negative integer, the two words would cancel
        low, high = _carried(torch.stack([low, high]) * sign)
        magnitude = high.to(torch.float64) * 2.0**_LOW_BITS + low.to(torch.float64)
        return magnitude * sign * self.spacing


def _carried(words: Int[Tensor, "words n"]) -> tuple[Tensor, Tensor]:
    """The same integers with a lower word from 0 to 2^56 - 1."""
    low, high = words
    return low & (2**_LOW_BITS - 1), high + (low >> _LOW_BITS)


class FixedPointSum:
    """The running sum of numbers on a grid.

    Args:
        grid: The grid.
        words: The sum so far, in the words of `Grid.words`.
    """

    def __init__(self, grid: Grid, words: Int[Tensor, "words n"]) -> None:
        self.grid, self.words = grid, words

    @classmethod
    def zeros(cls, grid: Grid, n: int, device: torch.device | None = None) -> FixedPointSum:
        """A sum of no numbers."""
        return cls(grid, torch.zeros(grid.n_words, n, dtype=torch.int64, device=device))

    def add(self, values: Num[Tensor, " n"]) -> None:
        """Add numbers of the grid.

        Raises:
            UpdateError: The sum exceeds what its words can hold; the caller adds the name.
        """
        self.words += self.grid.words(values.to(self.words.device))
        if self.grid.n_words == 2:
            self.words = torch.stack(_carried(self.words))
        low, high = (int(extreme) for extreme in torch.aminmax(self.words[-1]))
        if max(-low, high) >= 2**_SUM_BITS:
            most = 2.0 ** (_SUM_BITS - self.grid.fraction_bits)
            raise UpdateError(f"the sum over participants must stay below {most:.3g}")

    @property
    def value(self) -> Float[Tensor, " n"]:
        """The sum, rounded once: float32 for one word, float64 for two."""
        return self.grid.numbers(self.words)
