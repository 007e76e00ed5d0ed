"""The whole federation on one machine's loopback: real server, real sites, real certificates."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedprllm.federation.flare.kits import write_kits
from fedprllm.federation.flare.processes import running, start_participant, start_server
from fedprllm.federation.flare.supervisor import Tell, silent, supervise
from fedprllm.federation.plan import Plan, RunPlan, SiteSettings
from fedprllm.federation.site import settings_path
from fedprllm.files import write_json

__all__ = ["free_port", "rehearsal_kits", "rehearse"]


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rehearsal_kits(folder: Path, people: Mapping[str, SiteSettings]) -> Plan:
    """Write kits for a federation on the loopback, each with its participant's settings."""
    federation = Plan(name="rehearsal", server="localhost", port=free_port(), participants=sorted(people))
    write_kits(federation, folder)
    for name, settings in people.items():
        write_json(settings_path(folder / name), settings.model_dump(mode="json"))
    return federation


@contextmanager
def _everyone(kits: Path, names: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(running(start_server(kits / "server")))
        for name in names:
            stack.enter_context(running(start_participant(kits / name)))
        yield


def rehearse(folder: Path, people: Mapping[str, SiteSettings], plan: RunPlan, tell: Tell = silent) -> Path:
    """Run a federation from nothing to the pruned model; every process has ended when it returns.

    Args:
        folder: for the kits and the run; the kits of an earlier rehearsal in it are replaced.
        people: settings by name of participant.
        plan: what to run.
        tell: told of progress, as in `fedprllm.federation.flare.supervisor.supervise`.

    Returns:
        The folder of the run.

    Raises:
        RunError: the run could not be completed.
    """
    kits = folder / "kits"
    shutil.rmtree(kits, ignore_errors=True)
    federation = rehearsal_kits(kits, people)
    with _everyone(kits, federation.participants):
        return supervise(plan, federation, kits / "admin", kits / "server" / "runs", tell)
