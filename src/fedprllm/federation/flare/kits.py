"""Startup kits: keys, certificates and configuration of the server and the coordinator.

Participants generate their own keys (`fedprllm.federation.keys`). Their kits contain no configuration;
`fedprllm.federation.flare.configuration` writes it at the participant. FLARE's provisioning writes the
configuration of the server and the coordinator.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder, Project

from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.flare.configuration import RIGHTS, log_configuration
from fedprllm.federation.flare.orders import EXECUTOR
from fedprllm.federation.flare.policy import ADMIN
from fedprllm.federation.keys.authority import AUTHORITY, make_authority, server_identity, sign
from fedprllm.federation.keys.authority import authority as read_authority
from fedprllm.federation.keys.certificates import (
    Root,
    issue,
    new_key,
    pem,
    read_certificate,
    read_key,
    write_key,
)
from fedprllm.federation.keys.identity import KEY, accept, examine, new_identity
from fedprllm.federation.keys.requests import read_request
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json, write_text

__all__ = [
    "ADMIN",
    "CONTROLLER",
    "EXECUTOR",
    "FEDERATION_FILE",
    "keys_of_participants",
    "renew_own",
    "write_kits",
    "write_ready_kits",
]

CONTROLLER = "fedprllm.federation.flare.controller.CoordinatorController"
FEDERATION_FILE = "federation.json"
_ORGANIZATION = "fedprllm"
_ROLE = "project_admin"
_HEARTBEAT_TIMEOUT_S = 30


def write_kits(plan: Plan, folder: Path) -> list[Path]:
    """Write kits for the server and the coordinator, and create the federation's certificate authority.

    A later call with more participants adds them and leaves existing kits unchanged.

    Args:
        plan: The federation.
        folder: Folder for the kits.

    Returns:
        The folders of the new kits.

    Raises:
        ConfigError: The folder holds the kits of another federation.
        RunError: FLARE could not write the kits, or the authority has expired.
    """
    known = folder / FEDERATION_FILE
    if known.exists():
        before = Plan(**read_json(known))
        if (before.name, before.server, before.port) != (plan.name, plan.server, plan.port):
            raise ConfigError(
                f"{folder} holds the kits of federation '{before.name}' with its server at "
                f"{before.server}:{before.port}: choose another folder with --out"
            )
    root = make_authority(folder, plan)
    missing = [name for name in ("server", "admin") if not (folder / name).exists()]
    written = []
    if missing:
        with _provisioned(plan, root, folder / AUTHORITY) as made:
            for name in missing:
                source = made / (server_identity(plan) if name == "server" else ADMIN)
                _finish(source, name, plan)
                written.append(Path(shutil.copytree(source, folder / name)))
    for kit in (folder / "server", folder / "admin"):
        write_json(kit / "local" / FEDERATION_FILE, plan.model_dump(mode="json"))
    write_json(known, plan.model_dump(mode="json"))
    return written


def write_ready_kits(plan: Plan, folder: Path) -> None:
    """Write every kit of a federation, including the participants' keys; for rehearsals and tests only."""
    write_kits(plan, folder)
    for name in plan.participants:
        kit = folder / name
        if not kit.exists():
            request = read_request(new_identity(name, kit).path)
            path, _ = sign(folder, plan, request)
            accept(kit, examine(kit, path))
            path.unlink()


def keys_of_participants(plan: Plan, folder: Path) -> list[Path]:
    """Participants' private keys found in a folder of kits, left by rehearsals or earlier versions."""
    paths = [folder / name / "startup" / KEY for name in plan.participants]
    return [path for path in paths if path.exists()]


def renew_own(plan: Plan, folder: Path) -> list[Path]:
    """Sign new certificates for the existing keys of the server and the coordinator.

    Returns:
        The files that were replaced.

    Raises:
        RunError: A kit is missing, or the authority has expired.
    """
    root = read_authority(folder)
    server, admin = folder / "server" / "startup", folder / "admin" / "startup"
    certificates = {
        server / "server.crt": (read_key(server / "server.key"), server_identity(plan), None),
        admin / "client.crt": (read_key(admin / KEY), ADMIN, _ROLE),
    }
    for path, (key, name, role) in certificates.items():
        read_certificate(path)
        host = plan.server if role is None else None
        write_text(path, pem(issue(root, name, key.public_key(), plan.valid_days, role=role, host=host)))
    return list(certificates)


def _finish(kit: Path, name: str, plan: Plan) -> None:
    """Turn the files written by FLARE's provisioning into one of our kits."""
    (kit / "startup").chmod(0o700)
    _remove_scripts(kit)
    if name == "server":
        _configure_server(kit, plan)


def _remove_scripts(kit: Path) -> None:
    """Remove FLARE's own start scripts, which would start its processes without the guard."""
    for script in (*kit.glob("startup/*.sh"), *kit.glob("startup/*.ipynb"), *kit.rglob("readme.txt")):
        script.unlink()


class _Quiet:
    """A logger for FLARE's provisioning that keeps only errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def debug(self, message: str) -> None:
        pass

    info = warning = debug

    def error(self, message: str) -> None:
        self.errors.append(message)


class _Certificates(Builder):  # type: ignore[misc]
    """Writes keys and certificates of the server and the coordinator; replaces FLARE's own builder.

    FLARE's builder stores all private keys, and its certificates last 360 days regardless of the plan.
    """

    def __init__(self, root: Root, plan: Plan) -> None:
        self._root, self._plan = root, plan

    def build(self, project: Project, ctx: Any) -> None:
        """Write the files where FLARE's provisioning collects the kits."""
        server = project.get_server()
        self._write(Path(ctx.get_kit_dir(server)), "server", server.name, host=self._plan.server)
        for admin in project.get_admins():
            self._write(Path(ctx.get_kit_dir(admin)), "client", admin.name, role=_ROLE)

    def _write(self, folder: Path, base: str, name: str, **details: Any) -> None:
        key = new_key()
        certificate = issue(self._root, name, key.public_key(), self._plan.valid_days, **details)
        write_key(folder / f"{base}.key", key)
        write_text(folder / f"{base}.crt", pem(certificate))
        write_text(folder / "rootCA.pem", pem(self._root.certificate))


@contextmanager
def _provisioned(plan: Plan, root: Root, state: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``state`` with the kits of the server and the coordinator."""
    properties: dict[str, Any] = {"api_version": 3, "name": plan.name, "description": "fedprllm"}
    project = Project(name=plan.name, description="fedprllm", props=properties)
    server = {"name": server_identity(plan), "type": "server", "default_host": plan.server}
    admin = {"name": ADMIN, "type": "admin", "role": _ROLE}
    for participant in (server | {"fed_learn_port": plan.port}, admin):
        project.add_participant(participant_from_dict(participant | {"org": _ORGANIZATION}))
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme=plan.scheme),
        _Certificates(root, plan),
    ]
    with tempfile.TemporaryDirectory(dir=state) as temporary:
        logger = _Quiet()
        context = Provisioner(temporary, builders).provision(project, logger=logger)
        if context.get(CtxKey.BUILD_ERROR) or logger.errors:
            raise RunError(f"FLARE could not write the kits: {'; '.join(logger.errors)[:500]}")
        yield Path(context[CtxKey.CURRENT_PROD_DIR])


def _configure_server(kit: Path, plan: Plan) -> None:
    local = kit / "local"
    resources = read_json(local / "resources.json.default")
    resources["class_list_enforcement_mode"] = "enforce"
    resources["class_allow_list"] = [CONTROLLER]
    server = resources["servers"][0]
    server["heart_beat_timeout"] = _HEARTBEAT_TIMEOUT_S
    server["max_num_clients"] = max(100, 2 * len(plan.participants))
    components = [part for part in resources["components"] if part["id"] != "log_receiver"]
    for component in components:
        if component["id"] == "job_scheduler":
            component["args"] |= {"min_schedule_interval": 1.0, "max_schedule_interval": 5.0}
    resources["components"] = components
    _replace(local, "resources.json", resources)
    policy = {"format_version": "1.0", "permissions": {"project_admin": RIGHTS | {"operate": "any"}}}
    _replace(local, "authorization.json", policy)
    _replace(local, "log_config.json", log_configuration())
    (local / "privacy.json.sample").unlink(missing_ok=True)
    write_json(local / "comm_config.json", {"streaming_max_blob_size": plan.max_message_mb * 1_000_000})


def _replace(local: Path, name: str, content: dict[str, Any]) -> None:
    (local / f"{name}.default").unlink(missing_ok=True)
    write_json(local / name, content)
