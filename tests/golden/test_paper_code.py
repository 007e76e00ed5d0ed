"""Agreement with outputs of the paper's public code, wherever that code is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedprllm import PruneConfig, PruneResult, prune
from tests.golden.packed import DATA, MODEL, Golden
from tests.make_golden_set import pack

SPARSITIES = [0.5, 0.7]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


@pytest.fixture
def pruned(golden, tmp_path: Path):
    def run(sparsity: float, **options) -> tuple[PruneResult, dict]:
        config = PruneConfig(sparsity=sparsity, **options)
        result = prune(MODEL, golden.windows, config, out=tmp_path / "run")
        weights: dict[str, torch.Tensor] = {}
        for file in result.model_dir.glob("*.safetensors"):
            weights |= load_file(file)
        return result, weights

    return run


def assert_same_zeros(found: dict, expected: dict) -> None:
    for name, zeros in expected.items():
        assert torch.equal(found[name] == 0, zeros), name


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_votes(golden, pruned, sparsity):
    result, _ = pruned(sparsity)
    expected = golden.votes(sparsity)
    assert set(result.votes) == set(expected)
    for name, votes in expected.items():
        assert torch.equal(result.votes[name].to(torch.int8), votes), name


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("group", ["row", "column"])
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_server_groups(golden, pruned, sparsity, group, strategy):
    _, weights = pruned(sparsity, strategy=strategy, server_group=group)
    assert_same_zeros(weights, golden.zeros(f"{strategy.replace('-', '')}_{group}", sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("group", ["row", "column"])
def test_scaled(golden, pruned, sparsity, group):
    _, weights = pruned(sparsity, server_group=group, scale_weights=True)
    for name, expected in golden.scaled(group, sparsity).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("ties", ["index", "random", "magnitude"])
def test_server_layer_prunes_all_above_the_tied_count_and_none_below(golden, pruned, sparsity, ties):
    result, weights = pruned(sparsity, server_group="layer", ties=ties)
    expected = golden.zeros("oneshot_layer", sparsity)
    for name, votes in golden.votes(sparsity).items():
        zeros = weights[name] == 0
        assert zeros.sum() == expected[name].sum()
        threshold = votes.reshape(-1).sort(descending=True).values[zeros.sum() - 1]
        assert zeros[votes > threshold].all()
        assert not zeros[votes < threshold].any()
        assert result.sparsity[name] == zeros.double().mean()


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_centralized(golden, pruned, sparsity):
    _, weights = pruned(sparsity, strategy="centralized")
    assert_same_zeros(weights, golden.zeros("centralized", sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_local_only(golden, pruned, sparsity):
    result, weights = pruned(sparsity, strategy="local-only")
    assert len(result.model_dirs) == 4
    assert_same_zeros(weights, golden.zeros("local_client0", sparsity))


def test_pruned_model_keeps_the_other_weights_and_loads(golden, pruned):
    result, weights = pruned(0.5)
    for name, original in golden.dense.items():
        kept = weights[name] != 0
        assert torch.equal(weights[name][kept], original[kept]), name
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    )


@pytest.mark.shared
def test_the_set_says_what_the_full_outputs_say(shared):
    """Packing refuses weights that the bits would not give back, so this compares all 12 MB."""
    full, shipped = pack(shared / "golden"), load_file(DATA / "reference.safetensors")
    assert set(full) == set(shipped)
    for name, tensor in full.items():
        assert torch.equal(tensor, shipped[name]), name
    assert (MODEL / "model.safetensors").read_bytes() == (
        shared / "golden" / "tiny-llama" / "model.safetensors"
    ).read_bytes()
