"""Hidden states beyond a limit are kept in files: the bits stay the same, and no file is left over."""

from __future__ import annotations

import signal

import pytest
import torch

from fedprllm import ConfigError, PruneConfig, prune
from fedprllm.federation.plan import SiteSettings
from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates
from fedprllm.pruning.in_process import _SharedWalk
from tests.contracts.test_walk import assert_same_bits
from tests.dying import exit_code, prune_and_die
from tests.isolation import torch_threads

_STATE = 16 * 32 * 4  # bytes: tokens, hidden size, float32

_KILLED = """
import os, signal, sys
import torch
from fedprllm import PruneConfig, prune
from fedprllm.pruning.run_folder import Run
model, out = sys.argv[1:]
torch.set_num_threads(1)
finish_block = Run.finish_block
def dying(self, index, *args):
    if index == 1:
        assert list(self.spilled_folder.glob("*.safetensors"))
        os.kill(os.getpid(), signal.SIGKILL)
    finish_block(self, index, *args)
Run.finish_block = dying
participants = [torch.randint(4, 128, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
prune(model, participants, PruneConfig(memory_limit=1), out=out)
"""


def participants() -> list[torch.Tensor]:
    return [torch.randint(4, 128, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "iterative"},
        {"strategy": "centralized"},
        {"share": "statistics"},
        {"allocation": "owl"},
        {"block_fraction": "0.7"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", ["1B", f"{2 * _STATE}B"])
def test_a_limit_changes_no_bit_and_no_identity(tiny, tmp_path, monkeypatch, options, limit):
    free = prune(tiny("llama"), participants(), PruneConfig(**options), out=tmp_path / "free")
    n_files = []
    step = _SharedWalk.step

    def counting(self, index, advance):
        step(self, index, advance)
        n_files.append(len(list(self.run.spilled_folder.glob("*"))))

    monkeypatch.setattr(_SharedWalk, "step", counting)
    config = PruneConfig(**options, memory_limit=limit)
    limited = prune(tiny("llama"), participants(), config, out=tmp_path / "limited")
    size = _STATE // 2 if options.get("dtype") == "bfloat16" else _STATE
    assert set(n_files) == {5 - min(5, config.memory_limit // size)}
    assert_same_bits(free.model_dir, limited.model_dir)
    assert (free.out / "run.json").read_bytes() == (limited.out / "run.json").read_bytes()
    assert not (limited.out / "state").exists()


def test_a_killed_run_continues_with_any_limit(tiny, tmp_path):
    out = tmp_path / "killed"
    config = PruneConfig(memory_limit=1)
    killed = exit_code(prune_and_die, tiny("llama"), out, config, "before", 1, True)
    assert killed == -signal.SIGKILL
    with torch_threads(1):
        undisturbed = prune(tiny("llama"), participants(), out=tmp_path / "undisturbed")
        resumed = prune(tiny("llama"), participants(), PruneConfig(memory_limit=2 * _STATE), out=out)
    assert_same_bits(undisturbed.model_dir, resumed.model_dir)
    assert not (out / "state").exists()


def test_states_in_memory_never_exceed_the_limit(tmp_path):
    memory = HiddenMemory(tmp_path / "spilled", 3 * 40)
    states = [torch.full((1, 5, 2), float(number)) for number in range(4)]  # 40 bytes each
    one, other = HiddenStates(memory, "one"), HiddenStates(memory, "other")
    one.fill(states[:2])
    other.fill(states)
    names = ["other.1.safetensors", "other.2.safetensors", "other.3.safetensors"]
    assert sorted(path.name for path in memory.folder.iterdir()) == names
    for number, state in enumerate(other):
        other[number] = state + 10
    assert torch.equal(torch.stack(list(other)), torch.stack(states) + 10)
    assert torch.equal(torch.stack(other.kept()), torch.stack(states) + 10)
    one.clear()
    other.fill(states)
    assert [path.name for path in memory.folder.iterdir()] == ["other.3.safetensors"]
    assert len(other) == 4
    memory.clear()
    assert not memory.folder.exists()


@pytest.mark.parametrize(
    ("limit", "message"), [("2 elephants", "elephants"), ("0", "memory_limit.*greater than 0"), (-1, "-1")]
)
def test_a_nonsensical_limit_is_refused_in_words(limit, message):
    with pytest.raises(ConfigError, match=message) as refused:
        PruneConfig(memory_limit=limit)
    assert "memory_limit" in str(refused.value)
    with pytest.raises(ConfigError, match="memory_limit"):
        SiteSettings(data=["text"], memory_limit=limit)


def test_units():
    assert PruneConfig(memory_limit="2GiB").memory_limit == 2**31
    assert PruneConfig(memory_limit="1.5 MB").memory_limit == 1_500_000
    assert SiteSettings(data=["text"], memory_limit="1KiB").model_dump(mode="json")["memory_limit"] == 1024
