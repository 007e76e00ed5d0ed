"""Messages by which a participant fetches the result of a run, and the manifest of a result.

A participant asks and the server answers, so a participant that was away can fetch a result later.

| request | reply's payload |
|---|---|
| list: which results are there for me? | JSON, a list of `Offer` |
| manifest of a run | JSON, a `Manifest` |
| block of a run | the decision, as `fedprllm.federation.protocol.decision` writes it |
| outcome: what became of a result here | |

Requests and replies are framed as in `fedprllm.federation.protocol.messages`. A request holds numbers and
words from a fixed list, and nothing about the participant's text except a perplexity that its settings allow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedprllm.errors import UpdateError
from fedprllm.evaluation.results import Perplexity
from fedprllm.federation.protocol.messages import Header, read_header

__all__ = [
    "Manifest",
    "Measured",
    "Offer",
    "Outcome",
    "ResultReply",
    "ResultRequest",
    "read_manifest",
    "read_offers",
    "read_result_reply",
    "read_result_request",
    "tensors_digest",
]

_LARGEST_EXPONENT = 709  # exp overflows a float above 709.78
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
_RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

Outcome = Literal[
    "received",  # the model is there, and each of its tensors has the coordinator's digest
    "declined",  # the participant does not want results
    "model missing",  # the participant does not have the dense model
    "model differs",  # its dense model is not the coordinator's
    "result differs",  # the model it built has other tensors than the coordinator's
    "failed",  # the model could not be built or written
]


class Measured(Header):
    """Perplexity of one model on a participant's held-out text.

    Attributes:
        nll: Mean negative log-likelihood in nats per predicted token.
        n_tokens: Number of predicted tokens.
        n_windows: Number of windows.
    """

    nll: Annotated[float, Field(allow_inf_nan=False, ge=0)]
    n_tokens: Annotated[int, Field(ge=1)]
    n_windows: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, found: Perplexity) -> Self:
        """What is sent of a perplexity."""
        return cls(nll=found.nll, n_tokens=found.n_tokens, n_windows=found.n_windows)

    def perplexity(self, text: str) -> Perplexity:
        """The perplexity, under the name of a text."""
        value = math.exp(self.nll) if self.nll < _LARGEST_EXPONENT else math.inf
        return Perplexity(text=text, perplexity=value, **self.model_dump())


class ResultRequest(Header):
    """The header of a participant's request.

    Attributes:
        op: What it asks for or reports.
        run: Id of the run, 32 hexadecimal digits; empty for a list.
        block: Block index.
        outcome: What became of the result.
        digest: Digest of the model's tensors (`tensors_digest`), with the outcome ``received``.
        dense: Perplexity of the dense model on the participant's held-out text.
        pruned: Perplexity of the pruned model on the same text.
    """

    op: Literal["list", "manifest", "block", "outcome"]
    run: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    block: Annotated[int, Field(ge=0, lt=2**31)] = 0
    outcome: Outcome = "failed"
    digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    dense: Measured | None = None
    pruned: Measured | None = None


class ResultReply(Header):
    """The header of the server's reply.

    Attributes:
        code: Empty, or why there is no payload.
    """

    code: Literal["", "no such result", "bad request", "internal"] = ""


class Offer(Header):
    """A result that a participant may fetch.

    Attributes:
        run: Id of the run.
        name: Name of the run.
    """

    run: _RunId
    name: _RunName


class Manifest(BaseModel):
    """What a participant needs to build the pruned model from its dense copy, beside the decisions.

    Attributes:
        run: Id of the run.
        name: Name of the run.
        model: The coordinator's name for the dense model: a hub id or a path.
        fingerprints: Identity of the dense model (`fedprllm.models.identity.model_identity`).
        blocks: SHA-256 of each block's decision message.
        tensors: SHA-256 of the type, shape and bytes of each tensor of the pruned model.
        n_prunable: Number of prunable weights.
        n_zeros: Number of zeros among them.
        card: Text of the model card.
        dropped: Indices of the blocks that the pruned model lacks.
        removed_experts: Numbers of the experts that each block of the pruned model lacks; empty if none.
        exclude: Names and patterns of the Linears that stayed dense.
        healed: Whether the model was healed: the one message holds the parameters that were trained.
        of: Id of the run whose result was healed; empty if it was no such result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: _RunId
    name: _RunName
    model: Annotated[str, Field(max_length=4096)]
    fingerprints: dict[str, Annotated[str, Field(max_length=256)]]
    blocks: Annotated[list[_Digest], Field(min_length=1, max_length=100_000)]
    tensors: dict[Annotated[str, Field(max_length=1024)], _Digest]
    n_prunable: Annotated[int, Field(ge=1)]
    n_zeros: Annotated[int, Field(ge=0)]
    card: Annotated[str, Field(max_length=65_536)]
    dropped: Annotated[list[Annotated[int, Field(ge=0, lt=100_000)]], Field(max_length=100_000)] = []
    removed_experts: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, lt=100_000)]], Field(max_length=100_000)]],
        Field(max_length=100_000),
    ] = []
    exclude: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)] = []
    healed: bool = False
    of: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.n_zeros / self.n_prunable

    @property
    def digest(self) -> str:
        """Digest of all tensors together."""
        return tensors_digest(self.tensors)


_OFFERS = TypeAdapter(list[Offer])


def tensors_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 of the digests of tensors, by name."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def read_result_request(message: bytes) -> ResultRequest:
    """Decode a participant's request.

    Raises:
        UpdateError: The bytes are not a valid request.
    """
    header, payload = read_header(message, ResultRequest)
    if len(payload):
        raise UpdateError(f"request for a result: expected no payload, found {len(payload)} bytes")
    return header


def read_result_reply(message: bytes) -> tuple[ResultReply, memoryview]:
    """Decode a reply of the server into its header and payload.

    Raises:
        UpdateError: The bytes are not a valid reply.
    """
    return read_header(message, ResultReply)


def read_offers(payload: memoryview) -> list[Offer]:
    """Decode a list of results.

    Raises:
        UpdateError: The payload is not one.
    """
    try:
        return _OFFERS.validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        raise UpdateError(f"list of results: not valid ({error.errors()[0]['type']})") from None


def read_manifest(payload: bytes | memoryview) -> Manifest:
    """Decode a manifest.

    Raises:
        UpdateError: The payload is not one.
    """
    try:
        return Manifest.model_validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80] or "manifest"
        raise UpdateError(f"manifest of a result: {where} is not valid ({first['type']})") from None
