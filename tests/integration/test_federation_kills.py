"""The real engine when its processes are killed: the run ends with the same bits.

The bits are those of an undisturbed run over the same participants, computed in one process.
"""

from __future__ import annotations

import time

import psutil
import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.flare.processes import end
from fedprllm.federation.site.spool import read_ledger
from tests.federation_helpers import same_model
from tests.federation_processes import finish, kill, wait_until
from tests.federation_runs import (
    NAMES,
    QUICK,
    SLOW,
    check,
    complete,
    expected,
    federation,
    nothing_else_leaves,
)

# Imported fixtures, which pytest finds by their names here.
__all__ = ["complete", "expected", "federation", "nothing_else_leaves"]

pytestmark = [
    pytest.mark.federation,
    pytest.mark.filterwarnings("ignore"),
]


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
