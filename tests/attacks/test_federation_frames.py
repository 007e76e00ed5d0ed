"""Every driver that a federation can use refuses a long frame before allocating memory for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.rehearsal import free_port

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

LISTENER = """
import sys, threading, time
import psutil
from fedprllm.federation.flare.configuration import HARDENING
from fedprllm.federation.flare.guarded import install
if sys.argv[2] == "guarded":
    install({"streaming_max_blob_size": 10**9, **HARDENING}, None)
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
cell = CoreCell("server", sys.argv[1], False, {})
cell.start()
process = psutil.Process()
before = highest = process.memory_info().rss
def watch():
    global highest
    while True:
        highest = max(highest, process.memory_info().rss)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
print("READY", flush=True)
for line in sys.stdin:
    print("GREW", (highest - before) // 2**20, flush=True)
"""

SENDER = """
import os, sys, time
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
cell = CoreCell("south", sys.argv[1], False, {})
cell.start()
end = time.monotonic() + 30
for _ in range(int(sys.argv[2])):
    while "server" not in cell.agents and time.monotonic() < end:
        time.sleep(0.05)
    frame = Message(None, bytes(200 * 2**20))
    print("SENT", cell.fire_and_forget("task", "register", "server", frame), flush=True)
    time.sleep(4 / int(sys.argv[2]))
os._exit(0)
"""


def highest_mb(scheme, how, n_frames):
    """Peak growth of a listener's memory, in MB, during 4 seconds in which it is sent frames of 200 MB."""
    url = f"{scheme}://localhost:{free_port()}"
    listener = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LISTENER, url, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        next(line for line in listener.stdout if line.startswith("READY"))
        command = [sys.executable, "-W", "ignore", "-c", SENDER, url, str(n_frames)]
        sent = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert "SENT" in sent.stdout, sent
        listener.stdin.write("\n")
        listener.stdin.flush()
        return int(next(line for line in listener.stdout if line.startswith("GREW")).split()[1])
    finally:
        listener.kill()
        listener.communicate()


@pytest.mark.parametrize("scheme", ["grpc", "http", "tcp"])
def test_a_frame_of_200_mb_takes_no_memory(scheme):
    assert highest_mb(scheme, "guarded", 4) < 40


def test_a_frame_of_200_mb_takes_memory_without_the_guard():
    """Confirms that the test above measures the effect of the guard."""
    assert highest_mb("tcp", "plain", 1) > 150
