"""Smaller dense models: what every architecture, strategy and caller must have."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

from fedprllm import ConfigError, ModelError, PruneConfig, UpdateError, prune
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.decision import decided_weights
from fedprllm.models.block import NarrowedWeights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.channels import find_channels
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.smaller import fitting_config, write_rest
from fedprllm.sharing import update_bytes
from fedprllm.sharing.channel_inputs import channel_readers
from fedprllm.sharing.gram_matrices import GRAM
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import _COMMON, save_tiny

# The entry of config.json that holds the width of the MLPs.
WIDTHS = {
    "llama": "intermediate_size",
    "llama-tied": "intermediate_size",
    "qwen2": "intermediate_size",
    "qwen3": "intermediate_size",
    "gemma3": "intermediate_size",
    "opt": "ffn_dim",
    "gpt2": "n_inner",
    "gpt-neox": "intermediate_size",
    "phi": "intermediate_size",
    "phi3": "intermediate_size",
    "falcon": "ffn_hidden_size",
}
FURTHER = {
    "qwen3": lambda: Qwen3Config(**_COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    # A key and value head for every query head.
    "llama-mha": lambda: LlamaConfig(**_COMMON, intermediate_size=48),
    # One Linear for both gate and up.
    "phi3": lambda: Phi3Config(**_COMMON, intermediate_size=48, num_key_value_heads=2),
}
STRATEGIES = ["one-shot", "iterative", "centralized", "local-only"]


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    """``dense(name)`` is a folder with a tiny model, of further architectures too."""

    def get(name):
        if name not in FURTHER:
            return tiny(name)
        folder = tmp_path_factory.getbasetemp() / f"structure-{name}"
        if not folder.exists():
            save_tiny(FURTHER[name], folder)
        return folder

    return get


def losses(folder, window):
    """What the walk over a model makes of a window."""
    walked = BlockwiseModel(folder)
    (hidden,) = walked.embed(window[None])
    for index in range(walked.n_blocks):
        with walked.block(index) as block:
            hidden = block.forward(hidden)
    with walked.head():
        return walked.token_losses(hidden, window)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_smaller_model_loads_in_transformers_and_computes_the_same(dense, windows, tmp_path, name):
    config = PruneConfig(structure="mlp=0.3", strategy="iterative")
    result = prune(dense(name), [windows(0, 4), windows(1, 4)], config, out=tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(dense(name))
    loaded, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    changed = {
        key: value for key, value in loaded.config.to_dict().items() if value != before.config.to_dict()[key]
    }
    changed.pop("_name_or_path", None)
    # 0.7 times 48 and 128, rounded to a multiple of 2 and 8.
    assert changed == {WIDTHS[name]: 88 if name in ("gpt2", "falcon") else 34}
    window = windows(5, 1)[0]
    with torch.no_grad():
        logits = loaded.eval()(window[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
    torch.testing.assert_close(losses(result.model_dir, window), expected)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (before, loaded)]
    assert list(result.record.reduction.n_parameters) == sizes
    assert result.record.n_prunable == BlockwiseModel(result.model_dir).n_prunable


def random_loss(block, parts, generator):
    """Weights of a block that loses random channels and heads, the same number everywhere."""
    removed, narrow = {}, {}
    for name, linear in channel_readers(block.linears, parts).items():
        channels = linear.channels
        gone = []
        for group in range(channels.n_groups):
            units = (channels.groups == group).nonzero().flatten()
            n_gone = len(units) // 2
            gone += units[torch.randperm(len(units), generator=generator)[:n_gone]].tolist()
        removed[name] = torch.isin(channels.units, torch.tensor(gone))
        narrow[name] = linear.stored(linear.view(block.tensors)[:, ~removed[name]] * 1.5).contiguous()
    return NarrowedWeights(block.linears, removed, narrow)


HEADS = ["llama", "llama-tied", "qwen2", "qwen3", "gemma3", "llama-mha"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [(name, ("mlp",)) for name in WIDTHS]
    + [(name, ("heads",)) for name in HEADS]
    + [(name, ("mlp", "heads")) for name in HEADS],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_the_walk_computes_with_is_the_model_that_it_writes(dense, windows, tmp_path, name, parts):
    # Later blocks are decided on the states behind earlier ones: these must be the smaller model's own.
    model, window = BlockwiseModel(dense(name)), windows(5, 1)[0]
    writer = CheckpointWriter(tmp_path / "model", model.checkpoint, model.n_blocks)
    generator = torch.Generator().manual_seed(0)
    (hidden,) = model.embed(window[None])
    for index in range(model.n_blocks):
        with model.block(index) as block:
            weights = random_loss(block, parts, generator)
            before = block.forward(hidden)
            with block.replaced(weights):
                hidden = block.forward(hidden)
            assert not torch.allclose(before, hidden)
            writer.write(index, weights.remaining(block.tensors))
    write_rest(writer, model)
    with model.head():
        walked = model.token_losses(hidden, window)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = loaded(window[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
    torch.testing.assert_close(walked, expected)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.skeleton.parameters())


@pytest.mark.parametrize(
    ("name", "structure", "heads"),
    [
        ("llama", "heads=2", {"num_attention_heads": 2}),
        ("qwen3", "heads=0.5", {"num_attention_heads": 2}),
        ("gemma3", "heads=2", {"num_attention_heads": 2}),
        ("llama-mha", "heads=2", {"num_attention_heads": 2, "num_key_value_heads": 2}),
        ("qwen2", "mlp=0.3,heads=2", {"num_attention_heads": 2, "intermediate_size": 34}),
    ],
)
def test_heads_go_from_every_group(dense, windows, tmp_path, name, structure, heads):
    config = PruneConfig(structure=structure, strategy="iterative")
    result = prune(dense(name), [windows(0, 4), windows(1, 4)], config, out=tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(dense(name)).config
    loaded, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    entries, after = before.to_dict(), loaded.config.to_dict()
    after.pop("_name_or_path", None)
    assert {key: value for key, value in after.items() if value != entries.get(key)} == {
        **heads,
        **({} if getattr(before, "head_dim", None) == 8 else {"head_dim": 8}),
    }
    assert result.record.reduction.of_blocks > 0.05
    assert torch.isfinite(losses(result.model_dir, windows(5, 1)[0])).all()


@pytest.mark.parametrize(
    ("name", "structure", "error", "words"),
    [
        (
            "llama",
            "heads=1",
            ConfigError,
            "leave 3 of 4: expected at least 2, the same number from each of 2",
        ),
        ("llama", "heads=4", ConfigError, "leave 0 of 4"),
        ("llama", "heads=0.01", ConfigError, "remove none of 4"),
        ("opt", "heads=2", ModelError, "2 instead of 4 query heads: their number follows from another size"),
        # transformers wants the number of heads to divide the hidden size.
        ("gemma3", "heads=1", ModelError, "3 instead of 4 query heads.*or must divide it"),
        ("gpt2", "heads=1", ModelError, "has 0 Linears whose input is computed head by head"),
    ],
)
def test_heads_that_cannot_go_are_refused(tiny, windows, tmp_path, name, structure, error, words):
    with pytest.raises(error, match=words):
        prune(tiny(name), [windows(0)], PruneConfig(structure=structure), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_structure_that_removes_nothing_leaves_every_bit(tiny, windows, tmp_path, name, strategy):
    config = PruneConfig(structure="mlp=0", strategy=strategy)
    result = prune(tiny(name), [windows(0, 4), windows(1, 4)], config, out=tmp_path / "run")
    assert_same_bits(tiny(name), result.model_dir)
    assert (result.model_dir / "config.json").read_bytes() == (tiny(name) / "config.json").read_bytes()
    assert result.record.reduction is None


def test_one_participant_is_local_only_and_centralized(tiny, windows, tmp_path):
    # With one participant, all that differs is on what states the later blocks are decided.
    folders = {
        strategy: prune(
            tiny("llama"),
            [windows(0, 4)],
            PruneConfig(structure="mlp=0.3", strategy=strategy),
            out=tmp_path / strategy,
        ).model_dir
        for strategy in STRATEGIES
    }
    assert_same_bits(folders["iterative"], folders["centralized"])
    assert_same_bits(folders["iterative"], folders["local-only"])
    first = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights_of(folders["one-shot"])[first], weights_of(folders["iterative"])[first])


def test_text_of_all_is_the_sum_of_everybodys(tiny, windows, tmp_path):
    config = PruneConfig(structure="mlp=0.3")
    together = prune(tiny("llama"), [windows(0, 4), windows(1, 4)], config, out=tmp_path / "together")
    pooled = prune(
        tiny("llama"), [torch.cat([windows(0, 4), windows(1, 4)])], config, out=tmp_path / "pooled"
    )
    ours, theirs = weights_of(together.model_dir), weights_of(pooled.model_dir)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)


def test_only_the_input_of_the_second_linear_is_shared(tiny, windows, tmp_path):
    result = prune(tiny("llama"), [windows(0, 4)], PruneConfig(structure="mlp=0.3"), out=tmp_path / "run")
    linears = BlockwiseModel(tiny("llama")).linears
    down = [{name: linear for name, linear in block.items() if "down_proj" in name} for block in linears]
    assert result.record.update_bytes_per_block == [update_bytes(GRAM.shapes(block)) for block in down]


def test_biases_of_removed_channels_go_too(dense, windows, tmp_path):
    result = prune(dense("opt"), [windows(0, 4)], PruneConfig(structure="mlp=0.3"), out=tmp_path / "run")
    after, before = weights_of(result.model_dir), weights_of(dense("opt"))
    name = "model.decoder.layers.1.fc1"
    for row, bias in zip(after[f"{name}.weight"], after[f"{name}.bias"], strict=True):
        (index,) = (before[f"{name}.weight"] == row).all(dim=1).nonzero()[0].tolist()
        assert bias == before[f"{name}.bias"][index]
    assert torch.equal(after["model.decoder.layers.1.fc2.bias"], before["model.decoder.layers.1.fc2.bias"])


def test_a_width_that_follows_from_another_size_is_refused(tiny, windows, tmp_path):
    with pytest.raises(
        ModelError, match=r"no entry of .*config.json.*BloomForCausalLM 88 instead of 128 MLP channels"
    ):
        prune(tiny("bloom"), [windows(0)], PruneConfig(structure="mlp=0.3"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_to_remove_is_refused_before_anything_is_computed(tiny, windows, tmp_path):
    with pytest.raises(ConfigError, match=r"none of 48 after rounding.*at least mlp=2"):
        prune(tiny("llama"), [windows(0)], PruneConfig(structure="mlp=0.001"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_entry_that_is_absent_from_the_file_is_added(tiny, windows, tmp_path):
    content = json.loads((tiny("gpt2") / "config.json").read_text())
    source = tmp_path / "source"
    source.mkdir()
    content.pop("n_inner")
    (source / "config.json").write_text(json.dumps(content))
    save_file(weights_of(tiny("gpt2")), source / "model.safetensors", {"format": "pt"})
    changed = fitting_config(BlockwiseModel(source), {"mlp": 64})
    assert changed == {**content, "n_inner": 64}


def test_attention_is_no_mlp(tiny):
    # With as many key heads as query heads, value and output projection match channel by channel, but mix
    # tokens; their width follows from the heads.
    model = BlockwiseModel(tiny("opt"))
    parts = {one.path: one.channels.part for one in model.linears[0].values() if one.channels}
    assert parts == {"self_attn.out_proj": "heads", "fc2": "mlp"}


class Gate(torch.nn.Module):
    """An MLP whose first Linear is read by somebody else too."""

    def __init__(self, leak: str):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.leak = leak

    def forward(self, hidden):
        inner = self.first(hidden)
        read = torch.relu(inner)
        if self.leak == "mixed":
            read = read.roll(1, dims=-1) + read
        if self.leak == "tokens":
            read = read.cumsum(dim=1)
        if self.leak == "normalized input":
            read = read + torch.nn.functional.layer_norm(torch.cat([hidden, hidden**2], -1), (8,))
        if self.leak == "input":
            read = read + hidden.sum(-1, keepdim=True)
        output = self.second(read)
        if self.leak == "norm":
            # The sum over channels is zero, whatever the channels are.
            return output + torch.nn.functional.layer_norm(inner, (8,)).unflatten(-1, (2, 4)).sum(-2)
        return output + inner.sum(-1, keepdim=True) if self.leak == "output" else output


@pytest.mark.parametrize("leak", ["", "mixed", "tokens", "input", "output", "norm", "normalized input"])
def test_channels_that_something_else_reads_stay(leak):
    from fedprllm.models.find import find_linears

    module = Gate(leak)
    linears = find_linears(module, "block.0")
    found = find_channels(linears, module, torch.randn(1, 3, 4))
    assert list(found) == ([] if leak else ["block.0.second.weight"])


def test_a_killed_run_continues_with_the_same_bits(tiny, windows, tmp_path, monkeypatch):
    config = PruneConfig(structure="mlp=0.3", strategy="iterative")
    participants = [windows(0, 4), windows(1, 4)]
    whole = prune(tiny("llama"), participants, config, out=tmp_path / "whole")
    from fedprllm.models.checkpoint import CheckpointWriter

    write = CheckpointWriter.write

    def dies(self, block, tensors):
        if block == 2:
            raise KeyboardInterrupt
        write(self, block, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), participants, config, out=tmp_path / "killed")
    monkeypatch.setattr(CheckpointWriter, "write", write)
    again = prune(tiny("llama"), participants, config, out=tmp_path / "killed")
    assert_same_bits(whole.model_dir, again.model_dir)
    assert (whole.model_dir / "config.json").read_bytes() == (again.model_dir / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "mpl=0.2"}, "did you mean 'mlp'"),
        ({"structure": "mlp"}, "mlp=F"),
        ({"structure": "mlp=1"}, r"\[0, 1\)"),
        ({"structure": "mlp=2"}, r"\[0, 1\)"),
        ({"structure": "heads=1.5"}, "whole number"),
        ({"structure": "heads=-1"}, "whole number"),
        ({"structure": "heads=1,heads=2"}, "heads=N, both, depth=N or experts=N"),
        ({"structure": ""}, "unknown part"),
        ({"structure": "heads=1", "share": "channels"}, "leave share out"),
        ({"structure": "mlp=-0.1"}, r"\[0, 1\)"),
        ({"structure": "mlp=nan"}, "mlp=F"),
        ({"structure": "mlp=0.2", "sparsity": 0.5}, "sparsity applies to single weights"),
        ({"structure": "mlp=0.2", "pattern": "2:4"}, "applies to single weights"),
        ({"structure": "mlp=0.2", "share": "mask"}, "leave share out"),
        ({"structure": "mlp=0.2", "allocation": "owl"}, "allocation applies"),
        ({"structure": "mlp=0.2", "solver": "admm"}, "solver applies"),
        ({"structure": "mlp=0.2", "scale_weights": True}, "scale_weights applies"),
        ({"structure": "mlp=0.2", "criterion": "magnitude"}, "no text"),
        ({"share": "channels"}, "needs a structure"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig(**options)


def test_a_structure_says_what_is_shared_and_survives_the_wire():
    config = PruneConfig(structure="mlp=0.25")
    assert (config.share, config.sparsity, config.kinds) == ("channels", 0.0, ("channels",))
    assert PruneConfig(**config.model_dump(mode="json")) == config
    assert PruneConfig(structure={"mlp": 0.25}) == config


def test_blocks_of_different_widths_are_never_called_a_model(tiny, tmp_path):
    model = BlockwiseModel(tiny("llama"))
    writer = CheckpointWriter(tmp_path / "model", model.checkpoint, model.n_blocks)
    for index in range(model.n_blocks):
        with model.block(index) as block:
            (reader,) = channel_readers(block.linears, ("mlp",)).values()
            removed = torch.arange(48) < 4 * index
            narrow = {reader.name: reader.view(block.tensors)[:, ~removed]}
            weights = NarrowedWeights(block.linears, {reader.name: removed}, narrow)
            writer.write(index, weights.remaining(block.tensors))
    with pytest.raises(ModelError, match="have 40, 44, 48 MLP channels"):
        write_rest(writer, model)
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "spoil", ["short mask", "nothing left", "other count", "mask of another", "no weight"]
)
def test_a_decision_that_does_not_fit_is_refused(tiny, spoil):
    with BlockwiseModel(tiny("llama")).block(0) as block:
        (reader,) = channel_readers(block.linears, ("mlp",)).values()
        removed = torch.arange(48) < 8
        tensors = {
            "mlp.down_proj": reader.view(block.tensors)[:, ~removed].contiguous(),
            "mlp.down_proj.mask": removed,
        }
        good = message(tensors)
        weights = decided_weights(good, block, bytes(16), bytes(32))
        assert torch.equal(weights[reader.name][:, 8:], tensors["mlp.down_proj"])
        assert not weights[reader.name][:, :8].any()
        if spoil == "short mask":
            tensors["mlp.down_proj.mask"] = removed[1:]
        elif spoil == "nothing left":
            tensors["mlp.down_proj.mask"] = torch.ones(48, dtype=torch.bool)
        elif spoil == "other count":
            tensors["mlp.down_proj.mask"] = torch.arange(48) < 9
        elif spoil == "no weight":
            del tensors["mlp.down_proj"]
        else:
            tensors["mlp.up_proj.mask"] = torch.ones(48, dtype=torch.bool)
        with pytest.raises(UpdateError):
            decided_weights(message(tensors), block, bytes(16), bytes(32))


def message(tensors):
    """A coordinator's message about block 0."""
    return wire.encode(wire.Update(bytes(16), "coordinator", 0, "weights", bytes(32), tensors, 0))


def test_the_smaller_model_can_be_pruned_like_any_other(tiny, windows, tmp_path):
    participants = [windows(0, 4), windows(1, 4)]
    shorter = prune(tiny("qwen2"), participants, PruneConfig(structure="depth=1"), out=tmp_path / "a")
    config = PruneConfig(structure="mlp=0.25,heads=2", strategy="iterative")
    narrower = prune(shorter.model_dir, participants, config, out=tmp_path / "b")
    config = PruneConfig(pattern="2:4", share="gram", strategy="iterative")
    sparse = prune(narrower.model_dir, participants, config, out=tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(sparse.model_dir)
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (2, 36)
    assert sparse.record.sparsity == 0.5


def test_experts_keep_their_width_and_lose_heads(tiny, windows, tmp_path):
    with pytest.raises(ModelError, match="a mixture of experts, whose experts cannot lose MLP channels yet"):
        prune(tiny("qwen3-moe"), [windows(0)], PruneConfig(structure="mlp=0.3"), out=tmp_path / "run")
    model = BlockwiseModel(tiny("qwen3-moe"))
    assert not any(one.channels for block in model.linears for one in block.values() if one.family)
