"""Start-up kits: certificates and configuration for the server, each participant and the coordinator.

FLARE's provisioning makes the certificates; what a site lets in and out is written here:

* no code from outside (``byoc: none``), and of the installed classes only ours;
* no shell, no logs, no environment: the coordinator can start and stop a run and see that a site is up;
* nothing is streamed to the server;
* a message longer than the plan allows is refused before room is made for it.
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
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json

__all__ = ["ADMIN", "CONTROLLER", "EXECUTOR", "FEDERATION_FILE", "write_kits"]

ADMIN = "coordinator@fedprllm.local"
EXECUTOR = "fedprllm.federation.flare.executor.ParticipantExecutor"
CONTROLLER = "fedprllm.federation.flare.controller.CoordinatorController"
FEDERATION_FILE = "federation.json"
# Where provisioning keeps the private key of the federation's own certificate authority.
STATE = ".authority"

_ORGANISATION = "fedprllm"
_BASE = "nvflare.app_common"
_HEARTBEAT_TIMEOUT_S = 30

# On a site, ``project_admin`` is whoever holds the coordinator's kit.
_SITE_RIGHTS = {
    "submit_job": "any",
    "manage_job": "any",
    "view": "any",
    "clone_job": "none",
    "download_job": "none",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
}
_SERVER_RIGHTS = _SITE_RIGHTS | {"operate": "any"}


def write_kits(plan: Plan, folder: Path) -> list[Path]:
    """Write one kit for the server, one per participant and one for the coordinator.

    Called again with more participants, it adds their kits under the same authority and leaves the
    others as they are.

    Returns:
        The folders of the new kits.

    Raises:
        ConfigError: the folder holds kits of another federation.
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
        if kit.name == "server":
            _configure_server(kit, plan)
        elif kit.name != "admin":
            _configure_site(kit)
        if kit.name != "admin":
            limit = {"streaming_max_blob_size": plan.max_message_mb * 1_000_000}
            write_json(kit / "local" / "comm_config.json", limit)
    for kit in (folder / "server", folder / "admin"):
        write_json(kit / "local" / FEDERATION_FILE, plan.model_dump(mode="json"))
    write_json(known, plan.model_dump(mode="json"))
    return written


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
    people = [
        {"name": plan.server, "type": "server", "org": _ORGANISATION, "fed_learn_port": plan.port},
        *({"name": name, "type": "client", "org": _ORGANISATION} for name in plan.participants),
        {"name": ADMIN, "type": "admin", "org": _ORGANISATION, "role": "project_admin"},
    ]
    for person in people:
        project.add_participant(participant_from_dict(person))
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


def _authorization(rights: dict[str, str]) -> dict[str, Any]:
    return {"format_version": "1.0", "permissions": {"project_admin": rights}}


def _configure_site(kit: Path) -> None:
    local = kit / "local"
    resources = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [EXECUTOR],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            {
                "id": "resource_manager",
                "path": f"{_BASE}.resource_managers.gpu_resource_manager.GPUResourceManager",
                "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300},
            },
            {
                "id": "resource_consumer",
                "path": f"{_BASE}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
                "args": {},
            },
            {
                "id": "process_launcher",
                "path": f"{_BASE}.job_launcher.client_process_launcher.ClientProcessJobLauncher",
                "args": {},
            },
        ],
    }
    _replace(local, "resources.json", resources)
    _replace(local, "authorization.json", _authorization(_SITE_RIGHTS))
    _finish_local(local)


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
    _replace(local, "authorization.json", _authorization(_SERVER_RIGHTS))
    _finish_local(local)


def _replace(local: Path, name: str, content: dict[str, Any]) -> None:
    (local / f"{name}.default").unlink(missing_ok=True)
    write_json(local / name, content)


def _finish_local(local: Path) -> None:
    """Logs go to files of the workspace; the console belongs to fedprllm."""
    (local / "privacy.json.sample").unlink(missing_ok=True)
    log_config = read_json(local / "log_config.json.default")
    root = log_config["loggers"]["root"]
    root["handlers"] = ["logFileHandler", "errorFileHandler"]
    log_config["handlers"] = {name: log_config["handlers"][name] for name in root["handlers"]}
    _replace(local, "log_config.json", log_config)
