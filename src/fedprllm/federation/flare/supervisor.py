"""A run is a sequence of jobs over one folder: submit, watch, and submit again until it is complete."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprllm.errors import RunError
from fedprllm.federation.coordinator.results import outcomes
from fedprllm.federation.flare.session import AdminSession
from fedprllm.federation.keys.revoked import RevokedFile
from fedprllm.federation.plan import Plan, RunPlan
from fedprllm.files import read_json

__all__ = ["Tell", "silent", "supervise"]

_WATCH_S = 0.5
# The folder says more than FLARE does; FLARE is asked rarely, only whether the job still lives.
_ASK_FLARE_S = 3.0
_SERVER_WAIT_S = 120.0

Tell = Callable[[str, dict[str, Any]], None]


def silent(what: str, details: dict[str, Any]) -> None:
    """Report nothing."""


def supervise(plan: RunPlan, federation: Plan, admin_kit: Path, runs: Path, tell: Tell = silent) -> Path:
    """Run until the run is complete; returns its folder.

    Args:
        plan: What to run.
        federation: The participants and the server.
        admin_kit: The coordinator's kit.
        runs: The server's folder of runs, readable from here.
        tell: Reports progress (``progress``, with the coordinator's status; ``results``, with what became of
            the model at each participant) and events (``job``, ``again``, ``waiting``).

    Raises:
        RunError: Too few participants are left, or several jobs in a row got nowhere.
    """
    folder = runs / plan.name
    names = sorted(plan.participants or federation.participants)
    revoked = RevokedFile(runs.parent)
    n_fruitless = 0
    before = _achieved(folder)
    while not (folder / "result.json").exists():
        outcome, reason = _one_job(plan, _admitted(names, revoked, plan), admin_kit, folder, tell)
        if outcome == "quorum lost":
            raise RunError(reason)
        if outcome == "error":
            raise RunError(f"the server refused the run: {reason}")
        now = _achieved(folder)
        n_fruitless = 0 if now > before else n_fruitless + 1
        before = max(before, now)
        if n_fruitless >= plan.max_attempts:
            raise RunError(
                f"{n_fruitless} jobs in a row got nowhere ({reason}): what was decided is kept in {folder}; "
                "run it again when the cause is found"
            )
        if outcome != "complete":
            tell("again", {"reason": reason})
    _hand_out(plan, revoked, admin_kit, folder, tell)
    return folder


def _admitted(names: list[str], revoked: RevokedFile, plan: RunPlan) -> list[str]:
    """The participants that are not revoked.

    Raises:
        RunError: They are fewer than the quorum.
    """
    excluded = sorted(revoked.names() & set(names))
    admitted = [name for name in names if name not in excluded]
    if excluded and len(admitted) < plan.quorum:
        raise RunError(
            f"{', '.join(excluded)} was revoked, {len(admitted)} participants are left and the quorum is "
            f"{plan.quorum}: 'fedprllm federation revoke NAME --undo' lets a participant in again"
        )
    return admitted


def _hand_out(plan: RunPlan, revoked: RevokedFile, admin_kit: Path, folder: Path, tell: Tell) -> None:
    """Wait while connected participants fetch the result and build the model.

    Participants that are not connected fetch it later. The wait ends ``deadline_s`` after the last news.
    """
    before, end = outcomes(folder), time.monotonic() + plan.deadline_s
    if all(before.values()):
        return
    session = _session(admin_kit, tell)
    try:
        while time.monotonic() < end:
            found = outcomes(folder)
            end = time.monotonic() + plan.deadline_s if found != before else end
            before = found
            unheard = {name for name, outcome in found.items() if not outcome} - revoked.names()
            waiting = unheard & set(session.connected())
            if not waiting:
                return
            tell("results", {"outcomes": found, "waiting": sorted(waiting)})
            time.sleep(_WATCH_S)
    except RunError:
        raise
    except Exception as error:  # noqa: BLE001  of FLARE's session, whose errors have no common base
        tell("again", {"reason": f"the server does not answer: {type(error).__name__}"})
    finally:
        session.close()


def _achieved(folder: Path) -> int:
    """Grows with every block decided and every update received."""
    n_blocks = len(list(folder.glob("**/blocks/block-*.json")))
    return 1_000_000 * n_blocks + len(list(folder.glob("federation/updates/*/*.update")))


def _one_job(plan: RunPlan, names: list[str], admin_kit: Path, folder: Path, tell: Tell) -> tuple[str, str]:
    """Submit a job and watch it to its end: how it ended, and why."""
    session = _session(admin_kit, tell)
    try:
        _wait_for(session, names, plan, tell)
        job = session.submit(plan)
        tell("job", {"job": job})
        asked = time.monotonic()
        while True:
            outcome = _read(folder / "federation" / "outcome.json")
            if outcome is not None and outcome.get("job") == job:
                _wait_for_end(session, job)
                return outcome["outcome"], outcome["reason"]
            status = _read(folder / "federation" / "status.json")
            if status is not None:
                tell("progress", status)
            if time.monotonic() - asked > _ASK_FLARE_S:
                asked = time.monotonic()
                if session.has_ended(job):
                    return "interrupted", f"the job ended as {session.job_status(job)}"
            time.sleep(_WATCH_S)
    except RunError:
        raise
    except Exception as error:  # noqa: BLE001  of FLARE's session, whose errors have no common base
        return "interrupted", f"the server does not answer: {type(error).__name__}"
    finally:
        session.close()


def _session(admin_kit: Path, tell: Tell) -> AdminSession:
    """Log in, waiting for a server that is being restarted."""
    end = time.monotonic() + _SERVER_WAIT_S
    while True:
        try:
            return AdminSession(admin_kit)
        except RunError:
            if time.monotonic() > end:
                raise
            tell("waiting", {"for": ["server"]})
            time.sleep(1.0)


def _wait_for(session: AdminSession, names: list[str], plan: RunPlan, tell: Tell) -> None:
    """Wait until all participants are connected, or until a quorum is after long enough."""
    end = time.monotonic() + plan.join_s
    while True:
        absent = sorted(set(names) - set(session.connected()))
        if not absent:
            return
        if time.monotonic() > end:
            if len(names) - len(absent) >= plan.quorum:
                return
            raise RunError(
                f"{', '.join(absent)} did not connect within {plan.join_s:.0f} s and the quorum is "
                f"{plan.quorum}: run it again when they are there; what was decided is kept"
            )
        tell("waiting", {"for": absent})
        time.sleep(_WATCH_S)


def _wait_for_end(session: AdminSession, job: str) -> None:
    """Give FLARE a moment to end a job whose work is done, then stop it."""
    end = time.monotonic() + 15.0
    while time.monotonic() < end:
        if session.has_ended(job):
            return
        time.sleep(_WATCH_S)
    session.abort(job)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file that another process replaces at any moment; None if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = read_json(path)
        return content
    return None
