"""The whole federation on one machine's loopback: real server, real sites, real certificates.

FOLDER/
  run/             the run, as a coordinator has it
  ledgers/         what each participant sent
  kits/, texts/    while it lasts, after a failure, or on request
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fedprllm.errors import ConfigError
from fedprllm.federation.flare.kits import write_ready_kits
from fedprllm.federation.flare.processes import running, start_participant, start_server
from fedprllm.federation.flare.supervisor import Tell, silent, supervise
from fedprllm.federation.plan import Plan, RunPlan, SiteSettings
from fedprllm.federation.site.site import LEDGER, settings_path, work_folder
from fedprllm.files import write_json

__all__ = ["empty_folder", "free_port", "rehearsal_kits", "rehearse"]

_MARK = ".rehearsal"


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def empty_folder(folder: Path) -> Path:
    """Make the folder of a rehearsal, or empty that of an earlier one; returns it.

    Raises:
        ConfigError: The folder holds something else, which would be lost.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise ConfigError(f"{folder} is not empty and not of a rehearsal: name another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    return folder


def rehearsal_kits(folder: Path, participants: Mapping[str, SiteSettings]) -> Plan:
    """Write kits for a federation on the loopback, each with its participant's settings."""
    federation = Plan(
        name="rehearsal", server="localhost", port=free_port(), participants=sorted(participants)
    )
    write_ready_kits(federation, folder)
    for name, settings in participants.items():
        write_json(settings_path(folder / name), settings.model_dump(mode="json"))
    return federation


@contextmanager
def _everyone(kits: Path, names: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(running(partial(start_server, kits / "server")))
        for name in names:
            stack.enter_context(running(partial(start_participant, kits / name)))
        yield


def rehearse(
    folder: Path,
    participants: Mapping[str, SiteSettings],
    plan: RunPlan,
    tell: Tell = silent,
    *,
    keep_kits: bool = False,
) -> Path:
    """Run a federation from nothing to the pruned model; every process has ended when it returns.

    Args:
        folder: Made by `empty_folder`.
        participants: Settings by name of participant.
        plan: What to run.
        tell: Reports progress, as in `fedprllm.federation.flare.supervisor.supervise`.
        keep_kits: Leave the kits; a rehearsal that fails always does, for their logs.

    Returns:
        The folder of the run.

    Raises:
        RunError: The run could not be completed.
    """
    kits = folder / "kits"
    federation = rehearsal_kits(kits, participants)
    with _everyone(kits, federation.participants):
        run = supervise(plan, federation, kits / "admin", kits / "server" / "runs", tell)
    kept = run.rename(folder / plan.name)
    (folder / "ledgers").mkdir()
    for name in participants:
        shutil.copy(work_folder(kits / name) / LEDGER, folder / "ledgers" / f"{name}.jsonl")
    if not keep_kits:
        shutil.rmtree(kits)
        shutil.rmtree(folder / "texts", ignore_errors=True)
    return kept
