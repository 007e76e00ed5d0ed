"""Intervals for paired differences, from resampling the windows that were measured.

The windows of a held-out text are the sample (bootstrap; Efron & Tibshirani 1993). All models are measured on
the same windows, so that their differences are resampled, not their losses. What such an interval says is how
much the difference depends on the held-out text; it does not know how much depends on the calibration text,
for which a study has seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedprllm.core.ties import generator

__all__ = ["LEVEL", "interval"]

LEVEL = 0.95
_N_RESAMPLES = 4000


def interval(differences: Sequence[Tensor], sizes: Sequence[Tensor], purpose: str) -> tuple[float, float]:
    """Ends of the 95 % interval of a mean difference per token; every text counts equally.

    Args:
        differences: For each text, what one model loses more than another on each of its windows, in nats:
            float64 [n_windows].
        sizes: For each text, the number of predicted tokens of each window: float64 [n_windows].
        purpose: Seed of the resampling.
    """
    draws = generator(purpose)
    means = torch.zeros(_N_RESAMPLES, dtype=torch.float64)
    for difference, size in zip(differences, sizes, strict=True):
        draw = torch.randint(len(size), (_N_RESAMPLES, len(size)), generator=draws)
        means += difference[draw].sum(dim=1) / size[draw].sum(dim=1) / len(sizes)
    low, high = torch.quantile(means, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(low), float(high)
