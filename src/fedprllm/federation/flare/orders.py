"""The orders a site accepts from the server: run the one installed class, with a fixed set of files."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from fedprllm.federation.flare.policy import SITE_ORDERS, is_job_id

__all__ = ["CLIENT_FILE", "EXECUTOR", "client_configuration", "refusal"]

EXECUTOR = "fedprllm.federation.flare.executor.ParticipantExecutor"
CLIENT_FILE = "config/config_fed_client.json"

# FLARE also sends the server's half of the job and the submitter's signature and certificate.
_SIGNATURES = {".__nvfl_sig.json", ".__nvfl_submitter.crt"}
_OTHER_FILES = {"config/config_fed_server.json"} | _SIGNATURES | {f"config/{name}" for name in _SIGNATURES}
_MAX_UNPACKED_BYTES = 1024 * 1024


def client_configuration() -> dict[str, Any]:
    """The only client configuration a site accepts: one installed class, without arguments."""
    return {
        "format_version": 2,
        "executors": [{"tasks": ["fedprllm"], "executor": {"path": EXECUTOR, "args": {}}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }


def refusal(topic: object, job: object, app: object) -> str | None:
    """The reason an order is refused; None if it is accepted.

    Args:
        topic: FLARE's name of the order.
        job: Id of the job the order concerns.
        app: Zip file to install, for ``train.deploy``.
    """
    if topic not in SITE_ORDERS:
        return "not authorized: not on the list of orders that a site follows"
    if not (is_job_id(job) or (job is None and topic == "scheduler.cancel_resource")):
        return "expected a UUID as the job id"
    return _app_refusal(app) if topic == "train.deploy" else None


def _app_refusal(app: object) -> str | None:
    if not isinstance(app, bytes | bytearray | memoryview):
        return "expected the app as a zip file"
    try:
        with zipfile.ZipFile(io.BytesIO(app)) as archive:
            return _archive_refusal(archive)
    except (zipfile.BadZipFile, ValueError, KeyError, NotImplementedError, RuntimeError, EOFError) as error:
        return f"the app cannot be read ({type(error).__name__})"


def _archive_refusal(archive: zipfile.ZipFile) -> str | None:
    members = [member for member in archive.infolist() if not member.is_dir()]
    names = [member.filename for member in members]
    foreign = sorted(set(names) - _OTHER_FILES - {CLIENT_FILE})
    if foreign:
        return f"BYOC not permitted: the app brings {', '.join(name[:60] for name in foreign[:3])!a}"
    if len(names) != len(set(names)) or names.count(CLIENT_FILE) != 1:
        return f"expected {CLIENT_FILE} exactly once in the app"
    if sum(member.file_size for member in members) > _MAX_UNPACKED_BYTES:
        return f"expected an app of at most {_MAX_UNPACKED_BYTES} bytes"
    return _configuration_refusal(json.loads(archive.read(CLIENT_FILE)))


def _configuration_refusal(found: Any) -> str | None:
    if found == client_configuration():
        return None
    path = _executor_path(found)
    if path is not None and path != EXECUTOR:
        return f"class {path[:100]!a} is not in allow_list: a participant runs only {EXECUTOR}"
    return f"{CLIENT_FILE} differs from the one that every fedprllm run uses"


def _executor_path(found: Any) -> str | None:
    """The first executor class in a configuration; None if there is none."""
    try:
        return str(found["executors"][0]["executor"]["path"])
    except (KeyError, IndexError, TypeError):
        return None
