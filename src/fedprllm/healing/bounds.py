"""Limits on what one participant's gradient may add to the sum, where the server sees each of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedprllm.healing.round_sums import RoundSums
from fedprllm.sharing.bounds import FEWEST, others_median

__all__ = ["FACTOR", "outstanding_gradients"]

# Times the others' median. Of honest gradients of single windows, the longest measured was 13 times as long.
FACTOR = 50.0


def outstanding_gradients(sums: Mapping[str, RoundSums]) -> dict[str, str]:
    """Find the participants whose gradients are out of proportion.

    The length of a gradient per token is compared with the other participants' median. A gradient of the
    right length in a wrong direction passes; held-out windows tell what it did.

    Args:
        sums: A round's sums by participant.

    Returns:
        The reason for each refused participant, by name.
    """
    names = [name for name, one in sums.items() if one.n_tokens]
    if len(names) < FEWEST:
        return {}
    lengths = torch.stack([sums[name].gradient.norm() for name in names])[:, None]
    ratios = (lengths / others_median(lengths))[:, 0].tolist()
    return {
        name: f"the gradient per token is {ratio:.4g} times as long as the other participants' median: "
        f"expected at most {FACTOR:g} times"
        for name, ratio in zip(names, ratios, strict=True)
        if ratio > FACTOR
    }
