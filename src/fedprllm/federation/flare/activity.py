"""What a participant is doing, read from its files for display, and what ended runs left behind."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedprllm.errors import RunError
from fedprllm.federation.site.consent import open_questions
from fedprllm.federation.site.site import CURRENT, LEDGER
from fedprllm.federation.site.spool import Spool, read_ledger
from fedprllm.files import read_json

__all__ = ["Activity", "current_activity", "remove_leftovers"]


@dataclass(frozen=True)
class Activity:
    """What a participant is doing for a run.

    Attributes:
        run: Id of the run.
        doing: In words: computing, or whom it waits for.
        n_sent: Number of updates sent.
    """

    run: str
    doing: str
    n_sent: int


def current_activity(home: Path) -> Activity | None:
    """What a participant is doing; None if no run is going on.

    Args:
        home: The participant's folder with its ledger and runs.
    """
    with contextlib.suppress(OSError, ValueError, RunError, LookupError):
        current = read_json(home / CURRENT)
        if psutil.pid_exists(current["process"]):
            run = str(current["run"])
            return Activity(run, _doing(Spool(home / "runs" / run), home / "runs"), _n_sent(home, run))
    return None


def _doing(spool: Spool, runs: Path) -> str:
    status, job = spool.status, spool.known("job.json") or {}
    n_blocks = max(job.get("blocks", []), default=-1) + 1
    if any(folder == spool.folder for folder, _ in open_questions(runs)):
        return "waiting for your answer"
    if status.get("code") == "disk full":
        return "waiting for space on the disk"
    if status["state"] == "failed":
        return f"failed: {status['code']}"
    if status["state"] == "done":
        return "everything is computed; waiting for the coordinator"
    n_ready = spool.n_ready
    step = "block" if job.get("heal") is None else "round"
    follows = step == "round" or job.get("config", {}).get("strategy") == "iterative"
    if follows and n_ready and not spool.decision_path(n_ready - 1).exists():
        return f"waiting for the coordinator's decision about {step} {n_ready} of {n_blocks}"
    return f"computing {step} {min(n_ready + 1, n_blocks)} of {n_blocks}"


def _n_sent(home: Path, run: str) -> int:
    if not (home / LEDGER).exists():
        return 0
    lines = read_ledger(home / LEDGER)
    return sum(line["run"] == run and line.get("direction", "sent") == "sent" for line in lines)


def remove_leftovers(home: Path) -> None:
    """Delete hidden states of runs that this participant has left: they are computed from its text.

    Args:
        home: The participant's folder with its ledger and runs. No process may be using it.
    """
    for name in (CURRENT, "contact.json"):  # of an earlier process
        (home / name).unlink(missing_ok=True)
    for folder in (home / "runs").glob("*/"):
        spool = Spool(folder)
        if spool.status["state"] == "failed" or spool.known("left-out.json") is not None:
            shutil.rmtree(folder / "state", ignore_errors=True)
