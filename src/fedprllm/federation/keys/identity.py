"""A participant's identity: a private key generated on its machine, and the matching certificate.

NAME/
  NAME.csr               open request to the coordinator; deleted when the certificate is accepted
  startup/client.key     private key, readable only by its owner; never leaves this folder
  startup/next.key       key of an open request for a new key; the current key works until it is accepted
  startup/client.crt     from the coordinator, like rootCA.pem and the address in fed_client.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.flare.configuration import Address, address_of, check_address, write_address
from fedprllm.federation.keys.certificates import (
    check_dates,
    common_name,
    fingerprint,
    is_authority,
    is_issued_by,
    key_of,
    new_key,
    pem,
    read_certificate,
    read_key,
    write_key,
)
from fedprllm.federation.keys.kit_file import KitFile, read_kit_file
from fedprllm.federation.keys.requests import make_request, read_request
from fedprllm.federation.plan import check_name
from fedprllm.files import write_private, write_text

__all__ = [
    "KEY",
    "NEXT_KEY",
    "Offer",
    "OpenRequest",
    "accept",
    "check_credentials",
    "examine",
    "new_identity",
    "open_requests",
    "renew",
]

KEY, NEXT_KEY = "client.key", "next.key"
_CERTIFICATE, _ROOT = "client.crt", "rootCA.pem"


@dataclass(frozen=True)
class OpenRequest:
    """A certificate request that the coordinator has yet to sign.

    Attributes:
        path: File to send; contains no secret.
        name: Name of the participant.
        fingerprint: Fingerprint of the key, to compare with what the coordinator sees.
    """

    path: Path
    name: str
    fingerprint: str


def new_identity(name: str, folder: Path) -> OpenRequest:
    """Generate a private key and a certificate request on this machine.

    If called again before the certificate is accepted, it writes the request again with the same key.

    Args:
        name: Name of the participant.
        folder: Folder for the identity.

    Raises:
        ConfigError: The name is not a valid participant name.
        RunError: The folder holds another identity, or one that has a certificate already.
    """
    check_name(name)
    startup = folder / "startup"
    if (startup / _CERTIFICATE).exists():
        raise RunError(
            f"{folder} holds an identity with a certificate: renew it with 'fedprllm identity renew "
            f"{folder}', or choose another folder with --out"
        )
    named = {request.stem for request in folder.glob("*.csr")} - {name}
    if named:
        raise RunError(f"{folder} holds the open request of '{min(named)}': choose another folder with --out")
    startup.mkdir(parents=True, exist_ok=True)
    startup.chmod(0o700)
    if not (startup / KEY).exists():
        write_key(startup / KEY, new_key())
    return _request(folder, name, KEY)


def renew(folder: Path, *, with_new_key: bool = False) -> OpenRequest:
    """Write a request for a new certificate; the current one keeps working until it expires.

    Args:
        folder: Folder of the identity.
        with_new_key: Generate a new key. The old one is deleted when the new certificate is accepted.

    Raises:
        RunError: The folder holds no identity with a certificate.
    """
    startup = folder / "startup"
    name = address_of(folder)["name"]
    read_certificate(startup / _CERTIFICATE)
    if not with_new_key:
        return _request(folder, name, KEY)
    if not (startup / NEXT_KEY).exists():
        write_key(startup / NEXT_KEY, new_key())
    return _request(folder, name, NEXT_KEY)


def _request(folder: Path, name: str, key_file: str) -> OpenRequest:
    key = read_key(folder / "startup" / key_file)
    path = folder / f"{name}.csr"
    write_text(path, make_request(key, name).decode("ascii"))
    return OpenRequest(path, name, fingerprint(key.public_key()))


def open_requests(folder: Path) -> list[OpenRequest]:
    """The requests of an identity whose certificates have not been accepted yet."""
    found = []
    for path in sorted(folder.glob("*.csr")):
        request = read_request(path)
        found.append(OpenRequest(path, request.name, fingerprint(request.public_key)))
    return found


# Accepting a certificate -----------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """A kit that was checked against an identity but is not accepted yet.

    Attributes:
        address: Address of the server.
        certificate: The participant's certificate.
        authority: The authority's certificate.
        key_file: File name of the private key that the certificate is for.
        known_authority: Whether the identity already has a certificate from this authority.
    """

    address: Address
    certificate: x509.Certificate
    authority: x509.Certificate
    key_file: str
    known_authority: bool

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the authority's key, to compare with the one that the coordinator reads out."""
        return fingerprint(key_of(self.authority))


def examine(folder: Path, path: Path) -> Offer:
    """Check that a kit answers this identity's request.

    Args:
        folder: Folder of the identity.
        path: The kit.

    Raises:
        ConfigError: The file is not a kit, or names no server.
        RunError: The kit is for another key or name, from another authority, or out of date.
    """
    kit = read_kit_file(path)
    address = _address(kit)
    check_address(path, address)
    certificate = read_certificate(path, kit.certificate.encode())
    authority = read_certificate(path, kit.authority.encode())
    _check_names(folder, path, kit.name, common_name(certificate.subject))
    if not is_issued_by(authority, authority) or not is_issued_by(certificate, authority):
        raise RunError(f"{path}: the authority did not sign the certificate; ask for another kit")
    if is_authority(certificate):
        raise RunError(
            f"{path}: the certificate belongs to an authority, not to a participant; ask for another kit"
        )
    check_dates(certificate, f"the certificate in {path}", f"fedprllm identity renew {folder}")
    return Offer(
        address,
        certificate,
        authority,
        _fitting_key(folder, path, certificate),
        _known(folder, path, authority),
    )


def accept(folder: Path, offer: Offer) -> None:
    """Store a checked kit beside the private key, where ``fedprllm participate`` finds it."""
    startup = folder / "startup"
    write_text(startup / _ROOT, pem(offer.authority))
    if offer.key_file != KEY:
        write_private(startup / KEY, (startup / offer.key_file).read_bytes())
    write_text(startup / _CERTIFICATE, pem(offer.certificate))
    write_address(folder, offer.address)
    (startup / NEXT_KEY).unlink(missing_ok=True)
    for path in folder.glob("*.csr"):
        path.unlink()


def _address(kit: KitFile) -> Address:
    return {
        "federation": kit.federation,
        "target": kit.target,
        "scheme": kit.scheme,
        "identity": kit.server,
        "name": kit.name,
    }


def _check_names(folder: Path, path: Path, *names: str) -> None:
    expected = {request.name for request in open_requests(folder)}
    if not expected and (folder / "startup" / "fed_client.json").exists():
        expected = {address_of(folder)["name"]}
    if not expected:
        raise RunError(f"{folder} holds no identity: make one with 'fedprllm identity new NAME'")
    for name in names:
        if name not in expected:
            raise RunError(
                f"{path} is the kit of '{name}', but {folder} is the identity of '{min(expected)}': ask the "
                "coordinator for your own kit"
            )


def _fitting_key(folder: Path, path: Path, certificate: x509.Certificate) -> str:
    """File name of the private key that a certificate is for."""
    found = []
    for name in (NEXT_KEY, KEY):
        if (folder / "startup" / name).exists():
            own = read_key(folder / "startup" / name).public_key()
            if own == certificate.public_key():
                return name
            found.append(fingerprint(own))
    raise RunError(
        f"{path} certifies the key {fingerprint(key_of(certificate))}, but the keys in {folder} are "
        f"{', '.join(found) or 'none'}: send this identity's request to the coordinator again"
    )


def _known(folder: Path, path: Path, authority: x509.Certificate) -> bool:
    root = folder / "startup" / _ROOT
    if not root.exists():
        return False
    known = read_certificate(root)
    if known.public_key() != authority.public_key():
        raise RunError(
            f"{path} comes from another authority ({fingerprint(key_of(authority))}) than this identity "
            f"({fingerprint(key_of(known))}): ask the coordinator why; for another federation, make another "
            "identity with 'fedprllm identity new NAME --out FOLDER'"
        )
    return True


def check_credentials(kit: Path) -> float:
    """Check that a participant's key and certificate match and are in date.

    Args:
        kit: Folder of the identity.

    Returns:
        The days until the certificate expires.

    Raises:
        RunError: A file is missing or unreadable, a certificate is out of date, or it is for another key.
        ConfigError: The certificate and the kit name different participants.
    """
    startup = kit / "startup"
    certificate = read_certificate(startup / _CERTIFICATE)
    renewal = f"fedprllm identity renew {kit}, then send the request to the coordinator"
    days = check_dates(certificate, f"the certificate of participant '{address_of(kit)['name']}'", renewal)
    if read_key(startup / KEY).public_key() != certificate.public_key():
        raise RunError(
            f"{startup / KEY} does not match {startup / _CERTIFICATE}: accept the newest kit with "
            f"'fedprllm identity accept {kit} NAME.kit'"
        )
    authority = read_certificate(startup / _ROOT)
    check_dates(authority, "the federation's authority", "ask the coordinator for a new federation")
    if not is_issued_by(certificate, authority):
        raise RunError(
            f"{startup / _CERTIFICATE} was not signed by {startup / _ROOT}: accept the newest kit with "
            f"'fedprllm identity accept {kit} NAME.kit'"
        )
    if common_name(certificate.subject) != address_of(kit)["name"]:
        raise ConfigError(
            f"{startup / _CERTIFICATE} names '{common_name(certificate.subject)}', but the kit names "
            f"'{address_of(kit)['name']}': ask the coordinator for another kit"
        )
    return days
