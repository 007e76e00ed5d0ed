"""Share pruned weights, as FedSpaLLM does: each weight plus one bit that says whether it was pruned."""

from __future__ import annotations

import torch

from fedprllm.errors import UpdateError
from fedprllm.models.block import PrunedWeights
from fedprllm.sharing.interface import (
    BITS,
    SINGLE,
    Ballot,
    Linears,
    Seen,
    Shapes,
    Sharing,
    Tensors,
    Totals,
    Wire,
)
from fedprllm.sharing.prune_masks import check_mask, zero_votes
from fedprllm.sharing.target import Target

__all__ = ["WEIGHTS", "mask_name"]


def mask_name(name: str) -> str:
    """Name of the mask that accompanies a weight."""
    return f"{name}.mask"


def _shapes(linears: Linears) -> Shapes:
    weights: Shapes = {name: (linear.shape, linear.dtype) for name, linear in linears.items()}
    return weights | {mask_name(name): (linear.shape, torch.bool) for name, linear in linears.items()}


def _contribute(seen: Seen, target: Target) -> Tensors:  # noqa: ARG001  one signature for all ways of sharing
    weights = PrunedWeights(seen.block, seen.masks)
    update: Tensors = {}
    for name, linear in seen.block.linears.items():
        update[name] = linear.view(weights).contiguous()
        update[mask_name(name)] = seen.masks[name]
    return update


def _check(ballot: Ballot, target: Target) -> None:
    for name, linear in ballot.linears.items():
        mask, weight = ballot.update[mask_name(name)], ballot.update[name]
        check_mask(linear, mask, target)
        if (weight[mask] != 0).any():
            raise UpdateError(f"the weights of '{name}' are not all zero where their mask prunes them")
        if not torch.equal(weight[~mask], linear.stored(ballot.model(name))[~mask]):
            raise UpdateError(
                f"the weights of '{name}' that its mask keeps are not the model's: expected a participant to "
                "leave them unchanged"
            )


def _zeros(linears: Linears, device: torch.device) -> Totals:  # noqa: ARG001  votes are counted on the CPU
    # The weights that participants keep are the model's own: their sum follows from the votes.
    return Totals(votes={mask_name(name): votes for name, votes in zero_votes(linears).items()})


WEIGHTS = Sharing(
    kind="weights",
    noun="pruned weights",
    content="The pruned weights, and one bit per weight that says whether it was pruned.",
    wire=Wire(4, (*SINGLE, torch.float16, torch.bfloat16), BITS),
    shapes=_shapes,
    contribute=_contribute,
    check=_check,
    zeros=_zeros,
    shares_decision=True,
)
