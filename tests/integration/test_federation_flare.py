"""The real engine: server, sites and their processes on the loopback, and participants that fail.

Each fault ends with the bits of an undisturbed run over the same surviving participants, computed in one
process.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.site.spool import Spool
from tests.federation_processes import finish, kill, wait_until
from tests.federation_runs import (
    NAMES,
    QUICK,
    SLOW,
    check,
    check_models,
    complete,
    expected,
    federation,
    n_updates_sent,
    nothing_else_leaves,
    only_the_parents_are_left,
    read_logs,
)

# Imported fixtures, which pytest finds by their names here.
__all__ = ["complete", "expected", "federation", "nothing_else_leaves"]

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore"),
]


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
