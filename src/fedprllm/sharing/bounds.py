"""Bounds across ballots: limits on what one participant may add to sums that have no natural limit.

Sums of squares and Gram matrices can be arbitrarily large, so a single ballot could outweigh all others. Two
things limit an honest ballot, whatever its text: the model, where a normalization fixes the size of an input
(`fedprllm.models.norms`), and the other participants' sums. Upper bounds are enough, because a ballot of
small numbers only counts less. docs/decisions/bounds.md explains the factor and the measurements behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedprllm.sharing.interface import Norms, Tensors

__all__ = ["FACTOR", "FEWEST", "others_median", "outstanding_sums", "ratios_to_others"]

FACTOR = 25.0  # times the others' median; the largest honest ratio measured is 8.6
FEWEST = 3  # participants needed for a median of the others
# Added to each channel's median, as a fraction of the mean channel, for channels that are almost silent.
_FLOOR = 0.1


def others_median(values: Tensor) -> Tensor:
    """Replace each row with the median of the other rows, column by column; of two medians, the upper one.

    With the upper median, a minority of participants can neither raise the bound for itself nor lower it for
    the others with numbers that are too small.

    Args:
        values: One row per participant, [participants, n], at least two rows.

    Returns:
        The medians, [participants, n].
    """
    in_order = values.sort(dim=0).values
    middle = (len(values) - 1) // 2
    return torch.where(values <= in_order[middle], in_order[middle + 1], in_order[middle])


def outstanding_sums(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:
    """Find the participants whose sums are out of proportion.

    Args:
        figures: Sums of squares per token and channel of each input, float64 [in], by participant.
        norms: Known normalizations of the inputs.

    Returns:
        The reason for each refused participant, by name.
    """
    refused: dict[str, str] = {}
    for source in next(iter(figures.values()), {}):
        values = torch.stack([figures[name][source] for name in figures])
        reasons = [_beyond_model(row, source, norms) for row in values]
        if len(values) >= FEWEST:
            reasons = [
                own or other for own, other in zip(reasons, _beyond_others(values, source), strict=True)
            ]
        for name, reason in zip(figures, reasons, strict=True):
            if reason:
                refused.setdefault(name, reason)
    return refused


def _beyond_model(per_token: Tensor, source: str, norms: Norms) -> str:
    """The reason sums cannot come from this model; empty if they can or if the normalization is unknown."""
    if source not in norms:
        return ""
    found, most = norms[source].energy(per_token), norms[source].most_energy
    if found <= most:
        return ""
    return (
        f"the sums of squares of '{source}' are {found:.4g} per token in units of the preceding "
        f"normalization: expected at most {most:.4g} for any text"
    )


def _beyond_others(values: Tensor, source: str) -> Iterator[str]:
    """Yield, for each row, the reason its sums are out of proportion to the others; empty if they are not."""
    for ratios in zip(*(ratio.tolist() for ratio in ratios_to_others(values)), strict=True):
        total, mean = ratios
        if max(ratios) <= FACTOR:
            yield ""
        else:
            yield (
                f"the sums of squares of '{source}' per token are {total:.4g} times the other participants' "
                f"median in total and {mean:.4g} times on average over channels: expected at most "
                f"{FACTOR:g} times"
            )


def ratios_to_others(values: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio of each participant's sums to the others' median.

    Args:
        values: Sums of squares per token, one row per participant, [participants, in], at least two rows.

    Returns:
        The ratio of the totals, and the mean over channels of each channel's ratio, both [participants]. Both
        are 0 where the others' median total is zero, because there is nothing to compare with.
    """
    usual = others_median(values.sum(dim=1, keepdim=True))
    total = values.sum(dim=1, keepdim=True) / usual
    mean = values / (others_median(values) + _FLOOR * usual / values.shape[1])
    known = usual[:, 0] > 0
    return torch.where(known, total[:, 0], 0.0), torch.where(known, mean.mean(dim=1), 0.0)
