"""A participant's answers to the coordinator, independent of the transport.

`Site.answer` takes the bytes of a request and returns the bytes of a reply. It starts and watches the
computation (`fedprllm.federation.site.worker`) in a separate process, so that a crash becomes a reply instead
of ending the connection. The replies are the only thing that leaves a participant.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedprllm.errors import ConfigError, RunError, SecureError, UpdateError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.messages import (
    Code,
    Reply,
    Request,
    pack,
    read_fingerprints,
    read_request,
)
from fedprllm.federation.site.process import start_python
from fedprllm.federation.site.results import wake_path
from fedprllm.federation.site.spool import LEDGER, Spool, append_ledger
from fedprllm.files import is_full, read_json, write_bytes, write_json, write_sealed, write_text

__all__ = ["CURRENT", "LEDGER", "NO_SPACE", "SETTINGS", "Site", "settings_path", "work_folder"]

# Restarts of the computation without a new update before giving up.
_MAX_CRASHES = 3
SETTINGS = "fedprllm.json"
# Nothing was done, because it could not be written down. The coordinator asks again.
NO_SPACE = Reply(state="waiting", code="disk full")
MASKING = ("keys", "shares", "boxes", "agree", "unmask")
CURRENT = "current.json"  # the run that a job process is working on, for display


def settings_path(kit: Path) -> Path:
    """Path of a participant's own settings."""
    return kit / "local" / SETTINGS


def work_folder(kit: Path) -> Path:
    """Folder with a participant's ledger and spools."""
    return kit / "fedprllm"


class Site:
    """One participant, as the coordinator sees it.

    Args:
        name: Name of the participant, authenticated by the connection.
        settings_file: JSON file with its own settings (`SiteSettings`).
        folder: Folder with its ledger and spools.
        sent: Called with a short description of every update that leaves, without its content.
    """

    def __init__(
        self,
        name: str,
        settings_file: Path,
        folder: Path,
        sent: Callable[[str], object] = lambda what: None,  # noqa: ARG005
    ) -> None:
        self.name, self.folder, self._sent = name, folder, sent
        self._settings_file = settings_file
        self.settings = SiteSettings(**read_json(settings_file))
        self._worker: subprocess.Popen[bytes] | None = None
        self._crashes, self._ready_at_crash = 0, -1
        self._run = ""
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._owner = uuid.uuid4().hex

    @property
    def spool(self) -> Spool:
        """The spool of the current run."""
        return Spool(self.folder / "runs" / self._run)

    def answer(self, message: bytes) -> bytes:
        """Answer a request. Any failure becomes an answer too, never an exception."""
        with self._lock:
            try:
                reply = self._answer(*read_request(message))
            except (UpdateError, ConfigError) as error:
                print(f"refused a request of the coordinator: {error}", file=sys.stderr)
                reply = pack(Reply(state="failed", code="bad request"))
            except Exception as error:  # noqa: BLE001  the connection must outlive any failure here
                reply = pack(self._failed(error))
            try:
                self._record(reply)
            except Exception as error:  # noqa: BLE001  what is not recorded does not leave
                reply = pack(self._failed(error))
            return reply

    def _failed(self, error: Exception) -> Reply:
        if is_full(error):
            print(error, file=sys.stderr)
            return NO_SPACE
        traceback.print_exception(error)
        return Reply(state="failed", code="internal")

    def _answer(self, request: Request, payload: memoryview) -> bytes:
        if request.op == "start":
            return pack(self._start(request, payload))
        if request.op == "left out":
            return pack(self._leave(request))
        if request.run != self._run:
            return pack(Reply(state="failed", code="other run"))
        if request.op == "fetch":
            return self._fetch(request.block)
        if request.op in MASKING:
            return self._mask(request.op, payload)
        if request.op == "refused" and self._is_secure:
            pass  # the same bytes are sent again; an update is never hidden twice
        elif request.op == "refused":
            self._stop_worker()
            self.spool.forget(request.block)
        elif request.op == "decision":
            write_bytes(self.spool.decision_path(request.block), payload)
        elif request.op == "finish":
            self.close()
            self.spool.clear()
            self._run = ""
            write_text(wake_path(self.folder), request.run)
            return pack(Reply(state="done"))
        return pack(self._state())

    @property
    def _is_secure(self) -> bool:
        job = self.spool.known("job.json") or {}
        return bool(job.get("config", {}).get("secure"))

    def _mask(self, op: str, payload: memoryview) -> bytes:
        """Take one step of secure aggregation, or refuse it and end this participant's part."""
        from fedprllm.federation.site.masking import Masking

        local = self._settings_file.parent
        try:
            if not self._is_secure:
                raise SecureError("the run was not begun as one under masks")
            answer = Masking(self.name, local, self.settings, self.spool, self.folder).answer(op, payload)
        except SecureError as error:
            self._stop_worker()
            self.spool.set_status("failed", "not secure", message=str(error))
            print(f"refused: {error}", file=sys.stderr)
            return pack(Reply(state="failed", code="not secure"))
        return pack(Reply(state="working", n_ready=self.spool.n_ready), answer)

    # Computing ---------------------------------------------------------------------------------

    def _start(self, request: Request, payload: memoryview) -> Reply:
        spool = Spool(self.folder / "runs" / request.run)
        refused = [kind for kind in _kinds(request) if kind not in self.settings.allow]
        if refused:
            spool.set_status("failed", "kind not allowed", message=self._not_allowed(refused))
            return Reply(state="failed", code="kind not allowed")
        spool.path("left-out.json").unlink(missing_ok=True)
        job = request.model_dump(mode="json", exclude={"op", "block"})
        fingerprints = read_fingerprints(payload)
        if self._run and self._run != request.run:
            self._stop_worker()
        self._run = request.run
        write_json(self.folder / CURRENT, {"run": request.run, "process": os.getpid()}, durable=False)
        known = self.spool.known("job.json")
        if known is not None and (known != job or self._known_fingerprints() not in ({}, fingerprints)):
            return Reply(state="failed", code="other run")
        write_json(self.spool.path("fingerprints.json"), fingerprints)
        write_sealed(self.spool.path("job.json"), job)
        if self._worker is None:
            self._report_damage(self.spool.drop_damaged())
        if self._worker is None and self.spool.status["state"] != "done":
            # The participant may have fixed whatever failed before.
            self.spool.set_status("idle")
            self._crashes, self._ready_at_crash = 0, -1
        return self._state()

    def _known_fingerprints(self) -> dict[str, str]:
        """The identity of the model that the run began with; empty if it is missing or damaged."""
        try:
            found: dict[str, str] = read_json(self.spool.path("fingerprints.json"))
        except (OSError, ValueError, RunError):
            return {}
        return found

    def _not_allowed(self, refused: Sequence[str]) -> str:
        granted = ", ".join(self.settings.allow)
        options = " ".join(f"--allow {kind}" for kind in (*self.settings.allow, *refused))
        return (
            f"the run asks for {', '.join(refused)}, and this participant sends {granted} only: to allow it, "
            f"restart with {options} and ask the coordinator to start the run again"
        )

    def _leave(self, request: Request) -> Reply:
        """Stop computing for a run that goes on without this participant. Finished updates are kept."""
        if request.run == self._run:
            self.close()
        Spool(self.folder / "runs" / request.run).leave(request.reason)
        return Reply(state="done")

    def _report_damage(self, names: Sequence[str]) -> None:
        if names:
            print(f"{self.spool.folder}: damaged and computed again: {', '.join(names)}", file=sys.stderr)

    def _state(self) -> Reply:
        """Report the state of the computation, and start it if it is neither running nor complete."""
        status = self._watch()
        return Reply(
            state=status["state"],
            code=status.get("code", ""),
            tensor=status.get("tensor", ""),
            value=status.get("value"),
            n_ready=self.spool.n_ready,
        )

    def _watch(self) -> dict[str, Any]:
        status = self.spool.status
        if self._worker is not None and self._worker.poll() is None:
            return {"state": "waiting" if status["state"] == "waiting" else "working"}
        if status["state"] == "failed":
            self._worker = None
            return status
        if status["state"] == "done" and self._worker is None and self._is_whole():
            return status
        if self._worker is not None:
            ended, self._worker = self._worker, None
            if status["state"] == "done" and ended.returncode == 0:
                return status
            if not self._may_start_again():
                words = f"the computation ended {_MAX_CRASHES + 1} times without a new update: see worker.log"
                self.spool.set_status("failed", "crashed", message=f"{words} in {self.spool.folder}")
                return self.spool.status
        self._start_worker()
        return {"state": "working"}

    def _is_whole(self) -> bool:
        """Whether all updates still exist since the computation ended."""
        n_updates = len(list(self.spool.folder.glob("updates/*.update")))
        return n_updates == self.spool.n_ready == len(list(self.spool.folder.glob("updates/*.json")))

    def _may_start_again(self) -> bool:
        n_ready = self.spool.n_ready
        self._crashes = self._crashes + 1 if n_ready == self._ready_at_crash else 1
        self._ready_at_crash = n_ready
        return self._crashes <= _MAX_CRASHES

    def _start_worker(self) -> None:
        module = "fedprllm.federation.site.worker"
        write_text(self.spool.path("owner"), self._owner)
        arguments = [str(self.spool.folder), str(self._settings_file), self.name, self._owner]
        self._worker = start_python(module, arguments, self.spool.path("worker.log"))

    def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            assert worker.stdin is not None
            worker.stdin.close()

    def close(self) -> None:
        """Stop the computation. Finished updates are kept."""
        self._stop_worker()
        if self._run:
            (self.folder / CURRENT).unlink(missing_ok=True)

    # Sending -----------------------------------------------------------------------------------

    def _fetch(self, block: int) -> bytes:
        if self.spool.update_path(block).exists() and self.spool.update(block) is None:
            # Damaged since the job began: the computation makes it again.
            self._stop_worker()
            self._report_damage(self.spool.drop_damaged())
        found = self.spool.update(block)
        if found is None:
            code: Code = "not ready"
            return pack(Reply(state="working", code=code))
        summary, data = found
        if not data:  # the participant only walks through this block and shares nothing of it
            return pack(Reply(state="failed", code="bad request"))
        append_ledger(self.folder / LEDGER, self._run, block, summary, data)
        self._sent(f"{summary['kind']} of block {block}, run {self._run}, {len(data)} bytes")
        return pack(Reply(state="working", n_ready=self.spool.n_ready), data)

    def _record(self, reply: bytes) -> None:
        """Store a copy of a reply, if the participant wants one."""
        if self.settings.record is not None:
            number = next(self._numbers)
            write_bytes(Path(self.settings.record) / f"{os.getpid()}-{number:06d}.message", reply)


def _kinds(request: Request) -> tuple[str, ...]:
    """All kinds of update that a start request would have a participant send.

    Raises:
        ConfigError: Its options are invalid, leave open what is pruned, or do not go with a survey.
    """
    from fedprllm.config import PruneConfig

    if request.heal is not None:
        return ("gradients",)
    config = PruneConfig(**request.config)
    if config.smaller is not None:
        raise ConfigError("a request must name a structure, found smaller")
    if request.survey and config.allocation == "uniform":
        raise ConfigError("a survey belongs to allocation owl, found allocation uniform")
    return config.kinds
