"""Signatures, key agreement and sealed boxes, all from the library `cryptography`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedprllm.errors import SecureError

__all__ = [
    "agreed",
    "canonical",
    "derive",
    "digest",
    "is_signed",
    "new_private",
    "open_box",
    "public_of",
    "seal_box",
]

_DOMAIN = b"fedprllm secure aggregation 1\0"
_NONCE = bytes(12)  # every key seals one box


def canonical(value: Any) -> bytes:
    """A JSON value as bytes: keys sorted, no spaces, one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts whose boundaries count."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def derive(secret: bytes, *purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose (HKDF with SHA-256)."""
    return HKDF(hashes.SHA256(), 32, None, _DOMAIN + digest(*purpose)).derive(secret)


def new_private() -> bytes:
    """A private key for key agreement (X25519), 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key of a private key for key agreement, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes) -> bytes:
    """The secret that two key pairs have in common.

    Raises:
        SecureError: The public key is one of the few with which every private key has the same secret.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise SecureError(
            "a public key for key agreement is not valid: do not continue with its sender"
        ) from None


def is_signed(public: bytes, signature: bytes, purpose: bytes, message: bytes) -> bool:
    """Whether a signature (Ed25519) for a purpose is valid."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _DOMAIN + purpose + b"\0" + message)
    except (InvalidSignature, ValueError):
        return False
    return True


def sign(identity: Ed25519PrivateKey, purpose: bytes, message: bytes) -> bytes:
    """Sign a message for a purpose (Ed25519), 64 bytes."""
    return identity.sign(_DOMAIN + purpose + b"\0" + message)


def seal_box(key: bytes, content: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate the one content of a key (ChaCha20-Poly1305)."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, about)


def open_box(key: bytes, box: bytes, about: bytes) -> bytes:
    """Decrypt a box.

    Raises:
        SecureError: The box was changed, or belongs to another session.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, about)
    except InvalidTag:
        raise SecureError("a box of shares was changed on its way or belongs to another session") from None
