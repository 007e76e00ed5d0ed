"""FLARE's configuration at a participant: written from here before each start, never taken from a kit.

KIT/
  startup/            the participant's own key; from the coordinator its certificate, the authority's, and
                      in fed_client.json the address of the server
  local/fedprllm.json the participant's own settings
  engine/             FLARE's workspace; of what lies here before a start, only logs stay
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import FedprllmError, RunError
from fedprllm.federation.flare.orders import EXECUTOR
from fedprllm.federation.flare.policy import Party, is_job_id, party
from fedprllm.federation.plan import DEFAULT_MESSAGE_MB, SiteSettings
from fedprllm.federation.site.site import settings_path
from fedprllm.files import read_json, write_json, write_private

__all__ = [
    "DEFAULT_MESSAGE_MB",
    "ENGINE",
    "HARDENING",
    "RIGHTS",
    "Address",
    "address_of",
    "altered_files",
    "check_address",
    "check_allow_list",
    "engine_folder",
    "kit_of",
    "log_configuration",
    "max_message_mb",
    "participant_name",
    "prepare_engine",
    "site_configuration",
    "write_address",
]

ENGINE = "engine"
_STARTUP = "fed_client.json"
_NEXT_KEY = "next.key"  # of an open request; FLARE never sees it
_CREDENTIALS = ("client.crt", "client.key", "rootCA.pem")
_SETTINGS = "fedprllm.json"
# Five words: name of the federation, target (host and port), scheme, identity (the name in the server's
# certificate), and name of the participant.
Address = dict[str, str]
_LOG = re.compile(r".*\.(txt|log)(\.\d+)?")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*:\d{1,5}")
_BASE = "nvflare.app_common"

# Ours, whatever a file says: on the server too.
HARDENING: dict[str, Any] = {
    "allow_adhoc_conns": False,
    # Between a process and those it starts: by default it has neither encryption nor authentication.
    "internal": {
        "scheme": "tcp",
        "resources": {"host": "localhost", "listen_host": "127.0.0.1", "connection_security": "mtls"},
    },
}

# ``project_admin`` is whoever holds the coordinator's kit; no other role has any right.
RIGHTS = {
    "submit_job": "any",
    "manage_job": "any",
    "view": "any",
    "clone_job": "none",
    "download_job": "none",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
}


def engine_folder(kit: Path) -> Path:
    """FLARE's workspace of a participant: its logs and audit trail."""
    return kit / ENGINE


def kit_of(workspace: Path) -> Path:
    """The kit that a workspace of FLARE belongs to."""
    return workspace.parent if workspace.name == ENGINE else workspace


def site_configuration(max_message_mb: int) -> dict[str, dict[str, Any]]:
    """Every file of FLARE's ``local`` folder at a participant, by name."""
    return {
        "authorization.json": {"format_version": "1.0", "permissions": {"project_admin": RIGHTS}},
        "comm_config.json": {"streaming_max_blob_size": max_message_mb * 1_000_000, **HARDENING},
        "log_config.json": log_configuration(),
        "resources.json": _resources(),
    }


def _resources() -> dict[str, Any]:
    gpus = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300}
    components = {
        "resource_manager": (f"{_BASE}.resource_managers.gpu_resource_manager.GPUResourceManager", gpus),
        "resource_consumer": (f"{_BASE}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer", {}),
        "process_launcher": (f"{_BASE}.job_launcher.client_process_launcher.ClientProcessJobLauncher", {}),
    }
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [EXECUTOR],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            {"id": name, "path": path, "args": arguments} for name, (path, arguments) in components.items()
        ],
    }


def log_configuration() -> dict[str, Any]:
    """Logs go to files of the workspace; the console belongs to fedprllm."""

    def to_file(name: str, level: str) -> dict[str, Any]:
        return {
            "class": "logging.handlers.RotatingFileHandler",
            "level": level,
            "formatter": "plain",
            "filename": name,
            "maxBytes": 20 * 1024 * 1024,
            "backupCount": 10,
        }

    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s - %(name)s - %(levelname)s - %(message)s"}},
        "handlers": {"log": to_file("log.txt", "DEBUG"), "errors": to_file("error_log.txt", "ERROR")},
        "loggers": {"root": {"level": "INFO", "handlers": ["log", "errors"]}},
    }


def max_message_mb(kit: Path) -> int:
    """The longest message that a participant agreed to receive, in MB."""
    path = settings_path(kit)
    return SiteSettings(**read_json(path)).max_message_mb if path.exists() else DEFAULT_MESSAGE_MB


def participant_name(kit: Path) -> str:
    """The name in a participant's kit.

    Raises:
        RunError: The folder is no kit of a participant.
    """
    return address_of(kit)["name"]


def address_of(kit: Path) -> Address:
    """What is taken from a kit, beside its certificates: five words.

    Raises:
        RunError: The folder is no kit of a participant, or waits for one.
    """
    path = kit / "startup" / _STARTUP
    if not path.exists():
        requests = sorted(kit.glob("*.csr"))
        if requests:
            raise RunError(
                f"{kit} has no certificate yet: send {requests[0]} to the coordinator, and accept the kit "
                f"that comes back with 'fedprllm identity accept {kit} {requests[0].stem}.kit'"
            )
        raise RunError(
            f"{kit} is no participant's kit: {path} is missing; make an identity with 'fedprllm identity new "
            "NAME', and name its folder"
        )
    try:
        found = read_json(path)
        server, client = found["servers"][0], found["client"]
        address = {
            "federation": server["name"],
            "target": server["service"]["target"],
            "scheme": server["service"]["scheme"],
            "identity": server["identity"],
            "name": client["fqsn"],
        }
    except (ValueError, LookupError, TypeError):
        raise RunError(f"{path} does not name a server and a participant: ask for another kit") from None
    check_address(path, address)
    return address


def write_address(kit: Path, address: Address) -> None:
    """Write the address of the server into a kit."""
    write_json(kit / "startup" / _STARTUP, _startup(address))


def check_address(path: Path, address: Mapping[str, Any]) -> None:
    """Refuse words that are no address: they become part of FLARE's configuration and command line.

    Args:
        path: Where they are from; named in the error.
        address: The words.

    Raises:
        RunError: Names the word.
    """
    fits = {
        "federation": party(str(address["federation"])) is Party.SITE,
        "target": isinstance(address["target"], str) and _TARGET.fullmatch(address["target"]),
        "scheme": address["scheme"] in ("grpc", "http", "tcp"),
        "identity": isinstance(address["identity"], str) and len(address["identity"]) < 256,
        "name": party(str(address["name"])) is Party.SITE,
    }
    wrong = [what for what, fit in fits.items() if not fit]
    if wrong:
        raise RunError(f"{path}: {wrong[0]} cannot be {address[wrong[0]]!r:.80}: ask for another kit")


def _startup(address: Address) -> dict[str, Any]:
    """FLARE's ``fed_client.json`` for an address."""
    return {
        "format_version": 2,
        "servers": [
            {
                "name": address["federation"],
                "service": {"target": address["target"], "scheme": address["scheme"]},
                "identity": address["identity"],
            }
        ],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": "rootCA.pem",
            "fqsn": address["name"],
            "is_leaf": True,
            "connection_security": "mtls",
        },
    }


def altered_files(kit: Path, max_message_mb: int) -> list[str]:
    """Files of a kit that would change what FLARE does, and that are therefore not used.

    Raises:
        RunError: A file of the kit would let in every class.
    """
    ours = {f"local/{name}": content for name, content in site_configuration(max_message_mb).items()}
    ours[f"startup/{_STARTUP}"] = _startup(address_of(kit))
    expected = {f"startup/{name}" for name in (*_CREDENTIALS, _NEXT_KEY)} | {f"local/{_SETTINGS}"}
    altered = []
    for path in sorted(kit / part for part in ("startup", "local")):
        for file in sorted(path.rglob("*")) if path.is_dir() else []:
            name = file.relative_to(kit).as_posix()
            content = None if name in expected or not file.is_file() else _content(file)
            check_allow_list(file, content)
            if content is not None and content != ours.get(name):
                altered.append(name)
    return altered


def _content(file: Path) -> Any:
    """The JSON in a file; False if there is none."""
    try:
        return read_json(file)
    except (ValueError, OSError, FedprllmError):
        return False


def check_allow_list(file: Path, content: Any = None) -> None:
    """Refuse a configuration by which a run could use any class that is installed.

    Args:
        file: Where it is written.
        content: What is in it; read from the file if it is not given.

    Raises:
        RunError: Names the file.
    """
    content = _content(file) if content is None and file.exists() else content
    if isinstance(content, dict) and "*" in str(content.get("class_allow_list")):
        raise RunError(
            f"{file} lets a run use every class ('class_allow_list' holds '*'): no kit of fedprllm does. "
            "Nothing was started; ask the coordinator for another kit and how this came about"
        )


def prepare_engine(kit: Path, max_message_mb: int) -> Path:
    """Write FLARE's workspace of a participant anew; returns it.

    Raises:
        RunError: The folder is no kit, a certificate is missing, or a part of it leads somewhere else.
    """
    address, engine = address_of(kit), engine_folder(kit)
    for folder in (engine, kit / "local", kit / "fedprllm"):
        _check_no_links(folder)
    _sweep(engine)
    for name in _CREDENTIALS:
        source, copy = kit / "startup" / name, engine / "startup" / name
        if not source.is_file():
            raise RunError(f"{kit} is not complete: {source} is missing; accept the kit again")
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_private(copy, source.read_bytes())
    write_json(engine / "startup" / _STARTUP, _startup(address))
    for name, content in site_configuration(max_message_mb).items():
        write_json(engine / "local" / name, content)
    engine.chmod(0o700)
    return engine


def _check_no_links(folder: Path) -> None:
    """Nothing is written where a link of a kit leads.

    Raises:
        RunError: Names the link.
    """
    inside = [path for path in folder.rglob("*") if path.is_symlink()] if folder.is_dir() else []
    for path in [folder] * folder.is_symlink() + inside:
        raise RunError(f"{path} is a link, to {path.readlink()}: remove it")


def _sweep(engine: Path) -> None:
    """Remove everything but logs: FLARE looks for configuration and code in all of its workspace.

    Of jobs, nothing stays: they have ended, and the ledger says what was sent.
    """
    for job in engine.iterdir() if engine.is_dir() else ():
        if is_job_id(job.name):
            shutil.rmtree(job)
    for folder, _, files in os.walk(engine, topdown=False):
        for name in files:
            if not _LOG.fullmatch(name):
                (Path(folder) / name).unlink()
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()
