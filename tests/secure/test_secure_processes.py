"""Secure aggregation between real processes: a hostile server, kills, and everything that was sent.

One federation of four participants makes three runs. In the first, the server asks each participant for what
it must not have (`tests.secure.hostile_coordinator`); in the second, processes are killed between messages;
the third leaves out one participant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare")

from fedprllm import PruneConfig, prune
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.names import to_wire
from fedprllm.federation.site.spool import read_ledger
from fedprllm.files import read_json
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.inputs import make_participants
from fedprllm.pruning.masked_totals import layout_of
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.walk import Walker
from tests.federation_helpers import same_model
from tests.federation_processes import Federation, finish, kill, wait_until
from tests.isolation import torch_threads
from tests.secure.hostile_coordinator import HOSTILE_RUN, N_BLOCKS, NAMES

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

HERE, ROOT = Path(__file__).parent / "hostile_server", Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"windows": 2, "window_length": 32}
KILLED: dict[str, Any] = {**OPTIONS, "share": "gram", "strategy": "iterative"}


class SecureFederation(Federation):
    """A federation in which nothing may leave in the clear."""

    def settings(self, name: str, **others: Any) -> Any:
        secure = {"require_secure": True, "allow": ["mask", "gram"]}
        return super().settings(name, **others).model_copy(update=secure)

    def begin(self, run: str, prune: dict[str, Any], **policy: Any) -> Any:
        return super().begin(run, {**prune, "secure": True}, **{"quorum": 3, **policy})

    @property
    def orders(self) -> Path:
        return self.folder / "orders"

    def pauses_at(self, op: str) -> Path:
        """Stop the next run where a step begins; deleting the file lets it continue."""
        order = self.orders / f"pause {op}"
        order.touch()
        return order

    def frames(self) -> list[tuple[str, bytes]]:
        """Every message of a participant's processes, with the command line of its sender."""
        found = []
        for path in sorted((self.folder / "traffic").glob("*.frame")):
            line, _, payload = path.read_bytes().partition(b"\n")
            sender = json.loads(line)["process"]
            if "nvflare.private.fed.app.client" in sender:
                found.append((sender, payload))
        return found

    def updates(self) -> list[wire.Update]:
        """Every update that a participant's processes sent."""
        found = []
        for _, frame in self.frames():
            if (start := frame.find(b"FEDPRLLM")) >= 0:
                length = int.from_bytes(frame[start + 12 : start + 20], "little")
                found.append(wire.decode(frame[start : start + length], expect=None, max_bytes=length))
        return found


@pytest.fixture(scope="module")
def federation(tmp_path_factory, small_model):
    folder = tmp_path_factory.mktemp("secure")
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("TRAFFIC", folder / "traffic"), ("ORDERS", folder / "orders")):
            path.mkdir()
            patch.setenv(f"FEDPRLLM_{name}", str(path))
        inherited = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(ROOT), inherited]))
        with SecureFederation(folder, small_model, NAMES, 200) as made:
            yield made


@pytest.fixture(scope="module")
def hostile(federation):
    """What the participants answered to a hostile server in one run, which it then finished."""
    finish(federation.begin(HOSTILE_RUN, OPTIONS))
    return [json.loads(line) for line in (federation.orders / "answers.jsonl").read_text().splitlines()]


def in_the_clear(federation, folder, options):
    with torch_threads(1):
        texts = {name: [str(path)] for name, path in federation.texts.items()}
        return prune(federation.model, texts, PruneConfig(**options), out=folder).model_dir


FORBIDDEN = {
    "an update in the clear": 1,
    "a minted participant": 1,
    "two participants": 1,
    "a lone contributor": 1,
    "another configuration for one": 3,
    "other participants for one": 3,
    "a replaced key": 1,
    "keys of an earlier session": 1,
    "keys of a few": 1,
    "an altered box": 1,
    "swapped boxes": 1,
    "boxes of a few": 1,
    "a second session": 1,
    "shares before agreement": 1,
    "a sum of two": 1,
    "a stranger in the sum": 1,
    "a second list": 1,
    "the second list with too few signatures": 1,
    "the second list with signatures on the first": 1,
    "the first list, which it has not signed": 1,
    "both kinds of share": 1,
    "fewer signatures than the threshold": 1,
    "a forged signature": 1,
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_hostile_server_is_refused_before_a_byte_leaves(hostile, what):
    asked = [one for one in hostile if one["what"] == what]
    assert len(asked) == FORBIDDEN[what]
    for one in asked:
        assert (one["state"], one["code"], one["n_bytes"]) == ("failed", "not secure", 0), one


def test_no_other_question_was_asked_and_replays_get_the_same_bytes(hostile):
    others = [one for one in hostile if one["what"] not in FORBIDDEN]
    assert [one["what"] for one in others] == [
        "fetched in the clear",
        *N_BLOCKS * ["fetched again"],
        "shares again",
    ]
    assert others[0]["n_bytes"] == 0
    assert all(one["same"] and one["n_bytes"] for one in others[1:])


def test_the_sum_of_the_attacked_run_is_the_plain_sum(federation, hostile, tmp_path):
    assert hostile
    run = federation.run_folder(HOSTILE_RUN)
    same_model(run / "model", in_the_clear(federation, tmp_path, OPTIONS))
    assert all(block["participants"] == NAMES for block in read_json(run / "result.json")["blocks"])


def in_clear_bytes(federation) -> list[bytes]:
    """What the participants' updates would be without masks, as messages and as words, in pieces."""
    config, pieces = PruneConfig(**OPTIONS), []
    model = BlockwiseModel(federation.model)
    texts = {name: [str(path)] for name, path in federation.texts.items()}
    participants, config = make_participants(model, texts, config)
    method = pruning_method(config)
    for participant in participants:
        walker = Walker(participant, method, model.n_blocks)
        walker.enter(model)
        for index in range(model.n_blocks):
            with model.block(index) as block:
                contribution = walker.contribute(block)
                message = wire.Update(
                    bytes(16), participant.name, index, "mask", bytes(32),
                    to_wire(contribution.update, block.linears), participant.n_tokens,
                )  # fmt: skip
                words = layout_of(block, method, len(NAMES)).pack(contribution.update, participant.n_tokens)
                for content in (wire.encode(message)[-1500:-32], words.tobytes()):
                    pieces += [content[start : start + 32] for start in range(0, len(content) - 32, 499)]
                walker.advance(block, contribution.weights)
    return pieces


def test_the_server_s_traffic_holds_no_update_in_the_clear(federation, hostile):
    assert hostile
    with torch_threads(1):
        pieces = in_clear_bytes(federation)
    assert len(set(pieces)) > 100
    everything = b"\n".join(frame for _, frame in federation.frames())
    assert len(everything) > 4 * N_BLOCKS * 3 * 2000
    for piece in pieces:
        assert piece not in everything
    updates = federation.updates()
    assert {(update.kind, update.n_tokens) for update in updates} == {("masked", 0)}
    assert {(update.participant, update.block) for update in updates} == {
        (name, block) for name in NAMES for block in range(N_BLOCKS)
    }


def test_private_keys_are_nowhere_but_in_their_own_kit(federation, hostile):
    assert hostile
    everything = {"traffic": b"\n".join(frame for _, frame in federation.frames())}
    for path in federation.kits.rglob("*"):
        if path.is_file():
            everything[str(path)] = path.read_bytes()
    for name in NAMES:
        key = (federation.kits / name / "local" / "signing.key").read_bytes()
        found = {
            path for path, content in everything.items() if key in content or key.hex().encode() in content
        }
        assert found == {str(federation.kits / name / "local" / "signing.key")}


@pytest.fixture(scope="module")
def killed(federation, hostile):
    """A run in which processes are killed between messages, and which ends all the same."""
    assert hostile
    boxes = federation.pauses_at("boxes")
    running = federation.begin("killed", KILLED)
    wait_until((federation.orders / "paused boxes").exists, "the boxes")
    kill([federation.worker(name) for name in ("north", "south")])  # they have an update, and no box yet
    boxes.unlink()
    wait_until(lambda: federation.n_computed("south", "killed"), "the first update of south")
    unmask = federation.pauses_at("unmask")
    wait_until((federation.orders / "paused unmask").exists, "an agreement")
    kill([*federation.family("server"), *federation.family("west")])
    unmask.unlink()
    federation.start("server")
    federation.start("west")
    return finish(running)


def test_kills_between_messages_end_with_the_same_bits(federation, killed, tmp_path):
    assert "retrying" in killed
    same_model(
        federation.run_folder("killed") / "model",
        in_the_clear(federation, tmp_path, KILLED),
    )


def test_no_update_was_ever_masked_twice(federation, killed):
    assert killed
    masked: dict[Any, set[bytes]] = {}
    complete = {
        bytes.fromhex((federation.run_folder(run) / ".run-id").read_text()) for run in (HOSTILE_RUN, "killed")
    }
    for update in federation.updates():
        if update.run_id not in complete:
            continue
        words = update.tensors["words"].numpy().tobytes()
        masked.setdefault((update.run_id, update.participant, update.block), set()).add(words)
    assert len(masked) == 2 * 4 * N_BLOCKS
    assert {len(versions) for versions in masked.values()} == {1}
    for name in NAMES:
        lines = read_ledger(federation.kits / name / "fedprllm" / "ledger.jsonl")
        assert {line["kind"] for line in lines} == {"masked"}


def test_the_same_run_without_one_participant_is_refused(federation, hostile):
    """The difference of the two sums would be what the missing participant shared."""
    assert hostile
    less = {"participants": ["east", "north", "south"]}
    output = finish(federation.begin("less", OPTIONS, **less), expected=2)
    assert "the quorum is 3" in output
    for name in less["participants"]:
        status = read_json(federation.spool(name, "less") / "status.json")
        assert (status["state"], status["code"]) == ("failed", "not secure")
        # South was told a list that too few have signed, and does not know what was opened.
        assert ("this run differs by west" if name == "south" else "differ by west only") in status["message"]
