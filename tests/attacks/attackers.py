"""A federation in which some processes run hostile software: `tests/attacks/hostile.py`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import psutil

from fedprllm.federation.flare.configuration import engine_folder, prepare_engine
from fedprllm.federation.flare.processes import _place_storage, end
from fedprllm.federation.flare.request_log import read_requests
from tests.federation_processes import Federation

HOSTILE = Path(__file__).with_name("hostile.py")
SERVER, CLIENT = "nvflare.private.fed.app.server.server_train", "nvflare.private.fed.app.client.client_train"


class Attacker:
    """A process without the guard that carries out the test's orders."""

    def __init__(self, kit: Path) -> None:
        self.kit = kit
        is_server = kit.name == "server"
        if is_server:
            _place_storage(kit)
        workspace = kit if is_server else prepare_engine(kit, 1024)
        (workspace / "transfer").mkdir(exist_ok=True)
        config = "fed_server.json" if is_server else "fed_client.json"
        options = ["secure_train=true", "org=fedprllm", "config_folder=config"]
        options += [] if is_server else [f"uid={kit.name}"]
        arguments = ["-m", str(workspace), "-s", config, "--set", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HOSTILE), SERVER if is_server else CLIENT, *arguments],
            cwd=workspace,
            env={**os.environ, "TMPDIR": str(workspace / "transfer"), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(workspace / "console.txt").open("ab"),
            text=True,
            start_new_session=True,
        )
        self._answers: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER"):
                self._answers.put(json.loads(line.removeprefix("ANSWER")))

    def __call__(self, do: str, *arguments: str, **options: Any) -> Any:
        """Send an order to the process and return its answer."""
        assert self.process.stdin is not None
        names = ("channel", "topic", "target") if do in ("request", "stream") else ("headers",)
        order = {"do": do, **dict(zip(names, arguments, strict=False)), **options}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        try:
            return self._answers.get(timeout=60)
        except Empty:
            raise AssertionError(f"no answer to {order}: {(self.kit / 'console.txt')}") from None

    def raw(self, origin: str, destination: str, channel: str, topic: str, **more: Any) -> Any:
        """Send frames with arbitrary headers."""
        headers = {
            "cn__msg_type": "req",
            "cn__origin": origin,
            "cn__destination": destination,
            "cn__channel": channel,
            "cn__topic": topic,
            "cn__from": origin,
            "cn__to": destination,
            "cn__req_id": "0",
            "cn__reply_expected": True,
            "cn__payload_encoding": "bytes",
            **more.pop("headers", {}),
        }
        return self("raw", headers=headers, **more)

    def end(self) -> None:
        end(self.process)  # type: ignore[arg-type]
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class AttackedFederation(Federation):
    """A server and sites, some of which are attackers.

    Args:
        *arguments: As for `Federation`.
        hostile: Names of the attackers, which may include ``server``.
    """

    def __init__(self, *arguments: Any, hostile: list[str]) -> None:
        super().__init__(*arguments)
        self.hostile = hostile
        self.attackers: dict[str, Attacker] = {}

    def start(self, name: str) -> None:
        if name in self.hostile:
            self.attackers[name] = Attacker(self.kits / name)
            self.processes[name] = self.attackers[name].process  # type: ignore[assignment]
        else:
            super().start(name)

    def __exit__(self, *error: object) -> None:
        for attacker in self.attackers.values():
            attacker.end()
        super().__exit__(*error)

    def refusals(self, name: str) -> list[dict[str, Any]]:
        """The refusals recorded by a site or the server."""
        kit = self.kits / name
        path = kit / "refused.jsonl" if name == "server" else kit / "fedprllm" / "requests.jsonl"
        return [line for line in read_requests(path) if "refused" in line]

    def requests(self, name: str) -> list[dict[str, Any]]:
        return read_requests(self.kits / name / "fedprllm" / "requests.jsonl")

    def log(self, name: str) -> str:
        workspace = self.kits / name if name == "server" else engine_folder(self.kits / name)
        return (workspace / "log.txt").read_text()


def rss(process: Any) -> int:
    """Resident memory of a process, in bytes."""
    return int(psutil.Process(process.pid).memory_info().rss)
