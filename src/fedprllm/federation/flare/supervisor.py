"""A run is a sequence of jobs over one folder: submit, watch, and submit again until it is complete.

A job goes on at the server whether it is watched or not. A supervisor that is started again, or that has lost
the server for a while, therefore attaches to the job of its run that is still going on.

RUN/federation/
  plan.json      the plan and the id of the newest job; written by the job itself
  outcome.json   how it ended; written by the job itself
  stop.json      id of the job that 'fedprllm federation stop' ended
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.coordinator.results import outcomes
from fedprllm.federation.flare.session import AdminSession
from fedprllm.federation.keys.revoked import RevokedFile
from fedprllm.federation.plan import Plan, RunPlan
from fedprllm.files import free_bytes, read_json, write_json

__all__ = ["Session", "Tell", "silent", "stop", "supervise"]

_WATCH_S = 0.5
# The folder says more than FLARE does; FLARE is asked rarely, only whether the job still lives.
_ASK_FLARE_S = 3.0
_SERVER_WAIT_S = 120.0
# FLARE stores a job twice, and the job writes events and progress.
_SPACE_BYTES = 20_000_000

Tell = Callable[[str, dict[str, Any]], None]


class Session(Protocol):
    """A connection to the server, as `AdminSession` is one."""

    def connected(self) -> dict[str, float]:
        """See `AdminSession.connected`."""

    def going(self) -> dict[str, str]:
        """See `AdminSession.going`."""

    def submit(self, plan: RunPlan) -> str:
        """See `AdminSession.submit`."""

    def job_status(self, job: str) -> str:
        """See `AdminSession.job_status`."""

    def has_ended(self, job: str) -> bool:
        """See `AdminSession.has_ended`."""

    def abort(self, job: str) -> None:
        """See `AdminSession.abort`."""

    def close(self) -> None:
        """See `AdminSession.close`."""


def silent(what: str, details: dict[str, Any]) -> None:
    """Report nothing."""


def supervise(
    plan: RunPlan,
    federation: Plan,
    admin_kit: Path,
    runs: Path,
    tell: Tell = silent,
    connect: Callable[[Path], Session] = AdminSession,
) -> Path:
    """Run until the run is complete; returns its folder.

    Args:
        plan: What to run.
        federation: The participants and the server.
        admin_kit: The coordinator's kit.
        runs: The server's folder of runs, readable from here.
        tell: Reports progress (``progress``, with the coordinator's status; ``results``, with what became of
            the model at each participant) and events (``job``, ``attached``, ``again``, ``waiting``).
        connect: Logs in to the server with a kit.

    Raises:
        ConfigError: A job of this run is going on with other options, or the run is complete with others.
        RunError: Too few participants are left, several jobs in a row got nowhere, the run was stopped, or
            the server's disk is full.
    """
    supervisor = _Supervisor(plan, federation, admin_kit, runs, tell, connect)
    supervisor.complete()
    supervisor.hand_out()
    return supervisor.folder


def stop(name: str, admin_kit: Path, runs: Path, connect: Callable[[Path], Session] = AdminSession) -> str:
    """Stop the job of a run that is going on; returns the job's id. What was decided is kept.

    Args:
        name: Name of the run.
        admin_kit: The coordinator's kit.
        runs: The server's folder of runs.
        connect: Logs in to the server with a kit.

    Raises:
        RunError: The server cannot be reached, or no job of this run is going on.
    """
    session = connect(admin_kit)
    try:
        going = session.going()
        if name not in going:
            others = f"; going on: {', '.join(sorted(going))}" if going else ", and no other run either"
            raise RunError(f"run {name} is not going on at the server{others}")
        write_json(_stop_path(runs / name), {"job": going[name]})
        session.abort(going[name])
        return going[name]
    finally:
        session.close()


def _stop_path(folder: Path) -> Path:
    return folder / "federation" / "stop.json"


class _Supervisor:
    """The arguments of `supervise`, and what it does with them."""

    def __init__(
        self,
        plan: RunPlan,
        federation: Plan,
        admin_kit: Path,
        runs: Path,
        tell: Tell,
        connect: Callable[[Path], Session],
    ) -> None:
        self.plan, self.folder, self._kit, self._tell = plan, runs / plan.name, admin_kit, tell
        self._connect = connect
        self._names = sorted(plan.participants or federation.participants)
        self._revoked = RevokedFile(runs.parent)

    def complete(self) -> None:
        """Have one job after another work on the run, until it is complete."""
        n_fruitless, before = 0, self._achieved()
        while not (self.folder / "result.json").exists():
            outcome, reason = self._one_job()
            if outcome in ("quorum lost", "stopped", "disk full"):
                raise RunError(reason)
            if outcome == "error":
                raise RunError(f"the server refused the run: {reason}")
            now = self._achieved()
            # A server that was out of sight has not failed: its job may be going on.
            fruitless = now <= before and outcome != "unheard"
            n_fruitless = n_fruitless + 1 if fruitless else n_fruitless if now <= before else 0
            before = max(before, now)
            if n_fruitless >= self.plan.max_attempts:
                raise RunError(
                    f"{n_fruitless} jobs in a row got nowhere ({reason}): what was decided is kept in "
                    f"{self.folder}; run it again when the cause is found"
                )
            if outcome != "complete":
                self._tell("again", {"reason": reason})
        self._check_complete()

    def _achieved(self) -> int:
        """Grows with every block or round decided and every update received."""
        n_blocks = len(list(self.folder.glob("**/blocks/block-*.json")))
        n_blocks += len(list(self.folder.glob("rounds/round-*.json")))
        return 1_000_000 * n_blocks + len(list(self.folder.glob("federation/updates/*/*.update")))

    def _admitted(self) -> list[str]:
        """The participants that are not revoked.

        Raises:
            RunError: They are fewer than the quorum.
        """
        excluded = sorted(self._revoked.names() & set(self._names))
        admitted = [name for name in self._names if name not in excluded]
        if excluded and len(admitted) < self.plan.quorum:
            raise RunError(
                f"{', '.join(excluded)} was revoked, {len(admitted)} participants are left and the quorum is "
                f"{self.plan.quorum}: 'fedprllm federation revoke NAME --undo' lets a participant in again"
            )
        return admitted

    # One job -----------------------------------------------------------------------------------

    def _one_job(self) -> tuple[str, str]:
        """Attach to the run's job or submit one, and watch it to its end: how it ended, and why."""
        admitted = self._admitted()
        session = self._session()
        try:
            job = session.going().get(self.plan.name)
            if job is None:
                self._check_disk()
                self._wait_for(session, admitted)
                job = self._submit(session)
            else:
                self._tell("attached", {"job": job})
            return self._watch(session, job)
        except (RunError, ConfigError):
            raise
        except Exception as error:  # noqa: BLE001  of FLARE's session, whose errors have no common base
            time.sleep(_WATCH_S)
            return "unheard", f"the server does not answer: {type(error).__name__}"
        finally:
            session.close()

    def _submit(self, session: Session) -> str:
        """Submit a job, unless another supervisor of this run was faster."""
        with FileLock(self._kit / ".submit.lock"):
            job = session.going().get(self.plan.name)
            if job is not None:
                self._tell("attached", {"job": job})
                return job
            job = session.submit(self.plan)
            self._tell("job", {"job": job})
            return job

    def _watch(self, session: Session, job: str) -> tuple[str, str]:
        asked = time.monotonic()
        while True:
            self._check_going(job)
            outcome = self._read("outcome.json")
            if outcome is not None and outcome.get("job") == job:
                _wait_for_end(session, job)
                return self._ended(job, outcome["outcome"], outcome["reason"])
            status = self._read("status.json")
            if status is not None:
                self._tell("progress", status)
            if time.monotonic() - asked > _ASK_FLARE_S:
                asked = time.monotonic()
                if session.has_ended(job):
                    return self._ended(job, "interrupted", f"the job ended as {session.job_status(job)}")
            time.sleep(_WATCH_S)

    def _ended(self, job: str, outcome: str, reason: str) -> tuple[str, str]:
        """How a job ended, seen together with what others did to it."""
        stopped = self._read("stop.json")
        if outcome == "interrupted" and stopped is not None and stopped.get("job") == job:
            return "stopped", (
                f"run {self.plan.name} was stopped by 'fedprllm federation stop'; what was decided is kept, "
                "and the same 'fedprllm federation run' continues it"
            )
        if outcome == "interrupted":
            self._check_disk()
        return outcome, reason

    def _check_going(self, job: str) -> None:
        """Refuse to watch a job with other options as if it were ours.

        Raises:
            ConfigError: Names the first option that differs.
        """
        written = self._read("plan.json")
        if written is None or written.get("job") != job:
            return
        for name, (theirs, ours) in self._differences(written["plan"]).items():
            raise ConfigError(
                f"run {self.plan.name} is going on with {name} {theirs!r}, and this file has {ours!r}: use "
                "the same options to watch it, give this run another name, or stop the other one with "
                f"'fedprllm federation stop {self.plan.name}'"
            )

    def _check_complete(self) -> None:
        """Refuse to take the result of a run with other options for ours; its deadlines may differ.

        Raises:
            ConfigError: Names the first option that differs.
        """
        written = self._read("plan.json")
        differences = {} if written is None else self._differences(written["plan"])
        result = {"model", "participants", "heal", "of", *PruneConfig.model_fields}
        for name, (theirs, ours) in differences.items():
            if name in result:
                raise ConfigError(
                    f"run {self.plan.name} is complete, with {name} {theirs!r}, and this file has {ours!r}: "
                    "give this run another name"
                )

    def _differences(self, found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options that differ between a plan that was written down and ours: theirs and ours by name."""
        theirs, ours = (
            {**plan.model_dump(mode="json", exclude={"prune"}), **plan.config.model_dump(mode="json")}
            for plan in (RunPlan(**found), self.plan)
        )
        return {name: (theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]}

    def _check_disk(self) -> None:
        """Check that the server's disk has room for a job, where failures have only vague words.

        Raises:
            RunError: The disk is full.
        """
        free = free_bytes(self.folder)
        if free < _SPACE_BYTES:
            raise RunError(
                f"the server's disk is full ({free / 1e6:.0f} MB free): free at least "
                f"{_SPACE_BYTES / 1e6:.0f} MB; the same command continues"
            )

    # Waiting -----------------------------------------------------------------------------------

    def _session(self) -> Session:
        """Log in, waiting for a server that is being restarted."""
        end = time.monotonic() + _SERVER_WAIT_S
        while True:
            try:
                return self._connect(self._kit)
            except RunError:
                if time.monotonic() > end:
                    raise
                self._tell("waiting", {"for": ["the server"]})
                time.sleep(1.0)

    def _wait_for(self, session: Session, names: list[str]) -> None:
        """Wait until all participants are connected, or until a quorum is after long enough."""
        end = time.monotonic() + self.plan.join_s
        while True:
            absent = sorted(set(names) - set(session.connected()))
            if not absent:
                return
            if time.monotonic() > end:
                if len(names) - len(absent) >= self.plan.quorum:
                    return
                raise RunError(
                    f"{', '.join(absent)} did not connect within {self.plan.join_s:.0f} s and the quorum is "
                    f"{self.plan.quorum}: run it again when they are there; what was decided is kept"
                )
            self._tell("waiting", {"for": absent})
            time.sleep(_WATCH_S)

    def hand_out(self) -> None:
        """Wait while connected participants fetch the result and build the model.

        Participants that are not connected fetch it later. The wait ends ``deadline_s`` after the last news.
        """
        while not all(outcomes(self.folder).values()):
            try:
                session = self._session()
            except RunError:
                return  # the run is complete, and the result is fetched when the server is back
            try:
                self._watch_outcomes(session)
                return
            except Exception:  # noqa: BLE001  of FLARE's session, whose errors have no common base
                self._tell("waiting", {"for": ["the server"]})
                time.sleep(_WATCH_S)
            finally:
                session.close()

    def _watch_outcomes(self, session: Session) -> None:
        before, end = outcomes(self.folder), time.monotonic() + self.plan.deadline_s
        while time.monotonic() < end:
            found = outcomes(self.folder)
            end = time.monotonic() + self.plan.deadline_s if found != before else end
            before = found
            unheard = {name for name, outcome in found.items() if not outcome} - self._revoked.names()
            waiting = unheard & set(session.connected())
            if not waiting:
                return
            self._tell("results", {"outcomes": found, "waiting": sorted(waiting)})
            time.sleep(_WATCH_S)

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON file that another process replaces at any moment; None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            content: dict[str, Any] = read_json(self.folder / "federation" / name)
            return content
        return None


def _wait_for_end(session: Session, job: str) -> None:
    """Give FLARE a moment to end a job whose work is done, then stop it."""
    end = time.monotonic() + 15.0
    while time.monotonic() < end:
        if session.has_ended(job):
            return
        time.sleep(_WATCH_S)
    session.abort(job)
