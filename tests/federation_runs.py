"""Runs over the real engine, for the tests of what goes well and of what fails: fixtures and checks."""

from __future__ import annotations

import contextlib
import json

import pytest

from fedprllm import PruneConfig, prune
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.messages import read_reply
from fedprllm.federation.protocol.results import read_result_request
from fedprllm.files import read_json
from tests.federation_helpers import same_model
from tests.federation_processes import Federation, finish, wait_until
from tests.isolation import torch_threads

NAMES = ["north", "south", "west"]
# Enough text for a block to take long enough to be interrupted.
SLOW = {"windows": 80, "window_length": 128}
QUICK = {"windows": 2, "window_length": 32}
FORBIDDEN = [b"Once upon", b"little", b"birds", b"bread"]  # words of the text


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("federation")
    with Federation(folder, small_model, NAMES, 1500) as made:
        yield made
        only_the_parents_are_left(made)


def only_the_parents_are_left(federation):
    """Whether all computations and job processes have ended."""
    for name in NAMES:
        wait_until(lambda name=name: federation.part(name, "worker_process") is None, f"the end of {name}")
        assert federation.worker(name) is None
    assert federation.processes["server"].poll() is None


@pytest.fixture(scope="module")
def expected(federation, tmp_path_factory):
    """``expected(names, options)`` returns the model of the same run in one process, computed once."""
    made = {}

    def get(names, options):
        key = json.dumps([sorted(names), options], sort_keys=True)
        if key not in made:
            participants = {name: [str(federation.texts[name])] for name in sorted(names)}
            out = tmp_path_factory.mktemp("in-process")
            with torch_threads(1):
                made[key] = prune(federation.model, participants, PruneConfig(**options), out=out).model_dir
        return made[key]

    return get


@pytest.fixture(scope="module")
def complete(federation):
    """The name of an undisturbed run."""
    with federation.building_models():
        finish(federation.begin("complete", QUICK, quorum=3))
    return "complete"


def n_updates_sent(federation, name):
    """Number of updates in everything that a site recorded as sent; the rest must be answers."""
    n_updates = 0
    for path in (federation.folder / "sent" / name).glob("*.message"):
        message = path.read_bytes()
        header, payload = read_reply(message)
        assert header.tensor == ""
        for word in FORBIDDEN:
            assert word not in message
        if len(payload) and bytes(payload[8:16]) != bytes(8):  # the garbage of one test below
            update = wire.decode(payload, expect=None, max_bytes=len(payload))
            assert (update.participant, update.kind) == (name, "mask")
            n_updates += 1
    for path in (federation.folder / "sent" / name).glob("*.request"):
        assert read_result_request(path.read_bytes())
    return n_updates


def read_logs(federation):
    """The logs of the server and the sites."""
    found = {}
    for name in ("server", *NAMES):
        for path in (federation.kits / name).rglob("*"):
            if path.suffix in (".txt", ".log", ".json") and "startup" not in path.parts:
                with contextlib.suppress(FileNotFoundError):  # the engine may delete a job's folder
                    found[path] = path.read_bytes()
    return found


@pytest.fixture(autouse=True)
def nothing_else_leaves(federation):
    """After every fault: only answers and updates have left, and no log contains a word of the text."""
    yield
    for name in NAMES:
        n_updates_sent(federation, name)
    for path, content in read_logs(federation).items():
        assert b"Once upon" not in content, path
        assert b"birds" not in content, path


def check(federation, expected, run, names, options):
    same_model(federation.run_folder(run) / "model", expected(names, options))
    result = read_json(federation.run_folder(run) / "result.json")
    assert sorted(result["participants"]) == sorted(names)


def check_models(federation, run):
    """Whether every participant has the model, also those that were left out."""
    for name in NAMES:
        built = federation.kits / name / "runs" / run / "model"
        same_model(built, federation.run_folder(run) / "model")
        assert (built / "README.md").exists()
