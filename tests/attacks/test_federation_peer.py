"""Attacks by a hostile participant on other participants and on an honest server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.protocol.messages import Request, pack
from tests.attacks.attackers import AttackedFederation, rss
from tests.federation_processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

MB = 1024 * 1024
ROOM = 128 * MB  # memory that a process may take while it refuses 1 GB in streams of 200 MB
SECRETS = ("PRIVATE KEY", "Once upon a time", "north.txt")


LISTING = Path(__file__).with_name("listing")


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    """An honest server and an honest participant in a run that a hostile participant stalls."""
    folder = tmp_path_factory.mktemp("peer")
    model = small_model
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDPRLLM_LISTING", str(folder))
    patch.setenv("PYTHONPATH", str(LISTING), prepend=os.pathsep)
    made = AttackedFederation(folder, model, ["north", "south"], 50, hostile=["south"])
    with made:
        made.running = made.begin("held", {"windows": 2, "window_length": 32}, deadline_s=600, silence_s=600)
        worker = wait_until(lambda: made.worker("south"), "the computation of the hostile site")
        worker.suspend()
        ledger = made.kits / "north" / "fedprllm" / "ledger.jsonl"
        wait_until(lambda: ledger.exists() and len(ledger.read_text().splitlines()) == 5, "north's updates")
        yield made
        made.running.kill()
        made.running.communicate()
    patch.undo()


@pytest.fixture(scope="module")
def south(federation):
    return federation.attackers["south"]


@pytest.fixture(scope="module")
def job(federation):
    (line,) = [line for line in federation.requests("north") if line["what"] == "train.start_job"]
    return line["job"]


ORDERS = [
    ("sys.shell", {"body": "cat local/fedprllm.json startup/client.key"}),
    ("train.delete_run", {"headers": {"job_id": "fedprllm"}}),
    ("train.shutdown", {}),
    ("train.restart", {}),
    ("sys.configure_site_log", {"body": "DEBUG"}),
    ("sys.report_env", {}),
]


@pytest.mark.parametrize(("order", "more"), ORDERS)
def test_a_peer_cannot_give_orders_to_another_site(federation, south, order, more):
    answer = south("request", "admin", order, "north", order=order, **more)
    assert answer["rc"] == "invalid_request"
    assert "refused: south may not send messages to north" in answer["error"]
    assert not any(secret in str(answer) for secret in SECRETS)
    assert federation.processes["north"].poll() is None
    assert not [line for line in federation.requests("north") if line["what"] == order]


def test_a_peer_cannot_send_as_the_server(federation, south):
    n_lines = len(federation.requests("north"))
    for origin in ("server", "north", "_admin_00000000-0000-4000-8000-000000000000"):
        south.raw(origin, "north", "admin", "sys.shell")
        line = f"south cannot speak for {origin}"
        wait_until(lambda line=line: line in federation.log("server"), "the server's refusal", 20)
    assert len(federation.requests("north")) == n_lines


@pytest.mark.parametrize("origin", ["south", "server"])
def test_a_peer_cannot_fetch_updates_of_a_running_job(federation, south, job, origin):
    ledger = federation.kits / "north" / "fedprllm" / "ledger.jsonl"
    before = ledger.read_text()
    run = (federation.run_folder("held") / ".run-id").read_text()
    message = pack(Request(op="fetch", run=run)).hex()
    fetched = [line for line in federation.requests("north") if line["what"] == "fetch"]
    if origin == "south":
        for way in ("request", "stream"):
            answer = south(way, "aux_communication", "fedprllm", f"north.{job}", message=message)
            assert "refused" in answer["error"], answer
            assert not answer["body"] or "None" in answer["body"]
    else:
        south.raw(f"server.{job}", f"north.{job}", "aux_communication", "fedprllm", size=100)
        wait_until(
            lambda: f"south cannot speak for server.{job}" in federation.log("server"),
            "refusal",
            20,
        )
    assert ledger.read_text() == before
    assert [line for line in federation.requests("north") if line["what"] == "fetch"] == fetched


def test_a_peer_cannot_report_or_fetch_for_another(federation, south):
    south.raw("north", "server", "fedprllm", "result", size=100)
    wait_until(lambda: "south cannot speak for north" in federation.log("server"), "refusal", 20)
    answer = south("request", "fedprllm", "result", "north", size=10)
    assert "south may not send messages to north" in answer["error"]


@pytest.mark.parametrize("channel", ["_net_manager", "cellnet.channel", "hci_channel", "server_command"])
def test_a_peer_reaches_no_other_channel_of_the_server(south, channel):
    topic = {"_net_manager": "stop", "cellnet.channel": "bulk", "hci_channel": "command"}.get(
        channel, "abort"
    )
    answer = south("request", channel, topic, "server", size=10)
    assert "not on the list of messages that a run needs" in answer["error"]


CELL = """
import os, sys
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
port, address, channel, topic, startup = sys.argv[1:]
keys = {"ca_cert": "rootCA.pem", "client_cert": "client.crt", "client_key": "client.key"}
credentials = {key: os.path.join(startup, name) for key, name in keys.items()}
cell = CoreCell(address, f"grpc://localhost:{port}", True, credentials)
cell.start()
while "server" not in cell.agents: pass
reply = cell.send_request(channel, topic, "server", Message({"nonce": "x"}), 5)
print("ANSWER", reply.get_header("cn__return_code"), reply.get_header("cn__error"), flush=True)
os._exit(0)
"""


def test_a_participant_cannot_act_as_the_coordinator(federation, south):
    """FLARE alone does not check the name in the certificate for a coordinator's address."""
    address = "_admin_00000000-0000-4000-8000-000000000001"
    port = str(federation.plan.port)
    command = [sys.executable, "-W", "ignore", "-c", CELL, port, address, "cellnet.channel", "bye"]
    answers = {
        name: subprocess.run(
            [*command, str(federation.kits / name / "startup")], capture_output=True, text=True, timeout=60
        ).stdout
        for name in ("admin", "south")
    }
    assert "ANSWER ok" in answers["admin"]
    assert "ANSWER timeout" in answers["south"]  # another process may own the address
    wait_until(lambda: f"cannot speak for {address}" in federation.log("server"), "refusal", 20)


def grown(process, attack):
    """Peak growth of a process's memory, in bytes, during an attack and shortly after."""
    before = highest = rss(process)
    attack()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        highest = max(highest, rss(process))
        time.sleep(0.02)
    print(f"grew by {(highest - before) / 1e6:.0f} MB")
    return highest - before


def stream_headers(channel, topic, number, sequence=0, size=200 * MB):
    return {
        "sm__ch": channel,
        "sm__tp": topic,
        "sm__id": number,
        "sm__sq": sequence,
        "sm__dt": 1,
        "sm__sz": size,
        "cn__reply_expected": False,
    }


def test_unsolicited_frames_of_200_mb_take_no_memory_of_the_server(federation, south):
    """The driver drops the connection because of the announced length of the frame."""
    server = federation.processes["server"]

    def attack():
        south.raw("south", "server", "task", "register", size=200 * MB, times=5)

    assert grown(server, attack) < ROOM
    wait_until(lambda: "server" in south("peers"), "the connection to come back", 30)


@pytest.mark.parametrize(
    ("channel", "topic"),
    [
        ("aux_communication", "anything"),
        ("return_only", "aux_communication:fedprllm"),
        ("hci_channel", "command"),
    ],
)
def test_unsolicited_streams_of_200_mb_take_no_memory_of_the_server(federation, south, job, channel, topic):
    pid = federation.part("server", f"{job}").pid if channel == "return_only" else None
    process = federation.processes["server"] if pid is None else federation.part("server", job)
    target = "server" if pid is None else f"server.{job}"

    def attack():
        for number in range(5):
            for sequence in range(40):
                headers = stream_headers(channel, topic, 1000 + number, sequence)
                south.raw("south", target, "sm__STREAM", "sm__DATA", headers=headers, size=MB)

    assert grown(process, attack) < ROOM
    assert federation.processes["server"].poll() is None


ALWAYS = ["cellnet.channel:bye", "sm__STREAM:sm__ACK", "sm__STREAM:sm__DATA", "sm__STREAM:sm__ERROR"]
# Handlers of each process, as channel:topic. Any further one is a way in: see docs/decisions/flare-guard.md.
OPEN = {
    "server": [
        "aux_communication:*",
        "fedprllm:result",
        "hci_channel:*",
        "server_parent_listener:*",
        *(f"task:{topic}" for topic in ("challenge", "heart_beat", "quit", "register", "report_job_failure")),
    ],
    "server.JOB": ["aux_communication:*", "server_command:*"],
    "north": ["admin:*"],
    "north.JOB": ["aux_communication:*", "client_command:*"],
}
OPEN_STREAMS = {
    "server": ["aux_communication:*", "fedprllm:result", "hci_channel:*", "return_only:*"],
    "server.JOB": ["aux_communication:*", "return_only:*", "server_command:*"],
    "north": ["return_only:*"],
    "north.JOB": ["aux_communication:*", "return_only:*"],
}
ORDERS_OF_A_SITE = [
    "scheduler.cancel_resource",
    "scheduler.check_resource",
    "train.abort",
    "train.deploy",
    "train.notify_job_status",
    "train.start_job",
]


def test_nothing_else_is_open_in_any_process(federation, job):
    for name, word in (("server", "runner_process"), ("north", "worker_process")):
        for process in (federation.processes[name], federation.part(name, word)):
            process.send_signal(signal.SIGUSR2)
    for address in OPEN:
        path = federation.folder / f"{address.replace('JOB', job)}.json"
        wait_until(path.exists, f"the list of {address}", 20)
        found = json.loads(path.read_text())
        assert found["requests"] == sorted([*OPEN[address], *ALWAYS]), address
        assert found["streams"] == OPEN_STREAMS[address], address
        assert found["orders"] == (ORDERS_OF_A_SITE if address == "north" else []), address


def test_every_flare_handler_that_a_peer_may_not_use_is_refused(federation, south):
    """Tries all handlers that FLARE registers at a site without the guard."""
    opened = south("handlers")
    assert "_net_manager:stop" in opened
    assert len(opened) > 25
    for handler in {*opened, "hci_channel:command", "server_parent_listener:get_clients", "task:new"}:
        channel, topic = handler.split(":", 1)
        if handler in ALWAYS:
            continue
        for target, reason in (("server", "not on the list"), ("north", "may not send messages to")):
            answer = south("request", channel, topic, target, size=1)
            assert reason in answer["error"], (handler, target, answer)


def test_refusals_cannot_flood_the_servers_log(federation, south):
    path = federation.kits / "server" / "refused.jsonl"
    size = path.stat().st_size if path.exists() else 0
    for number in range(300):
        south.raw("south", "server", "task", f"new-{number}")
        south.raw("south", "server", "task", "again")
    wait_until(lambda: "refused task/new-299 from south" in federation.log("server"), "the last one", 20)
    added = path.read_bytes()[size:]
    assert {json.loads(line)["from"] for line in added.splitlines()} <= {"south"}
    assert len(added) < 60 * 250


def test_the_run_is_still_there(federation):
    assert federation.running.poll() is None
    assert federation.processes["north"].poll() is None
    assert federation.part("north", "worker_process") is not None
