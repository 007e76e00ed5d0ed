"""Start-up kits: certificates for the server, each participant and the coordinator, and where the server is.

FLARE's provisioning makes the certificates. The server's kit also configures the server; a participant's kit
configures nothing (`fedprllm.federation.flare.configuration` does, at the participant).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Project

from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.flare.configuration import RIGHTS, log_configuration
from fedprllm.federation.flare.orders import EXECUTOR
from fedprllm.federation.flare.policy import ADMIN
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json

__all__ = ["ADMIN", "CONTROLLER", "EXECUTOR", "FEDERATION_FILE", "write_kits"]

CONTROLLER = "fedprllm.federation.flare.controller.CoordinatorController"
FEDERATION_FILE = "federation.json"
# Where provisioning keeps the private key of the federation's own certificate authority.
STATE = ".authority"

_ORGANISATION = "fedprllm"
_HEARTBEAT_TIMEOUT_S = 30


def write_kits(plan: Plan, folder: Path) -> list[Path]:
    """Write one kit for the server, one per participant and one for the coordinator.

    Called again with more participants, it adds their kits under the same authority and leaves the
    others as they are.

    Returns:
        The folders of the new kits.

    Raises:
        ConfigError: The folder holds kits of another federation.
        RunError: FLARE could not make them.
    """
    known = folder / FEDERATION_FILE
    if known.exists():
        before = Plan(**read_json(known))
        if (before.name, before.server, before.port) != (plan.name, plan.server, plan.port):
            raise ConfigError(
                f"{folder} holds the kits of federation '{before.name}' with its server at "
                f"{before.server}:{before.port}: name another folder with --out"
            )
    made = _provision(plan, folder / STATE)
    written = []
    for source, name in [(plan.server, "server"), *((p, p) for p in plan.participants), (ADMIN, "admin")]:
        kit = folder / name
        if not kit.exists():
            shutil.copytree(made / source, kit)
            (kit / "startup").chmod(0o700)
            written.append(kit)
    shutil.rmtree(made)
    for kit in written:
        _remove_scripts(kit)
        if kit.name == "server":
            _configure_server(kit, plan)
        elif kit.name != "admin":
            # A participant's FLARE is configured from its own installed package, not by the coordinator.
            shutil.rmtree(kit / "local")
    for kit in (folder / "server", folder / "admin"):
        write_json(kit / "local" / FEDERATION_FILE, plan.model_dump(mode="json"))
    write_json(known, plan.model_dump(mode="json"))
    return written


def _remove_scripts(kit: Path) -> None:
    """FLARE's own start scripts would start its processes without the guard."""
    for script in (*kit.glob("startup/*.sh"), *kit.glob("startup/*.ipynb"), *kit.rglob("readme.txt")):
        script.unlink()


class _Quiet:
    """FLARE's provisioning reports to a logger; only its errors matter here."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def debug(self, message: str) -> None:
        pass

    info = warning = debug

    def error(self, message: str) -> None:
        self.errors.append(message)


def _provision(plan: Plan, state: Path) -> Path:
    properties: dict[str, Any] = {"api_version": 3, "name": plan.name, "description": "fedprllm"}
    project = Project(name=plan.name, description="fedprllm", props=properties)
    participants = [
        {"name": plan.server, "type": "server", "org": _ORGANISATION, "fed_learn_port": plan.port},
        *({"name": name, "type": "client", "org": _ORGANISATION} for name in plan.participants),
        {"name": ADMIN, "type": "admin", "org": _ORGANISATION, "role": "project_admin"},
    ]
    for participant in participants:
        project.add_participant(participant_from_dict(participant))
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme=plan.scheme),
        CertBuilder(root_valid_days=plan.valid_days),
        SignatureBuilder(),
    ]
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    logger = _Quiet()
    context = Provisioner(str(state), builders).provision(project, logger=logger)
    if context.get(CtxKey.BUILD_ERROR) or logger.errors:
        raise RunError(f"provisioning failed: {'; '.join(logger.errors)[:500]}")
    return Path(context[CtxKey.CURRENT_PROD_DIR])


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
