"""Certificate requests (PKCS #10): how a participant asks, and the checks before the coordinator signs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedprllm.errors import ConfigError
from fedprllm.federation.keys.certificates import EXPONENT, KEY_BITS, common_name, read_small

__all__ = ["Request", "make_request", "read_request"]

_MAX_KEY_BITS = 8192
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True)
class Request:
    """A checked certificate request.

    Attributes:
        name: Name of the participant that asks.
        public_key: Its key. The request proves that its sender holds the private one.
    """

    name: str
    public_key: rsa.RSAPublicKey


def make_request(key: rsa.RSAPrivateKey, name: str) -> bytes:
    """Ask for a certificate in a participant's name: PKCS #10, PEM, signed with its key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(path: Path) -> Request:
    """Read a certificate request as from an untrusted sender.

    Raises:
        ConfigError: It is none, asks for more than a name, its key is weak, or its sender does not hold the
            private key.
    """
    content = read_small(path, ConfigError)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path} holds a private key, which must not leave its owner's machine: delete it here, and ask "
            "for a request from a new identity ('fedprllm identity new')"
        )
    if content.count(b"-----BEGIN") != 1:
        raise ConfigError(
            f"{path} is no certificate request: expected the file that 'fedprllm identity' wrote"
        )
    try:
        request = x509.load_pem_x509_csr(content)
        return _checked(path, request)
    except ConfigError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} is no certificate request that can be read: expected the file that 'fedprllm identity' "
            "wrote"
        ) from None


def _checked(path: Path, request: x509.CertificateSigningRequest) -> Request:
    key = request.public_key()
    defect = _excess(request) or _key_defect(key)
    if defect is None and not _is_signed(request):
        defect = "its signature is not that of its key, so its sender may not hold the private key"
    if defect is not None:
        raise ConfigError(
            f"{path}: {defect}; ask for the request that 'fedprllm identity new' or 'renew' writes"
        )
    assert isinstance(key, rsa.RSAPublicKey), "other keys are a defect"
    return Request(common_name(request.subject), key)


def _excess(request: x509.CertificateSigningRequest) -> str | None:
    """What a request asks for beyond a name: a role, rights of an authority, other host names."""
    if [part.oid for part in request.subject] != [NameOID.COMMON_NAME]:
        asked = ", ".join(f"{part.oid._name} {str(part.value)[:40]!a}" for part in request.subject)
        return f"expected the name of a participant and nothing else, found {asked or 'no name'}"
    asked = ", ".join(extension.oid._name for extension in request.extensions)
    if asked or list(request.attributes):
        return f"a participant's request has no extensions or attributes, found {asked or 'an attribute'}"
    return None


def _key_defect(key: object) -> str | None:
    """Why a public key is not accepted: it is weak, or so long that checking it takes seconds."""
    if not isinstance(key, rsa.RSAPublicKey):
        return f"expected an RSA key, found {type(key).__name__}"
    exponent = key.public_numbers().e
    if not KEY_BITS <= key.key_size <= _MAX_KEY_BITS or exponent != EXPONENT:
        return (
            f"expected an RSA key of {KEY_BITS} to {_MAX_KEY_BITS} bits with exponent {EXPONENT}, found "
            f"{key.key_size} bits with exponent {str(exponent)[:12]}"
        )
    return None


def _is_signed(request: x509.CertificateSigningRequest) -> bool:
    return isinstance(request.signature_hash_algorithm, _HASHES) and request.is_signature_valid
