"""Everything that leaves a participant, recorded where the engine passes it to the connection, before TLS."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("nvflare")

from fedprllm.federation.protocol import update as wire
from fedprllm.federation.site.spool import read_ledger
from fedprllm.models.tokenizer import load_tokenizer
from tests.federation_processes import Federation, finish

pytestmark = [pytest.mark.federation, pytest.mark.filterwarnings("ignore")]

NAMES = ["north", "south"]
RECORDER = Path(__file__).parents[1] / "recorder"
SHAKE_HANDS = {4, 5}  # frame types without a topic, which hold the name and the time
# The engine's own messages: which sites are connected, and the state of the job.
ENGINE = {
    ("admin", "admin"),
    ("admin", "train.notify_job_status"),
    ("cellnet.channel", "bye"),
    ("sm__STREAM", "sm__ACK"),
    ("task", "challenge"),
    ("task", "heart_beat"),
    ("task", "register"),
    ("task", "report_job_failure"),
}
OURS = ("sm__STREAM", "sm__DATA")


class Frame(NamedTuple):
    """A message as it was passed to a connection."""

    about: dict[str, Any]
    headers: bytes
    payload: bytes

    @property
    def topic(self) -> tuple[str, str]:
        headers = self.about["headers"]
        return headers.get("cn__channel", ""), headers.get("cn__topic", "")

    @property
    def update(self) -> bytes:
        """The update that the message contains; empty if there is none."""
        start = self.payload.find(b"FEDPRLLM")
        if start < 0:
            return b""
        return self.payload[start : start + struct.unpack_from("<Q", self.payload, start + 12)[0]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, small_model):
    """A complete run, and every frame sent by a process of a site."""
    folder = tmp_path_factory.mktemp("recorded")
    traffic = folder / "traffic"
    traffic.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPRLLM_TRAFFIC", str(traffic))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(RECORDER), os.environ.get("PYTHONPATH", "")]))
        with Federation(folder, small_model, NAMES, 200) as federation:
            options = {"windows": 2, "window_length": 32, "strategy": "iterative"}
            finish(federation.begin("run", options, quorum=2))
    frames = []
    for path in sorted(traffic.glob("*.frame")):
        line, _, payload = path.read_bytes().partition(b"\n")
        about = json.loads(line)
        if "nvflare.private.fed.app.client" in about["process"]:
            frames.append(Frame(about, json.dumps(about["headers"]).encode(), payload))
    assert {name for name in NAMES for frame in frames if f"/{name}" in frame.about["process"]} == set(NAMES)
    return federation, frames


def test_the_updates_that_left_are_those_of_the_ledgers(recorded):
    federation, frames = recorded
    left = sorted(hashlib.sha256(frame.update).hexdigest() for frame in frames if frame.update)
    lines = [
        line for name in NAMES for line in read_ledger(federation.kits / name / "fedprllm" / "ledger.jsonl")
    ]
    assert left == sorted(line["sha256"] for line in lines if line["direction"] == "sent")
    assert len(left) == 2 * 5
    for frame in frames:
        if frame.update:
            update = wire.decode(frame.update, expect=None, max_bytes=len(frame.update))
            assert update.kind == "mask"
            assert f"/{update.participant}/engine " in frame.about["process"] + " "


def test_everything_else_is_the_engine_s_own_or_small(recorded):
    _, frames = recorded
    for frame in frames:
        if frame.about["type"] in SHAKE_HANDS:
            assert len(frame.payload) < 200
            continue
        assert frame.topic in {*ENGINE, OURS}, frame.about
        # The state in a reply plus the engine's headers; the certificate when a site registers.
        limit = 4000 if frame.topic == ("task", "register") else 1000
        assert len(frame.payload) - len(frame.update) < limit, frame.about


def test_no_frame_holds_text_tokens_or_paths(recorded):
    federation, frames = recorded
    tokenizer = load_tokenizer(federation.model)
    forbidden = [b"Once upon", b"little", b"birds", b"bread", str(federation.folder).encode()]
    for path in federation.texts.values():
        ids = tokenizer(path.read_text()[:400])["input_ids"]
        for start in range(1, 33, 8):
            some = ids[start : start + 6]
            forbidden += [struct.pack(f"<{len(some)}{letter}", *some) for letter in "Hiq"]
            forbidden += [json.dumps(some).encode(), json.dumps(some, separators=(",", ":")).encode()]
    assert len(set(map(len, forbidden))) > 5
    for frame in frames:
        for word in forbidden:
            assert word not in frame.payload, frame.about
            assert word not in frame.headers, frame.about


def test_the_recorder_sees_a_word_that_was_sent(recorded):
    """Proof that the tests above can fail: the coordinator's requests do contain the model's path."""
    federation, _ = recorded
    path = str(federation.model).encode()
    frames = (federation.folder / "traffic").glob("*.frame")
    assert any(path in frame.read_bytes().partition(b"\n")[2] for frame in frames)
