"""A participant that FLARE lost although it is connected is reachable again with its next message."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.rehearsal import free_port

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

# What FLARE is left with if it notes the end of a replaced connection after the new one was added.
SERVER = """
import os, sys, time
from fedprllm.federation.flare.configuration import HARDENING
from fedprllm.federation.flare.guarded import install
if sys.argv[2] == "guarded":
    install({"streaming_max_blob_size": 10**9, **HARDENING}, None)
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.endpoint import EndpointState
from nvflare.fuel.f3.message import Message
cell = CoreCell("server", sys.argv[1], False, {})
cell.start()
print("READY", flush=True)
def wait(what, seconds):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()
assert wait(lambda: "south" in cell.agents, 60)
endpoint = cell.communicator.conn_manager.sfm_endpoints["south"].endpoint
endpoint.state = EndpointState.DISCONNECTED
cell.state_change(endpoint)
assert "south" not in cell.agents
reachable = wait(lambda: "south" in cell.agents, 5)
sent = cell.fire_and_forget("task", "register", "south", Message(None, b"hello")) if reachable else None
print("FOUND", reachable, sent, flush=True)
os._exit(0)
"""

PARTICIPANT = """
import sys, time
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
cell = CoreCell("south", sys.argv[1], False, {})
cell.start()
while True:
    if "server" in cell.agents:
        cell.fire_and_forget("task", "heart_beat", "server", Message(None, b""))
    time.sleep(0.2)
"""


def found(scheme: str, how: str) -> str:
    """Whether the server has the participant again, and what came of sending it a message."""
    url = f"{scheme}://localhost:{free_port()}"

    def start(code: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-c", code, url, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    server = start(SERVER, how)
    try:
        next(line for line in server.stdout if line.startswith("READY"))
        participant = start(PARTICIPANT)
        try:
            return next(line for line in server.stdout if line.startswith("FOUND"))
        finally:
            participant.kill()
            participant.communicate()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("scheme", ["tcp", "grpc"])
def test_a_lost_participant_is_reachable_again_with_its_next_message(scheme):
    assert found(scheme, "guarded") == "FOUND True {'south': ''}\n"


def test_the_engine_alone_does_not_find_it():
    assert found("tcp", "alone").startswith("FOUND False")
