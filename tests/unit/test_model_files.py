"""The pruned model has the names, the precisions and the files of its source, and nothing private."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Qwen3_5Config,
)

from fedprllm import prune
from fedprllm.errors import ModelError
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.side_files import left_out, side_files

BELONGING = [
    "LICENSE",
    "License.txt",
    "NOTICE.md",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer/vocab.txt",
    "tokenizer_config.json",
    "vocab.json",
]
PRIVATE = [
    ".env",
    ".git/config",
    "adapter_model.bin",
    "additional_chat_templates/notes.txt",
    "checkpoint-100/config.json",
    "chats.jsonl",
    "eval.ipynb",
    "id_rsa.txt",
    "license_server.key",
    "notes.txt",
    "optimizer.pt",
    "results.json",
    "rng_state.pth",
    "run.log",
    "scheduler.pt",
    "tokenizer/customers.csv",
    "train.py",
    "trainer_state.json",
    "training_args.bin",
    "wandb/run.json",
]


def _put(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(f"content of {name}")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- Files ---


def test_only_files_that_belong_to_the_model_are_known(tmp_path) -> None:
    _put(tmp_path, BELONGING + PRIVATE + ["model.safetensors", "README.md"])
    assert {path.as_posix() for path in side_files(tmp_path)} == set(BELONGING)
    named = left_out(tmp_path)
    assert "training_args.bin" in named
    assert "wandb" in named
    assert not {"README.md", "model.safetensors", "tokenizer", "LICENSE", ".env"} & set(named)


def test_the_pruned_model_gets_these_files_and_no_others(small_model, windows, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    _put(folder, BELONGING[:5] + PRIVATE)
    result = prune(folder, [windows(0)], out=tmp_path / "run")
    made = {path.relative_to(result.model_dir).as_posix() for path in result.model_dir.rglob("*")}
    assert not made & set(PRIVATE)
    for path in side_files(folder):
        assert (result.model_dir / path).read_bytes() == (folder / path).read_bytes()
    assert (result.model_dir / "LICENSE").read_text() == "content of LICENSE"
    assert "model/additional_chat_templates/tool_use.jinja" in result.record.files
    (note,) = result.record.notes
    assert note.startswith("not copied to the pruned model, because not part of it: ")
    assert "adapter_model.bin" in note


def test_code_that_a_configuration_names_is_kept_and_other_code_is_not(tmp_path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "other/repo--modeling_y.Y"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    _put(tmp_path, ["modeling_y.py", "train.py", "helper.py", "deep.py", "tokenization_x.py"])
    (tmp_path / "configuration_x.py").write_text("import os\nfrom .helper import help\n")
    (tmp_path / "helper.py").write_text("def help():\n    from . import deep\n")
    found = {path.name for path in side_files(tmp_path) if path.suffix == ".py"}
    assert found == {"configuration_x.py", "helper.py", "deep.py", "tokenization_x.py"}


def test_an_auto_map_reaches_no_file_outside_the_folder(tmp_path) -> None:
    (tmp_path / "secret.py").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "../secret.C"}}))
    assert [path.name for path in side_files(folder)] == ["config.json"]


# --- Names, precisions and tensors ---


@pytest.mark.parametrize("name", ["gpt-neox", "gpt2", "llama-tied"])
def test_the_pruned_model_has_the_names_of_its_source(name, tiny, windows, tmp_path) -> None:
    result = prune(tiny(name), [windows(0)], out=tmp_path / "run")
    source, pruned = _tensors(tiny(name)), _tensors(result.model_dir)
    assert pruned.keys() == source.keys()
    if name == "gpt-neox":
        assert "embed_out.weight" in pruned
    assert (result.model_dir / "config.json").read_bytes() == (tiny(name) / "config.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir)
    head = loaded.get_output_embeddings().weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(tiny(name)).get_output_embeddings().weight)


def test_names_without_the_prefix_stay_without_it(tiny, windows, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("gpt2")).transformer.save_pretrained(tmp_path / "base")
    result = prune(tmp_path / "base", [windows(0)], out=tmp_path / "run")
    assert _tensors(result.model_dir).keys() == _tensors(tmp_path / "base").keys()
    assert BlockwiseModel(result.model_dir).n_blocks == 3


def test_pickled_weights_keep_names_and_precisions(tiny, windows, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEDPRLLM_CACHE", str(tmp_path / "cache"))
    source = _tensors(tiny("gpt-neox"))
    source["gpt_neox.final_layer_norm.weight"] = source["gpt_neox.final_layer_norm.weight"].double()
    source = {name: t if t.dtype == torch.float64 else t.bfloat16() for name, t in source.items()}
    shutil.copytree(tiny("gpt-neox"), tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(source, tmp_path / "old" / "pytorch_model.bin")
    pruned = _tensors(prune(tmp_path / "old", [windows(0)], out=tmp_path / "run").model_dir)
    assert {name: t.dtype for name, t in pruned.items()} == {name: t.dtype for name, t in source.items()}


def _changed(source: Path, folder: Path, change) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_mixed_precisions_and_unknown_tensors_are_kept_bit_by_bit(tiny, windows, tmp_path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()
        tensors["vision_tower.0.weight"] = torch.randn(3, 5).half()
        tensors["mtp.layers.0.weight"] = torch.tensor([float("nan"), -0.0, 1.0])
        tensors["step"] = torch.tensor(7)

    folder = _changed(tiny("llama"), tmp_path / "model", change)
    result = prune(folder, [windows(0)], out=tmp_path / "run")
    source, pruned = _tensors(folder), _tensors(result.model_dir)
    assert pruned.keys() == source.keys()
    for name, tensor in source.items():
        assert pruned[name].dtype == tensor.dtype, name
        assert name in result.votes or _same_bits(pruned[name].reshape(-1), tensor.reshape(-1)), name
    index = json.loads((result.model_dir / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == source.keys()


def test_two_stored_tensors_for_one_of_the_model_are_refused(tiny, tmp_path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm.weight"] = tensors["model.norm.weight"] + 1

    folder = _changed(tiny("llama"), tmp_path / "model", change)
    with pytest.raises(ModelError, match=r"two tensors, 'model\.norm\.weight' and 'norm\.weight'"):
        BlockwiseModel(folder)


# --- Multimodal models ---

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("n_vision", [1, 12])
def test_the_text_decoder_is_pruned_and_the_vision_tower_kept(n_vision, windows, tmp_path) -> None:
    config = Gemma3Config(
        text_config=_TEXT, vision_config=_VISION | {"num_hidden_layers": n_vision}, mm_tokens_per_image=4
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", [windows(0)], out=tmp_path / "run")
    source, pruned = _tensors(tmp_path / "model"), _tensors(result.model_dir)
    assert pruned.keys() == source.keys()
    changed = {name for name in source if not torch.equal(source[name], pruned[name])}
    assert len(changed) == 7 * 2 == len(result.votes)
    assert not any("vision" in name for name in changed)


def test_parts_that_only_the_multimodal_model_has_are_kept(windows, tmp_path) -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16}
    model = AutoModelForImageTextToText.from_config(
        Qwen3_5Config(text_config=_TEXT | linear, vision_config=vision)
    )
    model.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", [windows(0)], out=tmp_path / "run")
    source, pruned = _tensors(tmp_path / "model"), _tensors(result.model_dir)
    assert pruned.keys() == source.keys()
    assert any("visual" in name for name in source)
    assert all(torch.equal(source[name], pruned[name]) for name in source if "visual" in name)


def test_further_blocks_are_noticed_under_names_that_transformers_changes(tmp_path) -> None:
    config = Gemma3Config(text_config=_TEXT, vision_config=_VISION | {"num_hidden_layers": 1})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name and "vision" not in name)
    tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"holds weights of 3 blocks .*its config\.json says 2"):
        BlockwiseModel(tmp_path)
