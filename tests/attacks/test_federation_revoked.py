"""Over every driver, a server reads the certificate of a connection and turns away a replaced one."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.kits import write_ready_kits
from fedprllm.federation.flare.rehearsal import free_port
from fedprllm.federation.keys import revoked
from fedprllm.federation.keys.certificates import read_certificate
from fedprllm.federation.plan import Plan
from fedprllm.files import write_json
from tests.federation_processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

SERVER = """
import sys
from pathlib import Path
from fedprllm.federation.flare.configuration import HARDENING
from fedprllm.federation.flare.guarded import install
from fedprllm.federation.flare.turned_away import TurnedAway, serial_of
from fedprllm.federation.keys.revoked import RevokedFile
url, kit = sys.argv[1], Path(sys.argv[2])
class Telling(TurnedAway):
    def reason(self, endpoint, connection):
        reason = super().reason(endpoint, connection)
        print("JUDGED", endpoint, serial_of(connection), reason, flush=True)
        return reason
install({"streaming_max_blob_size": 10**9, **HARDENING}, None, Telling(RevokedFile(kit)))
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
names = {"ca_cert": "rootCA.pem", "server_cert": "server.crt", "server_key": "server.key"}
cell = CoreCell("server", url, True, {key: str(kit / "startup" / name) for key, name in names.items()})
cell.start()
print("READY", flush=True)
sys.stdin.read()
"""

SITE = """
import os, sys, time
from pathlib import Path
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver
from nvflare.fuel.f3.message import Message
CellIdentityResolver.require_match = lambda *_: None  # the server is named localhost here
url, kit = sys.argv[1], Path(sys.argv[2])
names = {"ca_cert": "rootCA.pem", "client_cert": "client.crt", "client_key": "client.key"}
cell = CoreCell("north", url, True, {key: str(kit / "startup" / name) for key, name in names.items()})
cell.start()
end = time.monotonic() + 30
while "server" not in cell.agents and time.monotonic() < end:
    time.sleep(0.05)
answer = cell.send_request("task", "heart_beat", "server", Message(None, b"x"), timeout=20)
print("ANSWER", answer.headers.get("cn__return_code"), answer.headers.get("cn__error"), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    write_ready_kits(Plan(server="localhost", port=free_port(), participants=["north"]), folder)
    return folder


def site_says(url, kit):
    command = [sys.executable, "-W", "ignore", "-c", SITE, url, str(kit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))


@contextlib.contextmanager
def listening(url, kit, output):
    """Run a guarded server; yields a function that returns the lines printed so far."""
    with output.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, url, str(kit)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: "READY" in output.read_text(), "the server", 60)
        yield lambda: output.read_text().splitlines()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("scheme", ["grpc", "http", "tcp"])
def test_a_replaced_certificate_is_turned_away(kits, scheme, tmp_path):
    path = kits / "server" / revoked.REVOKED
    path.unlink(missing_ok=True)
    serial = f"{read_certificate(kits / 'north' / 'startup' / 'client.crt').serial_number:x}"
    url = f"{scheme}://localhost:{free_port()}"
    with listening(url, kits / "server", tmp_path / "output.txt") as lines:
        assert "newer key" not in site_says(url, kits / "north")
        judged = next(line for line in lines() if line.startswith("JUDGED north"))
        assert judged.split()[2:4] == [serial, "None"]
        revoked.supersede(kits / "server", ["abc", serial])
        assert "unauthenticated refused: participant 'north' has a newer key" in site_says(
            url, kits / "north"
        )
        write_json(path, {"names": {}, "serials": ["abc"]})  # another participant's
        assert "newer key" not in site_says(url, kits / "north")
        revoked.revoke(kits / "server", "north")
        assert "unauthenticated refused: participant 'north' was revoked" in site_says(url, kits / "north")
