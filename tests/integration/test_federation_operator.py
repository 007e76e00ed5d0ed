"""The operator's day with the real engine: what terminals say, interruption, stopping, a paused server."""

from __future__ import annotations

import shutil
import signal
import socket
import time

import psutil
import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.processes import end
from fedprllm.federation.keys.reach import obstacle
from tests.federation_processes import Federation, finish, kill, start, wait_until

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

NAMES = ["north", "south"]
SLOW = {"windows": 80, "window_length": 128}
OURS = (
    "--min-tokens",
    "2",
    "--min-windows",
    "1",
    "--min-participants",
    "1",
    "--runs-per-text",
    "99",
    "--yes",
)

CLI = "from fedprllm.cli.app import main; main()"


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("operator")
    with Federation(folder, small_model, NAMES, 1500) as made:
        yield made


def jobs(federation):
    return sorted(path.name for path in (federation.kits / "server" / "storage" / "jobs").iterdir())


def interrupt(process):
    process.send_signal(signal.SIGINT)
    return finish(process, 130)


def test_a_run_is_interrupted_attached_to_stopped_and_continued(federation):
    first = federation.begin("run", SLOW, silence_s=60)
    wait_until(lambda: federation.n_computed("south", "run"), "the first update of south")
    federation.worker("south").suspend()  # the run waits for it
    said = interrupt(first)
    assert "run run goes on at the server; the same command attaches to it again" in said
    assert "federation stop run" in said
    (job,) = jobs(federation)

    paused = [psutil.Process(federation.processes["server"].pid)]
    second = federation.begin("run", SLOW, silence_s=60)
    time.sleep(8)  # it attaches
    for process in paused:
        process.suspend()
    time.sleep(20)
    for process in paused:
        process.resume()
    other = finish(federation.begin("run", {**SLOW, "sparsity": 0.75}, silence_s=60), 2)
    assert "is going on with sparsity 0.5, and this file has 0.75" in " ".join(other.split())
    assert jobs(federation) == [job]

    stopped = finish(federation.command("stop", "run", "--kits", str(federation.kits)))
    assert "run run is stopped" in stopped
    said = finish(second, 2)
    assert f"attached to job {job}" in said
    assert "was stopped by 'fedprllm federation stop'" in " ".join(said.split())
    assert jobs(federation) == [job]
    assert "is not going on" in finish(federation.command("stop", "run", "--kits", str(federation.kits)), 2)

    output = finish(federation.begin("run", SLOW, silence_s=60))
    assert len(jobs(federation)) == 2
    assert "50.00%" in output
    assert "\x1b" not in output


def test_a_participant_says_whether_it_is_connected_and_why_not(federation):
    end(federation.processes["north"])
    contact = federation.kit("north") / "fedprllm" / "contact.json"
    contact.unlink(missing_ok=True)  # as when it was never connected
    process = federation.participate(
        "north", "--data", str(federation.texts["north"]), "--model", str(federation.model), *OURS
    )
    wait_until(lambda: contact.exists() and '"connected": true' in contact.read_text(), "the connection")
    time.sleep(3)  # the terminal is written every second
    assert obstacle(federation.kit("north")) == ""
    kill(federation.family("server"))
    wait_until(lambda: '"connected": false' in contact.read_text(), "the loss of the connection")
    assert "refuses the connection" in obstacle(federation.kit("north"))
    time.sleep(20)
    federation.start("server")
    wait_until(lambda: '"connected": true' in contact.read_text(), "the connection")
    time.sleep(3)
    said = interrupt(process)
    federation.start("north")
    assert said.count("connected since") == 2
    assert "not connected: localhost" in said
    assert "refuses the connection: the server is not running" in said
    assert "\x1b" not in said


def test_a_certificate_of_another_federation_is_named(federation, tmp_path):
    foreign = Federation(tmp_path, federation.model, NAMES, 10)
    kit = tmp_path / "mixed"
    shutil.copytree(foreign.kit("north"), kit)
    shutil.copy(federation.kit("north") / "startup" / "fed_client.json", kit / "startup")
    assert "is not accepted" in obstacle(kit)  # the server's
    shutil.copy(federation.kit("north") / "startup" / "rootCA.pem", kit / "startup")
    assert "does not accept this participant's certificate" in obstacle(kit)


def test_a_host_that_is_unknown_or_silent_is_named(federation, tmp_path):
    kit = tmp_path / "kit"
    shutil.copytree(federation.kit("north") / "startup", kit / "startup")
    path = kit / "startup" / "fed_client.json"
    written = path.read_text()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        path.write_text(written.replace(f":{federation.plan.port}", f":{silent.getsockname()[1]}"))
        assert "does not answer" in obstacle(kit, timeout_s=0.5)
    path.write_text(written.replace("localhost:", "nowhere.invalid:"))
    assert "nowhere.invalid is unknown" in obstacle(kit)
    said = finish(
        start(
            CLI,
            "participate",
            str(kit),
            "--data",
            str(federation.texts["north"]),
            "--yes",
        ),
        2,
    )
    assert "nowhere.invalid is unknown" in said
    assert "text" not in said.splitlines()[0]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_that_is_taken_is_said_before_anything_starts(federation):
    wait_until(lambda: is_open(federation.plan.port), "the server's port")
    said = finish(start(CLI, "federation", "serve", str(federation.kit("server"))), 2)
    assert f"port {federation.plan.port} is taken" in str(said)
    assert "has started" not in said


def test_the_server_names_who_is_connected(federation):
    path = federation.kit("server") / "contact.json"
    wait_until(lambda: path.exists() and all(name in path.read_text() for name in NAMES), "both participants")
