"""Messages between coordinator and participant: a small JSON header, a payload of bytes, and nothing else.

    length of the header (uint32, little-endian), header (JSON), payload (the rest)

| request | payload | reply |
|---|---|---|
| start a run or survey | identity of the coordinator's model | a state |
| state | | a state |
| fetch a block | | the block's update, as `fedprllm.federation.protocol.update` writes it |
| refused: an update was invalid | | a state; the participant computes the block again |
| decision about a block | the decision, as `fedprllm.federation.protocol.update` writes it | a state |
| left out: the run goes on without the participant | | a state |
| finish | | a state |
| keys: a session under masks begins | session, contributors | the participant's public keys, signed |
| shares | everyone's public keys | a sealed box for each other participant |
| boxes | the boxes for this participant | a state |
| agree | whose updates have arrived | a signature |
| unmask | signatures | shares of masks |

A reply's header holds numbers, words from a fixed list, and at most the name of a tensor or of a setting of
the model. It has no place for text.
"""

from __future__ import annotations

import json
import struct
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedprllm.errors import UpdateError

__all__ = [
    "MAX_HEADER_BYTES",
    "Code",
    "Header",
    "Operation",
    "Reason",
    "Reply",
    "Request",
    "pack",
    "read_fingerprints",
    "read_header",
    "read_reply",
    "read_request",
]

MAX_HEADER_BYTES = 64 * 1024
_LENGTH = struct.Struct("<I")
_FINGERPRINTS = TypeAdapter(dict[str, Annotated[str, Field(min_length=1, max_length=256)]])

Operation = Literal[
    "start",
    "state",
    "fetch",
    "refused",
    "decision",
    "left out",
    "finish",
    # Secure aggregation (`fedprllm.federation.protocol.masks`).
    "keys",
    "shares",
    "boxes",
    "agree",
    "unmask",
]
# Why a run goes on without a participant.
Reason = Literal["", "absent", "deadline", "failed", "invalid updates", "revoked"]
State = Literal["idle", "waiting", "working", "done", "failed"]
Code = Literal[
    "",
    "model missing",  # the participant does not have the model
    "model differs",  # `tensor` names the first difference
    "data",  # the text cannot be used
    "compute",  # the model, the configuration or the activations cannot be used
    "memory",  # the computation needs more than the participant grants
    "crashed",  # the computation died repeatedly
    "too many blocks",  # this and the following limits are the participant's own
    "too few tokens",
    "too many rounds",
    "too few participants",
    "text used up",
    "another plan",  # not the run that the participant agreed to beforehand
    "not confirmed",  # the participant declined
    "kind not allowed",  # the participant does not share this kind of update
    "not secure",  # the participant shares sums only, or nothing that would go into this one
    "not ready",  # the update does not exist yet
    "disk full",  # nothing was done; the participant waits for space
    "other run",  # the participant is working on another run
    "bad request",
    "internal",
]


class Header(BaseModel):
    """Base class of headers: immutable, and nothing beside the fields that are declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_T = TypeVar("_T", bound=Header)


class Request(Header):
    """The header of a request.

    Attributes:
        op: The operation.
        run: Id of the run, 32 hexadecimal digits.
        block: Block index, for fetch, refused and decision.
        model: The coordinator's name for the model: a hub id or a path.
        config: The resolved `PruneConfig`.
        survey: Count outliers of the unpruned model instead of pruning it (OWL).
        blocks: Indices of the blocks that the participant prunes. It only walks through the others.
        participants: Names of all participants in the run.
        outliers: Number of outlying scores and of all scores, by block, from the survey.
        heal: The resolved `HealConfig` of a run that heals; None of one that prunes.
        of: Id of the run whose result is healed; empty if the model is no such result.
        dense: Digest of the dense model's weights, 64 hexadecimal digits, where healing compares with it;
            ``model`` is then its name.
        reason: Why the participant was left out.
    """

    op: Operation
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    block: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: Annotated[str, Field(max_length=4096)] = ""
    config: dict[str, Any] = {}
    survey: bool = False
    blocks: list[Annotated[int, Field(ge=0, lt=2**31)]] = []
    participants: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=10_000)] = []
    outliers: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]] = []
    heal: dict[str, Any] | None = None
    of: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    dense: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    reason: Reason = ""


class Reply(Header):
    """The header of a reply.

    Attributes:
        state: State of the participant's computation.
        code: Reason why the computation does not continue, if it does not.
        n_ready: Number of consecutive blocks, counted from the first, whose updates are ready.
        tensor: Name of the first tensor or setting of the model that differs from the coordinator's.
        value: The participant's value of that setting, if it is a number.
    """

    state: State = "idle"
    code: Code = ""
    n_ready: Annotated[int, Field(ge=0, lt=2**31)] = 0
    tensor: Annotated[str, Field(max_length=255)] = ""
    value: Annotated[float | None, Field(allow_inf_nan=False)] = None


def pack(header: Header, payload: bytes = b"") -> bytes:
    """Encode a message."""
    text = json.dumps(header.model_dump(exclude_defaults=True), separators=(",", ":")).encode()
    assert len(text) <= MAX_HEADER_BYTES
    return b"".join([_LENGTH.pack(len(text)), text, payload])


def read_request(message: bytes) -> tuple[Request, memoryview]:
    """Decode a request into its header and payload.

    Raises:
        UpdateError: The bytes are not a valid request.
    """
    return read_header(message, Request)


def read_reply(message: bytes) -> tuple[Reply, memoryview]:
    """Decode a reply into its header and payload.

    Raises:
        UpdateError: The bytes are not a valid reply.
    """
    return read_header(message, Reply)


def read_fingerprints(payload: memoryview) -> dict[str, str]:
    """Decode the payload of a start request: the identity of the coordinator's model (`model_identity`).

    Raises:
        UpdateError: The payload is not a JSON object with short strings as values.
    """
    try:
        return _FINGERPRINTS.validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        found = error.errors()[0]["type"]
        raise UpdateError(
            f"payload of a start request: expected fingerprints by name, found something else ({found}); use "
            "the same version of fedprllm on both sides"
        ) from None


def read_header(message: bytes, header_type: type[_T]) -> tuple[_T, memoryview]:
    """Decode a message into its header, of the given type, and its payload.

    Raises:
        UpdateError: The bytes are not such a message.
    """
    view = memoryview(message)
    name = header_type.__name__.lower()
    if len(view) < _LENGTH.size:
        raise UpdateError(f"{name}: expected at least {_LENGTH.size} bytes, found {len(view)}")
    (n_bytes,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + n_bytes
    if n_bytes > MAX_HEADER_BYTES or end > len(view):
        most = min(MAX_HEADER_BYTES, len(view) - _LENGTH.size)
        raise UpdateError(f"header of a {name}: expected at most {most} bytes, found a length of {n_bytes}")
    try:
        return header_type.model_validate_json(bytes(view[_LENGTH.size : end]), strict=True), view[end:]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise UpdateError(f"header of a {name}: {where[:80]} is not valid ({first['type']})") from None
