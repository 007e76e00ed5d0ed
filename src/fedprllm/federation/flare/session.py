"""The coordinator's connection to the server: connected participants, submitting a job, and its state."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedprllm.errors import RunError
from fedprllm.federation.flare.configuration import HARDENING
from fedprllm.federation.flare.guarded import install
from fedprllm.federation.flare.kits import ADMIN, CONTROLLER, EXECUTOR
from fedprllm.federation.flare.orders import client_configuration
from fedprllm.federation.flare.processes import RENEW_OWN
from fedprllm.federation.keys.certificates import check_dates, read_certificate
from fedprllm.federation.plan import RunPlan

__all__ = ["AdminSession", "job_files"]

_MAX_ANSWER_BYTES = 16 * 1024 * 1024
_ENDED = ("FINISHED:", "ABANDONED", "FAILED")


def job_files(plan: RunPlan, controller: str = CONTROLLER, executor: str = EXECUTOR) -> dict[str, Any]:
    """A job by file: it names two installed classes and carries a plan, no code."""
    server = {
        "format_version": 2,
        "workflows": [
            {"id": "coordinator", "path": controller, "args": {"plan": plan.model_dump(mode="json")}}
        ],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    client = client_configuration()
    client["executors"][0]["executor"]["path"] = executor
    return {
        "meta.json": {
            "name": plan.name,
            "resource_spec": {},
            "min_clients": plan.quorum,
            "deploy_map": {"app": ["@ALL"]},
        },
        "app/config/config_fed_server.json": server,
        "app/config/config_fed_client.json": client,
    }


class AdminSession:
    """One authenticated session; use it as a context manager.

    Args:
        kit: The coordinator's kit.
        timeout_s: How long to try to reach the server.

    Raises:
        RunError: The certificate has expired, or the server cannot be reached or refuses the kit.
    """

    def __init__(self, kit: Path, timeout_s: float = 6.0) -> None:
        if not (kit / "startup" / "fed_admin.json").exists():
            raise RunError(f"{kit} is no coordinator's kit: startup/fed_admin.json is missing")
        certificate = read_certificate(kit / "startup" / "client.crt")
        check_dates(certificate, "the coordinator's certificate", RENEW_OWN)
        install({"streaming_max_blob_size": _MAX_ANSWER_BYTES, **HARDENING}, None)
        kit = kit.resolve()  # the working directory changes below
        _log_to(kit / "log.txt")
        with _working_in(kit), contextlib.redirect_stdout(io.StringIO()):
            try:
                self._session: Session = new_secure_session(ADMIN, str(kit), timeout=timeout_s)
            except Exception as error:  # noqa: BLE001  of FLARE's session, whose errors have no common base
                raise RunError(
                    f"the server does not answer the kit {kit}: {type(error).__name__}: {error}; is "
                    "'fedprllm federation serve' running, and its port open?"
                ) from None

    def __enter__(self) -> AdminSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session and its threads."""
        with contextlib.suppress(Exception):
            self._session.close()

    def connected(self, within_s: float = 25.0) -> dict[str, float]:
        """Participants that are connected, and when each was heard of last."""
        clients = self._session.get_connected_client_list()
        now = time.time()
        return {
            client.name: client.last_connect_time
            for client in clients
            if now - client.last_connect_time < within_s
        }

    def submit(self, plan: RunPlan, **classes: str) -> str:
        """Submit a job; returns its id."""
        with tempfile.TemporaryDirectory() as temporary:
            return self.submit_files(Path(temporary) / plan.name, job_files(plan, **classes))

    def submit_files(self, folder: Path, files: dict[str, Any]) -> str:
        """Submit a job of the given files; returns its id."""
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(self._session.submit_job(str(folder)))

    def job_status(self, job: str) -> str:
        """FLARE's word for how a job is."""
        return str(self._session.get_job_status(job))

    def has_ended(self, job: str) -> bool:
        """The job will not go on."""
        return self.job_status(job).startswith(_ENDED)

    def going(self) -> dict[str, str]:
        """Jobs that are waiting or running, by the name of their run.

        After the death of a server, FLARE lists its jobs as running; they are not among what runs.
        """
        running = {job.job_id for job in self._session.get_system_info().job_info}
        found = {}
        for job in self._session.list_jobs():
            status = str(job["status"])
            if not status.startswith(_ENDED) and (status != "RUNNING" or job["job_id"] in running):
                found[str(job["job_name"])] = str(job["job_id"])
        return found

    def abort(self, job: str) -> None:
        """Stop a job; harmless if it has ended."""
        with contextlib.suppress(Exception):
            self._session.abort_job(job)

    def disable(self, participant: str) -> None:
        """Refuse a participant from now on, whatever certificate it shows."""
        self._session.disable_client(participant)

    def enable(self, participant: str) -> None:
        """Let a participant in again."""
        self._session.enable_client(participant)


def _log_to(path: Path) -> None:
    """FLARE's own words go to a file of the kit, not to the terminal."""
    logger = logging.getLogger("nvflare")
    for handler in logger.handlers:
        handler.close()
    logger.handlers = [logging.FileHandler(path, delay=True)]
    logger.propagate = False


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """FLARE makes its transfer folder in the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
