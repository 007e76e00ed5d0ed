"""The kit a coordinator sends to a participant: a JSON file with an address and two certificates, no secret.

{"format": "fedprllm kit 1", "name": "north", "federation": "clinics", "target": "host.org:8002",
 "scheme": "grpc", "server": "host.org", "certificate": "-----BEGIN ...", "authority": "-----BEGIN ..."}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedprllm.errors import ConfigError, RunError
from fedprllm.files import write_json
from fedprllm.settings import Settings

__all__ = ["FORMAT", "KitFile", "read_kit_file", "write_kit_file"]

FORMAT = "fedprllm kit 1"
_MAX_BYTES = 64 * 1024
_Word = Annotated[str, Field(max_length=300)]
_Pem = Annotated[str, Field(max_length=16 * 1024)]


class KitFile(Settings):
    """A participant's kit.

    Raises:
        ConfigError: A field is missing, unknown or too long.
    """

    format: Literal["fedprllm kit 1"]
    name: Annotated[_Word, Field(description="the participant's name")]
    federation: Annotated[_Word, Field(description="name of the federation")]
    target: Annotated[_Word, Field(description="the server's host and port")]
    scheme: Annotated[_Word, Field(description="grpc, http or tcp")]
    server: Annotated[_Word, Field(description="name in the server's certificate")]
    certificate: Annotated[_Pem, Field(description="the participant's certificate, PEM")]
    authority: Annotated[_Pem, Field(description="the authority's certificate, PEM")]


def write_kit_file(path: Path, kit: KitFile) -> None:
    """Write a kit as JSON."""
    write_json(path, kit.model_dump(mode="json"))


def read_kit_file(path: Path) -> KitFile:
    """Read a kit from an untrusted sender.

    Raises:
        RunError: The file cannot be read.
        ConfigError: The file is not a kit of this version, or contains a private key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path} contains a private key, but kits never do: do not use it, and ask the coordinator where "
            "it came from"
        )
    values = _object(content)
    if values is None or values.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is not a participant's kit: expected the file NAME.kit that 'fedprllm federation sign' "
            "wrote"
        )
    try:
        return KitFile(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; ask the coordinator for another kit") from None


def _object(content: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None if the content is anything else."""
    if len(content) > _MAX_BYTES:
        return None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
