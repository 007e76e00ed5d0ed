"""A GGUF file is converted to a Hugging Face folder with its values, configuration and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fedprllm.errors import ModelError
from fedprllm.models import conversion
from fedprllm.models.source import resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPRLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def _permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Interleave the two halves of a rotary embedding, as GGUF stores them."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Write a Llama as GGUF with its MLP in Q4_1; return the tensors that a reader must find."""
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<|end|>", *(chr(code) for code in range(33, 127)), "Ġ", "th", "the"]
    writer.add_token_list(tokens + [f"<{index}>" for index in range(config.vocab_size - len(tokens))])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    short = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    expected = {}
    for name, value in state.items():
        if name.startswith("model.layers."):
            _, _, block, rest = name.split(".", 3)
            kind = short[rest.removesuffix(".weight")]
            names[name] = f"blk.{block}.{kind}.weight"
            stored = _permuted(value, heads[kind]) if kind in heads else value
        else:
            kind, stored = "", value
        if kind.startswith("ffn_") and stored.ndim == 2:
            quantised = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(names[name], quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            value = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(names[name], np.ascontiguousarray(stored))
        expected[name] = torch.from_numpy(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _llama_for_gguf() -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return path, _write_gguf(path, _llama_for_gguf())


def test_gguf_is_converted_once_to_a_plain_folder(gguf_file, cache, monkeypatch, capfd) -> None:
    path, expected = gguf_file
    found = resolve_model(path)
    assert capfd.readouterr() == ("", "")
    assert found.parent == cache
    assert found.name.startswith("tiny.Q4_1-")
    tensors = load_file(found / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0)
    config = json.loads((found / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert str(path.parent) not in (found / "config.json").read_text()
    monkeypatch.delattr(conversion, "_fill")
    assert resolve_model(str(path)) == found
    assert resolve_model(found) == found


def test_converted_gguf_keeps_its_tokenizer(gguf_file, cache) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(gguf_file[0]))
    ids = tokenizer("the th", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "th"]
    assert tokenizer.eos_token == "<|end|>"


def test_the_file_that_was_named_is_read(gguf_file, cache, tmp_path, monkeypatch) -> None:
    other = _llama_for_gguf()
    with torch.no_grad():
        other.model.norm.weight.fill_(7)
    _write_gguf(tmp_path / gguf_file[0].name, other)
    monkeypatch.chdir(tmp_path)
    norms = [
        load_file(resolve_model(path) / "model.safetensors")["model.norm.weight"].unique().tolist()
        for path in (gguf_file[0], gguf_file[0].name)
    ]
    assert norms == [[1], [7]]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.7, 0.99])
def test_a_truncated_gguf_is_reported(gguf_file, share, cache, tmp_path) -> None:
    whole = gguf_file[0].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        resolve_model(path)
    assert [entry.name for entry in cache.iterdir()] == ["convert.lock"]


def test_a_gguf_without_a_tensor_is_reported(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda writer, name, *args, _original=gguf.GGUFWriter.add_tensor, **more: (
            None if name == "blk.1.ffn_up.weight" else _original(writer, name, *args, **more)
        ),
    )
    _write_gguf(tmp_path / "part.gguf", _llama_for_gguf())
    with pytest.raises(ModelError, match=r"incomplete.*model\.layers\.1\.mlp\.up_proj\.weight missing"):
        resolve_model(tmp_path / "part.gguf")
