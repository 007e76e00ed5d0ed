"""The federation's certificate authority, on the coordinator's machine.

KITS/
  .authority/root.key      its private key, never handed out
  .authority/root.crt      its certificate, part of every kit
  .authority/issued.json   all certificates signed for participants
  NAME.kit                 the newest kit of a participant; contains no secret
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

# Folder that is never handed out.
AUTHORITY = ".authority"
_KEY, _CERTIFICATE, _ISSUED = "root.key", "root.crt", "issued.json"
_FLARE_STATE = "*/state/cert.json"


@dataclass(frozen=True)
class Issued:
    """A certificate issued to a participant.

    Attributes:
        name: The participant's name.
        serial: Serial number, in hexadecimal.
        key: SHA-256 of the participant's public key, in hexadecimal.
        signed: Time of the signature (UTC, ISO 8601).
        ends: Time at which it expires (UTC, ISO 8601).
    """

    name: str
    serial: str
    key: str
    signed: str
    ends: str


def make_authority(kits: Path, plan: Plan) -> Root:
    """Return the authority of a folder of kits, creating it if there is none.

    An authority created with FLARE by an earlier version is adopted. That version kept the participants'
    private keys; they are deleted.

    Raises:
        RunError: The authority has expired.
    """
    folder = kits / AUTHORITY
    if (folder / _CERTIFICATE).exists():
        _forget_keys(folder)
        return authority(kits)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    root = _take_over(folder) or make_root(plan.name, plan.authority_days)
    write_key(folder / _KEY, root.key)
    # Written last: its existence marks the authority as complete.
    write_text(folder / _CERTIFICATE, pem(root.certificate))
    _forget_keys(folder)
    return root


def authority(kits: Path) -> Root:
    """Return the authority of a folder of kits.

    Raises:
        RunError: The folder holds no authority, or the authority has expired.
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
    """All certificates signed for participants, oldest first."""
    path = kits / AUTHORITY / _ISSUED
    return [Issued(**entry) for entry in read_json(path)] if path.exists() else []


def signed_before(kits: Path, request: Request) -> bool:
    """Whether the participant's newest certificate is for the key in the request."""
    earlier = [entry for entry in issued(kits) if entry.name == request.name]
    return bool(earlier) and earlier[-1].key == key_digest(request.public_key)


def check_requested(kits: Path, plan: Plan, request: Request) -> None:
    """Check that a request comes from a participant of the plan and is for a key of its own.

    Raises:
        ConfigError: The plan does not name the participant, or the key belongs to another participant or was
            replaced.
    """
    if request.name not in plan.participants:
        raise ConfigError(
            f"the request names participant {did_you_mean(request.name, plan.participants)} Only "
            "participants in the plan get certificates: correct the name, or add it to the plan and run "
            "'fedprllm federation init' again"
        )
    digest = key_digest(request.public_key)
    own = [entry.key for entry in issued(kits) if entry.name == request.name]
    if digest in own and own[-1] != digest:
        raise ConfigError(
            f"the request of '{request.name}' has a key that was replaced earlier and may be compromised: "
            "ask for a request with a new key ('fedprllm identity renew FOLDER --new-key')"
        )
    for entry in issued(kits):
        if entry.key == digest and entry.name != request.name:
            raise ConfigError(
                f"the request of '{request.name}' has the key of '{entry.name}': every participant needs "
                "a key of its own, made with 'fedprllm identity new NAME'"
            )


def sign(kits: Path, plan: Plan, request: Request) -> tuple[Path, Issued]:
    """Sign a participant's request and write its kit; other participants are not affected.

    If the participant has certificates for other keys, the server refuses them from now on.

    Returns:
        The kit to send to the participant, and the entry of the new certificate.

    Raises:
        ConfigError: The request fails `check_requested`.
        RunError: The folder holds no authority, the authority has expired, or certificates for other keys
            must be refused and the server's kit is not on this machine.
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
    """The name in the server's certificate: the host, cut to the 64 characters that fit."""
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
    """The authority's fingerprint, which participants compare before they accept a kit."""
    return fingerprint(key_of(root.certificate))


# Kits of earlier versions ----------------------------------------------------------------------


def _take_over(folder: Path) -> Root | None:
    """Adopt an authority created by FLARE's provisioning, with its certificates; None if there is none."""
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
    """Delete the private keys that FLARE's provisioning stored."""
    for path in folder.glob(_FLARE_STATE):
        shutil.rmtree(path.parent.parent)
