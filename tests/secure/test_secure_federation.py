"""A federation under masks: the same bits as in the clear, and refusals instead of updates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedprllm import PruneConfig, prune
from fedprllm.cli.app import app as cli
from fedprllm.federation.coordinator import rounds as coordinator_module
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.channel import Interrupted
from fedprllm.federation.protocol.messages import Request, pack, read_reply, read_request
from fedprllm.federation.site.site import Site, settings_path, work_folder
from fedprllm.federation.site.spool import read_ledger
from fedprllm.federation.site.unmask_ledger import UnmaskLedger
from fedprllm.files import read_json, write_sealed
from fedprllm.secure.journal import FileJournal
from tests.federation_helpers import (
    conduct,
    make_plan,
    same_model,
    texts,
    threads,  # noqa: F401  a fixture
)
from tests.isolation import torch_threads
from tests.secure.federations import local, secure_sites

pytestmark = [pytest.mark.usefixtures("threads")]
NAMES = ["east", "north", "south", "west"]
ALLOW = ["mask", "statistics", "gram", "weights", "outliers"]


@pytest.fixture
def federation(tmp_path, small_model, monkeypatch):
    monkeypatch.setattr(coordinator_module, "_POLL_S", 0.01)
    paths = texts(tmp_path / "texts", NAMES)
    with torch_threads(1):
        sites = secure_sites(tmp_path, paths, small_model, allow=ALLOW)
        channel = local(sites)
        channel.paths = paths
        yield channel
        for site in sites.values():
            site.close()


def in_the_clear(tmp_path, model, paths, **options):
    values = {"windows": 2, "window_length": 32, **options}
    with torch_threads(1):
        return prune(model, paths, PruneConfig(**values), out=tmp_path / "in-the-clear")


def outcome(tmp_path):
    return read_json(tmp_path / "runs" / "run" / "federation" / "outcome.json")


def events(tmp_path):
    path = tmp_path / "runs" / "run" / "federation" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "iterative"},
        {"share": "statistics", "strategy": "iterative"},
        {"share": "gram"},
        {"share": "weights"},
        {"allocation": "owl"},
    ],
    ids=str,
)
def test_a_federation_under_masks_gives_the_bits_of_one_in_the_clear(
    tmp_path, small_model, federation, options
):
    plan = make_plan(small_model, prune={"secure": True, **options}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    expected = in_the_clear(tmp_path, small_model, federation.paths, **options)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def test_the_coordinator_sees_no_update_in_the_clear(tmp_path, small_model, federation):
    """All that a participant sends, byte by byte: masked words, keys, boxes, signatures and shares."""
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    kinds = set()
    for _, answer in federation.sent:
        _, payload = read_reply(answer)
        if bytes(payload[:8]) == b"FEDPRLLM":
            update = wire.decode(payload, expect=None, max_bytes=len(payload))
            kinds.add(update.kind)
            assert update.n_tokens == 0
            ones = np.unpackbits(update.tensors["words"].numpy().view(np.uint8)).mean()
            assert abs(ones - 0.5) < 6 * 0.5 / (64 * update.tensors["words"].numel()) ** 0.5
    assert kinds == {"masked"}
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    assert {one.get("n_windows") for one in result["participants"].values()} == {None}
    assert {one["n_blocks"] for one in result["participants"].values()} == {5}
    assert {block["total_tokens"] for block in result["blocks"]} == {4 * 2 * 32}
    lines = read_ledger(tmp_path / "north" / "fedprllm" / "ledger.jsonl")
    assert {line["kind"] for line in lines} == {"masked"}


def test_a_participant_that_requires_masks_sends_nothing_in_the_clear(tmp_path, small_model, federation):
    plan = make_plan(small_model, quorum=1)
    assert conduct(tmp_path, plan, federation, NAMES) == "quorum lost"
    assert {event["reason"] for event in events(tmp_path)} == {"failed: not secure"}
    assert all(not len(read_reply(answer)[1]) for _, answer in federation.sent)


@pytest.mark.parametrize("missing", ["signing.key", "roster.json"])
def test_a_participant_without_key_or_roster_says_what_to_do(tmp_path, small_model, federation, missing):
    (tmp_path / "west" / "local" / missing).unlink()
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    assert [(event["participant"], event["reason"]) for event in events(tmp_path)] == [
        ("west", "failed: not secure")
    ]
    (run,) = (tmp_path / "west").glob("fedprllm/runs/*")
    assert "fedprllm roster" in read_json(run / "status.json")["message"]
    others = {name: path for name, path in federation.paths.items() if name != "west"}
    same_model(tmp_path / "runs" / "run" / "model", in_the_clear(tmp_path, small_model, others).model_dir)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
@pytest.mark.parametrize("op", ["keys", "shares", "boxes", "fetch", "agree", "unmask"])
def test_a_participant_may_vanish_at_any_step(tmp_path, small_model, federation, op, strategy):
    """Four participants, of which three are enough: the sum is that of those whose updates arrived."""
    gone = False

    def vanished(name, request, answer):
        nonlocal gone
        gone |= name == "west" and read_request(request)[0].op == op
        return None if gone and name == "west" else answer

    federation.meddle = vanished
    options = {"secure": True, "strategy": strategy}
    plan = make_plan(small_model, prune=options, quorum=3, join_s=0.5, silence_s=2, max_ballots=1)
    for _ in range(3):
        found = conduct(tmp_path, plan, federation, NAMES)
        if found != "interrupted":
            break
    assert found == "complete", outcome(tmp_path)
    result = read_json(tmp_path / "runs" / "run" / "result.json")
    with_west = "west" in result["blocks"][0]["participants"]
    assert with_west == (op in ("agree", "unmask"))
    if strategy == "one-shot":
        names = NAMES if with_west else NAMES[:3]
        paths = {name: federation.paths[name] for name in names}
        same_model(tmp_path / "runs" / "run" / "model", in_the_clear(tmp_path, small_model, paths).model_dir)


@pytest.mark.parametrize(
    ("every", "strategy"),
    [(15, "one-shot"), (14, "iterative"), (None, "one-shot"), (None, "iterative")],
)
def test_kills_between_messages_give_the_same_bits_and_never_two_masked_updates(
    tmp_path, small_model, federation, every, strategy
):
    """Coordinator and sites end after every few messages, and others continue from their files.

    With None, the first ones end after one message, the next after two, and so on: at every point of a step.
    """
    ask, n_messages, n_attempts = federation.ask, 0, 1

    def killed(names, message, timeout_s):
        nonlocal n_messages
        answers = ask(names, message, timeout_s)
        if read_request(message)[0].op != "state":
            n_messages += 1
            if n_messages % (every or n_attempts) == 0:
                raise Interrupted("killed")
        return answers

    federation.ask = killed
    plan = make_plan(small_model, prune={"secure": True, "strategy": strategy}, quorum=3, max_attempts=999)
    for _ in range(60):
        found = conduct(tmp_path, plan, federation, NAMES)
        if found != "interrupted":
            break
        n_messages, n_attempts = 0 if every is None else n_messages, n_attempts + 1
        for name, site in list(federation.sites.items()):
            site.close()
            federation.sites[name] = Site(name, settings_path(tmp_path / name), work_folder(tmp_path / name))
    assert found == "complete", outcome(tmp_path)
    expected = in_the_clear(tmp_path, small_model, federation.paths, strategy=strategy)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)
    masked = {}
    for name, answer in federation.sent:
        _, payload = read_reply(answer)
        if bytes(payload[:8]) == b"FEDPRLLM":
            update = wire.decode(payload, expect=None, max_bytes=len(payload))
            masked.setdefault((name, update.block), set()).add(bytes(payload))
    assert {len(found) for found in masked.values()} == {1}
    assert len(masked) == 4 * 5


def test_an_update_is_never_masked_twice_however_often_it_is_called_invalid(
    tmp_path, small_model, federation
):
    sent = []

    def refused(name, request, answer):
        header, payload = read_request(request)[0], read_reply(answer)[1]
        if name == "west" and header.op == "fetch" and header.block == 1 and len(payload):
            sent.append(bytes(payload))
            if len(sent) < 3:
                return answer[:-40] + bytes(40)
        return answer

    federation.meddle = refused
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    assert len(sent) == 3
    assert len(set(sent)) == 1
    expected = in_the_clear(tmp_path, small_model, federation.paths)
    same_model(tmp_path / "runs" / "run" / "model", expected.model_dir)


def test_a_second_run_without_one_participant_is_refused_by_all_others(tmp_path, small_model, federation):
    """The difference of the two sums would be what the missing participant shared."""
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    less = plan.model_copy(update={"name": "less", "participants": NAMES[1:]})
    assert conduct(tmp_path, less, federation, NAMES) == "quorum lost"
    (run,) = [
        folder
        for folder in (tmp_path / "north").glob("fedprllm/runs/*")
        if read_json(folder / "status.json")["state"] == "failed"
    ]
    assert "differ by east only" in read_json(run / "status.json")["message"]
    assert not list((run / "updates").glob("*.update")), "refused before an update was masked"
    same = plan.model_copy(update={"name": "same"})
    assert conduct(tmp_path, same, federation, NAMES) == "complete"


def test_a_sum_that_tells_too_much_because_of_a_dropout_is_not_signed(tmp_path, small_model, federation):
    """All four were to take part, as before; then the update of one has not arrived."""
    plan = make_plan(small_model, prune={"secure": True}, quorum=3, max_ballots=1)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    federation.meddle = lambda name, request, answer: (
        None if name == "west" and read_request(request)[0].op == "fetch" else answer
    )
    again = plan.model_copy(update={"name": "again"})
    assert conduct(tmp_path, again, federation, NAMES) == "quorum lost"
    (run,) = [
        folder
        for folder in (tmp_path / "north").glob("fedprllm/runs/*")
        if read_json(folder / "status.json")["state"] == "failed"
    ]
    assert "differ by west only" in read_json(run / "status.json")["message"]
    known, unknown = sorted(
        UnmaskLedger(tmp_path / "north" / "fedprllm").sums(), key=lambda one: not one.is_known
    )
    assert (known.participants, known.quantity, known.blocks) == (NAMES, "votes", [*range(5)])
    assert (unknown.participants, unknown.is_known, unknown.blocks) == (NAMES, False, [*range(5)])
    shown = CliRunner().invoke(cli, ["ledger", str(tmp_path / "north"), "--unmasked"], catch_exceptions=False)
    assert "(or fewer: not known)" in " ".join(shown.output.split())
    shown = CliRunner().invoke(cli, ["ledger", str(tmp_path / "north"), "--unmasked", "--json"])
    assert json.loads(shown.output)[0]["participants"] == NAMES
    signed = FileJournal(run / "secure").read("agree block 0000")
    assert signed is None, "shares are given for whatever was signed"
    federation.meddle = lambda name, request, answer: answer
    third = plan.model_copy(update={"name": "third"})
    assert conduct(tmp_path, third, federation, NAMES) == "complete", outcome(tmp_path)


def test_votes_count_as_the_same_whether_masks_or_weights_are_shared(tmp_path, small_model, federation):
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    assert conduct(tmp_path, plan, federation, NAMES) == "complete", outcome(tmp_path)
    prune = {**plan.prune, "share": "weights"}
    less = plan.model_copy(update={"name": "less", "participants": NAMES[1:], "prune": prune})
    assert conduct(tmp_path, less, federation, NAMES) == "quorum lost"
    prune = {**plan.prune, "share": "statistics"}  # nothing can be subtracted from the sum of votes
    other = plan.model_copy(update={"name": "other", "participants": NAMES[1:], "prune": prune})
    assert conduct(tmp_path, other, federation, NAMES) == "complete"


def test_a_run_cannot_be_begun_again_with_another_model(tmp_path, small_model, federation):
    """The list of opened sums tells models apart by what the coordinator says, which the site checks once."""
    site, run = federation.sites["west"], "0" * 32
    config = PruneConfig(secure=True).model_dump(mode="json")
    request = Request(op="start", run=run, config=config, participants=NAMES)

    def state(fingerprints):
        return read_reply(site.answer(pack(request, json.dumps(fingerprints).encode())))[0]

    assert state({"weight": "one"}).code != "other run"
    found = state({"weight": "another"})
    assert (found.state, found.code) == ("failed", "other run")
    assert state({"weight": "one"}).code != "other run"


class Misled:
    """A site whose coordinator sends it other messages of one kind than it should."""

    def __init__(self, site, op, change) -> None:
        self._site, self._op, self._change = site, op, change

    def answer(self, message):
        header, payload = read_request(message)
        changed = self._change(bytes(payload)) if header.op == self._op else bytes(payload)
        return self._site.answer(pack(header, changed))

    def close(self):
        self._site.close()


def opening(change):
    """Change the contributors to the sums."""

    def changed(payload):
        found = json.loads(payload)
        change(found["contributors"])
        return json.dumps(found).encode()

    return changed


def survivors(names):
    def changed(payload):
        found = json.loads(payload)
        found["survivors"] = dict.fromkeys(found["survivors"], names)
        return json.dumps(found).encode()

    return changed


def adverts_without_signature(payload):
    found = json.loads(payload)
    found["north"] = "00" * 64 + found["north"][128:]
    return json.dumps(found).encode()


MISLED = {
    "a minted participant": ("keys", opening(lambda by: by["0"].append("eve"))),
    "a lone contributor": ("keys", opening(lambda by: by.__setitem__("0", ["west"]))),
    "other blocks": ("keys", opening(lambda by: by["0"].remove("west"))),
    "a replaced key": ("shares", adverts_without_signature),
    "a withheld box": ("boxes", lambda payload: payload.replace(b"north", b"south", 1)),
    "a swapped box": (
        "boxes",
        lambda payload: (
            payload.replace(b"north", b"tmp").replace(b"south", b"north").replace(b"tmp", b"south")
        ),
    ),
    "too few survivors": ("agree", survivors(["west"])),
    "other survivors than agreed": ("unmask", survivors(["north", "south", "west"])),
    "no signatures": (
        "unmask",
        lambda payload: json.dumps({**json.loads(payload), "signatures": {}}).encode(),
    ),
}


@pytest.mark.parametrize("case", MISLED)
def test_a_misled_participant_refuses_and_says_why(tmp_path, small_model, federation, case):
    """Nothing of the update can be read from what it has answered, and the others finish without it."""
    op, change = MISLED[case]
    federation.sites["west"] = Misled(federation.sites["west"], op, change)
    plan = make_plan(small_model, prune={"secure": True}, quorum=3)
    found = conduct(tmp_path, plan, federation, NAMES)
    told = [event for event in events(tmp_path) if event["participant"] == "west"]
    assert [event["reason"] for event in told] == ["failed: not secure"]
    (run,) = (tmp_path / "west").glob("fedprllm/runs/*")
    assert read_json(run / "status.json")["message"]
    # Without a box, its masks do not cancel out: a coordinator that withholds one ruins its own sum.
    assert found == ("error" if case == "a withheld box" else "complete"), outcome(tmp_path)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b'{"session":"x","contributors":{}}'])
@pytest.mark.parametrize("op", ["keys", "shares", "boxes", "agree", "unmask"])
def test_what_cannot_be_read_is_refused_in_words(tmp_path, small_model, federation, op, payload):
    site = federation.sites["west"]
    request = Request(op="start", run="0" * 32, config=PruneConfig(secure=True).model_dump(mode="json"))
    site._run = request.run
    write_sealed(site.spool.path("job.json"), request.model_dump(mode="json", exclude={"op", "block"}))
    write_sealed(site.spool.path("fingerprints.json"), {})
    reply, content = read_reply(site.answer(pack(Request(op=op, run=request.run), payload)))
    assert reply.state == "failed"
    assert reply.code in ("bad request", "not secure")
    assert not len(content)
