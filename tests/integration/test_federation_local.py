"""Participants and coordinator without a network: the same bits as in one process, and all policies."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedprllm import PruneConfig, PruneResult, UpdateError, prune
from fedprllm.federation.coordinator import rounds as coordinator_module
from fedprllm.federation.coordinator.job import conduct_run
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.messages import Reply, Request, pack, read_reply, read_request
from fedprllm.federation.site.spool import read_ledger
from fedprllm.files import read_json, read_sealed
from fedprllm.sharing.gram_matrices import square, triangle
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
from tests.models import MIXTURES, save_tiny

pytestmark = [pytest.mark.usefixtures("threads")]
# The computation runs in a thread of this process, and its output is the worker's log.


@pytest.fixture
def model(small_model):
    return small_model


@pytest.fixture
def federation(tmp_path, model, monkeypatch):
    monkeypatch.setattr(coordinator_module, "_POLL_S", 0.01)
    paths = texts(tmp_path / "texts")

    made = []

    def make(names=NAMES, model=model, **settings):
        sites = {name: make_site(tmp_path, name, paths[name], model, threads=1, **settings) for name in names}
        made.extend(sites.values())
        return Local(sites)

    make.paths = paths
    # The order of a sum, and thus its last bit, depends on the number of threads; so does speed here.
    with torch_threads(1):
        yield make
        for site in made:
            site.close()


def in_process(tmp_path, model, paths, **options):
    config = PruneConfig(windows=2, window_length=32, **options)
    participants = {name: [paths[name]] for name in sorted(paths)}
    return prune(model, participants, config, out=tmp_path / "in-process")


def outcome(tmp_path):
    return read_json(tmp_path / "runs" / "run" / "federation" / "outcome.json")


def events(tmp_path):
    path = tmp_path / "runs" / "run" / "federation" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_participant_with_little_memory_makes_no_difference(tmp_path, model, federation):
    channel = federation(memory_limit=1)
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    same_model(tmp_path / "runs" / "run" / "model", in_process(tmp_path, model, federation.paths).model_dir)
    assert not list(tmp_path.rglob("spilled"))


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_weights": True, "weighting": "tokens"},
        {"share": "statistics"},
        {"share": "statistics", "aggregation": "trimmed", "allocation": "owl"},
        {"share": "gram"},
        {"share": "gram", "solver": "sparsegpt"},
        {"share": "gram", "solver": "alps"},
        {"share": "weights"},
        {"criterion": "magnitude"},
        {"allocation": "owl"},
        {"allocation": "owl", "criterion": "magnitude", "sparsity": 0.6},
        {"allocation": "owl", "share": "statistics"},
        {"block_fraction": 0.5},
        {"block_fraction": "north=0.4,west=0.2", "share": "weights", "allocation": "owl"},
        {"pattern": "2:4", "ties": "random", "seed": 3},
        {"structure": "mlp=0.3"},
        {"structure": "mlp=0.3,heads=4", "block_fraction": 0.7},
        {"structure": "depth=2"},
        {"share": "statistics", "exclude": ["*.q_proj", "model.layers.0.mlp.down_proj"]},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "mask",
)
def test_the_same_bits_as_in_one_process(tmp_path, model, federation, strategy, options):
    options = {"strategy": strategy, **options}
    channel = federation(
        allow=["mask", "statistics", "gram", "weights", "channels", "parts", "influence", "outliers"],
        seed=options.get("seed", 0),
    )
    assert conduct(tmp_path, make_plan(model, prune=options), channel) == "complete", outcome(tmp_path)
    expected = in_process(tmp_path, model, federation.paths, **options)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    ours, theirs = result, expected.record.as_json()
    for name in NAMES:
        assert ours["participants"][name]["n_blocks"] == theirs["participants"][name]["n_blocks"]
        in_messages, payload = (r["participants"][name]["update_bytes"] for r in (ours, theirs))
        assert payload <= in_messages <= payload + 10 * 800, "a message holds little more than its values"
    for key in ("outlier_ratios", "rounds"):
        assert ours[key] == theirs[key]
    for one, other in zip(ours["blocks"], theirs["blocks"], strict=True):
        assert one["participants"] == other["participants"]
        assert one["sparsity"] == other["sparsity"]
    assert result["model"]["fingerprint"]
    assert not (tmp_path / "runs" / "run" / "federation" / "updates").exists()
    collector(tmp_path, "north").collect()
    same_model(tmp_path / "north" / "runs" / "run" / "model", expected.model_dir)


@pytest.fixture
def mixture(model, tmp_path):
    """``mixture(name)``: a tiny random mixture of experts that reads the small model's tokens."""

    def get(name):
        def config():
            found = MIXTURES[name]()
            found.vocab_size = 512
            return found

        folder = tmp_path / name
        save_tiny(config, folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / file, folder / file)
        return folder

    return get


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt-oss", {}),
        ("gpt-oss", {"share": "statistics", "strategy": "iterative"}),
        ("deepseek-v3", {"share": "gram", "strategy": "iterative"}),
        ("deepseek-v3", {"share": "weights", "allocation": "owl"}),
        ("gpt-oss", {"structure": "experts=2"}),
        ("deepseek-v3", {"structure": "experts=0.25", "block_fraction": 0.7}),
    ],
)
def test_experts_get_the_same_bits_as_in_one_process(tmp_path, mixture, federation, name, options):
    folder = mixture(name)
    kinds = ["mask", "statistics", "gram", "weights", "experts", "outliers"]
    channel = federation(model=folder, allow=kinds, seed=0)
    assert conduct(tmp_path, make_plan(folder, prune=options), channel) == "complete", outcome(tmp_path)
    expected = in_process(tmp_path, folder, federation.paths, **options)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)
    record = read_json(tmp_path / "runs" / "run" / "result.json")
    assert not any("experts" in block for block in record["blocks"] if block.get("experts")), "stays local"
    collector(tmp_path, "north").collect()
    same_model(tmp_path / "north" / "runs" / "run" / "model", expected.model_dir)
    scores = [block.get("expert_scores") for block in record["blocks"]]
    assert scores == [block.expert_scores for block in expected.record.blocks]
    if "structure" in options:
        assert any(scores)
        return
    notes = [read_sealed(path)["notes"] for path in (tmp_path / "north").rglob("notes.json")]
    assert any("the text of 'north' reached " in note for found in notes for note in found)


def test_only_updates_and_states_leave(tmp_path, model, federation):
    channel = federation()
    conduct(tmp_path, make_plan(model), channel)
    fields = set(Reply.model_fields)
    words = {"little", "birds", "bread", *NAMES}
    n_updates = 0
    for name, message in channel.sent:
        header, payload = read_reply(message)
        assert set(header.model_dump()) == fields
        assert header.code == ""
        assert header.tensor == ""
        if not len(payload):
            continue
        n_updates += 1
        update = wire.decode(payload, expect=None, max_bytes=len(payload))
        assert update.participant == name
        assert update.kind == "mask"
        assert {tensor.dtype for tensor in update.tensors.values()} == {torch.bool}
        text = bytes(payload).replace(name.encode(), b"", 1)
        assert not any(word.encode() in text for word in words)
    assert n_updates == 15


def test_every_update_is_in_the_ledger_before_it_leaves(tmp_path, model, federation):
    channel = federation()
    conduct(tmp_path, make_plan(model), channel)
    for name in NAMES:
        lines = read_ledger(tmp_path / name / "fedprllm" / "ledger.jsonl")
        sent = [
            wire.decode(payload, expect=None, max_bytes=len(payload))
            for who, message in channel.sent
            if who == name and len(payload := read_reply(message)[1])
        ]
        assert [line["block"] for line in lines] == [update.block for update in sent]
        assert [line["bytes"] for line in lines] == [len(wire.encode(update)) for update in sent]
        assert all(
            line["shapes"] == {n: list(t.shape) for n, t in update.tensors.items()}
            for line, update in zip(lines, sent, strict=True)
        )


def test_nothing_is_sent_without_the_ledger(tmp_path, model, federation):
    channel = federation()
    ledger = tmp_path / "north" / "fedprllm" / "ledger.jsonl"
    ledger.mkdir(parents=True)  # cannot be written
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    assert [event["reason"] for event in events(tmp_path)] == ["failed: internal"]
    assert not any(len(read_reply(message)[1]) for name, message in channel.sent if name == "north")


def test_an_update_that_never_arrives_is_not_waited_for_forever(tmp_path, model, federation):
    channel = federation()
    channel.meddle = lambda name, request, answer: None if name == "north" and is_update(request) else answer
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    assert [event["reason"].split(":")[0] for event in events(tmp_path)] == ["deadline"]


def garbled(message):
    """The same message with one flipped bit in the update's payload."""
    damaged = bytearray(message)
    damaged[-40] ^= 1
    return bytes(damaged)


def is_update(request):
    return read_request(request)[0].op == "fetch"


def test_a_damaged_update_is_refused_and_may_be_sent_again(tmp_path, model, federation):
    channel = federation()
    damaged = []

    def meddle(name, request, answer):
        if name == "south" and is_update(request) and len(damaged) < 2:
            damaged.append(name)
            return garbled(answer)
        return answer

    channel.meddle = meddle
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    refused = [event for event in events(tmp_path) if "refused" in event["event"]]
    assert [event["participant"] for event in refused] == ["south", "south"]
    assert "checksum" in refused[0]["reason"]
    same_model(tmp_path / "runs" / "run" / "model", in_process(tmp_path, model, federation.paths).model_dir)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_participant_that_keeps_sending_garbage_is_left_out(tmp_path, model, federation, strategy):
    channel = federation()

    def meddle(name, request, answer):
        header = read_request(request)[0]
        bad = name == "south" and header.op == "fetch" and (header.block >= 2 or strategy == "iterative")
        return garbled(answer) if bad else answer

    channel.meddle = meddle
    plan = make_plan(model, prune={"strategy": strategy})
    assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    assert [event["participant"] for event in events(tmp_path) if event["event"] == "left out"] == ["south"]
    survivors = {name: path for name, path in federation.paths.items() if name != "south"}
    expected = in_process(tmp_path, model, survivors, strategy=strategy)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)
    assert set(read_json(tmp_path / "runs" / "run" / "result.json")["participants"]) == {"north", "west"}


def garble_block_2_of_south(name, request, answer):
    header = read_request(request)[0]
    return garbled(answer) if (name, header.op, header.block) == ("south", "fetch", 2) else answer


def test_an_iterative_run_goes_on_with_the_others_and_counts_them_per_block(tmp_path, model, federation):
    channel = federation()
    channel.meddle = garble_block_2_of_south
    plan = make_plan(model, prune={"strategy": "iterative"}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "complete"
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    assert [len(record["participants"]) for record in result["blocks"]] == [3, 3, 2, 2, 2]
    assert result["participants"]["south"]["n_blocks"] == 2


def test_scaling_counts_the_participants_of_the_block(tmp_path, model, federation):
    from safetensors.torch import load_file

    from fedprllm.core.masks import scale_kept

    channel = federation()
    channel.meddle = garble_block_2_of_south
    plan = make_plan(model, prune={"strategy": "iterative", "scale_weights": True}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "complete"
    dense = load_file(model / "model.safetensors")
    for block, n_participants in ((1, 3), (3, 2)):
        (pruned,) = (
            tensors
            for path in (tmp_path / "runs" / "run" / "model").glob("*.safetensors")
            if f"model.layers.{block}.mlp.up_proj.weight" in (tensors := load_file(path))
        )
        votes = {
            name: count
            for name, count in PruneResult.load(tmp_path / "runs" / "run").votes.items()
            if name.startswith(f"model.layers.{block}.")
        }
        assert max(int(count.max()) for count in votes.values()) <= n_participants
        for name, count in votes.items():
            scaled = scale_kept(dense[name], count, n_participants)
            kept = pruned[name] != 0
            assert torch.equal(pruned[name][kept], scaled[kept])
            assert not torch.equal(pruned[name][kept], dense[name][kept])


def test_a_late_participant_is_left_out(tmp_path, model, federation):
    channel = federation()

    def meddle(name, request, answer):
        if name == "west" and read_request(request)[0].op == "state":
            return pack(Reply(state="working", n_ready=min(read_reply(answer)[0].n_ready, 1)))
        return answer

    channel.meddle = meddle
    plan = make_plan(model, deadline_s=2, start_s=10)
    assert conduct(tmp_path, plan, channel) == "complete"
    (event,) = events(tmp_path)
    assert event["participant"] == "west"
    assert event["reason"].startswith("deadline")
    survivors = {name: path for name, path in federation.paths.items() if name != "west"}
    same_model(tmp_path / "runs" / "run" / "model", in_process(tmp_path, model, survivors).model_dir)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_lost_quorum_keeps_everything_and_the_run_continues(tmp_path, model, federation, strategy):
    channel = federation()

    def meddle(name, request, answer):
        header = read_request(request)[0]
        gone = name != "north" and header.op == "fetch" and header.block >= 2
        return garbled(answer) if gone else answer

    channel.meddle = meddle
    plan = make_plan(model, prune={"strategy": strategy}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert "the quorum is 2" in outcome(tmp_path)["reason"]
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
    channel.meddle = lambda name, request, answer: answer
    assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    expected = in_process(tmp_path, model, federation.paths, strategy=strategy)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_silent_participant_interrupts_the_job_and_the_next_one_continues(
    tmp_path, model, federation, strategy
):
    channel = federation()
    channel.meddle = lambda name, request, answer: (
        None if name == "west" and read_request(request)[0].op != "start" else answer
    )
    plan = make_plan(model, prune={"strategy": strategy}, silence_s=1.0)
    assert conduct(tmp_path, plan, channel) == "interrupted"
    assert "'west'" in outcome(tmp_path)["reason"]
    channel.meddle = lambda name, request, answer: answer
    assert conduct(tmp_path, plan, channel) == "complete"
    expected = in_process(tmp_path, model, federation.paths, strategy=strategy)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def test_an_unreachable_participant_with_updates_to_fetch_is_not_left_out(tmp_path, model, federation):
    """A dead machine delivers nothing, but it must not be left out before it had a chance to come back."""
    channel = federation()
    gone = []

    def meddle(name, request, answer):
        if name == "west" and read_request(request)[0].op == "fetch":
            gone.append(name)
        return None if name in gone else answer

    channel.meddle = meddle
    assert conduct(tmp_path, make_plan(model, silence_s=1.0, max_ballots=2), channel) == "interrupted"
    assert "'west'" in outcome(tmp_path)["reason"]
    assert not events(tmp_path)
    channel.meddle = lambda name, request, answer: answer
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    same_model(tmp_path / "runs" / "run" / "model", in_process(tmp_path, model, federation.paths).model_dir)


def test_an_absent_participant_is_left_out(tmp_path, model, federation):
    channel = federation()
    channel.meddle = lambda name, request, answer: None if name == "west" else answer
    assert conduct(tmp_path, make_plan(model, join_s=1), channel) == "complete"
    (event,) = events(tmp_path)
    assert (event["participant"], event["reason"].split(":")[0]) == ("west", "absent")


def test_the_weight_that_differs_is_named(tmp_path, model, federation):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other-model"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.2.input_layernorm.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    channel = federation()
    channel.sites["south"] = make_site(tmp_path, "south", federation.paths["south"], other, threads=1)
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    (event,) = events(tmp_path)
    assert event["participant"] == "south"
    assert event["reason"] == f"failed: model differs: '{name}'"
    (status,) = (tmp_path / "south" / "fedprllm" / "runs").glob("*/status.json")
    assert f"tensor '{name}' has different values" in read_json(status)["message"]


def test_a_path_named_by_the_coordinator_is_not_opened_at_a_participant(tmp_path, model, federation):
    """The path exists here too, but only the participant decides which files are read on its machine."""
    channel = federation(model=None)
    assert conduct(tmp_path, make_plan(model), channel) == "quorum lost"
    assert {event["reason"] for event in events(tmp_path)} == {"failed: model missing"}
    (status,) = (tmp_path / "south" / "fedprllm" / "runs").glob("*/status.json")
    assert "name your copy with --model" in read_json(status)["message"]


def test_a_participant_does_not_share_what_it_does_not_allow(tmp_path, model, federation):
    channel = federation(allow=["mask"])
    plan = make_plan(model, prune={"share": "statistics"})
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert {event["reason"] for event in events(tmp_path)} == {"failed: kind not allowed"}
    assert not any(len(read_reply(message)[1]) for _, message in channel.sent)


def test_a_bad_ballot_is_refused(tmp_path, model, federation):
    """A valid message whose mask prunes one weight too many in a row, and one with a wrong token count."""
    channel = federation()
    told = []

    def meddle(name, request, answer):
        if not is_update(request) or name == "north" or name in told:
            return answer
        told.append(name)
        header, payload = read_reply(answer)
        update = wire.decode(payload, expect=None, max_bytes=len(payload))
        first = min(update.tensors)
        update.tensors[first][0, update.tensors[first][0].logical_not().nonzero()[0]] = name == "south"
        n_tokens = update.n_tokens if name == "south" else 10**6
        forged = wire.Update(**{**vars(update), "n_tokens": n_tokens})
        return pack(header, wire.encode(forged))

    channel.meddle = meddle
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    reasons = {event["participant"]: event["reason"] for event in events(tmp_path)}
    assert "expected exactly" in reasons["south"]
    assert "claims 1000000 tokens" in reasons["west"]


def test_no_participant_can_vote_for_another(tmp_path, model, federation):
    channel = federation()
    told = []

    def meddle(name, request, answer):
        if name != "south" or not is_update(request) or told:
            return answer
        told.append(name)
        header, payload = read_reply(answer)
        update = wire.decode(payload, expect=None, max_bytes=len(payload))
        return pack(header, wire.encode(wire.Update(**{**vars(update), "participant": "north"})))

    channel.meddle = meddle
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    (refused,) = events(tmp_path)
    assert refused["participant"] == "south"
    assert "participant" in refused["reason"]


def test_masks_take_one_bit_per_weight_and_at_most_a_thousandth_more(tmp_path, model, federation):
    """A run over a block with SmolLM2-135M's shape, by a participant with the longest allowed name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "one-block"
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=3, **sizes)).save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    name = "n" * 63
    channel = Local({name: make_site(tmp_path, name, federation.paths["north"], folder, threads=1)})
    assert conduct(tmp_path, make_plan(folder, quorum=1), channel, [name]) == "complete", outcome(tmp_path)
    (message,) = (payload for _, answer in channel.sent if len(payload := read_reply(answer)[1]))
    one_bit_each = 442_368
    assert one_bit_each < len(message) <= 1.001 * one_bit_each
    names = set(wire.decode(message, expect=None, max_bytes=len(message)).tensors)
    projections = ["mlp.down", "mlp.gate", "mlp.up", *(f"self_attn.{letter}" for letter in "qkvo")]
    assert names == {f"{name}_proj" for name in projections}


@pytest.mark.parametrize(
    "prune",
    [{"share": "gram"}, {"strategy": "iterative", "scale_weights": True}],
    ids=["updates", "decisions"],
)
def test_a_run_whose_messages_could_not_arrive_is_refused_at_once(tmp_path, model, federation, prune):
    channel = federation(allow=["mask", "gram"])
    plan = make_plan(model, prune=prune)
    ended = conduct_run(plan, NAMES, tmp_path / "runs", "job", channel, max_message_mb=0.05)
    assert ended == "error"
    assert "allow 0.05 MB" in outcome(tmp_path)["reason"]
    assert not channel.sent


def test_the_coordinator_holds_one_update_at_a_time(tmp_path, model, federation, monkeypatch):
    """Each participant's update is released before the next one is read, however many there are."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), []
    decode = wire.decode
    gc.freeze()  # what is there already is not looked through each time

    def watched(*arguments, **options):
        gc.collect()
        most.append(len({id(tensor) for tensor in alive}))
        update = decode(*arguments, **options)
        alive.update(update.tensors.values())
        return update

    monkeypatch.setattr("fedprllm.federation.coordinator.ballots.wire.decode", watched)
    assert conduct(tmp_path, make_plan(model), federation()) == "complete"
    assert len(most) == 2 * 15  # checked on arrival and read again for the decision
    assert max(most) == 0


def test_a_request_that_cannot_be_read_is_answered_with_a_code(tmp_path, federation):
    site = federation().sites["north"]
    for message in (b"", b"\x00", b"\xff" * 40, pack(Request(op="fetch", run="0" * 32))[:-3]):
        header, payload = read_reply(site.answer(message))
        assert header.code == "bad request"
        assert not len(payload)
    assert read_reply(site.answer(pack(Request(op="fetch", run="0" * 32))))[0].code == "other run"


def test_a_participant_that_only_claims_to_be_ready_is_left_out(tmp_path, model, federation):
    """It says that everything is ready and answers every fetch with "not ready": once without end."""
    channel = federation()
    fetches = []

    def claims(name, request, reply):
        header, _ = read_request(request)
        if name != "west" or header.op not in ("state", "fetch", "start"):
            return reply
        if header.op == "fetch":
            fetches.append(header.block)
            return pack(Reply(state="working", code="not ready", n_ready=99))
        return pack(Reply(state="working", n_ready=99))

    channel.meddle = claims
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    left = [event for event in events(tmp_path) if event["event"] == "left out"]
    assert [(event["participant"], event["reason"]) for event in left] == [
        ("west", "invalid updates: 3 in a row")
    ]
    assert fetches == [0, 0, 0]


def test_claims_move_no_deadline(tmp_path, model, federation):
    """A participant that never sends anything is late, however much it says it has."""
    channel = federation()
    claimed = iter(range(1, 10_000))

    def claims(name, request, reply):
        header, _ = read_request(request)
        if name != "west" or header.op != "state":
            return None if name == "west" and header.op == "fetch" else reply
        return pack(Reply(state="working", n_ready=0 if next(claimed) % 2 else 99))

    channel.meddle = claims
    plan = make_plan(model, deadline_s=1, start_s=2, max_ballots=1000)
    assert conduct(tmp_path, plan, channel) in ("complete", "quorum lost"), outcome(tmp_path)
    assert any(event["participant"] == "west" for event in events(tmp_path) if event["event"] == "left out")


@pytest.mark.parametrize(
    ("share", "spoil", "words"),
    [
        ("weights", lambda t: t * 1000, "are not the model's"),
        ("weights", lambda t: -t, "are not the model's"),
        ("gram", lambda t: t - 2 * t.abs().max(), "negative"),
        ("gram", lambda t: triangle(square(t) + 3 * t.max() * (1 - torch.eye(len(square(t))))), "eigenvalue"),
    ],
)
def test_a_ballot_that_no_text_gives_names_its_sender(tmp_path, model, federation, share, spoil, words):
    channel = federation(allow=["mask", "weights", "gram"])
    plan = make_plan(model, prune={"share": share}, max_ballots=1)

    def spoiled(name, request, reply):
        header, _ = read_request(request)
        if name != "west" or header.op != "fetch" or header.block != 1:
            return reply
        state, payload = read_reply(reply)
        update = wire.decode(payload, expect=None, max_bytes=len(payload))
        tensors = dict(update.tensors)
        name_of = next(n for n, t in tensors.items() if t.dtype != torch.bool)
        tensors[name_of] = spoil(tensors[name_of].clone())
        return pack(state, wire.encode(replace(update, tensors=tensors)))

    channel.meddle = spoiled
    assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    refused = [event for event in events(tmp_path) if "refused" in event["event"]]
    assert {event["participant"] for event in refused} == {"west"}
    assert words in refused[0]["reason"]
    assert "west" not in read_json(tmp_path / "runs" / "run" / "result.json")["participants"]


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
@pytest.mark.parametrize("share", ["statistics", "gram"])
def test_sums_out_of_proportion_are_refused_before_anything_is_added_up(
    tmp_path, model, federation, share, strategy
):
    """A participant that keeps sending them is left out, and the model is the others'."""
    channel = federation(allow=["mask", "statistics", "gram"])

    def scaled(name, request, reply):
        header, _ = read_request(request)
        if name != "west" or header.op != "fetch" or (strategy == "one-shot" and header.block != 3):
            return reply
        return reply if not len(read_reply(reply)[1]) else _scaled(reply, 1000)

    channel.meddle = scaled
    plan = make_plan(model, prune={"share": share, "strategy": strategy})
    assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    told = events(tmp_path)
    block = 3 if strategy == "one-shot" else 0
    assert [event["event"] for event in told] == [f"update of block {block} refused"] * 3 + ["left out"]
    assert {event["participant"] for event in told} == {"west"}
    for event in told[:3]:
        assert f"'model.layers.{block}.self_attn.q_proj.weight' are" in event["reason"]
        assert "expected at most" in event["reason"]
    others = {name: path for name, path in federation.paths.items() if name != "west"}
    expected = in_process(tmp_path, model, others, share=share, strategy=strategy)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def _scaled(reply, factor):
    state, payload = read_reply(reply)
    update = wire.decode(payload, expect=None, max_bytes=len(payload))
    tensors = {name: factor * tensor for name, tensor in update.tensors.items()}
    return pack(state, wire.encode(replace(update, tensors=tensors)))


def test_one_update_out_of_proportion_may_be_sent_again(tmp_path, model, federation):
    channel = federation(allow=["statistics"])
    spoiled = []

    def once(name, request, reply):
        if name != "west" or not is_update(request) or not len(read_reply(reply)[1]) or len(spoiled) == 2:
            return reply
        spoiled.append(name)
        return _scaled(reply, 1000)

    channel.meddle = once
    plan = make_plan(model, prune={"share": "statistics"})
    assert conduct(tmp_path, plan, channel) == "complete", outcome(tmp_path)
    assert "left out" not in {event["event"] for event in events(tmp_path)}
    expected = in_process(tmp_path, model, federation.paths, share="statistics")
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def edited(model: Path, folder: Path, **entries: object) -> Path:
    """A copy of a model with other entries in its configuration."""
    shutil.copytree(model, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


def test_another_configuration_is_another_model(tmp_path, model, federation):
    channel = federation()
    other = edited(model, tmp_path / "other", rope_theta=500000.0, rope_parameters=None)
    channel.sites["west"] = make_site(tmp_path / "kits", "west", federation.paths["west"], other)
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    (event,) = [e for e in events(tmp_path) if e["event"] == "left out"]
    assert event["participant"] == "west"
    assert re.search(r"model differs: .*rope_theta: 10000\S* here, 500000 there", event["reason"])
    (status,) = channel.sites["west"].folder.glob("runs/*/status.json")
    assert re.search(r"rope_theta: 500000\S* here, 10000\S* there", read_json(status)["message"])


def test_another_tokenizer_is_another_model(tmp_path, model, federation):
    channel = federation()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = read_json(other / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    channel.sites["west"] = make_site(tmp_path / "kits", "west", federation.paths["west"], other)
    assert conduct(tmp_path, make_plan(model), channel) == "complete", outcome(tmp_path)
    (event,) = [e for e in events(tmp_path) if e["event"] == "left out"]
    assert event["reason"] == "failed: model differs: 'tokenizer.vocabulary'"
    (status,) = channel.sites["west"].folder.glob("runs/*/status.json")
    assert "the tokenizers differ in their vocabulary" in read_json(status)["message"]


@pytest.mark.parametrize(
    ("payload", "config"),
    [
        (b"{", {}),
        (b"\xff\xfe", {}),
        (b"[]", {}),
        (b'{"a": 1}', {}),
        (b"{}", {"self": 1}),
        (b"{}", {"sparsity": "much"}),
        (b"{}", {"unknown": 1}),
        (b"{}", {"block_fraction": {"a": []}}),
        (b"{}", {"smaller": 0.2}),
    ],
)
def test_a_start_that_cannot_be_used_is_a_bad_request(tmp_path, federation, payload, config):
    site = federation().sites["north"]
    request = Request(op="start", run="0" * 32, model="m", config=config)
    header, rest = read_reply(site.answer(pack(request, payload)))
    assert (header.state, header.code) == ("failed", "bad request")
    assert not len(rest)
    assert not list(site.folder.glob("runs/*/job.json"))


def test_what_goes_wrong_at_a_site_is_a_reply(tmp_path, federation, monkeypatch):
    site = federation().sites["north"]
    monkeypatch.setattr(site, "_answer", lambda *_: {}["missing"])
    header, _ = read_reply(site.answer(pack(Request(op="state", run="0" * 32))))
    assert (header.state, header.code) == ("failed", "internal")


def test_a_decision_from_another_sender_or_run_is_not_followed(tmp_path, model, federation):
    from fedprllm.federation.protocol.decision import decided_weights
    from fedprllm.models.blockwise import BlockwiseModel

    walked = BlockwiseModel(model)
    with walked.block(0) as block:
        masks = {n: torch.zeros(linear.shape, dtype=torch.bool) for n, linear in block.linears.items()}
        update = wire.Update(bytes(16), "north", 0, "mask", bytes(32), masks, 0)
        with pytest.raises(UpdateError, match="participant"):
            decided_weights(wire.encode(update), block, bytes(16), bytes(32))
        with pytest.raises(UpdateError, match="run_id"):
            decided_weights(
                wire.encode(wire.Update(bytes(16), "coordinator", 0, "mask", bytes(32), masks, 0)),
                block,
                b"1" * 16,
                bytes(32),
            )


def test_an_update_that_would_be_too_large_is_refused_before_anything_is_asked(tmp_path, model, federation):
    channel = federation(allow=["gram"])
    plan = make_plan(model, prune={"share": "gram", "max_update_mb": 0.05})
    assert conduct(tmp_path, plan, channel) == "error"
    reason = outcome(tmp_path)["reason"]
    assert re.search(
        r"share gram would send 0\.\d+ MB for block 0, but max_update_mb allows 0\.05 MB", reason
    )
    assert not channel.sent


def test_a_survey_cannot_be_had_beside_the_options(federation):
    """Outliers would leave a participant that allows masks only."""
    site = federation(allow=["mask"]).sites["north"]
    for config, code in (({}, "bad request"), ({"allocation": "owl"}, "kind not allowed")):
        request = Request(op="start", run="0" * 32, model="m", config=config, participants=NAMES, survey=True)
        assert read_reply(site.answer(pack(request, b"{}")))[0].code == code
    assert not list(site.folder.glob("runs/*/job.json"))


def test_a_survey_is_in_the_ledger_and_has_to_be_allowed(tmp_path, model, federation):
    plan = make_plan(model, prune={"allocation": "owl"})
    assert conduct(tmp_path, plan, federation(["north", "south"], allow=["mask"]), ["north", "south"]) != (
        "complete"
    )
    assert {event["reason"] for event in events(tmp_path)} == {"failed: kind not allowed"}
    channel = federation(allow=["mask", "outliers"])
    assert conduct(tmp_path, plan.model_copy(update={"name": "other"}), channel) == "complete"
    lines = read_ledger(tmp_path / "north" / "fedprllm" / "ledger.jsonl")
    assert [line["kind"] for line in lines] == ["outliers"] * 5 + ["mask"] * 5
    assert all(line["shapes"] == {"outliers": [1]} and line["bytes"] < 200 for line in lines[:5])


def test_counts_that_cannot_be_are_refused(tmp_path, model, federation):
    channel = federation(allow=["mask", "outliers"])

    def meddle(name, request, answer):
        header, payload = read_reply(answer)
        if name != "south" or not len(payload):
            return answer
        update = wire.decode(payload, expect=None, max_bytes=len(payload))
        if update.kind != "outliers":
            return answer
        more = {"outliers": torch.tensor([10**9])}
        return pack(header, wire.encode(replace(update, tensors=more)))

    channel.meddle = meddle
    plan = make_plan(model, prune={"allocation": "owl"}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "complete"
    refused = events(tmp_path)[0]
    assert refused["participant"] == "south"
    assert "must lie in 0 to" in refused["reason"]
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    # It was left out only of the survey: pruning asks all participants again.
    assert set(result["participants"]) == set(NAMES)


def test_a_survey_that_is_complete_is_not_repeated(tmp_path, model, federation):
    channel = federation(allow=["mask", "outliers"])
    seen = []

    def meddle(name, request, answer):
        header, payload = read_request(request)[0], read_reply(answer)[1]
        if header.op == "start":
            seen.append(header.survey)
        return garbled(answer) if len(payload) and not header.survey and len(payload) > 200 else answer

    channel.meddle = meddle
    plan = make_plan(model, prune={"allocation": "owl"}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert seen.count(True) == 3
    channel.meddle = lambda name, request, answer: answer
    seen.clear()
    assert conduct(tmp_path, plan, channel) == "complete"
    assert not any(seen)
    expected = in_process(tmp_path, model, federation.paths, allocation="owl")
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def test_a_block_whose_only_participant_is_gone_stops_the_run(tmp_path, model, federation):
    channel = federation(allow=["mask"])
    channel.meddle = lambda name, request, answer: (
        garbled(answer) if name == "west" and is_update(request) else answer
    )
    plan = make_plan(model, prune={"block_fraction": 0.4}, max_ballots=1)
    assert conduct(tmp_path, plan, channel) == "quorum lost"
    assert "no participant is left for block" in outcome(tmp_path)["reason"]
    channel.meddle = lambda name, request, answer: answer
    assert conduct(tmp_path, plan, channel) == "complete"


def test_blocks_that_a_participant_does_not_prune_are_never_sent(tmp_path, model, federation):
    channel = federation(allow=["mask"])
    plan = make_plan(model, prune={"block_fraction": "north=0.4", "strategy": "iterative"})
    assert conduct(tmp_path, plan, channel) == "complete"
    lines = read_ledger(tmp_path / "north" / "fedprllm" / "ledger.jsonl")
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    own = [record["block"] for record in result["blocks"] if "north" in record["participants"]]
    assert len(own) == 2
    assert [line["block"] for line in lines] == own


def test_a_participant_limits_the_blocks_it_prunes(tmp_path, model, federation):
    channel = federation(["north", "west"], allow=["mask"])
    channel.sites |= federation(["south"], allow=["mask"], block_fraction=0.4).sites
    assert conduct(tmp_path, make_plan(model), channel) == "complete"
    assert [(event["participant"], event["reason"]) for event in events(tmp_path)] == [
        ("south", "failed: too many blocks")
    ]
    plan = make_plan(model, prune={"block_fraction": "south=0.4"}).model_copy(update={"name": "other"})
    assert conduct(tmp_path, plan, channel) == "complete"
    result = read_json(tmp_path / "runs" / "other" / "result.json")
    assert result["participants"]["south"]["n_blocks"] == 2
