"""How many parts of a model a structure removes, and which: those with the lowest scores."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

__all__ = ["lowest", "n_removed"]


def n_removed(n: int, amount: Fraction, n_groups: int = 1) -> int:
    """Number of parts to remove.

    Args:
        n: Number of parts.
        amount: What is removed: below 1 a fraction, rounded for each group, otherwise a number.
        n_groups: Number of groups of parts, each of which loses equally many.
    """
    return int(amount) if amount >= 1 else round(amount * n / n_groups) * n_groups


def lowest(scores: Sequence[float], n: int, n_groups: int = 1) -> list[int]:
    """Numbers, in order, of the ``n`` parts with the lowest scores; of equal ones the first.

    With groups of consecutive parts, each group loses equally many, so that every other part stays in its
    group.
    """
    size = len(scores) // n_groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    ranked = [sorted(group, key=lambda number: (scores[number], number)) for group in groups]
    return sorted(number for group in ranked for number in group[: n // n_groups])
