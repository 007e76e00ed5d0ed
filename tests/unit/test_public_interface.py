"""What the package exports, and what can be passed to ``prune``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fedprllm
from fedprllm import ConfigError, ModelError, PruneConfig, prune
from tests.contracts.test_walk import assert_same_bits


def test_the_package_shows_what_it_offers():
    assert set(fedprllm.__all__) <= set(dir(fedprllm))
    for name in fedprllm.__all__:
        assert getattr(fedprllm, name).__doc__, name
    assert not [name for name in dir(fedprllm) if name not in (*fedprllm.__all__, "__version__")]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_all'"):
        _ = fedprllm.prune_all


def test_importing_changes_no_environment_and_imports_no_torch():
    code = (
        "import os, sys; before = dict(os.environ); import fedprllm\n"
        "assert dict(os.environ) == before\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_in_memory_is_pruned_like_its_folder(tiny, windows, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = prune(model, [windows(0), windows(1)], out=tmp_path / "held")
    read = prune(tiny(architecture), [windows(0), windows(1)], out=tmp_path / "read")
    assert_same_bits(held.model_dir, read.model_dir)
    assert held.record.model.fingerprint == read.record.model.fingerprint
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_of_a_model_in_memory_continues(tiny, windows, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    first = prune(model, [windows(0)], out=tmp_path / "run")
    assert prune(model, [windows(0)], out=tmp_path / "run").record == first.record


def test_an_object_that_is_not_a_model_is_refused(tiny, windows, tmp_path):
    with pytest.raises(ModelError, match="a hub id, a path or a transformers PreTrainedModel, found Linear"):
        prune(torch.nn.Linear(2, 2), [windows(0)], out=tmp_path / "run")
    with pytest.raises(ModelError, match="comes with its own: leave the tokenizer out"):
        prune(tiny("llama"), [windows(0)], out=tmp_path / "run", tokenizer=object())


def test_a_dict_of_options_is_not_a_configuration(tiny, windows, tmp_path):
    with pytest.raises(ConfigError, match="config must be a PruneConfig, found dict"):
        prune(tiny("llama"), [windows(0)], {"sparsity": 0.5}, out=tmp_path / "run")


def test_a_result_is_typed(tiny, windows, tmp_path):
    result = prune(tiny("llama"), [windows(0)], PruneConfig(sparsity=0.25), out=tmp_path / "run")
    record = result.record
    assert record.config == result.config
    assert record.sparsity == pytest.approx(0.25)
    assert [block.block for block in record.blocks] == [0, 1, 2]
    assert record.participants["participant-0"].n_tokens == 32
    first = next(iter(record.blocks[0].linears.values()))
    assert first.path == "self_attn.q_proj"
    assert first.sparsity == 0.25
