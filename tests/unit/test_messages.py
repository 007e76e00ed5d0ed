"""Mistakes, refusals of the system and interruptions: one line each, on the command line and in Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedprllm import ConfigError, DataError, ModelError, PruneConfig, evaluate, prune
from fedprllm.cli import app as app_module
from fedprllm.cli import console as console_module
from fedprllm.cli import coordinator
from fedprllm.cli.app import main
from fedprllm.federation.plan import Plan
from fedprllm.models.source import resolve_model
from fedprllm.pruning.inputs import PooledData

SHORT = ("--windows", "1", "--window-length", "32")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPRLLM_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        lines = "".join(f"Once upon a time {name} saw {i} birds. " for i in range(400))
        (tmp_path / f"{name}.txt").write_text(lines)
    return ["--participant", "a.txt", "--participant", "b.txt", *SHORT]


@pytest.fixture
def says(capsys, monkeypatch):
    """``says(*words)`` runs the command line and returns its exit status and all that it printed."""

    # The command line sets it for its own process.
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedprllm", *map(str, words)])
        for module in (app_module, console_module, coordinator):
            for name in ("console", "errors"):
                # Not the property: undone, it would keep the stream of this test, which is closed.
                monkeypatch.setattr(getattr(module, name), "_file", None)
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return run


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["a.txt/run", "/dev/null/run", "/proc/nowhere/run"])
def test_output_that_cannot_be_written(small_model, texts, says, out):
    status, said = says("prune", small_model, *texts, "--out", out)
    assert status == 2
    assert f"{out} cannot be written (" in said
    assert "choose another folder with --out" in said
    assert "pruning" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_output_that_is_not_permitted(small_model, texts, says, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    status, said = says("prune", small_model, *texts, "--out", "closed/run")
    assert (status, "closed/run cannot be written (Permission denied)" in said) == (2, True)


def test_a_report_that_cannot_be_written(small_model, texts, says):
    pytest.importorskip("matplotlib")
    assert says("prune", small_model, *texts, "--out", "run")[0] == 0
    status, said = says("report", "run", "--out", "a.txt/page.html")
    assert status == 2
    assert "a.txt" in said
    assert "is in the way of a folder" in said


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ('participants = "2"', "participants must be an integer without quotation marks, found '2'"),
        ("participants = 2.5", "participants must be an integer"),
        ("participants = true", "participants must be an integer"),
        ('alpha = "0.3"', "alpha must be a number without quotation marks, found '0.3'"),
        ("out = 5", "out must be a text in quotation marks, found 5"),
        ("model = 3", "model must be a text"),
        ("partition = 7", "partition must be a text"),
        ("data = [1, 2]", "data must be a list of paths in square brackets, found [1, 2]"),
        ('eval = "a.txt"', "eval must be a list of paths"),
    ],
)
def test_values_of_a_wrong_type_in_a_file(texts, says, tmp_path, line, pattern):
    (tmp_path / "run.toml").write_text(line)
    status, said = says("prune", "--config", "run.toml")
    assert (status, f"run.toml: {pattern}" in said) == (2, True), said


def test_square_brackets_in_paths_are_printed_as_they_are(small_model, texts, says, tmp_path):
    shutil.copy("a.txt", "[red]c.txt")
    status, said = says(
        "prune", small_model, "--participant", "[red]c.txt", "--participant", "b.txt", *SHORT, "--out", "[x]"
    )
    assert status == 0
    assert "model [x]/model" in said
    assert "report fedprllm report [x]" in said
    assert says("evaluate", small_model, "--text", "[/bold]d.txt")[0] == 2


@pytest.mark.parametrize(
    "server", ["https://host:8002", "host:8002", "host/x", "ho st", "", "::1", "a_b", "-x", "hä", "h" * 254]
)
def test_what_is_no_host_name(server):
    with pytest.raises(ConfigError, match=r"is no host name: .*without https://, port or path"):
        Plan(server=server, participants=["a"])


@pytest.mark.parametrize("server", ["localhost", "10.0.0.1", "Server-1.example.org"])
def test_what_is_a_host_name(server):
    assert Plan(server=server, participants=["a"]).server == server


def test_a_run_is_no_model(small_model, texts, says):
    assert says("prune", small_model, *texts, "--out", "run")[0] == 0
    status, said = says("evaluate", "run", "--text", "a.txt")
    assert (status, "the model of this run is in run/model" in said) == (2, True)


COMMANDS = [
    ["prune", "M", "--participant", "a.txt", "--participant", "b.txt", "--out", "run"],
    ["evaluate", "M", "--text", "a.txt"],
    ["study", "M", "--data", "a.txt", "--eval", "b.txt", "--out", "study"],
    ["demo"],
    ["report", "run"],
    ["identity", "new", "north"],
    ["federation", "init", "plan.toml"],
    ["ledger", "north"],
]
_INTERRUPTED = """
import signal, sys, threading, time, os
from fedprllm.cli import app
# The interruption comes while the command is at work.
busy = app.use_large_pages
def at_work():
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(30)
app.use_large_pages = at_work
sys.argv = ["fedprllm", *sys.argv[1:]]
app.main()
"""


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_ctrl_c_is_one_line_and_status_130(words, small_model, tmp_path):
    words = [str(small_model) if word == "M" else word for word in words]
    ended = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130, ended.stderr
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("interrupted")


@pytest.mark.parametrize("words", [COMMANDS[0], COMMANDS[1]], ids=["prune", "evaluate"])
def test_ctrl_c_during_a_computation(words, small_model, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("Once upon a time there was a bird. " * 20_000)
    words = [str(small_model) if word == "M" else word for word in words]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fedprllm", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert "Aborted" not in said


# Python ------------------------------------------------------------------------------------------


def test_python_types(small_model, texts):
    refused = [
        (DataError, "make it a list first", lambda: prune(small_model, (x for x in ["a.txt"]), out="r")),
        (DataError, "Make it a list first", lambda: prune(small_model, [iter(["a.txt"])], out="r")),
        (ConfigError, "PruneConfig", lambda: prune(small_model, ["a.txt"], {"windows": 1}, out="r")),
        (ConfigError, "out must be the path", lambda: prune(small_model, ["a.txt"], out=None)),
        (ConfigError, "did you mean 'float16'", lambda: evaluate(small_model, "a.txt", dtype="fp16")),
        (ConfigError, "unknown value of bos", lambda: evaluate(small_model, "a.txt", bos="x")),
        (ConfigError, "max_tokens must be", lambda: evaluate(small_model, "a.txt", max_tokens="5")),
        (ConfigError, "window_length", lambda: evaluate(small_model, "a.txt", window_length="long")),
        (ModelError, "must be a hub id or a path", lambda: evaluate(None, "a.txt")),
        (ConfigError, "participants must be an integer", lambda: PooledData(["a.txt"], "2")),
        (ConfigError, "alpha must be a number", lambda: PooledData(["a.txt"], 2, "dirichlet", "0.3")),
    ]
    for kind, pattern, call in refused:
        with pytest.raises(kind, match=pattern):
            call()
    assert not Path("r").exists()


def test_windows_of_numpy_and_of_torch_are_the_same(small_model, texts):
    windows = np.random.default_rng(0).integers(4, 100, (2, 32))
    config = PruneConfig(window_length=32)
    found = [
        prune(small_model, [each, each], config, out=out).model_dir / "model.safetensors"
        for each, out in ((windows, "numpy"), (torch.from_numpy(windows), "torch"))
    ]
    shards = [sorted(path.parent.glob("*.safetensors")) for path in found]
    assert shards[0]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


# Models ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(small_model, texts, tmp_path):
    return shutil.copytree(small_model, tmp_path / "copy")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_to_nothing_is_named(copy, file):
    (copy / file).unlink()
    (copy / file).symlink_to("/nowhere/blob")
    with pytest.raises(ModelError, match=rf"{file} is a link to /nowhere/blob, which does not exist"):
        resolve_model(copy)


def test_a_model_folder_that_is_a_link_to_nothing(texts):
    Path("link").symlink_to("/nowhere")
    with pytest.raises(ModelError, match="link is a link to /nowhere, which does not exist"):
        resolve_model("link")


def test_tensors_that_are_views_are_converted(copy):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    whole = torch.cat([tensor.flatten() for tensor in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = whole[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    torch.save(views, copy / "pytorch_model.bin")
    converted = load_file(resolve_model(copy) / "model.safetensors")
    assert all(torch.equal(converted[name], state[name]) for name in converted)
    assert len(converted) >= len(state) - 1  # tied tensors are written once


def test_a_vocabulary_of_another_size_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] += 10
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has the shape \[512, 64\], and config.json says \[522, 64\]"):
        resolve_model(copy)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_missing_sentencepiece_is_named(copy):
    for file in copy.glob("*token*"):
        file.unlink()
    (copy / "tokenizer.model").write_bytes(b"abc")
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        evaluate(copy, "a.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable for root")
@pytest.mark.parametrize("file", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_not_called_damaged(copy, file):
    (copy / file).chmod(0)
    try:
        with pytest.raises(ModelError, match="permission") as refused:
            resolve_model(copy)
    finally:
        (copy / file).chmod(0o700)
    assert "Download" not in str(refused.value)


def test_the_model_card_names_no_folder_of_this_machine(small_model, texts):
    card = prune(small_model, ["a.txt", "b.txt"], PruneConfig(windows=1, window_length=32), out="run")
    words = (card.model_dir / "README.md").read_text()
    assert "| base model | small-model |" in words
    assert str(small_model.parent) not in words
