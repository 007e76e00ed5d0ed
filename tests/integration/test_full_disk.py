"""Full disks, at the server and at participants: the system itself says that there is no space.

A temporary file that is a link to /dev/full cannot be written, once: what notices it removes the link.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from fedprllm.errors import DiskFull
from fedprllm.federation.coordinator import rounds
from fedprllm.federation.protocol.messages import Request, pack, read_reply, read_request
from fedprllm.federation.site import worker
from fedprllm.federation.site.site import LEDGER
from fedprllm.federation.site.spool import append_ledger, read_ledger
from fedprllm.files import append_line, read_json, read_sealed
from tests.federation_helpers import (
    NAMES,
    Local,
    conduct,
    make_plan,
    make_site,
    texts,
    threads,  # noqa: F401  a fixture
)

FULL = Path("/dev/full")
pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full"),
]
SUMMARY = {"kind": "mask", "n_tokens": 1, "shapes": {}}


def no_space_for(path: Path) -> Path:
    """Make the next write of a file fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    link.symlink_to(FULL)
    return link


@pytest.fixture
def sites(tmp_path, small_model, monkeypatch):
    monkeypatch.setattr(rounds, "_POLL_S", 0.01)
    monkeypatch.setattr(worker, "_SPACE_POLL_S", 0.01)
    paths = texts(tmp_path / "texts")
    made = {name: make_site(tmp_path, name, paths[name], small_model, threads=1) for name in NAMES}
    yield made
    for site in made.values():
        site.close()


def outcome(tmp_path):
    return read_json(tmp_path / "runs" / "run" / "federation" / "outcome.json")


@pytest.mark.parametrize(
    "file",
    [
        "federation/plan.json",
        "federation/status.json",
        "federation/updates/block-0002/south.update",
        "result/block-0001.decision",
        "blocks/block-0003.json",
        "result.json",
    ],
)
def test_a_full_disk_at_the_server_is_said_and_the_run_continues(tmp_path, small_model, sites, file):
    path, plan, channel = tmp_path / "runs" / "run" / file, make_plan(small_model), Local(sites)
    if file == "federation/plan.json":
        no_space_for(path)
    began = []

    def meddle(name, request, answer):
        if not began and read_request(request)[0].op == "fetch":
            began.append(no_space_for(path))
        return answer

    channel.meddle = meddle
    assert conduct(tmp_path, plan, channel) == "disk full"
    assert "the server's disk is full" in outcome(tmp_path)["reason"]
    assert "the same command continues" in outcome(tmp_path)["reason"]
    assert conduct(tmp_path, plan, Local(sites)) == "complete", outcome(tmp_path)


def test_a_full_disk_while_an_event_is_noted(tmp_path, small_model, sites):
    events = tmp_path / "runs" / "run" / "federation" / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.symlink_to(FULL)
    channel = Local({name: site for name, site in sites.items() if name != "west"})
    channel.ask = lambda names, *rest: Local.ask(channel, [name for name in names if name != "west"], *rest)
    assert conduct(tmp_path, make_plan(small_model, join_s=0.2), channel) == "disk full"


def test_any_other_failure_of_the_disk_ends_the_job_with_words(tmp_path, small_model, sites):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "federation").mkdir()
    (tmp_path / "runs" / "run" / "federation" / "status.json").mkdir()
    assert conduct(tmp_path, make_plan(small_model), Local(sites)) == "error"
    assert "status.json" in outcome(tmp_path)["reason"]
    assert "directory" in outcome(tmp_path)["reason"]


@pytest.mark.parametrize("file", ["updates/block-0001.update", "state/hidden-0002.json"])
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_computation_waits_for_space(tmp_path, small_model, sites, file, strategy):
    said = []
    channel = Local(sites)

    def meddle(name, request, answer):
        if name == "south" and read_request(request)[0].op == "start":
            no_space_for(sites["south"].spool.folder / file)
        said.append((name, read_reply(answer)[0].state))
        return answer

    channel.meddle = meddle
    held = threading.Event()
    set_status = worker.Spool.set_status
    waits = []

    def note(spool, state, code="", *rest, **more):
        if code == "disk full":
            waits.append(more["message"])
            held.set()
        set_status(spool, state, code, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Spool, "set_status", note)
        plan = make_plan(small_model, prune={"strategy": strategy})
        assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    assert len(waits) == 1
    assert "free some space, and the computation goes on by itself" in waits[0]
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    assert sorted(result["participants"]) == NAMES


def test_nothing_leaves_while_the_ledger_cannot_be_written(tmp_path, small_model, sites):
    ledger = sites["south"].folder / LEDGER
    ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger.symlink_to(FULL)
    channel, refused = Local(sites), []

    def meddle(name, request, answer):
        reply, payload = read_reply(answer)
        if name == "south" and reply.code == "disk full":
            assert not len(payload)
            refused.append(reply.state)
            if len(refused) == 5:  # more often than an invalid update may be sent
                ledger.unlink()
        return answer

    channel.meddle = meddle
    assert conduct(tmp_path, make_plan(small_model), channel) == "complete", outcome(tmp_path)
    assert refused == ["waiting"] * 5
    assert len([line for line in read_ledger(ledger) if line["direction"] == "sent"]) == 5
    assert sorted(read_json(tmp_path / "runs" / "run" / "result.json")["participants"]) == NAMES


def test_a_participant_with_a_full_disk_is_left_out_at_its_deadline_only(tmp_path, small_model, sites):
    plan = make_plan(small_model, join_s=0.1, start_s=0.2, deadline_s=0.3)
    answer = sites["south"].answer
    no_space = pack(worker_reply())
    sites["south"].answer = lambda message: (
        no_space if read_request(message)[0].op == "start" else answer(message)
    )
    conduct(tmp_path, plan, Local(sites))
    path = tmp_path / "runs" / "run" / "federation" / "events.jsonl"
    (left,) = [line for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "left out"]
    assert (left["participant"], left["reason"]) == ("south", "deadline: its disk is full")


def worker_reply():
    from fedprllm.federation.site.site import NO_SPACE

    return NO_SPACE


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "one")
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    full = tmp_path / "full"
    full.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        append_line(full, "three")
    with pytest.raises(DiskFull, match="nothing is sent until it can be written"):
        append_ledger(full, "run", 0, SUMMARY, b"data")


def test_a_participant_is_told_that_it_is_left_out(tmp_path, small_model, sites):
    channel = Local(sites)
    channel.meddle = lambda name, request, answer: (
        None if name == "south" and b'"fetch"' in request else answer
    )
    assert conduct(tmp_path, make_plan(small_model), channel) == "complete", outcome(tmp_path)
    (path,) = (sites["south"].folder / "runs").glob("*/left-out.json")
    assert read_sealed(path) == {"reason": "deadline"}
    assert not list((sites["north"].folder / "runs").glob("*/left-out.json"))


def test_a_participant_that_was_left_out_earlier_is_told_again_and_can_come_back(
    tmp_path, small_model, sites
):
    run = "ab" * 16
    site = sites["south"]
    farewell = pack(Request(op="left out", run=run, reason="absent"))
    assert read_reply(site.answer(farewell))[0].state == "done"
    path = site.folder / "runs" / run / "left-out.json"
    before = path.stat().st_mtime_ns
    site.answer(farewell)
    assert path.stat().st_mtime_ns == before  # the terminal says it once
    start = Request(op="start", run=run, model="m", config={"share": "gram"}, participants=NAMES)
    assert read_reply(site.answer(pack(start, b"{}")))[0].code == "kind not allowed"
    message = site_status(site, run)["message"]
    assert "asks for gram" in message
    assert "--allow mask --allow gram" in message


def site_status(site, run):
    return read_sealed(site.folder / "runs" / run / "status.json")
