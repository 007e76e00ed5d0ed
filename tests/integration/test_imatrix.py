"""The exported importance matrix holds what llama.cpp would measure on the participants' pooled text."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedprllm import PruneConfig, RunError, prune
from fedprllm.cli.app import app
from fedprllm.export.imatrix import export_importance_matrix

WORDS = {"share": "statistics", "sparsity": 0, "dtype": "float32", "window_length": 16}


def run(model: Path, out: Path, windows, **changes) -> Path:
    config = PruneConfig(**{**WORDS, **changes})
    prune(model, {"north": windows(0, 2), "south": windows(1, 2)}, config, out=out)
    return out


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def pooled(model: Path, windows) -> dict[str, torch.Tensor]:
    """Sums of squares of every Linear's input on all text, by module name, without anything of ours."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def add(name):
        def hook(_, inputs):
            squares = inputs[0].double().square().sum(dim=(0, 1))
            sums[name] = sums.get(name, 0) + squares

        return hook

    for name, module in loaded.named_modules():
        if "layers." in name or ".h." in name:
            module.register_forward_pre_hook(add(name)) if hasattr(module, "weight") else None
    with torch.no_grad():
        for ids in (*windows(0, 2), *windows(1, 2)):
            loaded(ids[None])
    return sums


LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "llama": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "gpt2": (
        "transformer.h",
        {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}


@pytest.mark.parametrize("share", ["statistics", "gram"])
@pytest.mark.parametrize("architecture", sorted(NAMES))
def test_everybodys_sums_under_the_names_of_llama_cpp(architecture, share, tiny, windows, tmp_path):
    model = tiny(architecture)
    solver = {"solver": "sparsegpt"} if share == "gram" else {}
    found = export_importance_matrix(
        run(model, tmp_path / "run", windows, share=share, **solver), tmp_path / "i.gguf"
    )
    values, expected = read(found.path), pooled(model, windows)
    blocks, paths = NAMES[architecture]
    n_blocks = len({name.split(".")[1] for name in values})
    assert found.n_weights == len(values) / 2 == n_blocks * len(paths)
    assert found.left_out == []
    for block in range(n_blocks):
        for name, path in paths.items():
            sums = values[f"blk.{block}.{name}.weight.in_sum2"]
            assert sums.shape[0] == 1
            np.testing.assert_allclose(sums[0], expected[f"{blocks}.{block}.{path}"], rtol=2e-4)
            assert values[f"blk.{block}.{name}.weight.counts"].tolist() == [[64.0]]


def test_its_description_is_that_of_an_importance_matrix(tiny, windows, tmp_path):
    result = CliRunner().invoke(
        app,
        ["export", str(run(tiny("llama"), tmp_path / "run", windows)), "--imatrix", str(tmp_path / "i.gguf")],
    )
    assert result.exit_code == 0, result.output
    assert "64 tokens" in result.output
    fields = gguf.GGUFReader(tmp_path / "i.gguf").fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.chunk_count"].contents() == 4
    assert fields["imatrix.chunk_size"].contents() == 16
    assert fields["imatrix.datasets"].contents() == ["fedprllm: 2 participants"]


def test_a_run_without_sums_is_refused_with_what_to_do(tiny, windows, tmp_path):
    folder = run(tiny("llama"), tmp_path / "run", windows, share="mask", sparsity=0.5)
    with pytest.raises(RunError, match="shared mask: run with --share statistics"):
        export_importance_matrix(folder, tmp_path / "i.gguf")
    assert not (tmp_path / "i.gguf").exists()


def test_damaged_or_missing_sums_are_named(tiny, windows, tmp_path):
    folder = run(tiny("llama"), tmp_path / "run", windows)
    path = folder / "sums" / "block-0001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=r"block-0001\.safetensors is damaged"):
        export_importance_matrix(folder, tmp_path / "i.gguf")
    path.unlink()
    with pytest.raises(RunError, match=r"block-0001\.safetensors is missing"):
        export_importance_matrix(folder, tmp_path / "i.gguf")


def test_an_architecture_that_llama_cpp_does_not_know(tiny, windows, tmp_path):
    folder = run(tiny("llama"), tmp_path / "run", windows)
    with pytest.raises(RunError, match=r"no architecture 'lama'.*--architecture"):
        export_importance_matrix(folder, tmp_path / "i.gguf", "lama")


# --- Experts ---

MIXTURES = {  # llama.cpp's name of the architecture, and its tensors of all experts of a block
    "mixtral": ("llama", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
    "qwen3-moe": ("qwen3moe", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
    "deepseek-v3": ("deepseek2", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
    "gpt-oss": ("gpt-oss", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
    "granitemoe": ("granitemoe", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
    "olmoe": ("olmoe", ["ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"]),
}


def reached(model: Path, windows) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For each block with experts, the sums of squares of what reaches every expert, and how many tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(block: int, n_experts: int):
        def hook(_, inputs):
            hidden, chosen, _ = inputs
            sums, counts = found.get(
                block, (torch.zeros(n_experts, hidden.shape[-1]).double(), torch.zeros(n_experts))
            )
            for number in range(n_experts):
                tokens = (chosen == number).any(dim=-1)
                sums[number] += hidden[tokens].double().square().sum(dim=0)
                counts[number] += tokens.sum()
            found[block] = sums, counts

        return hook

    for name, module in loaded.named_modules():
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter):
            block = int(name.split("layers.")[1].split(".")[0])
            module.register_forward_pre_hook(add(block, len(module.down_proj)))
    with torch.no_grad():
        for ids in (*windows(0, 2), *windows(1, 2)):
            loaded(ids[None])
    return found


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_all_experts_of_a_block_have_one_entry(name, tiny, windows, tmp_path):
    folder = run(tiny(name), tmp_path / "run", windows)
    found = export_importance_matrix(folder, tmp_path / "i.gguf")
    values, expected = read(found.path), reached(tiny(name), windows)
    assert not [one for one in found.left_out if ".experts." in one]
    assert expected
    known = gguf.MODEL_TENSORS[next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == MIXTURES[name][0])]
    for block, (sums, counts) in expected.items():
        entries = {one.split(".")[2] for one in values if one.startswith(f"blk.{block}.") and "_exps" in one}
        assert sorted(entries) == MIXTURES[name][1]
        assert all(getattr(gguf.MODEL_TENSOR, f"FFN_{one[4:-5].upper()}_EXP") in known for one in entries)
        for entry in entries:
            sums_of, counts_of = (
                values[f"blk.{block}.{entry}.weight.{each}"] for each in ("in_sum2", "counts")
            )
            assert sums_of.shape[0] == counts_of.shape[0] == len(sums)
            assert counts_of.tolist() == [[64.0 if n else 0.0] for n in counts.tolist()]
            assert not sums_of[counts.numpy() == 0].any()
        for entry in ("ffn_gate_exps", "ffn_up_exps"):
            np.testing.assert_allclose(values[f"blk.{block}.{entry}.weight.in_sum2"], sums, rtol=2e-4)


def test_an_expert_that_no_text_reaches_has_a_count_of_zero(tiny, windows, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), folder)
    weights = load_file(folder / "model.safetensors")
    (router,) = (name for name in weights if "layers.0" in name and name.endswith(".gate.weight"))
    weights[router] = torch.tensor([1.0, 0.5, -1.0, -0.5, 0.0, 0.0])[:, None] * weights[router][:1]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    export = ["export", str(run(folder, tmp_path / "run", windows)), "--imatrix", str(tmp_path / "i.gguf")]
    result = CliRunner().invoke(app, export)
    assert result.exit_code == 0, result.output
    counts = read(tmp_path / "i.gguf")["blk.0.ffn_down_exps.weight.counts"]
    assert counts.tolist() == [[64.0]] * 4 + [[0.0]] * 2
    assert "matrices of experts that no text reached have no importances" in result.output


def test_experts_of_which_some_are_missing_are_left_out_by_name(tiny, windows, tmp_path):
    folder = run(tiny("mixtral"), tmp_path / "run", windows, exclude=("*.experts.2.down_proj",))
    found = export_importance_matrix(folder, tmp_path / "i.gguf")
    assert sorted({name.split(".experts.")[1] for name in found.left_out}) == [
        f"{number}.down_proj.weight" for number in (0, 1, 3, 4, 5)
    ]
    assert not [name for name in read(found.path) if "down_exps" in name]
