"""The exported importance matrix holds what llama.cpp would measure on the participants' pooled text."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
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
