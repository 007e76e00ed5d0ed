"""Attacks on an honest participant by a hostile server, the authority's owner and another local user."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nvflare")

from cryptography.x509.oid import NameOID
from nvflare.lighter.utils import (
    Identity,
    generate_cert,
    generate_keys,
    load_crt_bytes,
    load_private_key,
    serialize_cert,
    sign_folders,
)
from nvflare.private.defs import RequestHeader

from fedprllm.federation.flare.orders import CLIENT_FILE, client_configuration
from fedprllm.files import write_json
from tests.attacks.attackers import AttackedFederation, rss
from tests.attacks.test_federation_peer import MB, ROOM, SECRETS, grown, stream_headers
from tests.federation_processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

JOB = "00000000-0000-4000-8000-00000000000f"
NOBODY = 65534
MAIN = "from fedprllm.cli import main; main()"


class WatchedFederation(AttackedFederation):
    """Starts the participant with its own command and keeps its terminal output."""

    @property
    def terminal(self) -> str:
        return (self.folder / "terminal.txt").read_text()

    def start(self, name: str) -> None:
        if name in self.hostile:
            super().start(name)
            return
        with (self.folder / "terminal.txt").open("ab") as terminal:
            options = ["--data", str(self.texts[name]), "--model", str(self.model), "--max-message-mb", "300"]
            self.processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    MAIN,
                    "participate",
                    str(self.kits / name),
                    "--yes",
                    *options,
                ],
                stdout=terminal,
                stderr=terminal,
                env={**os.environ, "COLUMNS": "300"},
                start_new_session=True,
            )

    @property
    def site(self) -> psutil.Process:
        """The FLARE process of the honest participant."""
        process = self.part("north", "client_train")
        assert process is not None
        return process


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("server")
    model = small_model
    made = WatchedFederation(folder, model, ["north"], 50, hostile=["server"])
    everything = {"format_version": "1.0", "permissions": {"project_admin": "any"}}
    write_json(made.kits / "server" / "local" / "authorization.json", everything)
    with made:
        server = made.attackers["server"]
        wait_until(lambda: "north" in server("peers"), "the participant")
        # FLARE's server accepts no reply from a site before the site has a token.
        wait_until(lambda: "Successfully registered" in made.log("north"), "the participant's registration")
        (made.kits / "north" / "fedprllm").mkdir(exist_ok=True)
        (made.kits / "north" / "fedprllm" / "ledger.jsonl").write_text("{}\n")
        yield made


@pytest.fixture(scope="module")
def server(federation):
    return federation.attackers["server"]


def order(server, topic, **what):
    return server("request", "admin", "admin", "north", order=topic, **what)


LOOKING_AROUND = [
    ("sys.shell", {"body": "cat local/fedprllm.json startup/client.key"}),
    ("sys.shell", {"body": "cat ../local/fedprllm.json", "headers": {RequestHeader.USER_ROLE: "super"}}),
    ("sys.report_env", {}),
    ("sys.sys_info", {}),
    ("sys.configure_site_log", {"body": '{"version": 1}'}),
    ("train.configure_job_log", {"body": "DEBUG", "headers": {"job_id": JOB}}),
    ("train.delete_run", {"headers": {"job_id": "fedprllm"}}),
    ("train.delete_run", {"headers": {"job_id": "local"}}),
    ("train.shutdown", {}),
    ("train.restart", {}),
    ("train.check_status", {}),
    ("resource_manager.report_resources", {}),
    ("control.do_command", {}),
]


@pytest.mark.parametrize(("topic", "more"), LOOKING_AROUND)
def test_the_server_can_order_only_a_run(federation, server, topic, more):
    answer = order(server, topic, **more)
    assert (answer["code"], "not on the list" in answer["body"]) == ("_error", True), answer
    assert not any(secret in str(answer) for secret in SECRETS)
    assert (federation.kits / "north" / "fedprllm" / "ledger.jsonl").exists()
    assert (federation.kits / "north" / "local" / "fedprllm.json").exists()
    assert federation.processes["north"].poll() is None
    assert topic in str(federation.refusals("north"))
    wait_until(lambda: f"server asked: {topic}" in federation.terminal, "the line on the terminal", 20)


@pytest.mark.parametrize("job", ["fedprllm", "local", "..", f"{JOB} --set x=1", "", JOB.upper()])
@pytest.mark.parametrize("topic", ["train.deploy", "train.start_job", "train.abort"])
def test_a_job_id_cannot_name_a_folder_of_the_participant(federation, server, topic, job):
    headers = {"job_id": job, "job_meta": {"job_id": job}, "app_name": "app"}
    answer = order(server, topic, headers=headers, zip=zipped(run_files()).hex())
    assert (answer["code"], "expected a UUID as the job id" in answer["body"]) == ("_error", True), answer
    assert (federation.kits / "north" / "fedprllm" / "ledger.jsonl").exists()


def run_files():
    return {CLIENT_FILE: json.dumps(client_configuration())}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def intruder(marker):
    configuration = client_configuration()
    configuration["executors"][0]["executor"]["path"] = "intruder.Intruder"
    code = f"open({str(marker)!r}, 'w').close()\n"
    return {CLIENT_FILE: json.dumps(configuration), "custom/intruder.py": code}


def signed_by_super(federation, folder, files):
    """Sign an app with a certificate of role super that the authority issued."""
    folder_of_keys = federation.kits / ".authority"
    authority = load_crt_bytes((folder_of_keys / "root.crt").read_bytes())
    key = load_private_key((folder_of_keys / "root.key").read_text())
    (name,) = (part.value for part in authority.subject if part.oid == NameOID.COMMON_NAME)
    own_key, own_public = generate_keys()
    subject = Identity("coordinator@fedprllm.local", "fedprllm", "super")
    certificate = generate_cert(subject, Identity(name), key, own_public)
    (folder / "super.crt").write_bytes(serialize_cert(certificate))
    app = folder / "app"
    for file, content in files.items():
        (app / file).parent.mkdir(parents=True, exist_ok=True)
        (app / file).write_text(content)
    sign_folders(str(app), own_key, str(folder / "super.crt"))
    return {path.relative_to(app).as_posix(): path.read_bytes() for path in app.rglob("*") if path.is_file()}


def of_role(role):
    """Headers of an order that claims to come from a user with this role."""
    meta = {"job_id": JOB, "submitter_name": "x", "submitter_org": "fedprllm", "submitter_role": role}
    headers = {RequestHeader.JOB_ID: JOB, RequestHeader.APP_NAME: "app", RequestHeader.JOB_META: meta}
    headers |= {RequestHeader.ADMIN_COMMAND: "submit_job", RequestHeader.REQUIRE_AUTHZ: "true"}
    for name, value in (("NAME", "x"), ("ORG", "fedprllm"), ("ROLE", role)):
        headers[getattr(RequestHeader, f"USER_{name}")] = value
        headers[getattr(RequestHeader, f"SUBMITTER_{name}")] = value
    return headers


@pytest.mark.parametrize("role", ["super", "project_admin", "lead"])
def test_a_job_with_code_is_refused_regardless_of_its_signature(federation, server, tmp_path, role):
    marker = tmp_path / "was-here"
    files = signed_by_super(federation, tmp_path, intruder(marker))
    assert ".__nvfl_sig.json" in files
    headers = of_role(role)
    headers["job_meta"]["byoc"] = True
    answer = order(server, "train.deploy", headers=headers, zip=zipped(files).hex())
    assert (answer["code"], "BYOC not permitted" in answer["body"]) == ("_error", True), answer
    assert not list((federation.kits / "north").rglob("intruder.py"))
    order(server, "train.start_job", headers=headers)
    assert not marker.exists()


def test_role_super_may_not_even_submit_a_run(federation, server, tmp_path):
    """FLARE's authorizer grants this role every right; the files are those of an honest run."""
    files = signed_by_super(federation, tmp_path, run_files())
    headers = of_role("super")
    answer = order(server, "train.deploy", headers=headers, zip=zipped(files).hex())
    assert (answer["code"], "role 'super' has no rights" in answer["body"]) == ("_error", True), answer


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "exactly once"),
        ({CLIENT_FILE: "{}"}, "differs from the one that every fedprllm run uses"),
        ({CLIENT_FILE: "[" * 100_000}, "cannot be read"),
        ({CLIENT_FILE: "{" + " " * 2_000_000 + "}"}, "at most"),
        ({**run_files(), "config/comm_config.json": "{}"}, "BYOC not permitted"),
        ({**run_files(), "../../local/x.json": "{}"}, "BYOC not permitted"),
        (None, "cannot be read"),
    ],
)
def test_an_app_that_is_not_a_run_is_refused(server, files, reason):
    headers = {"job_id": JOB, "app_name": "app", "job_meta": {"job_id": JOB}}
    content = b"no zip" if files is None else zipped(files)
    answer = order(server, "train.deploy", headers=headers, zip=content.hex())
    assert (answer["code"], reason in answer["body"]) == ("_error", True), answer


HANDLERS = [
    ("_net_manager", "change_root"),
    ("_net_manager", "stop"),
    ("_net_manager", "process_info"),
    ("cellnet.channel", "bulk"),
    ("credential_manager", "key_exchange"),
    ("aux_communication", "ObjectStreamer.Request"),
    ("server_command", "get_task"),
    ("server_command", "submit_update"),
    ("client_command", "abort"),
    ("download_service__", "download_service__download"),
    ("admin", "sys.shell"),
]


@pytest.mark.parametrize(("channel", "topic"), HANDLERS)
def test_the_server_reaches_no_other_handler_of_a_site(federation, server, channel, topic):
    answer = server("request", channel, topic, "north", size=10)
    assert "not on the list of messages that a run needs" in answer["error"], answer
    assert f"{channel}/{topic}" in str(federation.refusals("north"))


# Memory ----------------------------------------------------------------------------------------


def test_unsolicited_frames_of_200_mb_take_no_memory_of_a_site(federation, server):
    def attack():
        server.raw("server", "north", "admin", "admin", size=200 * MB, times=5)

    assert grown(federation.site, attack) < ROOM
    wait_until(lambda: "north" in server("peers"), "the participant to come back", 60)


@pytest.mark.parametrize("channel", ["aux_communication", "return_only", "admin"])
def test_unsolicited_streams_of_200_mb_take_no_memory_of_a_site(federation, server, channel):
    def attack():
        for number in range(5):
            for sequence in range(40):
                headers = stream_headers(channel, "admin", 2000 + number, sequence)
                server.raw("server", "north", "sm__STREAM", "sm__DATA", headers=headers, size=MB)

    assert grown(federation.site, attack) < ROOM


# Another user of the same machine ---------------------------------------------------------------

STRANGER = f"""
import os, sys
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
from nvflare.private.admin_defs import Message as Order
from nvflare.fuel.utils import fobs
if os.getuid() == 0:
    os.setgid({NOBODY}); os.setuid({NOBODY})
assert os.getuid() == {NOBODY}
url, address, *startup = sys.argv[1:]
keys = dict(ca_cert="rootCA.pem", client_cert="client.crt", client_key="client.key")
credentials = {{key: os.path.join(startup[0], name) for key, name in keys.items()}} if startup else {{}}
cell = CoreCell(address, url, bool(startup), credentials, parent_url=url)
cell.start()
import time
end = time.monotonic() + 5
while "north" not in cell.agents and time.monotonic() < end: time.sleep(0.05)
if "north" not in cell.agents:
    print("ANSWER no connection", flush=True); os._exit(0)
reply = cell.send_request("admin", "sys.shell", "north", Message(None, b"cat startup/client.key"), 5)
print("ANSWER", reply.headers, str(reply.payload), flush=True)
os._exit(0)
"""


def loopback_port(process):
    ports = [
        link.laddr.port for link in process.net_connections(kind="tcp") if link.status == psutil.CONN_LISTEN
    ]
    assert len(ports) == 1, ports
    return ports[0]


def test_a_site_listens_only_on_the_loopback(federation):
    listening = [
        link.laddr.ip
        for link in federation.site.net_connections(kind="inet")
        if link.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


@pytest.mark.parametrize("scheme", ["tcp", "stcp"])
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_without_a_certificate_gets_no_connection(federation, scheme, tmp_path):
    port = loopback_port(federation.site)
    arguments = [f"{scheme}://localhost:{port}", f"north.{JOB}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert "ANSWER no connection" in done.stdout, done
    with pytest.raises((ssl.SSLError, ConnectionError)):
        first_byte(port)


def first_byte(port):
    """Read a byte without presenting a certificate; a listener that requires one sends nothing."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain) as secured,
    ):
        secured.sendall(bytes(16))
        if not secured.recv(1):
            raise ConnectionError


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_cannot_read_the_engines_key(federation):
    program = f"import os, sys; os.setgid({NOBODY}); os.setuid({NOBODY}); open(sys.argv[1]).read()"
    key = federation.kits / "north" / "engine" / "startup" / "client.key"
    command = [sys.executable, "-c", program, str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "PermissionError" in done.stderr


def test_another_participants_certificate_gives_no_access_to_a_sites_port(federation, tmp_path):
    """North's own authority signed the certificate, so it is refused because of its name."""
    from fedprllm.federation.flare.kits import write_ready_kits
    from fedprllm.federation.plan import Plan

    plan = federation.plan
    write_ready_kits(
        Plan(**plan.model_dump() | {"participants": [*plan.participants, "other"]}), federation.kits
    )
    startup = tmp_path / "startup"
    shutil.copytree(federation.kits / "other" / "startup", startup)
    port = loopback_port(federation.site)
    program = STRANGER.replace(f"assert os.getuid() == {NOBODY}", "").replace("os.getuid() == 0", "False")
    arguments = [f"stcp://localhost:{port}", f"north.{JOB}", str(startup)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "PRIVATE KEY" not in done.stdout
    assert "authenticated as 'other'" in federation.log("north") or "no connection" in done.stdout, done


def test_the_participant_is_still_there(federation, server):
    assert federation.processes["north"].poll() is None
    assert "north" in server("peers")
    assert rss(federation.site) < 400 * MB
    assert Path(federation.kits / "north" / "engine" / "local" / "resources.json").exists()
