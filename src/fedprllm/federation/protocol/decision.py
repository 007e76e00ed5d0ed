"""The coordinator's decision about a block, as bytes: one bit per weight whenever that is sufficient."""

from __future__ import annotations

import torch

from fedprllm.deciding import BlockDecision
from fedprllm.errors import UpdateError
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.names import from_wire, to_wire
from fedprllm.models.block import Block, GivenWeights, PrunedWeights, Weights

__all__ = ["COORDINATOR", "decided_weights", "encode_decision"]

COORDINATOR = "coordinator"


def encode_decision(decision: BlockDecision, block: Block, run_id: bytes, digest: bytes) -> bytes:
    """Encode a decision so that `decided_weights` restores ``decision.weights`` bit for bit.

    If the decision only zeroes weights, the message holds the prune masks. If it also changes weights that
    stay (scaling), the message holds the weights themselves.

    Args:
        decision: The decision.
        block: The unpruned block.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
    """
    masks = {name: pruned.mask for name, pruned in decision.masks.items()}
    zeroed = PrunedWeights(block, masks)
    only_zeroes = all(torch.equal(weight, decision.weights[name]) for name, weight in zeroed.items())
    update = wire.Update(
        run_id=run_id,
        participant=COORDINATOR,
        block=block.index,
        kind="mask" if only_zeroes else "weights",
        model_fingerprint=digest,
        tensors=to_wire(masks if only_zeroes else decision.weights, block.linears),
        n_tokens=0,
    )
    return wire.encode(update)


def decided_weights(message: bytes, block: Block, run_id: bytes, digest: bytes) -> Weights:
    """Decode a decision into the block's new weights, in the orientation of the checkpoint.

    Args:
        message: From `encode_decision`.
        block: The unpruned block.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.

    Raises:
        UpdateError: The message is not the coordinator's decision about this block.
    """
    masks = wire.Expectation(
        run_id=run_id,
        model_fingerprint=digest,
        block=block.index,
        kind="mask",
        shapes={linear.path: linear.shape for linear in block.linears.values()},
        participant=COORDINATOR,
    )
    weights = wire.Expectation(
        run_id=run_id,
        model_fingerprint=digest,
        block=block.index,
        kind="weights",
        shapes={linear.path: tuple(block.tensors[name].shape) for name, linear in block.linears.items()},
        participant=COORDINATOR,
    )
    max_bytes = wire.max_message_bytes(weights)
    kind = wire.decode(message, expect=None, max_bytes=max_bytes).kind
    expect = {"mask": masks, "weights": weights}.get(kind)
    if expect is None:
        raise UpdateError(
            f"decision about block {block.index}: expected kind mask or weights, found {kind}; use the same "
            "version of fedprllm on both sides"
        )
    tensors = from_wire(wire.decode(message, expect=expect, max_bytes=max_bytes).tensors, block.linears)
    if kind == "mask":
        return PrunedWeights(block, {name: mask.to(block.device) for name, mask in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.dtype != block.tensors[name].dtype:
            raise UpdateError(
                f"decision about '{name}': expected type {block.tensors[name].dtype}, found {tensor.dtype}; "
                "use the same version of fedprllm on both sides"
            )
    return GivenWeights({name: tensor.to(block.device) for name, tensor in tensors.items()})
