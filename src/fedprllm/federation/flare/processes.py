"""Starting and ending FLARE's processes: the server, a participant, and everything below them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from fedprllm.errors import RunError
from fedprllm.federation.flare.configuration import (
    check_allow_list,
    max_message_mb,
    participant_name,
    prepare_engine,
)
from fedprllm.federation.flare.kits import FEDERATION_FILE
from fedprllm.federation.flare.policy import GUARDED, check_version
from fedprllm.federation.keys.certificates import check_dates, read_certificate
from fedprllm.federation.keys.identity import check_credentials
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json

__all__ = [
    "RENEW_OWN",
    "check_port",
    "check_server",
    "end",
    "participant_name",
    "running",
    "start_participant",
    "start_server",
]

RENEW_OWN = "fedprllm federation renew, on the machine with the kits; then restart the server"
RENEW_AUTHORITY = (
    "fedprllm federation init PLAN.toml --out ANOTHER_FOLDER; every participant then needs a new identity"
)
_GRACE_S = 5.0


def start_server(kit: Path) -> subprocess.Popen[bytes]:
    """Start the server of a kit in a process group of its own.

    Raises:
        RunError: The folder is no kit of a server, its certificate has expired, it would let in every
            class, or FLARE is of another version than was tested.
    """
    check_server(kit)
    check_port(kit)
    check_version()
    kit = kit.resolve()
    check_allow_list(kit / "local" / "resources.json")
    _place_storage(kit)
    return _start(kit, "nvflare.private.fed.app.server.server_train", "fed_server.json", [])


def check_server(kit: Path) -> float:
    """Check a server's kit and that its certificate is in date; returns the days left.

    Raises:
        RunError: Says what is wrong, and which command helps.
    """
    startup = kit / "startup"
    if not (startup / "fed_server.json").exists():
        raise RunError(f"{kit} is no server's kit: startup/fed_server.json is missing")
    check_dates(read_certificate(startup / "rootCA.pem"), "the federation's authority", RENEW_AUTHORITY)
    return check_dates(read_certificate(startup / "server.crt"), "the server's certificate", RENEW_OWN)


def check_port(kit: Path) -> None:
    """Check that the port of a server's kit is free: the engine would wait for it without a word.

    Raises:
        RunError: It is taken, or this user may not use it.
    """
    port = Plan(**read_json(kit / "local" / FEDERATION_FILE)).port
    try:
        with socket.socket() as probe:
            # Ports of connections that ended a moment ago are free; those that somebody listens on are not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} is taken: another server or program listens on it; stop that one, or name "
                "another port in the plan and run 'fedprllm federation init' into a new folder"
            ) from None
        raise RunError(f"port {port} cannot be used: {error.strerror}") from None


def _place_storage(kit: Path) -> None:
    """Keep FLARE's jobs in the kit: it wants absolute paths, and a kit may have been moved."""
    path = kit / "local" / "resources.json"
    resources = read_json(path)
    storage = resources["snapshot_persistor"]["args"]["storage"]["args"]
    storage["root_dir"] = str(kit / "storage" / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "storage" / "jobs")
    write_json(path, resources)


def start_participant(kit: Path) -> subprocess.Popen[bytes]:
    """Start the site of a kit in a process group of its own, configured from the installed package.

    Raises:
        RunError: The folder is no kit of a participant, its certificate has expired or is for another key, or
            FLARE is of another version than was tested.
    """
    check_version()
    name = participant_name(kit)
    check_credentials(kit)
    kit = kit.resolve()
    engine = prepare_engine(kit, max_message_mb(kit))
    return _start(engine, "nvflare.private.fed.app.client.client_train", "fed_client.json", [f"uid={name}"])


def _start(workspace: Path, module: str, config: str, options: list[str]) -> subprocess.Popen[bytes]:
    scratch = workspace / "scratch"
    for folder in (scratch, workspace / "transfer"):
        folder.mkdir(exist_ok=True)
    arguments = ["-m", str(workspace), "-s", config, "--set", "secure_train=true", *options]
    # FLARE leaves files where temporary files go. Python's warnings do not belong on a terminal.
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONWARNINGS": "ignore", "MALLOC_ARENA_MAX": "4"}
    with (workspace / "console.txt").open("ab") as console:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", GUARDED, module, *arguments, "org=fedprllm", "config_folder=config"],
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes] | psutil.Process) -> None:
    """End a process and everything it started, first politely."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_GRACE_S)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=_GRACE_S)
    with contextlib.suppress(subprocess.TimeoutExpired, psutil.Error):
        process.wait(timeout=_GRACE_S)


@contextlib.contextmanager
def running(start: Callable[[], subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it when the ``with`` block ends, however it ends.

    An interruption may come when the process is there and `subprocess` has not handed it over yet; so what
    ends is every child of ours that was not there before.
    """
    earlier = set(psutil.Process().children())
    try:
        yield start()
    finally:
        for child in set(psutil.Process().children()) - earlier:
            end(child)
