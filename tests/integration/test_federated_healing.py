"""Healing in a federation: the same bits as in one process, in the clear and under masks; limits, faults."""

from __future__ import annotations

import json

import pytest
import torch

from fedprllm import HealConfig, heal
from fedprllm.errors import ConfigError
from fedprllm.federation.coordinator import rounds as coordinator_module
from fedprllm.federation.coordinator.job import conduct_run
from fedprllm.federation.plan import RunPlan
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.channel import Interrupted
from fedprllm.federation.protocol.messages import read_reply, read_request
from fedprllm.federation.site.spool import read_ledger
from fedprllm.files import read_json
from fedprllm.healing.records import HealRecord
from tests.conftest import SMALL_MODEL
from tests.federation_helpers import (
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
from tests.secure.federations import pin_for_all, settings_path

pytestmark = [pytest.mark.usefixtures("threads")]
NAMES = ["east", "north", "south", "west"]
OPTIONS = {"rounds": 4, "check_every": 2, "windows": 8, "window_length": 32, "learning_rate": 0.02}
PATIENCE = {"deadline_s": 120, "join_s": 5, "silence_s": 60, "quorum": 3}


@pytest.fixture
def federation(tmp_path, small_model, monkeypatch):
    """``federation(**settings)`` is a channel to participants that have a model."""
    monkeypatch.setattr(coordinator_module, "_POLL_S", 0.01)
    paths = texts(tmp_path / "texts", NAMES)
    made = []

    def make(**settings):
        given = {"allow": ["mask", "gradients"], "min_gradient_tokens": 16, **settings}
        sites = {
            name: make_site(tmp_path, name, paths[name], small_model, threads=1, **given) for name in NAMES
        }
        pin_for_all({name: settings_path(tmp_path / name).parents[1] for name in NAMES})
        made.extend(sites.values())
        channel = Local(sites)
        channel.paths = paths
        return channel

    with torch_threads(1):
        yield make
        for site in made:
            site.close()


def healing_plan(of: str = "", **heal_options) -> RunPlan:
    model = {"of": of} if of else {"model": str(SMALL_MODEL)}
    return RunPlan(name="healed", heal={**OPTIONS, **heal_options}, **model, **PATIENCE)


def outcome(tmp_path):
    return read_json(tmp_path / "runs" / "healed" / "federation" / "outcome.json")


def events(tmp_path):
    path = tmp_path / "runs" / "healed" / "federation" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ledger(tmp_path, name):
    return read_ledger(tmp_path / name / "fedprllm" / "ledger.jsonl")


def in_process(tmp_path, paths, model=SMALL_MODEL, loss="text"):
    participants = {name: [path] for name, path in paths.items()}
    dense = SMALL_MODEL if loss == "dense" else None
    config = HealConfig(**OPTIONS, loss=loss)
    return heal(model, participants, config, out=tmp_path / "in-process", dense=dense)


@pytest.mark.parametrize(("secure", "loss"), [(False, "text"), (True, "dense")])
def test_the_healed_model_has_the_same_bits_as_in_one_process_everywhere(tmp_path, federation, secure, loss):
    channel = federation()
    assert conduct(tmp_path, make_plan(SMALL_MODEL), channel, NAMES) == "complete"
    for name in NAMES:
        collector(tmp_path, name).collect()
    plan = healing_plan(of="run", secure=secure, loss=loss)
    assert conduct(tmp_path, plan, channel, NAMES) == "complete", outcome(tmp_path)
    expected = in_process(tmp_path, channel.paths, tmp_path / "runs" / "run" / "model", loss)
    assert expected.record.best_round > 0
    same_model(tmp_path / "runs" / "healed" / "model", expected.model_dir)
    for name in NAMES:
        collector(tmp_path, name).collect()
        same_model(tmp_path / name / "runs" / "healed" / "model", expected.model_dir)
    record = HealRecord.read(tmp_path / "runs" / "healed" / "result.json")
    assert [one.loss for one in record.rounds] == [one.loss for one in expected.record.rounds]
    assert record.held_out == expected.record.held_out
    assert all(bool(one.losses) != secure for one in record.rounds[:-1])
    kind = "masked" if secure else "gradients"
    for name in NAMES:
        sent = [
            line
            for line in read_ledger(tmp_path / name / "fedprllm" / "ledger.jsonl")
            if line["direction"] == "sent"
        ]
        assert [line["block"] for line in sent if line["kind"] == kind][-5:] == [0, 1, 2, 3, 4]


def test_under_masks_the_server_sees_no_gradient(tmp_path, federation):
    channel = federation()
    seen = {}

    def watch(name, request, answer):
        asked, _ = read_request(request)
        _, payload = read_reply(answer)
        if asked.op == "fetch" and len(payload):
            update = wire.decode(payload, expect=None, max_bytes=len(payload))
            seen.setdefault(asked.block, {})[name] = update.tensors["words"]
        return answer

    channel.meddle = watch
    assert conduct(tmp_path, healing_plan(secure=True), channel, NAMES) == "complete", outcome(tmp_path)
    in_the_clear = {}
    plain = federation_words(tmp_path, channel.paths)
    for number, words in plain.items():
        for name, tensor in words.items():
            in_the_clear[number, name] = tensor
            assert not torch.equal(seen[number][name], tensor)
            assert (seen[number][name] == tensor).float().mean() < 0.01


def federation_words(tmp_path, paths):
    """What each participant adds to the first round."""
    from fedprllm.healing.in_process import Learner
    from fedprllm.healing.participant import HealingText
    from fedprllm.models.blockwise import BlockwiseModel
    from fedprllm.pruning.inputs import make_participants

    config = HealConfig(**OPTIONS)
    model = BlockwiseModel(SMALL_MODEL)
    members, _ = make_participants(model, {name: [path] for name, path in paths.items()}, config.reading)
    with Learner(model, config, tmp_path / "spilled") as learner:
        sums = learner.contribute([HealingText(one) for one in members], learner.tunable.initial(), 0)
    return {0: {name: one.words for name, one in sums.items()}}


@pytest.mark.parametrize("secure", [False, True])
def test_a_killed_job_continues_and_ends_with_the_same_bits(tmp_path, federation, secure):
    channel = federation()
    plan, n_asked = healing_plan(secure=secure), 0

    class Dying:
        def present(self):
            return channel.present()

        def ask(self, names, message, timeout_s):
            nonlocal n_asked
            n_asked += read_request(message)[0].op in ("fetch", "agree", "unmask")
            if n_asked and n_asked % 11 == 0:
                n_asked += 1
                raise Interrupted("killed")
            return channel.ask(names, message, timeout_s)

    ends = []
    while "complete" not in ends and len(ends) < 60:
        ends.append(conduct_run(plan, NAMES, tmp_path / "runs", "job", Dying()))
    assert set(ends) == {"interrupted", "complete"}, outcome(tmp_path)
    same_model(tmp_path / "runs" / "healed" / "model", in_process(tmp_path, channel.paths).model_dir)


def test_a_participant_that_is_lost_costs_its_tokens_only(tmp_path, federation):
    channel = federation()

    def meddle(name, request, answer):
        asked, _ = read_request(request)
        return b"nonsense" if name == "west" and asked.op == "fetch" and asked.block >= 2 else answer

    channel.meddle = meddle
    assert conduct(tmp_path, healing_plan(), channel, NAMES) == "complete", outcome(tmp_path)
    assert [event["participant"] for event in events(tmp_path) if event["event"] == "left out"] == ["west"]
    record = HealRecord.read(tmp_path / "runs" / "healed" / "result.json")
    assert [len(one.participants) for one in record.rounds] == [4, 4, 3, 3, 3]
    assert [one.n_tokens for one in record.rounds] == [124, 124, 93, 93, 0]


def gradient_message(message: bytes, change) -> bytes:
    """A participant's gradient, changed by what has taken it over."""
    update = wire.decode(message, expect=None, max_bytes=len(message))
    words = update.tensors["words"].clone()
    change(words)
    from dataclasses import replace

    return wire.encode(replace(update, tensors={"words": words}))


@pytest.mark.parametrize(
    ("change", "reason", "most"),
    [
        (lambda words: words[:-4].mul_(2), "a gradient longer than that of 1 windows can be in round 0", 1),
        (lambda words: words[:-4].mul_(1000), "as long as the other participants' median", 1e9),
        (lambda words: words[:1].fill_(2**60), "a gradient longer than that of 1 windows can be", 1e9),
        (lambda words: words[-3:-2].mul_(2), "claims 62 tokens in round 0", 1),
        (lambda words: words[-4:-3].neg_(), "has a loss of -", 1),
        (lambda words: words[-1:].add_(31 * 9), "held-out tokens in round 0", 1),
    ],
)
def test_a_hostile_gradient_is_refused_by_name(tmp_path, federation, change, reason, most):
    from fedprllm.federation.protocol.messages import pack

    channel = federation()

    def meddle(name, request, answer):
        asked, _ = read_request(request)
        reply, payload = read_reply(answer)
        if name != "south" or asked.op != "fetch" or not len(payload):
            return answer
        return pack(reply, gradient_message(bytes(payload), change))

    channel.meddle = meddle
    plan = healing_plan(max_gradient_norm=most)
    assert conduct(tmp_path, plan, channel, NAMES) == "complete", outcome(tmp_path)
    assert {event["participant"] for event in events(tmp_path)} == {"south"}
    assert any(reason in event["reason"] for event in events(tmp_path)), events(tmp_path)


@pytest.mark.parametrize(
    ("settings", "options", "code"),
    [
        ({"allow": ["mask"]}, {}, "kind not allowed"),
        ({"max_rounds": 3}, {}, "too many rounds"),
        ({"min_gradient_tokens": 64}, {}, "too few tokens"),
        ({"min_windows": 9}, {}, "too few tokens"),
    ],
)
def test_limits_of_a_participant_hold(tmp_path, federation, settings, options, code):
    channel = federation(**settings)
    assert conduct(tmp_path, healing_plan(**options), channel, NAMES) == "quorum lost"
    assert all(code in event["reason"] for event in events(tmp_path))
    assert not list(tmp_path.rglob("ledger.jsonl")), "something left a participant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "run"}, r"of names the run 'run', whose result would be healed, but there is no \[heal\]"),
        ({"heal": {}}, "model is missing"),
        ({"heal": {}, "of": "run", "model": "m"}, "give one of them"),
        ({"heal": {}, "of": "run", "prune": {"sparsity": 0.5}}, "prune in one run, and heal its result"),
        ({"heal": {"loss": "dense"}, "model": "m"}, "name the run with of instead of the model"),
        ({"heal": {"rounds": 0}, "of": "run"}, "rounds: input should be greater than or equal to 1"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _ = RunPlan(name="healed", **options).config


def test_a_run_that_is_not_complete_cannot_be_healed(tmp_path):
    plan = RunPlan(name="healed", of="other", heal=OPTIONS, **PATIENCE)
    assert conduct(tmp_path, plan, Local({}), NAMES) == "error"
    assert "of names the run 'other', which is not complete" in outcome(tmp_path)["reason"]
