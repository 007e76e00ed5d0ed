"""An altered kit has no effect at a participant, and an untested version of FLARE is not started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("nvflare")

from fedprllm.errors import RunError
from fedprllm.federation.flare.configuration import altered_files, prepare_engine, site_configuration
from fedprllm.federation.flare.kits import write_ready_kits
from fedprllm.federation.flare.policy import TESTED_VERSIONS, check_version
from fedprllm.federation.flare.processes import end
from fedprllm.federation.flare.rehearsal import free_port
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json
from tests.federation_processes import wait_until

STARTUP = ("client.crt", "client.key", "rootCA.pem", "fed_client.json")
MAIN = "from fedprllm.cli import main; main()"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    write_ready_kits(Plan(server="localhost", port=free_port(), participants=["north"]), folder)
    return folder


@pytest.fixture
def kit(made, tmp_path):
    shutil.copytree(made / "north", tmp_path / "north")
    (tmp_path / "text.txt").write_text("Once upon a time.")
    return tmp_path / "north"


def participate(kit, **environment):
    """Start the participant's own command, with all output in one file."""
    output, text = kit.parent / "output.txt", kit.parent / "text.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                MAIN,
                "participate",
                str(kit),
                "--yes",
                "--data",
                str(text),
            ],
            stdout=file,
            stderr=file,
            env={**os.environ, "COLUMNS": "300", **environment},
            start_new_session=True,
        )
    return process, output


def test_a_participants_kit_holds_an_address_and_certificates_only(made):
    kit = made / "north"
    files = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert files == {f"startup/{name}" for name in STARTUP}
    assert altered_files(kit, 1024) == []
    assert not list(made.rglob("*.sh"))  # FLARE's own scripts would start it without the guard


def doctored(kit, marker):
    """Add every FLARE configuration that can run code or grant access."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    local, startup = kit / "local", kit / "startup"
    (local / "custom").mkdir(parents=True)
    (local / "custom" / "evil.py").write_text(code + "from logging import NullHandler as build\n")
    opener = {"()": "builtins.open", "file": str(marker), "mode": "w"}
    handlers = {"a": opener, "b": {"()": "evil.build"}}
    log = {"version": 1, "handlers": handlers, "root": {"handlers": list(handlers)}}
    write_json(local / "log_config.json", log)
    write_json(local / "comm_config.json", {"comm_driver_path": str(local / "custom")})
    everything = {"format_version": "1.0", "permissions": {"project_admin": "any"}}
    write_json(local / "authorization.json", everything)
    write_json(local / "privacy.json", {"scopes": []})
    component = {"components": [{"id": "x", "path": "evil.build", "args": {}}]}
    write_json(local / "resources.json", site_configuration(1024)["resources.json"] | component)
    write_json(startup / "x__resources.json", component)
    write_json(local / "x__p_resources.json", component)
    client = read_json(startup / "fed_client.json")
    write_json(startup / "fed_client.json", client | {"relay_config": {"fqcn": "relay"}, **component})
    engine = kit / "engine"
    (engine / "local" / "custom").mkdir(parents=True)
    shutil.copy(local / "custom" / "evil.py", engine / "local" / "custom")
    (engine / "deep" / "er").mkdir(parents=True)
    shutil.copy(local / "comm_config.json", engine / "deep" / "er")


@pytest.mark.federation
def test_an_altered_kit_runs_no_code_and_is_reported(kit, tmp_path):
    marker = tmp_path / "was-here"
    doctored(kit, marker)
    process, output = participate(kit)
    try:
        log = kit / "engine" / "log.txt"
        wait_until(lambda: log.exists() and "secure channel" in log.read_text(), "the engine to start", 60)
        time.sleep(1.0)
        assert not marker.exists()
        said = output.read_text()
        for name in ("log_config", "comm_config", "authorization", "privacy", "resources"):
            assert f"local/{name}.json differs from what is installed here" in said, said
        for name in ("fed_client.json", "x__resources.json"):
            assert f"startup/{name} differs" in said, said
        found = {
            path.relative_to(kit / "engine").as_posix()
            for part in ("local", "startup", "deep")
            for path in (kit / "engine" / part).rglob("*")
        }
        ours = {f"local/{name}" for name in site_configuration(1024)}
        assert found == ours | {f"startup/{name}" for name in STARTUP}
        inside = read_json(kit / "engine" / "local" / "comm_config.json")["internal"]["resources"]
        assert inside["connection_security"] == "mtls"
    finally:
        end(process)


def test_a_kit_that_allows_every_class_is_refused(kit):
    resources = site_configuration(1024)["resources.json"]
    write_json(kit / "local" / "resources.json", resources | {"class_allow_list": ["*"]})
    process, output = participate(kit)
    assert process.wait(timeout=60) == 2
    assert "lets a run use every class" in output.read_text()
    assert not (kit / "engine").exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("fqsn", "server"),
        ("fqsn", "north.x"),
        ("fqsn", "../../x"),
        ("target", "localhost"),
        ("target", "localhost:80 --set x=1"),
        ("scheme", "file"),
        ("identity", None),
        ("name", "a b"),
    ],
)
def test_an_invalid_address_is_refused(kit, where, value):
    path = kit / "startup" / "fed_client.json"
    content = read_json(path)
    part = content["servers"][0] if where in ("identity", "name") else content["servers"][0]["service"]
    (content["client"] if where == "fqsn" else part)[where] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="cannot be"):
        prepare_engine(kit, 1024)
    assert not (kit / "engine").exists()


@pytest.mark.parametrize("place", ["engine", "fedprllm", "engine/log.txt", "local/fedprllm.json"])
def test_links_in_a_kit_are_not_followed(kit, tmp_path, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.json").write_text("precious")
    (kit / place).parent.mkdir(exist_ok=True)
    (kit / place).symlink_to(elsewhere)
    with pytest.raises(RunError, match="is a link"):
        prepare_engine(kit, 1024)
    assert (elsewhere / "mine.json").read_text() == "precious"


def test_only_logs_survive_a_restart(kit):
    engine = prepare_engine(kit, 1024)
    logs, others = {"log.txt", "log.txt.1", "audit.log", "x/audit.log"}, {"x/app/config/comm.json", "evil.py"}
    for name in logs | others:
        (engine / name).parent.mkdir(parents=True, exist_ok=True)
        (engine / name).write_text("kept?")
    prepare_engine(kit, 7)
    kept = {path.relative_to(engine).as_posix() for path in engine.rglob("*") if path.is_file()}
    assert logs <= kept
    assert not others & kept
    assert read_json(engine / "local" / "comm_config.json")["streaming_max_blob_size"] == 7_000_000


def test_an_untested_version_of_flare_is_refused_before_anything_starts(kit, tmp_path):
    other = tmp_path / "site" / "nvflare-2.9.7.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: nvflare\nVersion: 2.9.7\n")
    path = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")])
    process, output = participate(kit, PYTHONPATH=path)
    assert process.wait(timeout=60) == 2
    said = output.read_text()
    assert "NVIDIA FLARE 2.9.7 is installed" in said
    assert "pip install 'nvflare==2.9.0'" in said
    assert not (kit / "engine").exists()


def test_only_tested_versions_of_flare_are_accepted():
    for version in TESTED_VERSIONS:
        check_version(version)
    for version in ("2.8.9", "2.9.0.dev1", "2.9.1", "2.10.0"):
        with pytest.raises(RunError, match="may open new ways"):
            check_version(version)
