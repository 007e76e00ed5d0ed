"""Plans, settings, messages, the spool and the ledger."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedprllm import ConfigError, RunError, UpdateError
from fedprllm.cli.coordinator import app
from fedprllm.federation.plan import Plan, RunPlan, SiteSettings, read_plan, read_run_plan
from fedprllm.federation.protocol.messages import (
    MAX_HEADER_BYTES,
    Reply,
    Request,
    pack,
    read_reply,
    read_request,
)
from fedprllm.federation.site.spool import Spool, append_ledger, read_ledger
from fedprllm.files import write_bytes

PLAN = {"server": "localhost", "participants": ["north", "south"]}
RUN = {"name": "first", "model": "some/model"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"participants": []}, "participants"),
        ({"participants": ["north", "north"]}, "named twice"),
        ({"participants": ["../north"]}, "cannot name"),
        ({"participants": ["coordinator"]}, "cannot name"),
        ({"participants": ["localhost"]}, "is the server"),
        ({"port": 0}, "port"),
        ({"scheme": "ftp"}, "unknown scheme"),
        ({"sever": "x"}, "did you mean 'server'"),
    ],
)
def test_a_plan_names_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words):
        Plan(**PLAN | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../x"}, "cannot name a run"),
        ({"quorum": 0}, "quorum"),
        ({"quorum": 3, "participants": ["a", "b"]}, "cannot be reached by 2"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"prune": {"strategy": "centralized"}}, "cannot run in a federation"),
        ({"prune": {"sparsty": 0.5}}, "did you mean 'sparsity'"),
        ({"modell": "x"}, "did you mean 'model'"),
    ],
)
def test_a_run_names_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words):
        RunPlan(**RUN | change)


def test_files_are_named_in_errors_and_models_found_beside_them(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('name = "first"\nmodel = "here"\nquorum = 0\n')
    with pytest.raises(ConfigError, match=r"config\.toml"):
        read_run_plan(path)
    (tmp_path / "here").mkdir()
    path.write_text('name = "first"\nmodel = "here"\n')
    assert read_run_plan(path).model == str(tmp_path / "here")
    path.write_text("name = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_plan(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_plan(tmp_path / "absent.toml")


def test_the_examples_can_be_read(pytestconfig):
    folder = pytestconfig.rootpath / "examples" / "federation"
    plan, run = read_plan(folder / "plan.toml"), read_run_plan(folder / "config.toml")
    assert len(plan.participants) >= run.quorum


def test_only_masks_leave_unless_told_otherwise():
    assert SiteSettings(data=["x"]).allow == ["mask"]


def test_messages_come_back_as_they_were():
    request = Request(op="fetch", run="ab" * 16, block=3)
    assert read_request(pack(request, b"payload"))[0] == request
    reply = Reply(state="working", n_ready=4)
    header, payload = read_reply(pack(reply, b"payload"))
    assert (header, bytes(payload)) == (reply, b"payload")


@pytest.mark.parametrize(
    "header",
    [
        {"state": "working", "text": "once upon a time"},
        {"state": "once upon a time"},
        {"state": "failed", "code": "once upon a time"},
        {"n_ready": -1},
        {"n_ready": "3"},
        {"tensor": "x" * 256},
        [],
    ],
)
def test_a_reply_has_no_place_for_anything_else(header):
    text = json.dumps(header).encode()
    with pytest.raises(UpdateError):
        read_reply(len(text).to_bytes(4, "little") + text)


def test_a_header_is_bounded():
    with pytest.raises(UpdateError, match="header"):
        read_reply((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + b" " * (MAX_HEADER_BYTES + 1))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_readers(message):
    for read in (read_request, read_reply):
        try:
            header, _ = read(message)
        except UpdateError:
            continue
        assert isinstance(header, (Request, Reply))


def test_the_spool_counts_whole_updates_from_the_first(tmp_path):
    spool = Spool(tmp_path)
    assert (spool.n_ready, spool.n_walked, spool.status) == (0, 0, {"state": "idle"})
    for block in (0, 1, 3):
        write_bytes(spool.update_path(block), b"x")
    write_bytes(spool.hidden_path(1), b"x")
    assert (spool.n_ready, spool.n_walked) == (2, 2)
    spool.forget(1)
    assert (spool.n_ready, spool.n_walked) == (1, 0)


def test_the_ledger_has_a_line_for_each_update(tmp_path):
    path = tmp_path / "kit" / "ledger.jsonl"
    summary = {"kind": "mask", "n_tokens": 64, "shapes": {"w": [2, 3]}}
    append_ledger(path, "ab" * 16, 0, summary, b"first")
    append_ledger(path, "ab" * 16, 1, summary, b"second")
    lines = read_ledger(path)
    assert [(line["block"], line["bytes"]) for line in lines] == [(0, 5), (1, 6)]
    assert all(len(line["sha256"]) == 64 for line in lines)
    path.write_text("{")
    with pytest.raises(RunError, match="line 1 is damaged"):
        read_ledger(path)
    with pytest.raises(RunError, match="nothing was sent"):
        read_ledger(tmp_path / "absent.jsonl")


def test_help_imports_neither_torch_nor_the_engine():
    code = (
        "import sys, fedprllm.cli.coordinator, fedprllm.cli.participant; "
        "assert not {'torch', 'nvflare', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    result = CliRunner().invoke(app, ["--help"])
    for command in ("init", "sign", "renew", "serve", "run", "status", "report", "revoke", "rehearse"):
        assert command in result.output


def test_only_the_flare_folder_imports_the_engine(pytestconfig):
    source = pytestconfig.rootpath / "src" / "fedprllm"
    for path in source.rglob("*.py"):
        if "flare" not in path.parts:
            lines = path.read_text().splitlines()
            assert not any(line.lstrip().startswith(("import nvflare", "from nvflare")) for line in lines), (
                path
            )
