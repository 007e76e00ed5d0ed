"""Certificate requests (PKCS #10): how participants make them and what is checked before one is signed."""

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
        name: Name of the participant.
        public_key: Its public key. The request proves that the sender holds the private key.
    """

    name: str
    public_key: rsa.RSAPublicKey


def make_request(key: rsa.RSAPrivateKey, name: str) -> bytes:
    """Make a certificate request for a participant: PKCS #10 as PEM, signed with its key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(path: Path) -> Request:
    """Read a certificate request from an untrusted sender.

    Raises:
        ConfigError: The file is not a certificate request, asks for more than a name, has a weak key, or does
            not prove that the sender holds the private key.
    """
    content = read_small(path, ConfigError)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{path} holds a private key, which must never leave its owner's machine: delete this file, and "
            "ask for a request from a new identity ('fedprllm identity new')"
        )
    if content.count(b"-----BEGIN") != 1:
        raise ConfigError(
            f"{path} is not a certificate request: expected the file that 'fedprllm identity' wrote"
        )
    try:
        request = x509.load_pem_x509_csr(content)
        return _checked(path, request)
    except ConfigError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} is not a readable certificate request: expected the file that 'fedprllm identity' wrote"
        ) from None


def _checked(path: Path, request: x509.CertificateSigningRequest) -> Request:
    key = request.public_key()
    defect = _excess(request) or _key_defect(key)
    if defect is None and not _is_signed(request):
        defect = "its signature does not match its key, so the sender may not hold the private key"
    if defect is not None:
        raise ConfigError(
            f"{path}: {defect}; ask for the request that 'fedprllm identity new' or 'renew' writes"
        )
    assert isinstance(key, rsa.RSAPublicKey), "keys of other types were refused above"
    return Request(common_name(request.subject), key)


def _excess(request: x509.CertificateSigningRequest) -> str | None:
    """Describe what a request asks for beyond a name, such as a role, authority rights or host names."""
    if [part.oid for part in request.subject] != [NameOID.COMMON_NAME]:
        asked = ", ".join(f"{part.oid._name} {str(part.value)[:40]!a}" for part in request.subject)
        return f"expected a participant's name and nothing else, found {asked or 'no name'}"
    asked = ", ".join(extension.oid._name for extension in request.extensions)
    if asked or list(request.attributes):
        return f"expected no extensions or attributes, found {asked or 'an attribute'}"
    return None


def _key_defect(key: object) -> str | None:
    """Describe why a public key is refused: it is weak, or so long that checking it takes seconds."""
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
