"""Sparsity by block (OWL), in whole numbers that add up to the sparsity of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from jaxtyping import Float
from torch import Tensor

from fedprllm.core.groups import Grouping, GroupName

__all__ = ["Outliers", "allocate", "outliers", "owl", "split_exactly"]

Scores = Iterable[Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Outliers:
    """Outlying scores among those of a block. Counts of participants merge by addition.

    Attributes:
        n_outliers: Scores above M times the mean of the block.
        n_scores: All scores of the block.
    """

    n_outliers: int
    n_scores: int

    def __add__(self, other: Outliers) -> Outliers:
        """Counts over the participants of both."""
        return Outliers(self.n_outliers + other.n_outliers, self.n_scores + other.n_scores)

    @property
    def ratio(self) -> float:
        """``D``: the share of outliers, in [0, 1]."""
        return self.n_outliers / self.n_scores


def outliers(scores: Callable[[], Scores], m: float = 5.0) -> Outliers:
    """Count ``S[o, j] > m * mean(S)``, the mean being over all Linears of a block.

    Args:
        scores: Makes the Wanda scores of the block's Linears, one after the other; called twice, so that
            those of one Linear only are in memory.
        m: How many times the mean an outlier exceeds.

    Source: Yin et al., OWL (ICML 2024), section 3.2: layer outlier distribution.
    """
    total, n_scores = 0.0, 0
    for linear in scores():
        total += float(linear.sum())
        n_scores += linear.numel()
    threshold = m * total / n_scores
    return Outliers(sum(int((linear > threshold).sum()) for linear in scores()), n_scores)


def owl(
    outlier_ratios: Sequence[float], sizes: Sequence[int], sparsity: float, lam: float = 0.08
) -> list[float]:
    """Sparsity of each block: the more outliers, the less is pruned.

    ``A_b = 2 lam (D_b - min D) / (max D - min D)`` and ``S_b = S + mean(A) - A_b``.

    Blocks with equal ratios all get ``S``. Differs from the paper's code on purpose:

    * The mean weighs blocks by their size, so that ``sum_b n_b S_b = S sum_b n_b``.
    * Centring alone can leave a block up to 2 lam away from S, although the paper confines it to
      ``[S - lam, S + lam]``. Then all deviations shrink by the one factor that confines them.
    * Near 0 and 1 the room is smaller: ``lam`` is at most ``S`` and ``1 - S``.

    Args:
        outlier_ratios: ``D`` of each block.
        sizes: Prunable weights of each block.
        sparsity: ``S``, of the whole model, in [0, 1).
        lam: The largest deviation from it.

    Source: Yin et al., OWL (ICML 2024), section 3.3.
    """
    target = Fraction(str(sparsity))
    room = min(Fraction(str(lam)), target, 1 - target)
    ratios = [Fraction(ratio) for ratio in outlier_ratios]
    lowest, spread = min(ratios), max(ratios) - min(ratios)
    if spread == 0 or room == 0:
        return [float(target)] * len(ratios)
    scaled = [2 * room * (ratio - lowest) / spread for ratio in ratios]
    mean = sum((size * value for size, value in zip(sizes, scaled, strict=True)), Fraction()) / sum(sizes)
    deviations = [mean - value for value in scaled]
    shrink = min(Fraction(1), room / max(abs(deviation) for deviation in deviations))
    return [float(target + shrink * deviation) for deviation in deviations]


def split_exactly(total_k: int, sizes: Sequence[int], ratios: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``sizes * ratios`` that add up to ``total_k`` (largest remainder).

    Args:
        total_k: Weights to prune in all parts together.
        sizes: Weights of each part.
        ratios: Sparsity of each part, with ``sum(sizes * ratios)`` equal to ``total_k`` but for rounding.

    Returns:
        What each part loses: its quota rounded down or up. Of equal remainders, the first is rounded up.
    """
    shares = [size * Fraction(ratio) for size, ratio in zip(sizes, ratios, strict=True)]
    total = sum(shares, Fraction())
    if total_k == 0:
        return [0] * len(shares)
    quotas = [share * total_k / total for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: total_k - sum(counts)]:
        counts[part] += 1
    for part, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        assert count <= size, f"part {part} cannot lose {count} of its {size} weights"
    return counts


def allocate(
    outlier_ratios: Sequence[float],
    shapes: Sequence[Sequence[tuple[int, int]]],
    group: GroupName,
    sparsity: float,
    lam: float = 0.08,
) -> list[list[Fraction]]:
    """Sparsity of every Linear of every block by OWL, so that every comparison group loses whole weights.

    The model loses in total what it would lose if all blocks were pruned alike, exactly when groups are
    whole Linears (``layer``). With ``row`` and ``column`` a Linear loses a multiple of its number of groups:
    the total then falls short by less than one weight for each group of a Linear.

    Args:
        outlier_ratios: ``D`` of each block.
        shapes: (out, in) of the Linears of each block.
        group: The comparison group that decides what the model loses.
        sparsity: Sparsity of the whole model, in [0, 1).
        lam: The largest deviation from it.

    Returns:
        For each block and Linear a share ``k / n`` of the ``n`` weights of one of its groups.
    """
    sizes = [sum(n_out * n_in for n_out, n_in in of_block) for of_block in shapes]
    ratios = owl(outlier_ratios, sizes, sparsity, lam)
    flat = [shape for of_block in shapes for shape in of_block]
    uniform = Grouping(group, sparsity)
    group_sizes = [uniform.group_size(shape) for shape in flat]
    counts = [uniform.n_pruned(shape) for shape in flat]
    if len(set(ratios)) > 1:
        by_linear = [ratio for ratio, of_block in zip(ratios, shapes, strict=True) for _ in of_block]
        weights = [n_out * n_in for n_out, n_in in flat]
        n_groups = [weight // size for weight, size in zip(weights, group_sizes, strict=True)]
        total = sum(n * count for n, count in zip(n_groups, counts, strict=True))
        counts = _whole_groups(split_exactly(total, weights, by_linear), n_groups)
    shares = iter(Fraction(count, size) for count, size in zip(counts, group_sizes, strict=True))
    return [[next(shares) for _ in of_block] for of_block in shapes]


def _whole_groups(quotas: Sequence[int], n_groups: Sequence[int]) -> list[int]:
    """What each group of a part loses, when all groups of a part lose the same.

    Args:
        quotas: What the parts are to lose.
        n_groups: Groups of each part.
    """
    counts = [quota // n for quota, n in zip(quotas, n_groups, strict=True)]
    remainders = [quota % n for quota, n in zip(quotas, n_groups, strict=True)]
    left = sum(remainders)
    # The part that rounding down spared most is the first to lose one more weight of each group.
    for part in sorted(range(len(counts)), key=lambda part: -Fraction(remainders[part], n_groups[part])):
        if remainders[part] and n_groups[part] <= left:
            counts[part] += 1
            left -= n_groups[part]
    return counts
