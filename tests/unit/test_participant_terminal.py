"""What the terminals of participants and server say: questions, complaints, connections, refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

pytest.importorskip("nvflare")

from fedprllm.cli import console as console_module
from fedprllm.cli import line as line_module
from fedprllm.cli import news as news_module
from fedprllm.cli import serving
from fedprllm.cli.line import StatusLine
from fedprllm.cli.news import News
from fedprllm.cli.serving import ServerNews
from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.flare.activity import current_activity, remove_leftovers
from fedprllm.federation.flare.configuration import _sweep
from fedprllm.federation.flare.contact import Contact
from fedprllm.federation.flare.processes import check_port
from fedprllm.federation.plan import Plan
from fedprllm.federation.site.consent import ask
from fedprllm.federation.site.site import CURRENT, work_folder
from fedprllm.federation.site.spool import Spool, append_ledger
from fedprllm.files import write_json, write_sealed
from fedprllm.study.questions import StudyConfig

RUN = "ab" * 16


@pytest.fixture
def printed(monkeypatch):
    """Everything that is printed, without a terminal."""
    out = io.StringIO()
    for module in (console_module, line_module, news_module):
        monkeypatch.setattr(module, "errors", Console(file=out, width=200))
    return lambda: out.getvalue()


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "startup").mkdir()
    return tmp_path


@pytest.fixture
def spool(kit):
    made = Spool(work_folder(kit) / "runs" / RUN)
    write_sealed(made.path("job.json"), {"blocks": [0, 1, 2], "config": {"strategy": "iterative"}})
    write_json(work_folder(kit) / CURRENT, {"run": RUN, "process": os.getpid()})
    return made


def test_a_complaint_is_printed_once_and_never_again_after_a_restart(kit, spool, printed):
    news = News(kit, StatusLine())
    spool.set_status("failed", "too few tokens", message="the text gives 2 windows (--min-windows)")
    news()
    news()
    assert printed().count("too few tokens: the text gives 2 windows (--min-windows)") == 1
    News(kit, StatusLine())()
    assert printed().count("the text gives 2 windows") == 1
    assert "\x1b" not in printed()


def test_a_full_disk_is_not_repeated_at_every_attempt(kit, spool, printed):
    news = News(kit, StatusLine())
    for number in range(3):
        spool.set_status("waiting", "disk full", message="the disk is full: free some space")
        os.utime(spool.path("status.json"), (number, number))
        news()
    assert printed().count("free some space") == 1


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("absent", "it did not answer in time when the run began"),
        ("deadline", "its update did not arrive in time"),
        ("failed", "its computation failed"),
        ("invalid updates", "its updates were not valid"),
        ("revoked", "the coordinator revoked it"),
    ],
)
def test_a_participant_that_is_left_out_reads_why(kit, spool, printed, reason, words):
    news = News(kit, StatusLine())
    spool.leave(reason)
    news()
    assert f"run {RUN[:8]} goes on without this participant: {words}" in printed()


def test_the_state_of_a_computation(kit, spool):
    home = work_folder(kit)
    spool.set_status("working")
    assert current_activity(home).doing == "computing block 1 of 3"
    spool.keep_update(0, b"update", {"kind": "mask"})
    assert current_activity(home).doing == "waiting for the coordinator's decision about block 1 of 3"
    spool.decision_path(0).parent.mkdir()
    spool.decision_path(0).touch()
    assert current_activity(home).doing == "computing block 2 of 3"
    append_ledger(home / "ledger.jsonl", RUN, 0, {"kind": "mask", "n_tokens": 1, "shapes": {}}, b"update")
    assert current_activity(home).n_sent == 1
    spool.set_status("waiting", "disk full")
    assert current_activity(home).doing == "waiting for space on the disk"
    spool.set_status("waiting")
    with pytest.raises(RunError, match="not answered"):
        ask(spool.folder, {"run": RUN, "lines": []}, lambda: False)
    assert current_activity(home).doing == "waiting for your answer"
    write_json(home / CURRENT, {"run": RUN, "process": 2**22 + 1})
    assert current_activity(home) is None  # its process was killed


def test_a_connection_and_its_loss_are_one_line_each(kit, printed, monkeypatch):
    monkeypatch.setattr(news_module, "_QUIET_S", 0.0)
    monkeypatch.setattr(
        "fedprllm.federation.keys.reach.address_of",
        lambda kit: {"target": "localhost:1", "scheme": "grpc"},
    )
    news, contact = News(kit, StatusLine()), None
    contact = Contact(work_folder(kit))
    contact.note(made=True)
    for _ in range(3):
        news()
    contact.note(made=False)
    deadline = time.monotonic() + 30
    while "not connected" not in printed() and time.monotonic() < deadline:
        news()
        time.sleep(0.05)
    lines = [line for line in printed().splitlines() if line != "connecting"]
    assert len(lines) == 2
    assert lines[0].startswith("connected since ")
    assert lines[1].startswith("not connected: localhost:1 refuses the connection")


def test_the_server_names_participants_and_run(tmp_path, printed, monkeypatch):
    line = StatusLine()
    news = ServerNews(tmp_path, line)
    news()
    assert "0 participants connected" in printed()
    write_json(tmp_path / "contact.json", {"north": time.time() + 1, "south": time.time() + 1})
    status = {"time": time.time(), "doing": "block 3", "n_finished": 3, "n_blocks": 5}
    write_json(tmp_path / "runs" / "first" / "federation" / "status.json", status)
    news()
    assert printed().splitlines()[-1] == "2 participants connected: north, south; run first"
    assert news._run() == ("first", ": block 3, 3 of 5 blocks decided")
    write_json(tmp_path / "runs" / "first" / "federation" / "status.json", {**status, "time": 0})
    news()
    assert printed().splitlines()[-1] == "2 participants connected: north, south"
    assert serving.__all__ == ["ServerNews"]


def test_what_ended_runs_left_is_removed_and_what_may_continue_stays(kit):
    home = work_folder(kit)
    spools = {name: Spool(home / "runs" / (name[0] * 32)) for name in ("failed", "left", "going")}
    for one in spools.values():
        one.hidden_path(0).parent.mkdir(parents=True)
        one.hidden_path(0).touch()
        one.update_path(0).parent.mkdir()
        one.update_path(0).touch()
        one.set_status("working")
    spools["failed"].set_status("failed", "memory")
    spools["left"].leave("deadline")
    remove_leftovers(home)
    assert [name for name, one in spools.items() if one.hidden_path(0).exists()] == ["going"]
    assert all(one.update_path(0).exists() for one in spools.values())  # they are not computed again


def test_folders_of_ended_jobs_are_removed_from_the_engine(tmp_path):
    job = tmp_path / "0e2e4c4c-4ba4-4d0c-9d0e-1c2f3a4b5c6d"
    for path in (job / "log.txt", job / "app" / "config.json", tmp_path / "log.txt", tmp_path / "stray.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_taken_port_is_named(tmp_path):
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        plan = Plan(server="localhost", port=other.getsockname()[1], participants=["a"])
        write_json(tmp_path / "local" / "federation.json", plan.model_dump(mode="json"))
        with pytest.raises(RunError, match=f"port {plan.port} is taken"):
            check_port(tmp_path)
    check_port(tmp_path)


# Options -----------------------------------------------------------------------------------------


def participate(*words: object, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", "-m", "fedprllm", "participate", *map(str, words)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return ended.returncode, " ".join((ended.stdout + ended.stderr).split())


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_kind_of_update_that_does_not_exist(tmp_path, more):
    status, said = participate(tmp_path, "--data", tmp_path, "--allow", "masks", *more)
    assert status == 2
    assert "unknown kind of update 'masks'; did you mean 'mask'?" in said


def test_a_model_that_is_nowhere_is_named_before_anything_starts(tmp_path):
    for model in ("modle", "someone/modle"):
        status, said = participate(tmp_path, "--data", tmp_path, "--model", model, HF_HUB_OFFLINE="1")
        assert status == 2
        assert f"there is no folder or file {model}, and no model of this name has been fetched" in said
    status, said = participate(tmp_path, "--data", tmp_path, "--model", "modle", HF_HUB_OFFLINE="0")
    assert "--model modle is no folder or file here: the model of this name will be fetched" in said


def test_a_dry_run_keeps_to_the_limits_of_a_run(small_model, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a bird. " * 200)
    (tmp_path / "run.toml").write_text(
        f'name = "r"\nmodel = "{small_model}"\n[prune]\nshare = "gram"\nwindows = 2\nwindow_length = 64\n'
    )
    words = ["north", "--data", tmp_path / "a.txt", "--dry-run", "--config", tmp_path / "run.toml"]
    status, said = participate(*words)
    assert (status, "the run asks for gram, and mask may be sent (--allow)" in said) == (2, True)
    # The libraries alone take more, and end a process without a word where they get less.
    status, said = participate(*words, "--allow", "gram", "--memory-gb", "0.3")
    assert status == 2
    assert "memory_gb: input should be greater than or equal to 0.5" in said
    status, said = participate(*words, "--allow", "gram", "--threads", "1")
    assert status == 0, said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domains": ["a.txt"]}, "nothing to measure with 1 domain and no data"),
        ({"data": ["a"], "eval": ["b"], "questions": []}, "nothing to measure: name a question"),
        ({"data": ["a"], "eval": ["b"], "grid": [{}]}, "grid 1: it names no option"),
        ({"data": ["a"], "eval": ["b"], "grid": [{"sparsity": []}]}, "grid 1: sparsity has no values"),
    ],
)
def test_a_study_that_measures_nothing_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        StudyConfig(model="m", **json.loads(json.dumps(options)))
