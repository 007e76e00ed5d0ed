"""What coordinator and participant say to each other: a small JSON header and bytes, nothing else.

    uint32, little-endian: length of the header; the header, JSON; the payload, to the end

| request | payload | reply |
|---|---|---|
| start: what is to be done | fingerprints of the model's tensors | a state |
| state | | a state |
| fetch: a block | | the update of that block, as `fedprllm.federation.protocol.update` writes it |
| refused: a block | | a state; the participant computes the block again |
| decision: a block | the server's decision, as `fedprllm.federation.protocol.update` writes it | a state |
| finish | | a state |

A reply's header holds numbers, words of a fixed list and at most the name of a tensor: it has no place
for text.
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
    "Operation",
    "Reply",
    "Request",
    "pack",
    "read_fingerprints",
    "read_reply",
    "read_request",
]

MAX_HEADER_BYTES = 64 * 1024
_LENGTH = struct.Struct("<I")
_FINGERPRINTS = TypeAdapter(dict[str, Annotated[str, Field(min_length=1, max_length=256)]])

Operation = Literal["start", "state", "fetch", "refused", "decision", "finish"]
State = Literal["idle", "waiting", "working", "done", "failed"]
Code = Literal[
    "",
    "model missing",  # no such model here
    "model differs",  # a tensor has other values; `tensor` names it
    "data",  # the text cannot be used
    "compute",  # model, configuration or activations cannot be used
    "memory",  # more than this participant grants
    "crashed",  # the computation died several times
    "too many blocks",  # more than this participant prunes
    "too few tokens",  # the four limits are the participant's own
    "too few participants",
    "text used up",  # in as many runs as the participant grants
    "another plan",
    "not confirmed",
    "kind not allowed",  # the participant does not share what the run asks for
    "not ready",  # no such update yet
    "other run",
    "bad request",
    "internal",
]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_T = TypeVar("_T", bound=_Header)


class Request(_Header):
    """The header of a request.

    Attributes:
        run: Hex digits of the run's id.
        block: Block index, for fetch, refused and decision.
        model: What the coordinator calls the model.
        config: The resolved `PruneConfig`.
        survey: Count outliers of the unpruned model instead of pruning (OWL).
        blocks: Numbers of the blocks that this participant prunes; the others it only walks through.
        participants: Names of all participants of the run.
        outliers: Number of outlying scores and of all scores of each block, as a survey found them.
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


class Reply(_Header):
    """The header of a reply.

    Attributes:
        state: State of the participant's computation.
        code: Why it does not continue.
        n_ready: Number of blocks, from the first one, whose update is ready.
        tensor: Name of the first tensor, or entry of the model's configuration, that differs.
        value: The value of that entry at the participant, if it is a number.
    """

    state: State = "idle"
    code: Code = ""
    n_ready: Annotated[int, Field(ge=0, lt=2**31)] = 0
    tensor: Annotated[str, Field(max_length=255)] = ""
    value: Annotated[float | None, Field(allow_inf_nan=False)] = None


def pack(header: Request | Reply, payload: bytes = b"") -> bytes:
    """Return the bytes of a message."""
    text = json.dumps(header.model_dump(exclude_defaults=True), separators=(",", ":")).encode()
    assert len(text) <= MAX_HEADER_BYTES
    return b"".join([_LENGTH.pack(len(text)), text, payload])


def read_request(message: bytes) -> tuple[Request, memoryview]:
    """Return the header and the payload of a request.

    Raises:
        UpdateError: The bytes are not such a message.
    """
    return _read(message, Request)


def read_reply(message: bytes) -> tuple[Reply, memoryview]:
    """Return the header and the payload of a reply.

    Raises:
        UpdateError: The bytes are not such a message.
    """
    return _read(message, Reply)


def read_fingerprints(payload: memoryview) -> dict[str, str]:
    """Return the payload of a start request: what identifies the coordinator's model (`model_identity`).

    Raises:
        UpdateError: It is not one.
    """
    try:
        return _FINGERPRINTS.validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        raise UpdateError(f"fingerprints of a start request: {error.errors()[0]['type']}") from None


def _read(message: bytes, kind: type[_T]) -> tuple[_T, memoryview]:
    view = memoryview(message)
    name = kind.__name__.lower()
    if len(view) < _LENGTH.size:
        raise UpdateError(f"a {name} has at least {_LENGTH.size} bytes, found {len(view)}")
    (n_bytes,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + n_bytes
    if n_bytes > MAX_HEADER_BYTES or end > len(view):
        raise UpdateError(f"the header of a {name} claims {n_bytes} bytes: the message does not hold them")
    try:
        return kind.model_validate_json(bytes(view[_LENGTH.size : end]), strict=True), view[end:]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise UpdateError(f"{where[:80]} of a {name}: {first['type']}") from None
