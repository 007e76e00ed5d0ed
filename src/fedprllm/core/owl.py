"""Sparsity allocation: how much to prune from each block, in whole weights that add up for the model."""

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
    """Counts of the outlying scores of a block. Participants' counts merge by addition.

    Attributes:
        n_outliers: Number of scores above M times the mean score of the block.
        n_scores: Number of all scores of the block.
    """

    n_outliers: int
    n_scores: int

    def __add__(self, other: Outliers) -> Outliers:
        """Counts over the participants behind both operands."""
        return Outliers(self.n_outliers + other.n_outliers, self.n_scores + other.n_scores)

    @property
    def ratio(self) -> float:
        """``D``: the fraction of scores that are outliers, in [0, 1]."""
        return self.n_outliers / self.n_scores


def outliers(scores: Callable[[], Scores], m: float = 5.0) -> Outliers:
    """Count ``S[o, j] > m * mean(S)``, with the mean over all Linears of a block.

    Args:
        scores: Function that yields the Wanda scores of the block's Linears one after the other. It is called
            twice instead of keeping the scores, so that memory holds those of only one Linear.
        m: Multiple of the mean above which a score is an outlier.

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
    """Sparsity of each block: the more outliers a block has, the less of it is pruned.

    ``A_b = 2 lam (D_b - min D) / (max D - min D)`` and ``S_b = S + mean(A) - A_b``.

    If all ratios are equal, every block gets ``S``. Differs from the paper's code on purpose:

    * The mean weighs blocks by their size, so that ``sum_b n_b S_b = S sum_b n_b``.
    * Centering alone can leave a block up to 2 lam away from S, although the paper confines it to
      ``[S - lam, S + lam]``. In that case all deviations are scaled down by one common factor to fit.
    * Near 0 and 1 there is less room: ``lam`` is capped at ``S`` and at ``1 - S``.

    Args:
        outlier_ratios: ``D`` of each block.
        sizes: Number of prunable weights of each block.
        sparsity: ``S``, the sparsity of the whole model, in [0, 1).
        lam: Largest deviation of a block from ``S``.

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
    """Split ``total_k`` into integers in proportion to ``sizes * ratios`` (largest-remainder method).

    Args:
        total_k: Number of weights to prune in all parts together.
        sizes: Number of weights of each part.
        ratios: Sparsity of each part; ``sum(sizes * ratios)`` is ``total_k`` up to rounding.

    Returns:
        The number of weights to prune from each part: its quota rounded down or up. Among parts with equal
        remainders, the first is rounded up.
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
    """OWL's sparsity for every Linear, rounded so that every comparison group loses whole weights.

    With the group ``layer`` (a whole Linear), the model loses exactly as many weights as under uniform
    sparsity. With ``row`` and ``column``, a Linear loses a multiple of its number of groups, so the total can
    fall short, by less than one weight for each group of a single Linear.

    Args:
        outlier_ratios: ``D`` of each block.
        shapes: (out, in) of the Linears of each block.
        group: Comparison group in which the weights to prune are decided.
        sparsity: Sparsity of the whole model, in [0, 1).
        lam: Largest deviation of a block from ``sparsity``.

    Returns:
        For each Linear of each block the fraction ``k / n`` pruned of the ``n`` weights of each group.
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
    """Number of weights to prune from each group of a part, equal for all groups of that part.

    Args:
        quotas: Number of weights to prune from each part.
        n_groups: Number of groups in each part.
    """
    counts = [quota // n for quota, n in zip(quotas, n_groups, strict=True)]
    remainders = [quota % n for quota, n in zip(quotas, n_groups, strict=True)]
    left = sum(remainders)
    # Parts that rounding down spared the most per group are the first to lose one more weight per group.
    for part in sorted(range(len(counts)), key=lambda part: -Fraction(remainders[part], n_groups[part])):
        if remainders[part] and n_groups[part] <= left:
            counts[part] += 1
            left -= n_groups[part]
    return counts
