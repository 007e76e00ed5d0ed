"""The federation's certificate authority, on the coordinator's machine.

KITS/
  .authority/root.key      its private key, never handed out
  .authority/root.crt      its certificate, in every kit
  .authority/issued.json   every certificate that was signed for a participant
  NAME.kit                 the newest kit of a participant, without a secret
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedprllm.errors import ConfigError, RunError, did_you_mean
from fedprllm.federation.keys.certificates import (
    Root,
    check_dates,
    common_name,
    fingerprint,
    issue,
    key_digest,
    key_of,
    make_root,
    pem,
    read_certificate,
    read_key,
    write_key,
)
from fedprllm.federation.keys.kit_file import FORMAT, KitFile, write_kit_file
from fedprllm.federation.keys.requests import Request
from fedprllm.federation.keys.revoked import check_server_here, supersede
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json, write_text

__all__ = [
    "AUTHORITY",
    "Issued",
    "authority",
    "authority_fingerprint",
    "check_requested",
    "issued",
    "make_authority",
    "server_identity",
    "sign",
    "signed_before",
]

# The folder that is never handed out.
AUTHORITY = ".authority"
_KEY, _CERTIFICATE, _ISSUED = "root.key", "root.crt", "issued.json"
_FLARE_STATE = "*/state/cert.json"


@dataclass(frozen=True)
class Issued:
    """A certificate of a participant.

    Attributes:
        name: The participant's name.
        serial: Serial number, in hexadecimal.
        key: SHA-256 of the participant's public key, in hexadecimal.
        signed: Day and time of the signature (UTC, ISO 8601).
        ends: Day and time until which it is valid (UTC, ISO 8601).
    """

    name: str
    serial: str
    key: str
    signed: str
    ends: str


def make_authority(kits: Path, plan: Plan) -> Root:
    """The authority of a folder of kits, made if there is none.

    One that an earlier version made with FLARE is taken over. That version kept the private keys of all
    participants; they are deleted.
    """
    folder = kits / AUTHORITY
    if (folder / _CERTIFICATE).exists():
        _forget_keys(folder)
        return authority(kits)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    root = _take_over(folder) or make_root(plan.name, plan.authority_days)
    write_key(folder / _KEY, root.key)
    # Last: its existence says that the authority is complete.
    write_text(folder / _CERTIFICATE, pem(root.certificate))
    _forget_keys(folder)
    return root


def authority(kits: Path) -> Root:
    """The authority of a folder of kits.

    Raises:
        RunError: The folder has none, or it has expired.
    """
    folder = kits / AUTHORITY
    if not (folder / _CERTIFICATE).exists():
        raise RunError(
            f"{kits} holds no authority: create it with 'fedprllm federation init PLAN.toml --out {kits}'"
        )
    root = Root(read_key(folder / _KEY), read_certificate(folder / _CERTIFICATE))
    check_dates(
        root.certificate,
        f"the authority in {folder}",
        "write new kits with 'fedprllm federation init PLAN.toml --out ANOTHER_FOLDER'",
    )
    return root


# Signing ---------------------------------------------------------------------------------------


def issued(kits: Path) -> list[Issued]:
    """Every certificate that was signed for a participant, oldest first."""
    path = kits / AUTHORITY / _ISSUED
    return [Issued(**entry) for entry in read_json(path)] if path.exists() else []


def signed_before(kits: Path, request: Request) -> bool:
    """Whether the newest certificate of this participant is for the same key."""
    earlier = [entry for entry in issued(kits) if entry.name == request.name]
    return bool(earlier) and earlier[-1].key == key_digest(request.public_key)


def check_requested(kits: Path, plan: Plan, request: Request) -> None:
    """Refuse a request of somebody whom the plan does not name, or for a key of somebody else or of earlier.

    Raises:
        ConfigError: Names the participant, or the owner of the key.
    """
    if request.name not in plan.participants:
        raise ConfigError(
            f"the request is of participant {did_you_mean(request.name, plan.participants)} Only "
            "participants of the plan get certificates: correct the name, or add it to the plan and run "
            "'fedprllm federation init' again"
        )
    digest = key_digest(request.public_key)
    own = [entry.key for entry in issued(kits) if entry.name == request.name]
    if digest in own and own[-1] != digest:
        raise ConfigError(
            f"the request of '{request.name}' has a key that it replaced, which somebody else may hold: "
            "ask for the request of a new key ('fedprllm identity renew FOLDER --new-key')"
        )
    for entry in issued(kits):
        if entry.key == digest and entry.name != request.name:
            raise ConfigError(
                f"the request of '{request.name}' has the key of '{entry.name}': every participant makes "
                "its own, with 'fedprllm identity new NAME'"
            )


def sign(kits: Path, plan: Plan, request: Request) -> tuple[Path, Issued]:
    """Sign a participant's request and write its kit; the other participants are left alone.

    Certificates that the participant has for other keys end: the server refuses them from now on.

    Returns:
        The kit to send to the participant, and what was signed.

    Raises:
        ConfigError: The request is not one of a participant of this federation.
        RunError: The folder holds no authority, or it has expired.
    """
    root = authority(kits)
    check_requested(kits, plan, request)
    certificate = issue(root, request.name, request.public_key, plan.valid_days)
    entry = _entry(certificate)
    earlier = issued(kits)
    ended = [known.serial for known in earlier if known.name == entry.name and known.key != entry.key]
    if ended:
        check_server_here(kits / "server")
    write_json(kits / AUTHORITY / _ISSUED, [asdict(known) for known in [*earlier, entry]])
    if ended:
        supersede(kits / "server", ended)
    path = kits / f"{request.name}.kit"
    write_kit_file(path, _kit_file(plan, request.name, certificate, root.certificate))
    return path, entry


def server_identity(plan: Plan) -> str:
    """The name in the server's certificate, where 64 characters fit."""
    return plan.server[:64]


def _kit_file(plan: Plan, name: str, certificate: x509.Certificate, root: x509.Certificate) -> KitFile:
    return KitFile(
        format=FORMAT,
        name=name,
        federation=plan.name,
        target=f"{plan.server}:{plan.port}",
        scheme=plan.scheme,
        server=server_identity(plan),
        certificate=pem(certificate),
        authority=pem(root),
    )


def _entry(certificate: x509.Certificate, signed: datetime | None = None) -> Issued:
    return Issued(
        name=common_name(certificate.subject),
        serial=f"{certificate.serial_number:x}",
        key=key_digest(key_of(certificate)),
        signed=(signed or datetime.now(UTC)).isoformat(timespec="seconds"),
        ends=certificate.not_valid_after_utc.isoformat(timespec="seconds"),
    )


def authority_fingerprint(root: Root) -> str:
    """What participants compare before they accept a kit."""
    return fingerprint(key_of(root.certificate))


# Kits of earlier versions ----------------------------------------------------------------------


def _take_over(folder: Path) -> Root | None:
    """The authority that FLARE's provisioning made, and what it signed for participants."""
    for path in folder.glob(_FLARE_STATE):
        state = read_json(path)
        certificates = [
            read_certificate(path, subject["cert"].encode())
            for subject in state.values()
            if isinstance(subject, dict)
        ]
        entries = [_entry(certificate, certificate.not_valid_before_utc) for certificate in certificates]
        write_json(folder / _ISSUED, [asdict(entry) for entry in entries])
        return Root(
            read_key(path, state["root_pri_key"].encode()),
            read_certificate(path, state["root_cert"].encode()),
        )
    return None


def _forget_keys(folder: Path) -> None:
    """Delete the private keys that FLARE's provisioning kept."""
    for path in folder.glob(_FLARE_STATE):
        shutil.rmtree(path.parent.parent)
