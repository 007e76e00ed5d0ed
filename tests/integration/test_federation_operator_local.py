"""The operator's side of a run, with the server's jobs in threads: attaching, stopping, losing the server."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.coordinator import rounds
from fedprllm.federation.coordinator.job import conduct_run
from fedprllm.federation.flare import supervisor
from fedprllm.federation.flare.supervisor import stop, supervise
from fedprllm.federation.plan import Plan
from tests.federation_helpers import (
    NAMES,
    Local,
    make_plan,
    make_site,
    texts,
    threads,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.usefixtures("threads")]


class Server:
    """A server whose jobs are threads, and sessions with it: what `AdminSession` asks of FLARE."""

    def __init__(self, folder: Path, channel: Local) -> None:
        self.folder, self.channel = folder, channel
        self.jobs: dict[str, tuple[str, threading.Thread, threading.Event]] = {}
        self.is_paused = False

    def connect(self, kit: Path) -> Server:
        if self.is_paused:
            raise RunError("the server does not answer")
        return self

    def _answer(self) -> None:
        if self.is_paused:
            raise ConnectionError

    def connected(self):
        self._answer()
        return dict.fromkeys(self.channel.present(), time.time())

    def going(self):
        self._answer()
        return {name: job for job, (name, thread, _) in self.jobs.items() if thread.is_alive()}

    def submit(self, plan):
        job, stopped = f"job-{len(self.jobs)}", threading.Event()
        thread = threading.Thread(
            target=conduct_run,
            args=(plan, NAMES, self.folder / "kits" / "server" / "runs", job, self.channel, stopped.is_set),
            daemon=True,
        )
        self.jobs[job] = (plan.name, thread, stopped)
        thread.start()
        return job

    def job_status(self, job):
        return "RUNNING" if self.jobs[job][1].is_alive() else "FINISHED:COMPLETED"

    def has_ended(self, job):
        self._answer()
        return not self.jobs[job][1].is_alive()

    def abort(self, job):
        self.jobs[job][2].set()
        self.jobs[job][1].join(60)

    def close(self):
        pass


class Watching(threading.Thread):
    """A `supervise` that goes on while the test does something."""

    def __init__(self, server: Server, plan) -> None:
        super().__init__(daemon=True)
        self.server, self.plan, self.told = server, plan, []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        kits = self.server.folder / "kits"
        federation = Plan(server="localhost", participants=NAMES)
        try:
            supervise(
                self.plan,
                federation,
                kits / "admin",
                kits / "server" / "runs",
                lambda what, details: self.told.append(what),
                self.server.connect,
            )
        except Exception as error:  # noqa: BLE001  the test looks at it
            self.error = error

    def ends(self) -> Exception | None:
        self.join(120)
        assert not self.is_alive()
        return self.error


@pytest.fixture
def held(tmp_path, small_model, monkeypatch):
    """A server, the plan of a run, and what lets the run's first update through."""
    monkeypatch.setattr(rounds, "_POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.02)
    monkeypatch.setattr(supervisor, "_ASK_FLARE_S", 0.02)
    paths = texts(tmp_path / "texts")
    sites = {name: make_site(tmp_path, name, paths[name], small_model, threads=1) for name in NAMES}
    (tmp_path / "kits" / "admin").mkdir(parents=True)
    go_on, channel = threading.Event(), Local(sites)

    def meddle(name, request, answer):
        if b'"fetch"' in request and not go_on.is_set():
            go_on.wait(0.05)
            return None
        return answer

    channel.meddle = meddle
    # Nobody fetches the model here, so the short deadline ends the wait for that.
    plan = make_plan(small_model, max_ballots=10_000, silence_s=300, deadline_s=0.5)
    yield Server(tmp_path, channel), plan, go_on
    go_on.set()
    for site in sites.values():
        site.close()


def until(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def submitted(server, plan) -> Watching:
    """A first supervisor, whose job has begun."""
    first = Watching(server, plan)
    until(lambda: "progress" in first.told or first.error)
    assert first.error is None
    return first


def test_a_second_supervisor_attaches_to_the_job_that_is_going_on(held):
    server, plan, go_on = held
    first = submitted(server, plan)
    second = Watching(server, plan)
    until(lambda: "attached" in second.told)
    go_on.set()
    assert (first.ends(), second.ends()) == (None, None)
    assert len(server.jobs) == 1
    assert "job" not in second.told


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"quorum": 3}, "quorum 2"), ({"prune": {"sparsity": 0.6}}, "sparsity 0.5")],
)
def test_a_job_with_other_options_is_not_watched_as_if_it_were_ours(held, small_model, changed, named):
    server, plan, go_on = held
    first = submitted(server, plan)
    kept = {name: getattr(plan, name) for name in ("max_ballots", "silence_s", "deadline_s")}
    error = Watching(server, make_plan(small_model, **kept, **changed)).ends()
    assert isinstance(error, ConfigError)
    assert named in str(error)
    assert "federation stop run" in str(error)
    go_on.set()
    assert first.ends() is None
    assert len(server.jobs) == 1


def test_a_stopped_run_ends_with_words_and_the_same_command_continues_it(held):
    server, plan, go_on = held
    first = submitted(server, plan)
    kits = server.folder / "kits"
    assert stop("run", kits / "admin", kits / "server" / "runs", server.connect) == "job-0"
    error = first.ends()
    assert isinstance(error, RunError)
    assert "was stopped" in str(error)
    assert list(server.jobs) == ["job-0"]
    go_on.set()
    again = Watching(server, plan)
    assert again.ends() is None
    assert list(server.jobs) == ["job-0", "job-1"]


def test_what_is_not_going_on_cannot_be_stopped(held):
    server, plan, _ = held
    kits = server.folder / "kits"
    with pytest.raises(RunError, match="run other is not going on at the server, and no other run either"):
        stop("other", kits / "admin", kits / "server" / "runs", server.connect)
    submitted(server, plan)
    with pytest.raises(RunError, match="going on: run"):
        stop("other", kits / "admin", kits / "server" / "runs", server.connect)


def test_a_server_out_of_sight_gets_no_second_job(held):
    server, plan, go_on = held
    first = submitted(server, plan)
    server.is_paused = True
    until(lambda: first.told.count("waiting") or first.error)
    server.is_paused = False
    until(lambda: "attached" in first.told)
    go_on.set()
    assert first.ends() is None
    assert len(server.jobs) == 1


def test_a_full_disk_is_said_before_a_job_is_submitted(held, monkeypatch):
    server, plan, _ = held
    monkeypatch.setattr(supervisor, "_SPACE_BYTES", 1 << 62)
    error = Watching(server, plan).ends()
    assert isinstance(error, RunError)
    assert "the server's disk is full" in str(error)
    assert not server.jobs


def test_the_result_of_other_options_is_not_taken_for_ours(held, small_model):
    server, plan, go_on = held
    go_on.set()
    assert Watching(server, plan).ends() is None
    kept = {name: getattr(plan, name) for name in ("max_ballots", "silence_s", "deadline_s")}
    error = Watching(server, make_plan(small_model, **kept, prune={"sparsity": 0.6})).ends()
    assert isinstance(error, ConfigError)
    assert "is complete, with sparsity 0.5, and this file has 0.6" in str(error)
    assert Watching(server, make_plan(small_model, **kept, join_s=7)).ends() is None
    assert len(server.jobs) == 1
