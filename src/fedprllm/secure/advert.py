"""What a participant makes public for a session, as bytes: its keys, signed.

    signature (Ed25519, 64 bytes), then one JSON object in canonical spelling:
    {"box": KEY, "context": HASH, "name": NAME, "session": ID, "sums": {SUM: {"mask": KEY, "self": HASH}}}

Keys are public keys for key agreement (X25519). ``mask`` belongs to the masks that two contributors to a sum
have in common; ``self`` is the SHA-256 of the seed of the participant's own mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.errors import SecureError
from fedprllm.secure import keys

__all__ = ["SIGNATURE_BYTES", "Advert"]

SIGNATURE_BYTES = 64
_PURPOSE = b"advert"
_SESSION, _HASH = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")
_FIELDS = {"box", "context", "name", "session", "sums"}


@dataclass(frozen=True)
class Advert:
    """A participant's public keys for a session.

    Attributes:
        name: The participant.
        session: The session, 16 bytes.
        context: `Terms.context`.
        box: Public key for boxes.
        masks: Public key for the common masks of each sum, by name of the sum.
        seeds: Digest of the seed of the own mask of each sum, by name of the sum.
    """

    name: str
    session: bytes
    context: bytes
    box: bytes
    masks: Mapping[str, bytes]
    seeds: Mapping[str, bytes]

    @property
    def _body(self) -> bytes:
        return keys.canonical(
            {
                "name": self.name,
                "session": self.session.hex(),
                "context": self.context.hex(),
                "box": self.box.hex(),
                "sums": {
                    name: {"mask": self.masks[name].hex(), "self": self.seeds[name].hex()}
                    for name in self.masks
                },
            }
        )

    def signed(self, identity: Ed25519PrivateKey) -> bytes:
        """The advert as bytes."""
        return keys.sign(identity, _PURPOSE, self._body) + self._body

    @staticmethod
    def is_signed(message: bytes, public: bytes) -> bool:
        """Whether the owner of a public signing key wrote a message."""
        return keys.is_signed(public, message[:SIGNATURE_BYTES], _PURPOSE, message[SIGNATURE_BYTES:])

    @classmethod
    def read(cls, message: bytes) -> Advert:
        """Decode an advert, whoever signed it.

        Raises:
            SecureError: The bytes are not those of an advert.
        """
        body = message[SIGNATURE_BYTES:]
        try:
            advert = cls._of(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SecureError("an advert of keys cannot be read: use the same version of fedprllm") from None
        if advert._body != body:
            raise SecureError("an advert of keys has another spelling than the only one allowed")
        return advert

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Advert:
        if set(found) != _FIELDS or not isinstance(found["name"], str):
            raise ValueError
        sums = found["sums"]
        return cls(
            found["name"],
            _bytes(found["session"], _SESSION),
            _bytes(found["context"], _HASH),
            _bytes(found["box"], _HASH),
            {name: _bytes(one["mask"], _HASH) for name, one in sums.items()},
            {name: _bytes(one["self"], _HASH) for name, one in sums.items()},
        )


def _bytes(digits: str, pattern: re.Pattern[str]) -> bytes:
    if pattern.fullmatch(digits) is None:
        raise ValueError
    return bytes.fromhex(digits)
