"""Models that cannot be pruned rightly are refused before a tensor is read, and the message says why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    FalconMambaConfig,
    Gemma4TextConfig,
    HrmTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    XLMConfig,
    XLNetConfig,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fedprllm import PruneConfig, prune
from fedprllm.errors import ModelError
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.find import find_linears
from fedprllm.models.guards import coverage, refuse_structure
from fedprllm.models.probe import probe_blocks
from fedprllm.models.source import resolve_model
from tests.models import ARCHITECTURES, save_tiny

_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_LLAMA = _SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}


def _gemma4(**more: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **_LLAMA,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **more,
    )


_DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "dbrx": (
        lambda: DbrxConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64, **_DBRX),
        r"only \d+\.\d% of the weight matrices in block 'transformer\.blocks\.0' of DbrxForCausalLM",
    ),
    "xlnet": (
        lambda: XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
        r"only \d+\.\d% .*of XLNetLMHeadModel",
    ),
    "xlm": (
        lambda: XLMConfig(vocab_size=64, emb_dim=32, n_layers=3, n_heads=4),
        "XLMWithLMHeadModel changes the hidden states between blocks 0 and 1",
    ),
    "text": (
        lambda: _gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=0),
        "Gemma4ForCausalLM takes arguments that depend on the text",
    ),
    "shared": (
        lambda: _gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=2),
        r"block 0 of Gemma4ForCausalLM leaves something for other blocks .*shared keys and values",
    ),
    "hrm": (
        lambda: HrmTextConfig(**_LLAMA),
        r"HrmTextForCausalLM called the blocks 0, 1, 2, 3, 0: expected one call for each, in order",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_would_be_pruned_wrongly(name, tmp_path, monkeypatch) -> None:
    make_config, words = REFUSED[name]
    save_tiny(make_config, tmp_path)

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "load", read)
    with pytest.raises(ModelError, match=f"{words}.*use another model$"):
        BlockwiseModel(tmp_path)


def test_blocks_that_could_share_keys_but_do_not(tmp_path) -> None:
    save_tiny(lambda: _gemma4(hidden_size_per_layer_input=0, num_kv_shared_layers=0), tmp_path)
    assert min(BlockwiseModel(tmp_path).coverages) == 1


# --- Every way in which a block may reach another ---


class _ByAttribute(LlamaDecoderLayer):
    """Leaves its output on a module that the next block also knows."""

    def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        board = self.board[0]
        output = super().forward(hidden, **rest)
        found, board.note = getattr(board, "note", 0.0), output
        return output + 0.0 * found


class _ByArgument(LlamaDecoderLayer):
    """Writes to an argument that all blocks are given."""

    def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        rest["position_ids"].add_(1)
        return super().forward(hidden, **rest)


class _OfAnotherShape(LlamaDecoderLayer):
    """Returns fewer tokens than it was given."""

    def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        return super().forward(hidden, **rest)[:, 1:]


class _OfAnotherBlock(LlamaDecoderLayer):
    """Uses the weights of another block, which is pruned by itself."""

    def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        output = super().forward(hidden, **rest)
        return output * self.board[0].layers[0].input_layernorm.weight


class _Harmless(LlamaDecoderLayer):
    """Works in place and returns more than hidden states."""

    def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        return super().forward(hidden, **rest).mul_(1.0)


def _llama(layer: type[LlamaDecoderLayer]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**_LLAMA)).eval()
    for block in model.model.layers:
        block.__class__ = layer
        block.board = (model.model,)  # in a tuple, so that it is no submodule
    return model


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (_ByAttribute, "block 1 of LlamaForCausalLM reads what another block computed"),
        (_ByArgument, "block 0 of LlamaForCausalLM leaves something for other blocks"),
        (_OfAnotherBlock, "block 1 of LlamaForCausalLM reads what another block computed"),
        (_OfAnotherShape, "block 0 of LlamaForCausalLM does not return hidden states of the shape"),
    ],
)
def test_blocks_that_reach_each_other_are_refused(layer, words) -> None:
    model = _llama(layer)
    with pytest.raises(ModelError, match=words):
        probe_blocks(model, list(model.model.layers))


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = _llama(_ByAttribute)
    before = dict(model.named_parameters())
    with pytest.raises(ModelError):
        probe_blocks(model, list(model.model.layers))
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_that_only_pass_on_hidden_states_are_accepted() -> None:
    model = _llama(_Harmless)
    probe = probe_blocks(model, list(model.model.layers))
    assert len(probe.called) == 7 * 4


def test_skipping_blocks_on_the_way_to_the_head_is_refused() -> None:
    model = _llama(LlamaDecoderLayer)
    inner = model.model.forward
    kept = []
    model.model.layers[1].register_forward_hook(lambda *args: kept.append(args[2]))

    def forward(**inputs: Any) -> Any:
        output = inner(**inputs)
        output.last_hidden_state = output.last_hidden_state + kept[-1]
        return output

    model.model.forward = forward
    with pytest.raises(ModelError, match="LlamaForCausalLM combines the outputs of several blocks"):
        probe_blocks(model, list(model.model.layers))


def test_parameters_shared_between_blocks_are_refused() -> None:
    model = _llama(LlamaDecoderLayer)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"shared between 'model\.layers\.0' and 'model\.layers\.2'"):
        refuse_structure(model)
    model = _llama(LlamaDecoderLayer)
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    refuse_structure(model)


# --- Routers, and what stays dense ---


class _Experts(nn.Module):
    def __init__(self, router: str, n_experts: int = 6) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 6)
        self.mlp = nn.Module()
        self.mlp.add_module(router, nn.Linear(8, n_experts))
        self.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6)) for _ in range(n_experts))
        self.mlp.shared_expert = nn.Sequential(nn.Linear(8, 6))
        self.mlp.shared_expert_gate = nn.Linear(8, 1)


@pytest.mark.parametrize("router", ["gate", "router", "wg", "chooses"])
def test_routers_are_never_pruned(router) -> None:
    paths = {linear.path for linear in find_linears(_Experts(router), "block").values()}
    assert paths == {"attention", "mlp.shared_expert.0", *(f"mlp.experts.{n}.0" for n in range(6))}


def test_a_gate_of_a_dense_block_is_pruned() -> None:
    block = nn.Module()
    block.gate, block.up = nn.Linear(8, 8), nn.Linear(8, 8)
    assert len(find_linears(block, "block")) == 2


def test_what_stays_dense_is_recorded(tmp_path, windows) -> None:
    save_tiny(lambda: FalconMambaConfig(**_SMALL | {"vocab_size": 128}), tmp_path / "model")
    result = prune(tmp_path / "model", [windows(0)], PruneConfig(sparsity=0.5), out=tmp_path / "run")
    block = result.record.blocks[0]
    assert not any("dt_proj" in name for name in result.votes)
    n_pruned = sum(linear.n_weights for linear in block.linears.values())
    shapes = [tensor.shape for name, tensor in _tensors(tmp_path / "model").items() if ".layers.0." in name]
    assert block.coverage == n_pruned / sum(shape.numel() for shape in shapes if len(shape) >= 2)
    assert block.coverage == pytest.approx(result.record.coverage)
    assert re.match(
        r"8\d\.\d% of the block's weight matrices are prunable; these stay dense: ", block.notes[0]
    )
    assert "mixer.dt_proj.weight" in block.notes[0]


def test_a_dense_model_is_covered_entirely(tiny, windows, tmp_path) -> None:
    record = prune(tiny("llama"), [windows(0)], out=tmp_path / "run").record
    assert record.coverage == 1
    assert not any(block.notes for block in record.blocks)
    old = record.as_json()
    del old["coverage"]
    for block in old["blocks"]:
        del block["coverage"]
    assert type(record).model_validate(old).coverage is None


# --- Tied weights ---


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _store_head(source: Path, folder: Path, change: float) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += change
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_two_matrices_for_one_tied_weight_are_refused(tiny, tmp_path) -> None:
    folder = _store_head(tiny("llama-tied"), tmp_path / "model", 1.0)
    words = r"two different tensors, '(lm_head|model\.embed_tokens)\.weight' .*tie_word_embeddings to false"
    with pytest.raises(ModelError, match=words):
        BlockwiseModel(folder)


def test_a_tied_weight_that_is_stored_twice_is_kept_twice(tiny, windows, tmp_path) -> None:
    folder = _store_head(tiny("llama-tied"), tmp_path / "model", 0.0)
    result = prune(folder, [windows(0)], out=tmp_path / "run")
    assert _tensors(result.model_dir).keys() == _tensors(folder).keys()


# --- What is stored ---


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_a_configuration_are_refused(dtype, tiny, tmp_path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"'{name}' .* is stored as {dtype}: .*The model is quantized"):
        BlockwiseModel(tmp_path / "model")


def test_a_single_file_counts_more_than_an_index(tiny, tmp_path) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(folder, max_shard_size="20KB")
    tensors = load_file(tiny("llama") / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    read = BlockwiseModel(resolve_model(folder)).checkpoint.load(["model.norm.weight"])
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(read["model.norm.weight"], expected["model.norm.weight"])


# --- Every architecture that worked still does ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tested_architectures_pass(name) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    refuse_structure(model)
    prefix = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    for index, block in enumerate(model.get_submodule(prefix)):
        assert coverage(block, find_linears(block, f"{prefix}.{index}")) == 1
