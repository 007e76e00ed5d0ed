"""Every participant ends with the coordinator's model, whatever happens on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedprllm.errors import UpdateError
from fedprllm.federation.coordinator.results import Publication, ResultServer, outcomes
from fedprllm.federation.protocol.messages import pack
from fedprllm.federation.protocol.results import (
    ResultRequest,
    read_manifest,
    read_result_reply,
    read_result_request,
)
from fedprllm.federation.site import build
from fedprllm.federation.site.results import Unreachable
from fedprllm.federation.site.site import settings_path, work_folder
from fedprllm.federation.site.spool import read_ledger
from fedprllm.files import read_json, write_json
from fedprllm.pruning.records import RunRecord
from tests.federation_helpers import (
    NAMES,
    Local,
    collector,
    conduct,
    make_plan,
    make_site,
    same_model,
    texts,
    threads,  # noqa: F401  a fixture
)
from tests.isolation import torch_threads

pytestmark = [pytest.mark.usefixtures("threads")]


@pytest.fixture
def complete(tmp_path, small_model):
    """Conduct a run to its end; returns its folder."""

    def get(**plan):
        paths = texts(tmp_path / "texts")
        sites = {name: make_site(tmp_path, name, paths[name], small_model, threads=1) for name in NAMES}
        with torch_threads(1):
            assert conduct(tmp_path, make_plan(small_model, **plan), Local(sites)) == "complete"
        return tmp_path / "runs" / "run"

    return get


def change_settings(tmp_path, name, **settings):
    path = settings_path(tmp_path / name)
    write_json(path, read_json(path) | settings)


def status(tmp_path, name):
    (path,) = (work_folder(tmp_path / name) / "results").glob("*/status.json")
    return read_json(path)


def test_everything_that_came_in_is_in_the_ledger(tmp_path, complete):
    run = complete()
    collector(tmp_path, "north").collect()
    same_model(run / "model", tmp_path / "north" / "runs" / "run" / "model")
    card = (tmp_path / "north" / "runs" / "run" / "model" / "README.md").read_text()
    assert card == (run / "model" / "README.md").read_text()
    received = [
        line
        for line in read_ledger(work_folder(tmp_path / "north") / "ledger.jsonl")
        if line["direction"] == "received"
    ]
    assert [(line["kind"], line["block"]) for line in received] == [
        ("manifest", None),
        *(("result", block) for block in range(5)),
    ]
    assert sum(line["bytes"] for line in received) == sum(
        path.stat().st_size for path in (run / "result").iterdir() if path.name.startswith(("block", "manif"))
    )
    assert outcomes(run)["north"]["outcome"] == "received"
    assert outcomes(run)["south"] == {}
    assert not list(work_folder(tmp_path / "north").glob("results/*/*.decision")), "no longer needed"


def test_what_the_plan_excludes_stays_dense_at_every_participant(tmp_path, complete, small_model):
    run = complete(prune={"exclude": ["*.o_proj"]})
    collector(tmp_path, "north").collect()
    assert outcomes(run)["north"]["outcome"] == "received"
    same_model(run / "model", tmp_path / "north" / "runs" / "run" / "model")


def test_a_participant_keeps_the_names_of_its_own_copy(tmp_path, complete, small_model):
    run = complete()
    copy = tmp_path / "copy"
    shutil.copytree(small_model, copy)
    (file,) = copy.glob("*.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    assert renamed.keys() != load_file(file).keys()
    renamed["unknown"] = torch.ones(3)
    save_file(renamed, file, {"format": "pt"})
    (copy / "LICENSE").write_text("terms")
    (copy / ".env").write_text("secret")
    change_settings(tmp_path, "north", model=str(copy))
    collector(tmp_path, "north").collect()
    assert outcomes(run)["north"]["outcome"] == "received"
    built = tmp_path / "north" / "runs" / "run" / "model"
    found = {name for shard in built.glob("*.safetensors") for name in load_file(shard)}
    assert found == set(renamed)
    assert (built / "LICENSE").read_text() == "terms"
    assert not (built / ".env").exists()


def test_masks_come_at_one_bit_a_weight(tmp_path, complete):
    run = complete()
    n_bytes = sum(path.stat().st_size for path in (run / "result").glob("*.decision"))
    n_prunable = RunRecord.read(run / "result.json").n_prunable
    assert n_prunable / 8 <= n_bytes <= n_prunable / 8 + 5 * 800


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_transfer_that_breaks_off_continues(tmp_path, complete, damage):
    run = complete()
    server, asked = ResultServer(tmp_path / "runs"), []
    fetching = collector(tmp_path, "north", server)

    def breaks(message):
        request = read_result_request(message)
        asked.append((request.op, request.block))
        if len(asked) == 5:
            raise Unreachable("gone")
        return server.answer("north", message)

    fetching._ask_server = breaks
    with pytest.raises(Unreachable):
        fetching.collect()
    assert asked[-1] == ("block", 2)
    (first,) = work_folder(tmp_path / "north").glob("results/*/block-0000.decision")
    if damage == "gone":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:-1] if damage == "cut" else first.read_bytes()[::-1])
    fetching.collect()
    same_model(run / "model", tmp_path / "north" / "runs" / "run" / "model")
    assert [block for op, block in asked[5:] if op == "block"] == [0, 2, 3, 4], "block 1 was there"


def test_a_build_that_is_killed_continues(tmp_path, complete, monkeypatch):
    run = complete()
    fetching = collector(tmp_path, "north")
    built = []
    original = build._is_right

    def dies(shard, *rest):
        built.append((shard.name, right := original(shard, *rest)))
        if len(built) == 3:
            raise SystemExit(9)
        return right

    monkeypatch.setattr(build, "_is_right", dies)
    fetching.collect()
    assert "status 9" in status(tmp_path, "north")["message"]
    assert not (tmp_path / "north" / "runs" / "run" / "model").exists(), "nothing is half written"
    shard = tmp_path / "north" / "runs" / "run" / "model.unfinished" / built[0][0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"\1\2\3\4")
    collector(tmp_path, "north").collect()
    assert [right for _, right in built[3:]] == [False, True, False, False, False]
    same_model(run / "model", tmp_path / "north" / "runs" / "run" / "model")


def test_a_decision_that_is_not_the_manifests_is_not_used(tmp_path, complete):
    run = complete()
    path = Publication(run).decision_path(3)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    collector(tmp_path, "north").collect()
    found = status(tmp_path, "north")
    assert found["state"] == "failed"
    assert "decision about block 3 of run run: expected digest" in found["message"]
    assert outcomes(run)["north"]["outcome"] == "failed"


def test_a_model_with_another_tensor_is_not_kept(tmp_path, complete):
    run = complete()
    path = run / "result" / "manifest.json"
    manifest = read_json(path)
    name = sorted(manifest["tensors"])[4]
    manifest["tensors"][name] = "0" * 64
    write_json(path, manifest)
    collector(tmp_path, "north").collect()
    assert status(tmp_path, "north")["state"] == "result differs"
    assert f"'{name}' of the model built here" in status(tmp_path, "north")["message"]
    assert not list((tmp_path / "north" / "runs").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "state", "words"),
    [
        ({"result": False}, "declined", ""),
        ({"model": None}, "model missing", "a path on its own machine"),
        ({"model": "/nowhere"}, "model missing", "there is no model at /nowhere"),
    ],
)
def test_why_a_participant_has_no_model_is_known_on_both_sides(tmp_path, complete, settings, state, words):
    run = complete()
    change_settings(tmp_path, "north", **settings)
    collector(tmp_path, "north").collect()
    assert status(tmp_path, "north")["state"] == state
    assert words in status(tmp_path, "north")["message"]
    assert outcomes(run)["north"]["outcome"] == state
    change_settings(tmp_path, "north", result=True, model=read_json(run / "run.json")["model"]["source"])
    collector(tmp_path, "north").collect()
    assert outcomes(run)["north"]["outcome"] == ("declined" if state == "declined" else "received")


def test_an_existing_folder_of_that_name_is_left_alone(tmp_path, complete):
    run = complete()
    mine = tmp_path / "north" / "runs" / "run"
    mine.mkdir(parents=True)
    (mine / "notes").write_text("mine")
    collector(tmp_path, "north").collect()
    run_id = (run / ".run-id").read_text()
    same_model(run / "model", tmp_path / "north" / "runs" / f"run-{run_id[:8]}" / "model")
    assert [path.name for path in mine.iterdir()] == ["notes"]


def test_perplexities_on_held_out_text_come_back_as_numbers(tmp_path, complete):
    run = complete()
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("One day a cat and a dog went to the park to play with a red ball. " * 30)
    for name in ("north", "south"):
        change_settings(tmp_path, name, held_out=[str(held_out)])
        collector(tmp_path, name).collect()
    collector(tmp_path, "west").collect()
    evaluation = RunRecord.read(run / "result.json").evaluation
    assert [found.text for found in evaluation["dense"]] == ["north", "south"]
    from fedprllm import evaluate

    with torch_threads(1):
        for key, folder in (
            ("dense", read_json(run / "run.json")["model"]["source"]),
            ("model", run / "model"),
        ):
            (expected,) = evaluate(folder, [held_out])
            assert [found.perplexity for found in evaluation[key]] == [expected.perplexity] * 2
    assert "| north |" in (run / "model" / "README.md").read_text()
    sent = read_ledger(work_folder(tmp_path / "north") / "ledger.jsonl")
    assert sent[-1]["kind"] == "perplexity"
    assert sent[-1]["direction"] == "sent"


def test_participants_that_were_left_out_get_the_result_unless_the_plan_says_no(tmp_path, complete):
    run = complete(left_out_receive=False)
    assert Publication(run).receivers == NAMES
    write_json(run / "result" / "receivers.json", ["south"])
    collector(tmp_path, "north").collect()
    assert not (tmp_path / "north" / "runs").exists()


def test_no_participant_sees_the_results_of_others(tmp_path, complete):
    run = complete()
    server = ResultServer(tmp_path / "runs")
    run_id = (run / ".run-id").read_text()
    for request in (
        ResultRequest(op="manifest", run=run_id),
        ResultRequest(op="block", run=run_id),
        ResultRequest(op="outcome", run=run_id, outcome="received"),
    ):
        reply, payload = read_result_reply(server.answer("east", pack(request)))
        assert (reply.code, bytes(payload)) == ("no such result", b"")
    assert outcomes(run) == {name: {} for name in NAMES}
    reply, payload = read_result_reply(server.answer("east", pack(ResultRequest(op="list"))))
    assert json.loads(bytes(payload)) == []


@pytest.mark.parametrize("message", [b"", b"\0", b"\5\0\0\0{}", pack(ResultRequest(op="list"), b"x")])
def test_a_request_that_cannot_be_read_is_answered_with_a_code(tmp_path, message):
    reply, payload = read_result_reply(ResultServer(tmp_path).answer("north", message))
    assert (reply.code, bytes(payload)) == ("bad request", b"")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 101, "run\n"])
def test_no_manifest_names_a_folder_elsewhere(tmp_path, complete, name):
    manifest = read_json(complete() / "result" / "manifest.json") | {"name": name}
    with pytest.raises(UpdateError, match="name is not valid"):
        read_manifest(json.dumps(manifest).encode())


def test_results_are_fetched_once(tmp_path, complete):
    complete()
    collector(tmp_path, "north").collect()
    shutil.rmtree(tmp_path / "north" / "runs")
    collector(tmp_path, "north").collect()
    assert not (tmp_path / "north" / "runs").exists()
    change_settings(tmp_path, "north", fetch="another")
    collector(tmp_path, "north").collect()
    assert not (tmp_path / "north" / "runs").exists()
    change_settings(tmp_path, "north", fetch="run")
    collector(tmp_path, "north").collect()
    assert (tmp_path / "north" / "runs" / "run" / "model" / "config.json").exists(), (
        "it was asked for by name"
    )
