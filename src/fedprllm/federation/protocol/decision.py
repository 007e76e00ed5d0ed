"""The coordinator's decision about a block, as bytes: one bit per weight whenever that is sufficient.

A decision travels packed where that is shorter: weights without their zeros, and masks that repeat.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedprllm.deciding import BlockDecision
from fedprllm.errors import ModelError, UpdateError
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.names import from_wire, to_wire
from fedprllm.models.block import UNCHANGED, Block, GivenWeights, NarrowedWeights, PrunedWeights, Weights
from fedprllm.packing.message import pack_message, unpack_message
from fedprllm.sharing.expert_outputs import SCORES, n_values, scores_on_grid
from fedprllm.sharing.input_sums import SQUARES
from fedprllm.sharing.pruned_weights import mask_name

__all__ = ["COORDINATOR", "decided_weights", "encode_decision"]

COORDINATOR = "coordinator"
_INFLUENCE, _EXPERTS = "influence", "experts"


def encode_decision(decision: BlockDecision, block: Block, run_id: bytes, digest: bytes) -> bytes:
    """Encode a decision so that `decided_weights` restores ``decision.weights`` bit for bit.

    If the decision only zeroes weights, the message holds the prune masks. If it also changes weights that
    stay (scaling), the message holds the weights themselves. If it removes channels, the message holds the
    remaining columns of the Linears that read them, and which channels are gone. If blocks are to be dropped,
    it holds the block's influence, and if experts are to be removed, their scores; the block stays as it is.

    Args:
        decision: The decision.
        block: The unpruned block.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
    """
    kind, tensors = _content(decision, block)
    update = wire.Update(
        run_id=run_id,
        participant=COORDINATOR,
        block=block.index,
        kind=kind,
        model_fingerprint=digest,
        tensors=to_wire(tensors, block.linears),
        n_tokens=0,
    )
    return _packed(wire.encode(update), tensors)


def _packed(message: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """The message, packed if that is shorter."""
    numbers = [tensor for tensor in tensors.values() if tensor.dtype.is_floating_point]
    itemsize = numbers[0].dtype.itemsize if numbers else 1
    # The numbers of most messages begin with the payload and have one type. Where they do not, the message
    # is restored all the same, only longer.
    n_payload = wire.payload_bytes(tensors)
    n_after = wire.DIGEST_BYTES + n_payload % itemsize
    return pack_message(message, len(message) - n_payload - wire.DIGEST_BYTES, n_after, itemsize)


def _content(decision: BlockDecision, block: Block) -> tuple[str, Mapping[str, Tensor]]:
    """The kind of a message about a decision, and its tensors."""
    weights = decision.weights
    if decision.influence is not None:
        return _INFLUENCE, {_INFLUENCE: SQUARES.rounded(torch.tensor([decision.influence]))}
    if decision.expert_scores is not None:
        return _EXPERTS, {SCORES: scores_on_grid(decision.expert_scores)}
    if isinstance(weights, NarrowedWeights):
        return "weights", {
            **weights.narrow,
            **{mask_name(name): gone for name, gone in weights.removed.items()},
        }
    masks = {name: pruned.mask for name, pruned in decision.masks.items()}
    zeroed = PrunedWeights(block, masks)
    if all(torch.equal(weight, weights[name]) for name, weight in zeroed.items()):
        return "mask", masks
    return "weights", weights


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

    def expecting(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> wire.Expectation:
        return wire.Expectation(
            run_id=run_id,
            model_fingerprint=digest,
            block=block.index,
            kind=kind,
            shapes=to_wire(shapes, block.linears),
            participant=COORDINATOR,
        )

    masks = expecting("mask", {name: linear.shape for name, linear in block.linears.items()})
    weights = expecting("weights", {name: tuple(block.tensors[name].shape) for name in block.linears})
    max_bytes = wire.max_message_bytes(weights)
    try:
        message = unpack_message(message, max_bytes)
    except ModelError as error:
        raise UpdateError(f"decision about block {block.index}: {error}; fetch it again") from None
    received = wire.decode(message, expect=None, max_bytes=max_bytes)
    removed = _removed(received.tensors, block)
    if removed:
        weights = expecting("weights", _narrow_shapes(removed, block))
    unchanged = expecting(_INFLUENCE, {_INFLUENCE: (1,)})
    scores = expecting(_EXPERTS, {SCORES: (n_values(block.linears),)})
    expect = {"mask": masks, "weights": weights, _INFLUENCE: unchanged, _EXPERTS: scores}.get(received.kind)
    if expect is None:
        raise UpdateError(
            f"decision about block {block.index}: expected kind mask or weights, found {received.kind}; use "
            "the same version of fedprllm on both sides"
        )
    tensors = {
        name: tensor.to(block.device)
        for name, tensor in from_wire(
            wire.decode(message, expect=expect, max_bytes=max_bytes).tensors, block.linears
        ).items()
    }
    if received.kind in (_INFLUENCE, _EXPERTS):
        return UNCHANGED
    if received.kind == "mask":
        return PrunedWeights(block, tensors)
    given = {name: tensor for name, tensor in tensors.items() if name in block.tensors}
    _check_types(given, block)
    if removed:
        return NarrowedWeights(
            block.linears, {name: gone.to(block.device) for name, gone in removed.items()}, given
        )
    return GivenWeights(given)


def _removed(received: Mapping[str, Tensor], block: Block) -> dict[str, Tensor]:
    """The removed input channels of the Linears that lose some, by weight name."""
    found = {
        name: received.get(mask_name(linear.path))
        for name, linear in block.linears.items()
        if linear.channels
    }
    return {name: gone for name, gone in found.items() if gone is not None and gone.dtype == torch.bool}


def _narrow_shapes(removed: Mapping[str, Tensor], block: Block) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a message about Linears that lose channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, gone in removed.items():
        linear = block.linears[name]
        n_out, n_kept = linear.shape[0], int((~gone).count_nonzero())
        shapes[name] = (n_kept, n_out) if linear.transposed else (n_out, n_kept)
        shapes[mask_name(name)] = (linear.shape[1],)
    return shapes


def _check_types(given: Mapping[str, Tensor], block: Block) -> None:
    for name, tensor in given.items():
        if tensor.dtype != block.tensors[name].dtype:
            raise UpdateError(
                f"decision about '{name}': expected type {block.tensors[name].dtype}, found {tensor.dtype}; "
                "use the same version of fedprllm on both sides"
            )
