"""The payloads of secure aggregation: JSON objects with names, numbers and bytes in hexadecimal digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedprllm.errors import UpdateError
from fedprllm.secure.keys import canonical
from fedprllm.secure.terms import Terms

__all__ = [
    "Agreement",
    "Opening",
    "Shares",
    "read_bytes_by_name",
    "sum_name",
    "terms_of",
    "write_bytes_by_name",
]

Name = Annotated[str, Field(min_length=1, max_length=128)]
Digits = Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]
Block = Annotated[int, Field(ge=0, lt=2**31)]
_BY_NAME = TypeAdapter(dict[Name, Digits])
_SHARES = TypeAdapter(dict[Block, dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{132}$")]]])
Shares = dict[int, dict[str, bytes]]


def sum_name(block: int) -> str:
    """Name of the sum over a block's updates."""
    return f"block {block:04d}"


def terms_of(
    contributors: Mapping[int, Sequence[str]], job: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> Terms:
    """What all participants of a run must have been asked alike.

    Args:
        contributors: Participants that prune each block.
        job: The request, without what differs between participants.
        fingerprints: Identity of the model.
    """
    about = {
        "run": job["run"],
        "config": job["config"],
        "survey": job["survey"],
        "outliers": [list(counts) for counts in job["outliers"]],
        "participants": sorted(job["participants"]),
        "model": dict(fingerprints),
    }
    return Terms({sum_name(block): list(names) for block, names in contributors.items()}, about)


class _Payload(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def pack(self) -> bytes:
        """As bytes."""
        return self.model_dump_json().encode()

    @classmethod
    def read(cls, payload: bytes | memoryview) -> Any:
        """From bytes.

        Raises:
            UpdateError: The bytes are something else.
        """
        try:
            return cls.model_validate_json(bytes(payload))
        except ValidationError as error:
            raise _invalid(cls.__name__.lower(), error) from None


class Opening(_Payload):
    """The beginning of a session: its id, and which participants contribute to each block's sum."""

    session: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    contributors: dict[Block, list[Name]]


class Agreement(_Payload):
    """Whose updates of each block have arrived, and the signatures on that."""

    survivors: dict[Block, list[Name]]
    signatures: dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{128}$")]] = {}

    @property
    def by_sum(self) -> dict[str, list[str]]:
        """The survivors by name of the sum."""
        return {sum_name(block): names for block, names in self.survivors.items()}


def write_bytes_by_name(values: Mapping[str, bytes]) -> bytes:
    """Encode bytes by name of a participant."""
    return canonical({name: value.hex() for name, value in values.items()})


def read_bytes_by_name(payload: bytes | memoryview) -> dict[str, bytes]:
    """Reverse `write_bytes_by_name`.

    Raises:
        UpdateError: The bytes are something else.
    """
    try:
        found = _BY_NAME.validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        raise _invalid("bytes by name", error) from None
    return {name: bytes.fromhex(digits) for name, digits in found.items()}


def write_shares(shares: Shares) -> bytes:
    """Encode shares of masks, by block and by the participant whose masks they are of."""
    return canonical(
        {str(block): {name: one.hex() for name, one in found.items()} for block, found in shares.items()}
    )


def read_shares(payload: bytes | memoryview) -> Shares:
    """Reverse `write_shares`.

    Raises:
        UpdateError: The bytes are something else.
    """
    try:
        found = _SHARES.validate_json(bytes(payload))
    except ValidationError as error:
        raise _invalid("shares", error) from None
    return {
        block: {name: bytes.fromhex(digits) for name, digits in one.items()} for block, one in found.items()
    }


def _invalid(what: str, error: ValidationError) -> UpdateError:
    found = error.errors()[0]["type"]
    return UpdateError(
        f"{what} of secure aggregation: cannot be read ({found}); use the same version of fedprllm on both "
        "sides"
    )
