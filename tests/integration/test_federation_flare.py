"""The real engine: server, sites and their processes on the loopback, and every way they can fail.

Each fault ends with the bits of an undisturbed run over the same surviving participants, computed in one
process.
"""

from __future__ import annotations

import contextlib
import json
import time

import psutil
import pytest

pytest.importorskip("nvflare")

from fedprllm import PruneConfig, prune
from fedprllm.federation.flare.processes import end
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.messages import read_reply
from fedprllm.federation.protocol.results import read_result_request
from fedprllm.federation.site.spool import Spool, read_ledger
from fedprllm.files import read_json
from tests.federation_helpers import same_model
from tests.federation_processes import Federation, finish, kill, wait_until
from tests.isolation import torch_threads

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore"),
]

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


def test_a_federated_run_and_one_in_process_give_the_same_model(federation, expected, complete):
    check(federation, expected, complete, NAMES, QUICK)
    check_models(federation, complete)


def test_an_iterative_run_and_one_in_process_give_the_same_model(federation, expected):
    options = {**QUICK, "strategy": "iterative"}
    with federation.building_models():
        output = finish(federation.begin("iterative", options, quorum=3))
    assert "50.00%" in output
    check(federation, expected, "iterative", NAMES, options)
    check_models(federation, "iterative")


def test_a_computation_is_killed(federation, expected):
    running = federation.begin("compute-killed", SLOW)
    wait_until(lambda: federation.n_computed("south", "compute-killed"), "the first update of south")
    worker = wait_until(lambda: federation.worker("south"), "the computation of south")
    assert federation.n_computed("south", "compute-killed") < 5
    kill([worker])
    output = finish(running)
    assert "retrying" not in output  # the job went on
    check(federation, expected, "compute-killed", NAMES, SLOW)


def test_a_job_process_is_killed(federation, expected):
    options = {**SLOW, "strategy": "iterative"}
    running = federation.begin("job-killed", options)
    wait_until(lambda: federation.n_computed("south", "job-killed"), "the first update of south")
    job = wait_until(lambda: federation.part("south", "worker_process"), "the job process of south")
    for process in (psutil.Process(federation.processes["south"].pid), job):
        # Only the computation holds the model, and only it loads torch, which takes 200 MB.
        assert not any("libtorch" in library.path for library in process.memory_maps())
    kill([job])
    output = finish(running)
    assert "retrying" in output
    check(federation, expected, "job-killed", NAMES, options)


def test_a_site_is_killed_and_comes_back(federation, expected):
    running = federation.begin("site-killed", SLOW)
    wait_until(lambda: federation.n_computed("west", "site-killed"), "the first update of west")
    kill(federation.family("west"))
    time.sleep(1)  # long enough for its absence to be noticed
    federation.start("west")
    finish(running)
    check(federation, expected, "site-killed", NAMES, SLOW)


def test_the_server_is_killed_and_restarted(federation, expected):
    options = {**SLOW, "strategy": "iterative"}
    running = federation.begin("server-killed", options)
    blocks = federation.run_folder("server-killed") / "blocks"
    wait_until(lambda: list(blocks.glob("*.json")), "the first decided block")
    kill(federation.family("server"))
    federation.start("server")
    finish(running)
    check(federation, expected, "server-killed", NAMES, options)


def test_a_participant_is_too_slow(federation, expected):
    running = federation.begin("too-slow", SLOW, start_s=40, deadline_s=30)
    wait_until(lambda: federation.n_computed("north", "too-slow"), "the first update of north")
    stopped = wait_until(lambda: federation.worker("north"), "the computation of north")
    stopped.suspend()
    try:
        with federation.building_models():
            finish(running)
    finally:
        kill([stopped])
    (event,) = [event for event in federation.events("too-slow") if event["event"] == "left out"]
    assert (event["participant"], event["reason"].split(":")[0]) == ("north", "deadline")
    check(federation, expected, "too-slow", ["south", "west"], SLOW)
    check_models(federation, "too-slow")


def test_a_participant_sends_garbage_and_may_correct_it(federation, expected):
    run = federation.run_folder("garbage")
    run.mkdir(parents=True)
    (run / ".run-id").write_text("ab" * 16)
    updates = federation.spool("south", "garbage") / "updates"
    updates.mkdir(parents=True)
    summary = {"kind": "mask", "n_tokens": 64, "shapes": {}}
    Spool(updates.parent).keep_update(0, b"FEDPRLLM" + bytes(3000), summary)
    finish(federation.begin("garbage", QUICK, quorum=3))
    (event,) = federation.events("garbage")
    assert event["participant"] == "south"
    assert event["event"] == "update of block 0 refused"
    check(federation, expected, "garbage", NAMES, QUICK)


def test_the_quorum_is_lost_and_the_run_continues_later(federation, expected):
    options = {**SLOW, "strategy": "iterative"}
    running = federation.begin("quorum", options, quorum=3, start_s=40, deadline_s=30)
    wait_until(lambda: federation.n_computed("north", "quorum"), "the first update of north")
    stopped = wait_until(lambda: federation.worker("north"), "the computation of north")
    stopped.suspend()
    try:
        output = finish(running, expected=2)
    finally:
        kill([stopped])
    assert "the quorum is 3" in " ".join(output.split())
    n_decided = len(list((federation.run_folder("quorum") / "blocks").glob("*.json")))
    assert n_decided < 5
    finish(federation.begin("quorum", options, quorum=3, deadline_s=120))
    check(federation, expected, "quorum", NAMES, options)


def test_who_was_away_fetches_the_result_later(federation, expected):
    end(federation.processes["west"])
    finish(federation.begin("away", QUICK, join_s=5))
    kit = federation.kits / "west"
    assert not (kit / "runs" / "away").exists()
    try:
        output = finish(federation.participate("west", "--fetch", "nonsense"), expected=2)
        assert "no result named nonsense" in " ".join(output.split())
        output = finish(federation.participate("west", "--fetch", "away", "--model", str(federation.model)))
        assert "50.0% zeros" in " ".join(output.split())
        same_model(kit / "runs" / "away" / "model", expected(["north", "south"], QUICK))
    finally:
        federation.write_settings("west")
        federation.start("west")
    lines = [
        line for line in read_ledger(kit / "fedprllm" / "ledger.jsonl") if line["direction"] == "received"
    ]
    run = (federation.run_folder("away") / ".run-id").read_text()
    assert [line["block"] for line in lines if line["run"] == run] == [None, *range(5)]


def test_what_left_was_answers_and_updates_and_no_word_of_the_text(federation, complete):
    """`nothing_else_leaves` checks after every test in this file; this test gives it something to find."""
    n_updates = {name: n_updates_sent(federation, name) for name in NAMES}
    ledgers = {name: federation.kits / name / "fedprllm" / "ledger.jsonl" for name in NAMES}
    for name in NAMES:
        assert 0 < n_updates[name] <= len(ledgers[name].read_text().splitlines())


def test_logs_hold_no_text(federation, complete):
    assert len(read_logs(federation)) > len(NAMES)
    assert any(complete.encode() in content for content in read_logs(federation).values())


def test_status_lists_participants_and_runs(federation, complete, monkeypatch):
    monkeypatch.chdir(federation.folder)  # where the default folder of the kits is looked up
    output = finish(federation.command("status", "--json"))
    status = json.loads(output[output.index("{") :])
    assert status["connected"] == NAMES
    assert status["runs"][complete][2] == "complete"


def test_no_process_is_left(federation, complete):
    only_the_parents_are_left(federation)
