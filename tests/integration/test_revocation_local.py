"""A participant is revoked at every moment of a run: what counts, what does not, and who is left."""

from __future__ import annotations

import json
from collections.abc import Collection

import pytest

from fedprllm import PruneConfig, prune
from fedprllm.federation.coordinator import rounds
from fedprllm.federation.coordinator.job import conduct_run
from fedprllm.federation.protocol.messages import Reply, pack, read_request
from fedprllm.files import read_json
from tests.federation_helpers import (
    NAMES,
    Local,
    make_plan,
    make_site,
    same_model,
    texts,
    threads,  # noqa: F401  a fixture
)
from tests.isolation import torch_threads

pytestmark = [pytest.mark.usefixtures("threads")]


@pytest.fixture
def federation(tmp_path, small_model, monkeypatch):
    monkeypatch.setattr(rounds, "_POLL_S", 0.01)
    paths = texts(tmp_path / "texts")
    with torch_threads(1):
        sites = {name: make_site(tmp_path, name, paths[name], small_model, threads=1) for name in NAMES}
        yield Local(sites)
        for site in sites.values():
            site.close()


@pytest.fixture
def conduct(tmp_path, small_model, federation):
    def run(revoked, strategy="one-shot", **options) -> str:
        plan = make_plan(small_model, prune={"strategy": strategy}, **options)
        return conduct_run(plan, NAMES, tmp_path / "runs", "job", federation, revoked=revoked)

    return run


@pytest.fixture
def without_west(tmp_path, small_model):
    """The model of a run in which west never took part."""

    def pruned(strategy):
        participants = {name: [str(tmp_path / "texts" / f"{name}.txt")] for name in NAMES if name != "west"}
        config = PruneConfig(windows=2, window_length=32, strategy=strategy)
        return prune(small_model, participants, config, out=tmp_path / "in-process").model_dir

    return pruned


class Revoked:
    """Names nobody until told to."""

    def __init__(self, *names: str) -> None:
        self.names: Collection[str] = names

    def __call__(self) -> Collection[str]:
        return self.names


def reasons(tmp_path):
    path = tmp_path / "runs" / "run" / "federation" / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["participant"]: line["reason"] for line in lines if line["event"] == "left out"}


def voters(tmp_path):
    """Participants whose votes count, by block."""
    paths = sorted((tmp_path / "runs" / "run" / "blocks").glob("block-*.json"))
    return [set(read_json(path)["n_tokens"]) for path in paths]


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_revoked_before_a_run_takes_no_part(tmp_path, federation, conduct, without_west, strategy):
    assert conduct(Revoked("west"), strategy, join_s=60) == "complete"
    same_model(tmp_path / "runs" / "run" / "model", without_west(strategy))
    assert reasons(tmp_path)["west"].startswith("revoked")
    assert "west" not in {name for name, _ in federation.sent}  # it is not even asked


def test_all_its_updates_are_there_and_none_is_counted(tmp_path, federation, conduct, without_west):
    """One-shot: what waits for a decision does not count any more."""
    waiting = tmp_path / "runs" / "run" / "federation" / "updates"
    held = []

    def revoked():
        n_blocks = len(list(waiting.glob("*")))
        if n_blocks and len(list(waiting.glob("*/west.update"))) == 5 == len(
            list(waiting.glob("*/south.update"))
        ):
            held.append("west")
        return held

    assert conduct(revoked) == "complete"
    assert held
    same_model(tmp_path / "runs" / "run" / "model", without_west("one-shot"))


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_an_update_that_is_on_its_way_is_refused(tmp_path, federation, conduct, without_west, strategy):
    revoked = Revoked()

    def meddle(name, request, answer):
        assert not list(tmp_path.rglob("west.update"))
        if name == "west" and read_request(request)[0].op == "fetch":
            revoked.names = ["west"]
        return answer

    federation.meddle = meddle
    assert conduct(revoked, strategy) == "complete"
    same_model(tmp_path / "runs" / "run" / "model", without_west(strategy))


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_votes_of_finished_blocks_stay(tmp_path, federation, conduct, strategy):
    second = tmp_path / "runs" / "run" / "blocks" / "block-0001.json"
    assert conduct(lambda: ["west"] if second.exists() else [], strategy) == "complete"
    n_blocks = len(voters(tmp_path))
    assert voters(tmp_path) == [set(NAMES)] * 2 + [{"north", "south"}] * (n_blocks - 2)
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    assert result["participants"]["west"]["n_blocks"] == 2
    assert result["participants"]["north"]["n_blocks"] == n_blocks


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_nobody_waits_for_a_revoked_participant_to_speak(
    tmp_path, federation, conduct, without_west, strategy
):
    """The server lets nothing of it through, and the others compute for longer than a silence may last."""
    revoked = Revoked()
    busy = iter(range(100))

    def meddle(name, request, answer):
        if read_request(request)[0].op != "state":
            return answer
        if name == "west":
            revoked.names = ["west"]
        if name in revoked.names:
            return None
        return answer if next(busy, None) is None else pack(Reply(state="working", n_ready=0))

    federation.meddle = meddle
    assert conduct(revoked, strategy, silence_s=0.2) == "complete"
    same_model(tmp_path / "runs" / "run" / "model", without_west(strategy))


def test_a_quorum_that_is_lost_by_a_revocation_is_named(tmp_path, federation, conduct):
    assert conduct(Revoked("south", "west")) == "quorum lost"
    assert set(reasons(tmp_path)) == {"south", "west"}
    assert not voters(tmp_path)


def test_a_name_of_somebody_else_changes_nothing(tmp_path, federation, conduct):
    assert conduct(Revoked("stranger")) == "complete"
    assert voters(tmp_path)[0] == set(NAMES)
