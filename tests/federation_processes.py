"""A federation of real processes for tests; closing it ends every process it started."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from fedprllm.federation.flare.processes import end, start_participant, start_server
from fedprllm.federation.flare.rehearsal import rehearsal_kits
from fedprllm.federation.plan import Plan, SiteSettings
from fedprllm.federation.site.site import settings_path
from fedprllm.files import write_json
from tests.federation_helpers import UNLIMITED

STORY = "Once upon a time there was a little {who} who saw {n} birds and gave them bread. "
PATIENCE_S = 240  # CI may be slow; everything is polled, so fast machines do not wait longer than necessary
_CLI = "from fedprllm.cli.coordinator import app; app()"


def wait_until(what: Callable[[], Any], why: str, seconds: float = PATIENCE_S) -> Any:
    """Poll ``what`` until it returns a truthy value, and return that value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = what()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {why}, but it did not happen")


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes with SIGKILL."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


class Federation:
    """A server and sites on the loopback, and their runs."""

    def __init__(self, folder: Path, model: Path, names: list[str], n_sentences: int) -> None:
        self.folder, self.model, self.names = folder, model, names
        self.kits = folder / "kits"
        self.texts = {name: folder / f"{name}.txt" for name in names}
        for name, path in self.texts.items():
            path.write_text("".join(STORY.format(who=name, n=n) for n in range(n_sentences)))
        self.plan = self.make_kits({name: self.settings(name) for name in names})
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def settings(self, name: str, **others: Any) -> SiteSettings:
        """A participant's settings. It builds no model unless told to: that takes a process of its own."""
        return SiteSettings(
            data=[str(self.texts[name])],
            model=str(self.model),
            threads=1,
            allow=["mask", "statistics"],
            record=str(self.folder / "sent" / name),
            **{"result": False, **UNLIMITED, **others},
        )

    def write_settings(self, name: str, **others: Any) -> None:
        """Restore a participant's initial settings, except for those given."""
        write_json(settings_path(self.kit(name)), self.settings(name, **others).model_dump(mode="json"))

    @contextlib.contextmanager
    def building_models(self) -> Iterator[None]:
        """Let every participant build the models of runs that end inside the ``with`` block."""
        for name in self.names:
            self.write_settings(name, result=True)
        try:
            yield
        finally:
            for name in self.names:
                self.write_settings(name)

    def make_kits(self, participants: dict[str, SiteSettings]) -> Plan:
        return rehearsal_kits(self.kits, participants)

    def kit(self, name: str) -> Path:
        """The kit of the server or a participant, on its own machine."""
        return self.kits / name

    def start(self, name: str) -> None:
        start = start_server if name == "server" else start_participant
        self.processes[name] = start(self.kit(name))

    def __enter__(self) -> Federation:
        for name in ("server", *self.names):
            self.start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            end(process)

    # Processes ---------------------------------------------------------------------------------

    def family(self, name: str) -> list[psutil.Process]:
        parent = psutil.Process(self.processes[name].pid)
        return [parent, *parent.children(recursive=True)]

    def part(self, name: str, word: str) -> psutil.Process | None:
        """The child process of a site or the server whose command line contains ``word``."""
        for process in self.family(name)[1:]:
            with contextlib.suppress(psutil.Error):
                if any(word in argument for argument in process.cmdline()):
                    return process
        return None

    def worker(self, name: str) -> psutil.Process | None:
        return self.part(name, "fedprllm.federation.site.worker")

    # Runs --------------------------------------------------------------------------------------

    def run_folder(self, run: str) -> Path:
        return self.kits / "server" / "runs" / run

    def spool(self, name: str, run: str) -> Path:
        run_id = (self.run_folder(run) / ".run-id").read_text()
        return self.kit(name) / "fedprllm" / "runs" / run_id

    def n_computed(self, name: str, run: str) -> int:
        """Number of updates that a participant has computed."""
        if not (self.run_folder(run) / ".run-id").exists():
            return 0
        return len(list((self.spool(name, run) / "updates").glob("*.update")))

    def events(self, run: str) -> list[dict[str, str]]:
        path = self.run_folder(run) / "federation" / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def begin(self, run: str, prune: dict[str, Any], **policy: Any) -> subprocess.Popen[str]:
        """Start ``fedprllm federation run``."""
        policy = {"quorum": 2, "deadline_s": 120, "start_s": 120, "join_s": 60, "silence_s": 15, **policy}
        lines = [f'name = "{run}"', f'model = "{self.model}"']
        lines += [f"{name} = {json.dumps(value)}" for name, value in policy.items()]
        lines += ["[prune]", *(f"{name} = {json.dumps(value)}" for name, value in prune.items())]
        config = self.folder / f"{run}.toml"
        config.write_text("\n".join(lines))
        return self.command("run", str(config), "--kits", str(self.kits))

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        return start(_CLI, *arguments)

    def participate(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """Start ``fedprllm participate``."""
        return start(
            "from fedprllm.cli.app import app; app()", "participate", str(self.kits / name), *arguments
        )


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python process in its own session, with all output on its standard output."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a command and return its output."""
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        end(process)  # type: ignore[arg-type]
        raise
    assert process.returncode == expected, output
    return output
