"""Private keys, fingerprints and certificates.

Keys are RSA because FLARE signs with RSA-PSS when a participant registers. A private key never leaves the
machine it was generated on. The `fingerprint` of a public key is compared by telephone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedprllm.errors import ConfigError, RunError
from fedprllm.files import write_private

__all__ = [
    "EXPONENT",
    "KEY_BITS",
    "WARN_DAYS",
    "Root",
    "check_dates",
    "common_name",
    "fingerprint",
    "is_authority",
    "is_issued_by",
    "issue",
    "key_digest",
    "key_of",
    "make_root",
    "new_key",
    "pem",
    "read_certificate",
    "read_key",
    "read_small",
    "same_fingerprint",
    "write_key",
]

# Days before a certificate expires from which its owner is asked to renew it.
WARN_DAYS = 30

KEY_BITS = 3072
EXPONENT = 65537
_MAX_FILE_BYTES = 64 * 1024
_ORGANIZATION = "fedprllm"
# Certificates are valid from this long before they are signed, because clocks differ.
_CLOCK_TOLERANCE = timedelta(minutes=10)


# Keys ------------------------------------------------------------------------------------------


def new_key() -> rsa.RSAPrivateKey:
    """Generate a private key."""
    return rsa.generate_private_key(public_exponent=EXPONENT, key_size=KEY_BITS)


def write_key(path: Path, key: rsa.RSAPrivateKey) -> None:
    """Write a private key to a file that only its owner can read."""
    plain = serialization.NoEncryption()
    write_private(
        path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )


def read_key(path: Path, content: bytes | None = None) -> rsa.RSAPrivateKey:
    """Read a private key.

    Args:
        path: File of the key, named in errors.
        content: The key (PEM); read from the file by default.

    Raises:
        RunError: The file is missing or does not hold an RSA key.
    """
    try:
        key = serialization.load_pem_private_key(
            read_small(path) if content is None else content, password=None
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise RunError(
            f"{path} does not hold a readable private key: restore it from your backup, or make a new "
            "identity with 'fedprllm identity new'"
        ) from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise RunError(f"{path} holds a {type(key).__name__}: expected an RSA key")
    return key


def fingerprint(public_key: rsa.RSAPublicKey) -> str:
    """Eight groups of four hexadecimal digits, for comparing a key by telephone.

    The digits are the first 128 bits of the SHA-256 of the key's SubjectPublicKeyInfo (DER).
    """
    digits = key_digest(public_key)[:32]
    return " ".join(digits[start : start + 4] for start in range(0, 32, 4))


def key_digest(public_key: rsa.RSAPublicKey) -> str:
    """SHA-256 of a public key, in hexadecimal."""
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are equal, ignoring spaces, separators and capitalization."""
    plain = ["".join(text.replace(":", " ").replace("-", " ").split()).lower() for text in (one, other)]
    return plain[0] == plain[1]


# Certificates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """A federation's certificate authority: its private key and its certificate."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate


def make_root(name: str, valid_days: int) -> Root:
    """Create a federation's certificate authority."""
    key = new_key()
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) - _CLOCK_TOLERANCE
    builder = (
        _builder(subject, key.public_key(), x509.DNSName(name))
        .issuer_name(subject)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=valid_days))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Root(key, builder.sign(key, hashes.SHA256()))


def issue(
    root: Root,
    name: str,
    public_key: rsa.RSAPublicKey,
    valid_days: int,
    *,
    role: str | None = None,
    host: str | None = None,
    begin: datetime | None = None,
) -> x509.Certificate:
    """Sign a certificate, which expires no later than the authority's own.

    Args:
        root: The authority.
        name: Name of the holder.
        public_key: Public key of the holder.
        valid_days: Days for which the certificate is valid.
        role: FLARE role of the coordinator; None for the server and for participants.
        host: Host name or address of the server; the holder's name by default.
        begin: Time from which the certificate is valid; a few minutes ago by default.

    Raises:
        RunError: The authority has expired.
    """
    begin = begin or datetime.now(UTC) - _CLOCK_TOLERANCE
    end = min(begin + timedelta(days=valid_days), root.certificate.not_valid_after_utc)
    if root.certificate.not_valid_after_utc <= datetime.now(UTC):
        raise RunError(
            f"the federation's authority expired on {_day(root.certificate.not_valid_after_utc)}: write new "
            "kits with 'fedprllm federation init PLAN.toml --out ANOTHER_FOLDER'; all participants need new "
            "identities"
        )
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, name),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION),
    ]
    if role is not None:
        subject.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
    builder = (
        _builder(x509.Name(subject), public_key, _host(host or name))
        .issuer_name(root.certificate.subject)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(identifier, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    return builder.sign(root.key, hashes.SHA256())


def _builder(
    subject: x509.Name, public_key: rsa.RSAPublicKey, host: x509.GeneralName
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem(certificate: x509.Certificate) -> str:
    """Encode a certificate as PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def read_certificate(path: Path, content: bytes | None = None) -> x509.Certificate:
    """Read a certificate.

    Args:
        path: File of the certificate, named in errors.
        content: The certificate (PEM); read from the file by default.

    Raises:
        RunError: The file is missing or does not hold exactly one certificate.
    """
    try:
        (certificate,) = x509.load_pem_x509_certificates(read_small(path) if content is None else content)
    except (ValueError, UnsupportedAlgorithm):
        raise RunError(
            f"{path} does not hold exactly one certificate: accept the kit again, or ask for another"
        ) from None
    return certificate


def common_name(subject: x509.Name) -> str:
    """The common name in a certificate or a request; empty if there is none."""
    return next((str(part.value) for part in subject.get_attributes_for_oid(NameOID.COMMON_NAME)), "")


def key_of(certificate: x509.Certificate) -> rsa.RSAPublicKey:
    """The public key in a certificate.

    Raises:
        RunError: The key is not an RSA key.
    """
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise RunError(f"a certificate holds a {type(key).__name__}: expected an RSA key")
    return key


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` is an authority and signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return is_authority(authority)


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate belongs to an authority."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return constraints.value.ca


def check_dates(certificate: x509.Certificate, whose: str, remedy: str) -> float:
    """Check that a certificate is in date.

    Args:
        certificate: The certificate.
        whose: Description of the certificate, for errors.
        remedy: How to renew it, for errors.

    Returns:
        The days until it expires.

    Raises:
        RunError: The certificate has expired or is not valid yet. The message gives the date and the remedy.
    """
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        raise RunError(f"{whose} expired on {_day(end)}; nothing was started. To renew it: {remedy}")
    if now < begin:
        raise RunError(
            f"{whose} is valid from {begin:%Y-%m-%d %H:%M} UTC, but this machine's clock says "
            f"{now:%Y-%m-%d %H:%M} UTC; nothing was started. Correct this machine's clock"
        )
    return (end - now) / timedelta(days=1)


def _day(time: datetime) -> str:
    return f"{time:%Y-%m-%d}"


def read_small(path: Path, error: type[ConfigError | RunError] = RunError) -> bytes:
    """Read the file of a key, a request or a certificate.

    Args:
        path: The file.
        error: Type of the error to raise.

    Raises:
        RunError: The file cannot be read or is too long. `ConfigError` if ``error`` says so.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise error(f"{path} is longer than {_MAX_FILE_BYTES} bytes: it is not a key, request or certificate")
    return content
