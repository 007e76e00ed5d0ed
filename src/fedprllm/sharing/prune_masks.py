"""Share prune masks, as the paper does: one bit per prunable weight (FedPrLLM, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.core.bitplanes import PackedVotes
from fedprllm.errors import UpdateError
from fedprllm.models.block import Linear
from fedprllm.sharing.interface import BITS, Ballot, Linears, Seen, Shapes, Sharing, Totals, Wire
from fedprllm.sharing.target import Target

__all__ = ["MASKS", "check_mask", "check_votes", "zero_votes"]


def _shapes(linears: Linears) -> Shapes:
    return {name: (linear.shape, torch.bool) for name, linear in linears.items()}


def _contribute(seen: Seen, target: Target) -> Mapping[str, Tensor]:  # noqa: ARG001  one signature
    return seen.masks


def _check(ballot: Ballot, target: Target) -> None:
    for name, linear in ballot.linears.items():
        check_mask(linear, ballot.update[name], target)


def check_mask(linear: Linear, mask: Tensor, target: Target) -> None:
    """Refuse a mask that does not prune exactly k weights of every local comparison group.

    Raises:
        UpdateError: A group has another number of pruned weights; the message names the weight and the first
            such group.
    """
    grouping = target.local_grouping(linear)
    counts = grouping.split(mask).sum(dim=1)
    k = grouping.n_pruned(linear.shape)
    wrong = (counts != k).nonzero()
    if wrong.numel():
        first = int(wrong[0])
        raise UpdateError(
            f"the mask of '{linear.name}' prunes {int(counts[first])} weights in comparison group {first} "
            f"({grouping.group}): expected exactly {k} at sparsity {float(grouping.sparsity):g}"
        )


def check_votes(linear: Linear, votes: PackedVotes, votes_cast: int, target: Target) -> None:
    """Refuse a sum of masks that do not each prune exactly k weights of every local comparison group.

    Raises:
        UpdateError: A group has another number of votes; the message names the weight and the first such
            group.
    """
    grouping = target.local_grouping(linear)
    counts = grouping.split(votes.counts().reshape(linear.shape)).sum(dim=1)
    expected = votes_cast * grouping.n_pruned(linear.shape)
    wrong = (counts != expected).nonzero()
    if wrong.numel():
        first = int(wrong[0])
        raise UpdateError(
            f"the votes on '{linear.name}' in comparison group {first} ({grouping.group}) are "
            f"{int(counts[first])}: expected exactly {expected}"
        )


def zero_votes(linears: Linears) -> dict[str, PackedVotes]:
    """No votes yet on any Linear."""
    return {name: PackedVotes(linear.n_weights) for name, linear in linears.items()}


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001  votes are counted on the CPU
    return Totals(votes=zero_votes(linears))


MASKS = Sharing(
    kind="mask",
    noun="prune masks",
    content="One bit per prunable weight: whether the participant would prune it.",
    wire=Wire(1, BITS, BITS),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    shares_decision=True,
)
