"""Models with fewer blocks: which ones go, and that transformers loads what is left."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from fedprllm import ConfigError, ModelError, PruneConfig, prune
from fedprllm.core.sums import ChangeStatistics
from fedprllm.deciding.parts import lowest, n_removed
from fedprllm.models.checkpoint import CheckpointWriter
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import save_tiny


def influences(folder, tokens):
    """One minus the mean cosine of each block's input and output, from transformers' own hidden states."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[float] = []
    blocks = next(list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    inputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    outputs: list[list[torch.Tensor]] = [[] for _ in blocks]

    def remembering(index):
        def remember(module, args, kwargs, output):
            inputs[index].append(args[0] if args else kwargs["hidden_states"])
            outputs[index].append(output[0] if isinstance(output, tuple) else output)

        return remember

    for index, block in enumerate(blocks):
        block.register_forward_hook(remembering(index), with_kwargs=True)
    with torch.no_grad():
        for window in tokens:
            model(window[None])
    for before, after in zip(inputs, outputs, strict=True):
        x, y = (torch.cat(states, dim=1)[0].double() for states in (before, after))
        found.append(float(1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()))
    return found


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen2", "gemma3", "opt", "gpt2", "gpt-neox", "phi", "bloom"]
)
def test_the_blocks_that_change_least_go_and_the_rest_is_the_model(tiny, windows, tmp_path, name):
    result = prune(
        tiny(name), [windows(0, 3), windows(1, 3)], PruneConfig(structure="depth=1"), out=tmp_path / "run"
    )
    found = [block.influence for block in result.record.blocks]
    expected = influences(tiny(name), torch.cat([windows(0, 3), windows(1, 3)]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    (gone,) = [block.block for block in result.record.blocks if block.dropped]
    assert gone == expected.index(min(expected))
    dense = AutoModelForCausalLM.from_pretrained(tiny(name)).eval()
    loaded, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The same model in transformers, without the block.
    blocks = next(m for m in dense.modules() if isinstance(m, torch.nn.ModuleList))
    blocks[gone].register_forward_hook(passes_on, with_kwargs=True)
    window = windows(5, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(window).logits, dense(window, use_cache=False).logits)
    assert result.record.reduction.n_parameters[1] == sum(p.numel() for p in loaded.parameters())
    assert result.record.n_prunable == sum(block.n_weights for block in result.record.blocks)


def passes_on(module, args, kwargs, output):
    """What an absent block returns: its input, in the form of the others."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_lists_with_an_entry_for_every_block_become_shorter(tiny, windows, tmp_path):
    result = prune(tiny("gemma3"), [windows(0, 3)], PruneConfig(structure="depth=2"), out=tmp_path / "run")
    config = AutoModelForCausalLM.from_pretrained(result.model_dir).config
    before = AutoModelForCausalLM.from_pretrained(tiny("gemma3")).config
    kept = [block.block for block in result.record.blocks if not block.dropped]
    assert config.layer_types == [before.layer_types[index] for index in kept]
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("strategy", ["one-shot", "iterative", "centralized"])
def test_every_strategy_drops_the_same_blocks(tiny, windows, tmp_path, strategy):
    config = PruneConfig(structure="depth=1", strategy=strategy)
    result = prune(tiny("llama"), [windows(0, 3), windows(1, 3)], config, out=tmp_path / strategy)
    first = prune(
        tiny("llama"), [windows(0, 3), windows(1, 3)], PruneConfig(structure="depth=1"), out=tmp_path / "a"
    )
    assert_same_bits(first.model_dir, result.model_dir)


def test_one_number_for_each_block_is_shared(tiny, windows, tmp_path):
    result = prune(tiny("llama"), [windows(0)], PruneConfig(structure="depth=1"), out=tmp_path / "run")
    assert result.record.update_bytes_per_block == [4, 4, 4]


def test_tensors_that_transformers_does_not_know_go_with_their_block(tiny, windows, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny("llama").iterdir():
        if path.suffix == ".json":
            (source / path.name).write_bytes(path.read_bytes())
    extra = {f"model.layers.{index}.old.buffer": torch.full((2,), float(index)) for index in range(3)}
    extra["elsewhere.5.buffer"] = torch.ones(2)
    save_file({**weights_of(tiny("llama")), **extra}, source / "model.safetensors", {"format": "pt"})
    result = prune(source, [windows(0)], PruneConfig(structure="depth=1"), out=tmp_path / "run")
    kept = [block.block for block in result.record.blocks if not block.dropped]
    after = weights_of(result.model_dir)
    assert [after.pop(f"model.layers.{number}.old.buffer")[0] for number in (0, 1)] == kept
    assert "elsewhere.5.buffer" in after
    assert not [name for name in after if name.startswith("model.layers.2.")]


def test_blocks_that_depend_on_their_number_are_refused(windows, tmp_path):
    def config() -> GPT2Config:
        return GPT2Config(
            vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
            scale_attn_by_inverse_layer_idx=True,
        )  # fmt: skip

    save_tiny(config, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    # The first block changes nothing, so the others get other numbers; their attention is sharp.
    for name, tensor in weights.items():
        if ".h.0." in name and "c_proj" in name:
            tensor.zero_()
        if "attn.c_attn" in name:
            tensor *= 10
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="something else at another position"):
        prune(tmp_path / "source", [windows(0)], PruneConfig(structure="depth=1"), out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_killed_run_continues_with_the_same_bits(tiny, windows, tmp_path, monkeypatch):
    config = PruneConfig(structure="depth=1")
    whole = prune(tiny("llama"), [windows(0)], config, out=tmp_path / "whole")
    write, calls = CheckpointWriter.write, []

    def dies(self, block, tensors):
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, block, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), [windows(0)], config, out=tmp_path / "killed")
    monkeypatch.setattr(CheckpointWriter, "write", write)
    again = prune(tiny("llama"), [windows(0)], config, out=tmp_path / "killed")
    assert_same_bits(whole.model_dir, again.model_dir)
    assert again.record.files.keys() == whole.record.files.keys()


@pytest.mark.parametrize(
    ("structure", "words"), [("depth=3", "would drop 3 of 3"), ("depth=0.1", "would drop 0 of 3")]
)
def test_some_blocks_must_stay_and_some_must_go(tiny, windows, tmp_path, structure, words):
    with pytest.raises(ConfigError, match=words):
        prune(tiny("llama"), [windows(0)], PruneConfig(structure=structure), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "depth=1,mlp=0.2"}, "in one run"),
        ({"structure": "depth=1", "strategy": "local-only"}, "one model of all participants"),
        ({"structure": "depth=1.5"}, "whole number"),
        ({"share": "influence"}, "needs a structure"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig(**options)


def test_influence_is_a_sum_over_tokens():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(1, 6, 8, generator=generator) for _ in range(2))
    whole, parts = ChangeStatistics(), ChangeStatistics()
    whole.add(before, after)
    for token in range(6):
        parts.add(before[:, token], after[:, token])
    assert parts.n_tokens == whole.n_tokens == 6
    assert parts.total == pytest.approx(whole.total)
    expected = sum(1 - float(x @ y / (x.norm() * y.norm())) for x, y in zip(before[0], after[0], strict=True))
    assert whole.total == pytest.approx(expected, rel=1e-5)
    same = ChangeStatistics()
    same.add(before, 3 * before)
    assert 0 <= same.total < 1e-5


def test_the_least_influential_blocks_are_chosen():
    from fractions import Fraction

    assert lowest([0.3, 0.1, 0.2, 0.1], 2) == [1, 3]
    assert lowest([0.1, 0.1, 0.1], 1) == [0]
    assert n_removed(30, Fraction(3)) == n_removed(30, Fraction("0.1")) == 3
