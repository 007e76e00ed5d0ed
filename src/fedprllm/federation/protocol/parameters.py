"""The parameters that a round of healing begins with, as bytes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.decision import COORDINATOR

__all__ = ["PARAMETERS", "WORDS", "decode_parameters", "encode_parameters"]

PARAMETERS, WORDS = "parameters", "words"


def encode_parameters(vector: Float[Tensor, " n"], number: int, run_id: bytes, digest: bytes) -> bytes:
    """Encode the parameters that the server found in a round.

    Args:
        vector: The parameters.
        number: Number of the round.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
    """
    update = wire.Update(
        run_id=run_id,
        participant=COORDINATOR,
        block=number,
        kind=wire.PARAMETERS,
        model_fingerprint=digest,
        tensors={PARAMETERS: vector},
        n_tokens=0,
    )
    return wire.encode(update)


def decode_parameters(message: bytes, n: int, number: int, run_id: bytes, digest: bytes) -> Tensor:
    """Reverse `encode_parameters`.

    Args:
        message: The message.
        n: Number of parameters that the model has.
        number: Number of the round.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.

    Raises:
        UpdateError: The message is something else.
    """
    expect = wire.Expectation(
        run_id=run_id,
        model_fingerprint=digest,
        block=number,
        kind=wire.PARAMETERS,
        shapes={PARAMETERS: (n,)},
        participant=COORDINATOR,
    )
    return wire.decode(message, expect=expect, max_bytes=wire.max_message_bytes(expect)).tensors[PARAMETERS]
