"""A participant's identity: a private key made on its machine, and the certificate that fits it.

NAME/
  NAME.csr               the open request, for the coordinator; gone when the certificate has arrived
  startup/client.key     the private key, which only its owner can read; it never leaves this folder
  startup/next.key       the key of an open request for a new one; the old one works until then
  startup/client.crt     from the coordinator, as are rootCA.pem and the address in fed_client.json
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
    """A request for the coordinator to sign.

    Attributes:
        path: File to send. It holds no secret.
        name: Name that it asks for.
        fingerprint: What the coordinator must see too.
    """

    path: Path
    name: str
    fingerprint: str


def new_identity(name: str, folder: Path) -> OpenRequest:
    """Make a private key and a certificate request on this machine.

    Called again before the certificate has arrived, it writes the request again, with the same key.

    Raises:
        ConfigError: The name cannot be that of a participant.
        RunError: The folder holds an identity that is in use.
    """
    check_name(name)
    startup = folder / "startup"
    if (startup / _CERTIFICATE).exists():
        raise RunError(
            f"{folder} holds an identity with a certificate: renew it with 'fedprllm identity renew "
            f"{folder}', or name another folder with --out"
        )
    named = {request.stem for request in folder.glob("*.csr")} - {name}
    if named:
        raise RunError(f"{folder} holds the open request of '{min(named)}': name another folder with --out")
    startup.mkdir(parents=True, exist_ok=True)
    startup.chmod(0o700)
    if not (startup / KEY).exists():
        write_key(startup / KEY, new_key())
    return _request(folder, name, KEY)


def renew(folder: Path, *, with_new_key: bool = False) -> OpenRequest:
    """Ask for another certificate before the present one ends; the present one works until then.

    Args:
        folder: Folder of the identity.
        with_new_key: Make a new key. The old one is deleted when the new certificate is accepted.

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
    """Requests of an identity whose certificate has not been accepted yet."""
    found = []
    for path in sorted(folder.glob("*.csr")):
        request = read_request(path)
        found.append(OpenRequest(path, request.name, fingerprint(request.public_key)))
    return found


# Accepting a certificate -----------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """A kit that fits an identity, checked, and not accepted yet.

    Attributes:
        address: Where the server is.
        certificate: The participant's certificate.
        authority: The authority's certificate.
        key_file: File of the private key that the certificate is for.
        known_authority: The identity has a certificate of this authority already.
    """

    address: Address
    certificate: x509.Certificate
    authority: x509.Certificate
    key_file: str
    known_authority: bool

    @property
    def fingerprint(self) -> str:
        """The authority's, which the coordinator reads out."""
        return fingerprint(key_of(self.authority))


def examine(folder: Path, path: Path) -> Offer:
    """Check that a kit is the answer to this identity's request.

    Raises:
        ConfigError: The file is no kit, or names no server.
        RunError: It is for another key or name, of another authority, or out of date.
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
            f"{path}: the certificate is one of an authority, not of a participant; ask for another"
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
    """Put a checked kit beside the private key, where ``fedprllm participate`` uses it."""
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
                f"{path} is the kit of '{name}', and {folder} is the identity of '{min(expected)}': ask the "
                "coordinator for yours"
            )


def _fitting_key(folder: Path, path: Path, certificate: x509.Certificate) -> str:
    """The file of the private key that a certificate is for."""
    found = []
    for name in (NEXT_KEY, KEY):
        if (folder / "startup" / name).exists():
            own = read_key(folder / "startup" / name).public_key()
            if own == certificate.public_key():
                return name
            found.append(fingerprint(own))
    raise RunError(
        f"{path} certifies the key {fingerprint(key_of(certificate))}, and the keys in {folder} are "
        f"{', '.join(found) or 'none'}: send the coordinator the request of this identity again"
    )


def _known(folder: Path, path: Path, authority: x509.Certificate) -> bool:
    root = folder / "startup" / _ROOT
    if not root.exists():
        return False
    known = read_certificate(root)
    if known.public_key() != authority.public_key():
        raise RunError(
            f"{path} is of another authority ({fingerprint(key_of(authority))}) than this identity "
            f"({fingerprint(key_of(known))}): ask the coordinator why; for another federation, make another "
            "identity with 'fedprllm identity new NAME --out FOLDER'"
        )
    return True


def check_credentials(kit: Path) -> float:
    """Check that key and certificate of a participant fit and are in date; returns the days left.

    Raises:
        RunError: Says what is wrong, and which command helps.
    """
    startup = kit / "startup"
    certificate = read_certificate(startup / _CERTIFICATE)
    renewal = f"fedprllm identity renew {kit}, then send the request to the coordinator"
    days = check_dates(certificate, f"the certificate of participant '{address_of(kit)['name']}'", renewal)
    if read_key(startup / KEY).public_key() != certificate.public_key():
        raise RunError(
            f"{startup / KEY} is not the key of {startup / _CERTIFICATE}: accept the newest kit with "
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
            f"{startup / _CERTIFICATE} is of '{common_name(certificate.subject)}', and the kit is of "
            f"'{address_of(kit)['name']}': ask for another kit"
        )
    return days
