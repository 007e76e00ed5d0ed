"""Attacks by a hostile coordinator, server or stranger on real sites.

The server in these tests runs without the guard and allows everything, so every refusal comes from the site.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.kits import write_ready_kits
from fedprllm.federation.flare.processes import end, start_participant
from fedprllm.federation.flare.session import job_files
from fedprllm.federation.plan import Plan, RunPlan
from fedprllm.files import write_json
from tests.attacks.attackers import AttackedFederation
from tests.federation_processes import Federation, finish, wait_until

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore"),
]

# Answers each JSON line, [what, argument], with a JSON line. It keeps running because it starts slowly.
_SESSION = """
import json, os, sys, time
from pathlib import Path
from fedprllm.federation.flare.session import AdminSession
answers = os.fdopen(os.dup(1), "w")
session = AdminSession(Path(sys.argv[1]), timeout_s=120)
for line in sys.stdin:
    what, argument = json.loads(line)
    try:
        if what == "submit":
            files = json.loads((Path(argument) / "files.json").read_text())
            job = session.submit_files(Path(argument), files)
            end = time.monotonic() + 120
            while time.monotonic() < end and not session.has_ended(job):
                time.sleep(0.1)
            answer = session.job_status(job)
        elif what == "command":
            answer = str(session._session.do_command(argument))
        elif what == "connected":
            answer = sorted(session.connected())
        else:
            getattr(session, what)(argument)
            answer = "done"
    except Exception as error:
        answer = repr(error)
    print(json.dumps(answer), file=answers, flush=True)
os._exit(0)
"""


@contextlib.contextmanager
def coordinator(federation):
    """Start ``federation.coordinator``, a process that talks to the server as the coordinator."""
    with (federation.folder / "coordinator.txt").open("w") as errors:
        federation.coordinator = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SESSION, str(federation.kits / "admin")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield
    finally:
        federation.coordinator.stdin.close()
        end(federation.coordinator)
        federation.coordinator.stdout.close()


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("attacked")
    made = AttackedFederation(folder, small_model, ["north"], 50, hostile=["server"])
    everything = {"format_version": "1.0", "permissions": {"project_admin": "any"}}
    local = made.kits / "server" / "local"
    write_json(local / "authorization.json", everything)
    resources = json.loads((local / "resources.json").read_text())
    write_json(local / "resources.json", resources | {"class_allow_list": ["*"]})
    with made, coordinator(made):
        wait_until(lambda: ask(made, "connected", "") == ["north"], "the site")
        yield made


def ask(federation, what, argument):
    asked = federation.coordinator
    asked.stdin.write(json.dumps([what, argument]) + "\n")
    asked.stdin.flush()
    readable, _, _ = select.select([asked.stdout], [], [], 200)
    line = asked.stdout.readline() if readable else ""
    assert line, (federation.folder / "coordinator.txt").read_text()
    return json.loads(line)


def submit(federation, tmp_path, files):
    folder = tmp_path / "attack"
    folder.mkdir()
    (folder / "files.json").write_text(json.dumps(files))
    return ask(federation, "submit", str(folder))


def logs(folder):
    return "\n".join(
        path.read_text(errors="replace")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".txt", ".log")
    )


def attack_plan(federation):
    return RunPlan(name="attack", model=str(federation.model), prune={"windows": 2, "window_length": 32})


def test_a_job_with_code_is_refused_by_the_site(federation, tmp_path):
    files = job_files(attack_plan(federation), executor="intruder.Intruder")
    marker = tmp_path / "was-here"
    files["app/custom/intruder.py"] = (
        f"from nvflare.apis.executor import Executor\nopen({str(marker)!r}, 'w').close()\n"
        "class Intruder(Executor):\n    def execute(self, *a):\n        return None\n"
    )
    status = submit(federation, tmp_path, files)
    assert not marker.exists(), status
    assert "BYOC not permitted" in status + logs(federation.kits / "server") + logs(federation.kits / "north")
    assert not list((federation.kits / "north").rglob("intruder.py"))


def test_a_job_that_names_another_class_is_refused_by_the_site(federation, tmp_path):
    other = "nvflare.app_common.executors.statistics.statistics_executor.StatisticsExecutor"
    submit(federation, tmp_path, job_files(attack_plan(federation), executor=other))
    wait_until(lambda: "is not in allow_list" in logs(federation.kits / "north"), "the site's refusal", 60)
    assert not (federation.kits / "north" / "fedprllm" / "ledger.jsonl").exists()


def test_a_job_that_passes_arguments_to_our_executor_is_refused(federation, tmp_path):
    files = job_files(attack_plan(federation))
    client = files["app/config/config_fed_client.json"]
    client["executors"][0]["executor"]["args"] = {"data": "/etc/passwd"}
    submit(federation, tmp_path, files)
    assert not (federation.kits / "north" / "fedprllm" / "ledger.jsonl").exists()


@pytest.mark.parametrize("command", ["cat", "ls", "head", "grep Once"])
def test_the_coordinator_has_no_shell_on_a_site(federation, command):
    verb, *pattern = command.split()
    answer = ask(federation, "command", " ".join([verb, "north", *pattern, "local/fedprllm.json"]))
    assert "not authorized" in answer.lower()
    assert "north.txt" not in answer


@pytest.mark.parametrize("command", ["report_env north", "sys_info client north", "restart client north"])
def test_the_coordinator_cannot_inspect_or_restart_a_site(federation, command):
    answer = ask(federation, "command", command)
    assert "not authorized" in answer.lower()
    assert federation.processes["north"].poll() is None


def test_a_certificate_of_another_authority_is_refused(federation, tmp_path):
    ours = federation.plan
    plan = Plan(name=ours.name, server="localhost", port=ours.port, participants=["stranger"])
    write_ready_kits(plan, tmp_path / "kits")
    stranger = start_participant(tmp_path / "kits" / "stranger")
    try:
        refused = ("handshake", "certificate", "ssl", "cannot connect", "failed to connect")
        kit = tmp_path / "kits" / "stranger"
        wait_until(lambda: any(word in logs(kit).lower() for word in refused), "the refusal", 90)
        assert "stranger" not in ask(federation, "connected", "")
    finally:
        end(stranger)


def test_a_revoked_certificate_is_refused_until_it_is_readmitted(federation):
    assert ask(federation, "disable", "north") == "done"
    end(federation.processes["north"])
    federation.start("north")
    kit = federation.kits / "north"
    wait_until(
        lambda: "disabled" in logs(kit).lower() or federation.processes["north"].poll() is not None,
        "the refusal",
        90,
    )
    assert "north" not in ask(federation, "connected", "")
    assert ask(federation, "enable", "north") == "done"
    end(federation.processes["north"])
    federation.start("north")
    wait_until(lambda: ask(federation, "connected", "") == ["north"], "the site to be readmitted")


def test_the_server_refuses_a_message_over_the_limit_before_receiving_it(tmp_path, small_model):
    """A block's update takes 5,963 bytes; all other messages from the site are far shorter."""
    with Federation(tmp_path, small_model, ["north"], 50) as federation, coordinator(federation):
        wait_until(lambda: ask(federation, "connected", "") == ["north"], "the site")
        # The server has read its limit by now, but the job process, which starts below, has not.
        limit = federation.kits / "server" / "local" / "comm_config.json"
        assert json.loads(limit.read_text())["streaming_max_blob_size"] == 1024 * 10**6
        write_json(limit, {"streaming_max_blob_size": 5000})
        options = {"windows": 2, "window_length": 32}
        running = federation.begin("long", options, quorum=1, silence_s=2, max_ballots=1, join_s=60)
        output = finish(running, expected=2)
        assert "the quorum is 1" in " ".join(output.split())
        (event,) = federation.events("long")
        assert event["reason"] == "deadline: the update of block 0 did not arrive"
        assert "exceeds configured limit 5000" in logs(federation.kits / "north")  # the site gets the reason
