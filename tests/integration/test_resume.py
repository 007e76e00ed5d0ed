"""A killed run continues and ends with the same bits; no file is ever half written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from fedprllm import PruneConfig, RunError, prune
from fedprllm.pruning.in_process import _SharedWalk
from tests.contracts.test_walk import assert_same_bits
from tests.dying import exit_code, prune_and_die
from tests.isolation import torch_threads

_CHILD = """
import sys
from fedprllm.lean import start_lean
start_lean()
import torch
from fedprllm import PruneConfig, prune
model, out = sys.argv[1:]
torch.set_num_threads(1)
participants = [torch.randint(4, 128, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
prune(model, participants, PruneConfig(), out=out)
"""


def participants() -> list[torch.Tensor]:
    return [torch.randint(4, 128, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]


@pytest.mark.parametrize("strategy", ["one-shot", "iterative", "centralized", "local-only"])
@pytest.mark.parametrize(("phase", "block"), [("before", 1), ("after", 1), ("after", 2)])
def test_killed_run_continues_to_the_same_bits(tiny, tmp_path, strategy, phase, block):
    out = tmp_path / "killed"
    config = PruneConfig(strategy=strategy)
    assert exit_code(prune_and_die, tiny("llama"), out, config, phase, block, False) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    assert not (out / "model").exists()
    finished = sorted(path.name for path in (out / "blocks").glob("*.json"))
    assert len(finished) == block + (phase == "after")

    steps = []
    original = _SharedWalk.step
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _SharedWalk,
            "step",
            lambda self, index, advance: (steps.append(index), original(self, index, advance)),
        )
        resumed = prune(tiny("llama"), participants(), PruneConfig(strategy=strategy), out=out)
    assert steps == list(range(len(finished), 3)), "finished blocks must not be computed again"
    with torch_threads(1):
        undisturbed = prune(
            tiny("llama"), participants(), PruneConfig(strategy=strategy), out=tmp_path / "undisturbed"
        )
    for name, folder in undisturbed.model_dirs.items():
        assert_same_bits(folder, resumed.model_dirs[name])
    assert not (out / "state").exists()


def test_killed_at_arbitrary_moments(tiny, tmp_path):
    """A run that is killed repeatedly at arbitrary moments still completes, with the same bits."""
    with torch_threads(1):
        undisturbed = prune(tiny("llama"), participants(), out=tmp_path / "undisturbed")
    out = tmp_path / "killed"
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(tiny("llama")), str(out)]
    # The first kill happens while the process starts, the later ones during the walk.
    for attempt in range(4):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(out.glob("blocks/*.json"))) < attempt:
            time.sleep(0.002)
        child.kill()
        child.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same_bits(undisturbed.model_dir, out / "model")
    assert not list(out.rglob("*.tmp"))


def test_complete_run_is_not_computed_again(tiny, windows, tmp_path, monkeypatch):
    first = prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    monkeypatch.setattr(_SharedWalk, "step", lambda *_: pytest.fail("computed again"))
    again = prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    assert again.record == first.record


@pytest.mark.parametrize(
    ("config", "participant", "named"),
    [
        (PruneConfig(sparsity=0.6), 0, "config.sparsity"),
        (PruneConfig(seed=1), 0, "config.seed"),
        (PruneConfig(), 1, "fingerprint"),
    ],
)
def test_folder_of_another_configuration_is_refused(tiny, windows, tmp_path, config, participant, named):
    prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=f"belongs to another run.*{named}"):
        prune(tiny("llama"), [windows(participant)], config, out=tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_weights_are_another_run(tiny, windows, tmp_path):
    prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    with pytest.raises(RunError, match=r"model\."):
        prune(tiny("llama-tied"), [windows(0)], out=tmp_path / "run")


def test_folder_that_is_no_run_is_refused(tiny, windows, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file: expected a folder"):
        prune(tiny("llama"), [windows(0)], out=tmp_path / "file")


def test_two_processes_do_not_share_a_run(tiny, windows, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunError, match="another process is working on"):
        prune(tiny("llama"), [windows(0)], out=tmp_path / "run")


def test_too_little_space_is_refused_before_computing(tiny, windows, tmp_path, monkeypatch):
    monkeypatch.setattr("fedprllm.pruning.run_folder.free_bytes", lambda _: 1000)
    monkeypatch.setattr(_SharedWalk, "step", lambda *_: pytest.fail("computed"))
    with pytest.raises(RunError, match=r"free, but the run needs"):
        prune(tiny("llama"), [windows(0)], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


_LIMITED = """
import resource, signal, sys, torch
from fedprllm import FedprllmError, prune
model, out, limit = sys.argv[1:4]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
participants = [torch.randint(4, 128, (2, 16), generator=torch.Generator().manual_seed(2))]
def full_from_block_1(steps, n=[0]):
    n[0] += steps
    if n[0] == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
from contextlib import contextmanager
@contextmanager
def progress(description, total):
    yield full_from_block_1 if description == "pruning" else (lambda steps: None)
try:
    prune(model, participants, out=out, progress=progress)
except FedprllmError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""


def test_full_disk_is_a_clear_error_and_the_run_goes_on(tiny, tmp_path):
    """The kernel refuses writes beyond a limit, as it does on a full disk."""
    out = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-c", _LIMITED, str(tiny("llama")), str(out), "20000"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 2, child.stderr
    assert "DiskFull no space left while writing" in child.stdout
    assert not list(out.rglob("*.tmp"))
    generator = torch.Generator().manual_seed(2)
    result = prune(tiny("llama"), [torch.randint(4, 128, (2, 16), generator=generator)], out=out)
    assert json.loads((out / "result.json").read_text())["models"] == {"model": "model"}
    assert result.model_dir.is_dir()
