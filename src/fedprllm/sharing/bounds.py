"""Bounds across ballots: what one participant of several may add to sums that have no limit of their own.

Sums of squares and Gram matrices are any numbers that are not negative, so a single ballot could outweigh
all others. Two things limit an honest one, whatever its text: the model, where a normalization fixes the size
of an input (`fedprllm.models.norms`), and what the other participants found. Upper bounds are enough: a
ballot of small numbers only counts less. The factor and the measurements behind it: docs/decisions/bounds.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedprllm.sharing.interface import Norms, Tensors

__all__ = ["FACTOR", "FEWEST", "others_median", "outstanding_sums", "ratios_to_others"]

FACTOR = 25.0  # of the others' median; the largest honest ratio measured is 8.6
FEWEST = 3  # participants of which each one has a median of others
# Channels that are almost silent in the others' text count as if they had this fraction of the mean channel.
_FLOOR = 0.1


def others_median(values: Tensor) -> Tensor:
    """Replace each row by the median of the other rows, column by column; the upper one of two.

    With the upper one, a minority of participants can neither raise the bound for itself nor, by numbers that
    are too small, lower it for the others.

    Args:
        values: One row per participant, [participants, n], at least two.
    """
    in_order = values.sort(dim=0).values
    middle = (len(values) - 1) // 2
    return torch.where(values <= in_order[middle], in_order[middle + 1], in_order[middle])


def outstanding_sums(figures: Mapping[str, Tensors], norms: Norms) -> dict[str, str]:
    """Why the sums of a participant are refused, by its name.

    Args:
        figures: Sums of squares per token and channel of each input, float64 [in], by participant.
        norms: Known normalizations of the inputs.
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
    """Why sums cannot come from this model; empty if they can, or if it is not known."""
    if source not in norms:
        return ""
    found, most = norms[source].energy(per_token), norms[source].most_energy
    if found <= most:
        return ""
    return (
        f"the sums of squares of '{source}' are {found:.4g} per token in units of the normalization before "
        f"it: expected at most {most:.4g}, whatever the text"
    )


def _beyond_others(values: Tensor, source: str) -> Iterator[str]:
    """Why each row of sums is out of proportion to the others; empty if it is not."""
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
    """How large each participant's sums are in units of the others' median.

    Args:
        values: Sums of squares per token, one row per participant, [participants, in], at least two.

    Returns:
        Ratio of the totals, and the mean over channels of the ratio of each channel, both [participants].
        They are 0 where most of the others found nothing, because there is nothing to compare with.
    """
    usual = others_median(values.sum(dim=1, keepdim=True))
    total = values.sum(dim=1, keepdim=True) / usual
    mean = values / (others_median(values) + _FLOOR * usual / values.shape[1])
    known = usual[:, 0] > 0
    return torch.where(known, total[:, 0], 0.0), torch.where(known, mean.mean(dim=1), 0.0)
