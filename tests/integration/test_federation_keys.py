"""A federation whose participants made their keys themselves, on real processes: honest, renewed, revoked."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from typer.testing import CliRunner

from fedprllm import PruneConfig, prune
from fedprllm.cli.app import app
from fedprllm.federation.flare.processes import end, start_participant
from fedprllm.federation.flare.rehearsal import free_port
from fedprllm.federation.flare.request_log import read_requests
from fedprllm.federation.plan import Plan, SiteSettings
from fedprllm.federation.site.site import settings_path
from fedprllm.files import read_json, write_json
from tests.federation_helpers import same_model
from tests.federation_processes import Federation, finish, wait_until
from tests.isolation import torch_threads
from tests.private_keys import private_keys

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

NAMES = ["north", "south", "west"]
QUICK = {"windows": 2, "window_length": 32}
SLOW = {"windows": 80, "window_length": 128, "strategy": "iterative"}


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class OwnKeys(Federation):
    """Every participant has a folder of its own, as on a machine of its own; only files are handed over."""

    def kit(self, name: str) -> Path:
        return self.kits / name if name == "server" else self.folder / f"machine-of-{name}" / name

    def make_kits(self, people: dict[str, SiteSettings]) -> Plan:
        plan = Plan(name="clinics", server="localhost", port=free_port(), participants=sorted(people))
        lines = [f"{key} = {json.dumps(value)}" for key, value in plan.model_dump().items()]
        (self.folder / "plan.toml").write_text("\n".join(lines))
        run("federation", "init", self.folder / "plan.toml", "--out", self.kits)
        for name, settings in people.items():
            run("identity", "new", name, "--out", self.kit(name))
            self.certify(name)
            write_json(settings_path(self.kit(name)), settings.model_dump(mode="json"))
        return plan

    def certify(self, name: str) -> None:
        mailed = shutil.copy(self.kit(name) / f"{name}.csr", self.folder / "mailed.csr")
        run("federation", "sign", mailed, "--kits", self.kits, "--yes")
        back = shutil.copy(self.kits / f"{name}.kit", self.folder / "mailed.kit")
        run("identity", "accept", self.kit(name), back, "--yes")

    def connected(self) -> set[str]:
        def output() -> str:
            command = self.command("status", "--kits", str(self.kits), "--json")
            said = command.communicate(timeout=60)[0]
            return said if command.returncode == 0 else ""

        answer = wait_until(output, "the server's answer")  # it may be busy
        return set(json.loads(answer[answer.index("{") :])["connected"])

    def told(self, name: str) -> list[str]:
        """Why the server turned a participant away, as its terminal shows it."""
        lines = read_requests(self.kit(name) / "fedprllm" / "requests.jsonl")
        return [line["reason"] for line in lines if line["what"] == "turned away"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    with OwnKeys(tmp_path_factory.mktemp("keys"), small_model, NAMES, 1500) as made:
        for name in NAMES:  # any of the tests may be the first one
            log = made.kit(name) / "engine" / "log.txt"
            wait_until(
                lambda log=log: log.exists() and "Successfully registered" in log.read_text(), f"{name}"
            )
        yield made


def expected(federation, names, options, out):
    participants = {name: [str(federation.texts[name])] for name in names}
    with torch_threads(1):
        return prune(federation.model, participants, PruneConfig(**options), out=out)


def test_an_honest_run_has_the_bits_of_a_run_in_one_process(federation, tmp_path):
    finish(federation.begin("honest", QUICK, quorum=3))
    same_model(
        federation.run_folder("honest") / "model", expected(federation, NAMES, QUICK, tmp_path).model_dir
    )


def test_no_private_key_of_a_participant_is_anywhere_but_on_its_machine(federation):
    everywhere = private_keys(federation.folder)
    assert {path.split("!")[0].split("/")[0] for path in everywhere} == {
        "kits",
        *(f"machine-of-{name}" for name in NAMES),
    }
    in_kits = {path for path in everywhere if path.startswith("kits/")}
    assert in_kits == {
        "kits/.authority/root.key",
        "kits/admin/startup/client.key",
        "kits/server/startup/server.key",
    }


def revoke(federation, name, *options):
    return finish(federation.command("revoke", name, "--kits", str(federation.kits), *options))


@contextlib.contextmanager
def let_in_again(federation, name):
    """Whatever happens, the participant takes part again afterwards; one that still runs is not restarted."""
    try:
        yield
    finally:
        revoke(federation, name, "--undo")
        if federation.processes[name].poll() is not None:
            federation.start(name)
    wait_until(lambda: name in federation.connected(), f"{name} to be let in again")


def test_a_revocation_takes_effect_in_a_running_job(federation):
    with let_in_again(federation, "west"), federation.building_models():
        running = federation.begin("cut", SLOW, quorum=2)
        blocks = federation.run_folder("cut") / "blocks"
        wait_until(lambda: (blocks / "block-0000.json").exists(), "the first block")
        assert "refused from now on" in revoke(federation, "west")
        finish(running)
        records = [read_json(path) for path in sorted(blocks.glob("*.json"))]
        voted = ["west" in record["n_tokens"] for record in records]
        assert voted[0]
        assert not voted[-1]
        assert voted == sorted(voted, reverse=True)  # what was counted stays; nothing is counted afterwards
        assert all({"north", "south"} <= set(record["n_tokens"]) for record in records)
        (event,) = (event for event in federation.events("cut") if event["participant"] == "west")
        assert event["event"] == "left out"
        assert event["reason"].startswith("revoked")
        assert "west" not in federation.connected()
        # Only who still takes part gets the result.
        assert (federation.kit("north") / "runs" / "cut" / "model").exists()
        assert not (federation.kit("west") / "runs" / "cut" / "model").exists()
        wait_until(lambda: federation.part("west", "worker_process") is None, "the end of its computation")


def test_a_revoked_participant_is_told_and_cannot_connect_again(federation):
    with let_in_again(federation, "west"):
        revoke(federation, "west")
        wait_until(lambda: "was revoked" in " ".join(federation.told("west")), "the server's word")
        end(federation.processes["west"])
        n_told = len(federation.told("west"))
        federation.start("west")
        wait_until(lambda: len(federation.told("west")) > n_told, "the refusal of a new connection")
        assert federation.processes["west"].wait(timeout=60) != 0
        assert "west" not in federation.connected()


def test_a_replaced_key_is_refused_and_the_new_one_is_not(federation):
    stolen = federation.folder / "machine-of-a-thief" / "west"
    shutil.copytree(federation.kit("west") / "startup", stolen / "startup")
    run("identity", "renew", federation.kit("west"), "--new-key")
    federation.certify("west")
    end(federation.processes["west"])
    n_logged = len((federation.kit("west") / "engine" / "log.txt").read_text())
    thief = start_participant(stolen)
    try:
        requests = stolen / "fedprllm" / "requests.jsonl"
        wait_until(
            lambda: any("newer key" in line.get("reason", "") for line in read_requests(requests)), "refusal"
        )
        assert thief.wait(timeout=60) != 0
        federation.start("west")
        registered = federation.kit("west") / "engine" / "log.txt"
        wait_until(lambda: "Successfully registered" in registered.read_text()[n_logged:], "its new key")
    finally:
        end(thief)
        shutil.rmtree(stolen.parent)
