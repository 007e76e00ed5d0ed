"""Run a whole federation on one machine's loopback, with a real server, real sites and real certificates.

FOLDER/
  run/             the run, as the coordinator sees it
  ledgers/         each participant's ledger of what it sent
  kits/, texts/    kept during the rehearsal, after a failure, or on request
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
    """A port that is currently free on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def empty_folder(folder: Path) -> Path:
    """Create the folder of a rehearsal, or empty that of an earlier one, and return it.

    Raises:
        ConfigError: The folder has other contents, which would be lost.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise ConfigError(
            f"{folder} is not empty and was not created by a rehearsal: choose another folder with --out"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    return folder


def rehearsal_kits(folder: Path, participants: Mapping[str, SiteSettings]) -> Plan:
    """Write the kits of a federation on the loopback, including each participant's settings."""
    federation = Plan(
        name="rehearsal", server="localhost", port=free_port(), participants=sorted(participants)
    )
    write_ready_kits(federation, folder)
    for name, settings in participants.items():
        write_json(settings_path(folder / name), settings.model_dump(mode="json"))
    if any(settings.require_secure for settings in participants.values()):
        _pin_each_other([folder / name for name in federation.participants])
    return federation


def _pin_each_other(kits: Sequence[Path]) -> None:
    """Make everyone's signing key, and pin the same roster everywhere."""
    from fedprllm.federation.site.masking import pin_roster, signing_key
    from fedprllm.secure.terms import Roster

    keys = {kit.name: signing_key(kit / "local", make=True).public_key() for kit in kits}
    roster = Roster({name: key.public_bytes_raw() for name, key in keys.items()})
    for kit in kits:
        pin_roster(kit / "local", roster)


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
    plans: Sequence[RunPlan],
    tell: Tell = silent,
    *,
    keep_kits: bool = False,
) -> list[Path]:
    """Run a federation from setup to the result; every process has ended when this returns.

    Args:
        folder: Folder made by `empty_folder`.
        participants: Settings of each participant, by name.
        plans: The runs, one after the other.
        tell: Progress callback, as in `fedprllm.federation.flare.supervisor.supervise`.
        keep_kits: Keep the kits. After a failure they are always kept, for their logs.

    Returns:
        The runs' folders.

    Raises:
        RunError: A run could not be completed.
    """
    kits = folder / "kits"
    federation = rehearsal_kits(kits, participants)
    with _everyone(kits, federation.participants):
        runs = []
        for plan in plans:
            tell("run", {"name": plan.name})
            runs.append(supervise(plan, federation, kits / "admin", kits / "server" / "runs", tell))
    kept = [run.rename(folder / plan.name) for run, plan in zip(runs, plans, strict=True)]
    (folder / "ledgers").mkdir()
    for name in participants:
        shutil.copy(work_folder(kits / name) / LEDGER, folder / "ledgers" / f"{name}.jsonl")
    if not keep_kits:
        shutil.rmtree(kits)
        shutil.rmtree(folder / "texts", ignore_errors=True)
    return kept
