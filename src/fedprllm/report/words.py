"""How the report writes numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedprllm.evaluation.results import Perplexity

__all__ = [
    "change",
    "count",
    "factor",
    "listed",
    "mean_perplexity",
    "percent",
    "percent_range",
    "perplexity",
    "seconds",
    "size",
    "size_range",
]

_MOST_LISTED = 6
_LARGE = 1e5  # larger numbers are written with a power of ten
_UNIT = "\N{NO-BREAK SPACE}"  # between a number and its unit


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal place."""
    return f"{share * 100:.1f}{_UNIT}%"


def percent_range(shares: Iterable[float]) -> str:
    """The range of several fractions as percentages."""
    low, high = percent(min(shares := list(shares))), percent(max(shares))
    return low if low == high else f"{low.removesuffix(f'{_UNIT}%')} to {high}"


def size(n_bytes: float) -> str:
    """A number of bytes in a suitable unit, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f}{_UNIT}{unit}" if unit == "bytes" else f"{n_bytes:.1f}{_UNIT}{unit}"


def size_range(numbers: Iterable[int]) -> str:
    """The range of several numbers of bytes."""
    low, high = size(min(numbers := list(numbers))), size(max(numbers))
    return low if low == high else f"{low} to {high}"


def seconds(duration: float) -> str:
    """A duration in seconds or, from two minutes on, in minutes and seconds."""
    if duration < 120:
        return f"{duration:.1f}{_UNIT}s" if duration >= 1 else f"{duration:.2f}{_UNIT}s"
    return "{} min {} s".format(*divmod(round(duration), 60))


def count(number: int, noun: str) -> str:
    """``3 blocks``, ``1 block``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``; of many, the first few and how many more there are."""
    if len(names) > _MOST_LISTED + 1:
        names = [*names[:_MOST_LISTED], f"{len(names) - _MOST_LISTED} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def perplexity(value: float) -> str:
    """A perplexity with two decimal places, or with its power of ten; ∞ beyond the range of floats."""
    return f"{value:,.2f}" if value < _LARGE else _power(value)


def factor(ratio: float) -> str:
    """By what something is multiplied."""
    return f"{ratio:,.1f}" if ratio < _LARGE else _power(ratio)


def _power(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.1e}".replace("e+", "e")


def change(value: float, dense: float) -> str:
    """Relative change from the dense model."""
    ratio = value / dense
    if not math.isfinite(ratio):
        return ""
    return f"{(ratio - 1) * 100:+.1f}{_UNIT}%" if ratio < 10 else f"{_whole(ratio)}{_UNIT}times"


def _whole(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio < _LARGE else _power(ratio)


def mean_perplexity(rows: Sequence[Perplexity]) -> float:
    """Geometric mean over texts: ``exp`` of the mean negative log-likelihood."""
    nll = math.fsum(row.nll for row in rows) / len(rows)
    return math.exp(nll) if nll < 709 else math.inf
