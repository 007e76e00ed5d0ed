"""A federation without processes or a network: the real `Site` computes in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedprllm.federation.coordinator.job import conduct_run
from fedprllm.federation.coordinator.results import ResultServer
from fedprllm.federation.plan import RunPlan, SiteSettings
from fedprllm.federation.site import build, worker
from fedprllm.federation.site import site as site_module
from fedprllm.federation.site.results import Collector
from fedprllm.federation.site.site import Site, settings_path, work_folder
from fedprllm.files import write_json
from fedprllm.models import blockwise, conversion, source

NAMES = ["north", "south", "west"]
# Settings that let a test share very little text, with the same windows as a run in one process.
UNLIMITED: dict[str, Any] = {
    "min_windows": 1,
    "min_tokens": 2,
    "min_participants": 1,
    "runs_per_text": 99,
    "seed": 0,
    "confirm": False,
}
STORY = "Once upon a time there was a little {who} who saw {n} birds and gave them bread. "


class _Thread:
    """Replaces a participant's computing process; provides the part of `Popen` that a site uses."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.returncode: int | None = None
        self.stdin = self
        self._main = {"worker": worker.main, "build": build.main}[module.rpartition(".")[2]]
        self._arguments = arguments
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.returncode = self._main(list(self._arguments))
        except SystemExit as ended:
            self.returncode = int(ended.code or 0)

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        # A thread cannot be killed, but it ends at the next block because the spool has another owner.
        (Path(self._arguments[0]) / "owner").write_text("nobody")

    def wait(self) -> None:
        self._thread.join(60)

    def close(self) -> None:
        pass


@pytest.fixture
def threads(monkeypatch) -> None:
    """Make sites compute in threads."""

    def ended(code: int) -> None:
        raise SystemExit(code)

    # Creating a model without weights patches torch for the whole process.
    lock = threading.RLock()

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any, **options: Any) -> Any:
            with lock:
                return function(*arguments, **options)

        return locked

    for module in (blockwise, conversion, source):
        monkeypatch.setattr(module, "build_skeleton", alone(module.build_skeleton))
    monkeypatch.setattr(worker.os, "_exit", ended)
    for process in (worker, build):
        monkeypatch.setattr(process, "end_with_parent", lambda: None)
    monkeypatch.setattr(
        site_module.subprocess, "Popen", lambda command, **_: _Thread(command[2], list(map(str, command[3:])))
    )


class Local:
    """A channel to sites in this process; ``meddle`` may change or drop a reply."""

    def __init__(self, sites: dict[str, Any]) -> None:
        self.sites = sites
        self.sent: list[tuple[str, bytes]] = []
        self.meddle: Callable[[str, bytes, bytes], bytes | None] = lambda name, request, answer: answer

    def present(self) -> set[str]:
        return set(self.sites)

    def ask(self, names: Sequence[str], message: bytes, timeout_s: float) -> dict[str, bytes]:
        answers = {}
        for name in names:
            answer = self.meddle(name, message, self.sites[name].answer(message))
            if answer is not None:
                self.sent.append((name, answer))
                answers[name] = answer
        return answers


def texts(folder: Path, names: Sequence[str] = NAMES) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        path = folder / f"{name}.txt"
        path.write_text("".join(STORY.format(who=name, n=n) for n in range(60)))
        paths[name] = str(path)
    return paths


def make_site(folder: Path, name: str, text: str, model: Path | None, **settings: Any) -> Site:
    kit = folder / name
    values = SiteSettings(
        data=[text], model=None if model is None else str(model), **{**UNLIMITED, **settings}
    )
    write_json(settings_path(kit), values.model_dump(mode="json"))
    return Site(name, settings_path(kit), work_folder(kit))


def make_plan(model: Path, **options: Any) -> RunPlan:
    prune = {"windows": 2, "window_length": 32, **options.pop("prune", {})}
    values = {"deadline_s": 120, "join_s": 5, "silence_s": 60, "quorum": 2, **options}
    return RunPlan(name="run", model=str(model), prune=prune, **values)


def collector(folder: Path, name: str, server: ResultServer | None = None) -> Collector:
    """A collector that fetches a participant's results from the runs in ``folder``."""
    server = server or ResultServer(folder / "runs")
    kit = folder / name
    return Collector(
        lambda message: server.answer(name, message), settings_path(kit), work_folder(kit), kit / "runs"
    )


def conduct(folder: Path, plan: RunPlan, channel: Any, names: Sequence[str] = NAMES) -> str:
    return conduct_run(plan, names, folder / "runs", "job", channel)


def same_model(one: Path, other: Path) -> None:
    """Assert that two model folders have equal files, except for the model cards."""
    files = sorted(path.name for path in one.iterdir() if path.name != "README.md")
    assert files == sorted(path.name for path in other.iterdir() if path.name != "README.md")
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
