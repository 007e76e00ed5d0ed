"""Agreement with outputs of the paper's public code, wherever that code is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedprllm import PruneConfig, PruneResult, prune

SPARSITIES = [0.5, 0.7]


@pytest.fixture(scope="module")
def golden(shared: Path):
    with safe_open(shared / "golden" / "reference_outputs.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def get(kind: str, sparsity: float) -> dict[str, torch.Tensor]:
        prefix = f"{kind}/s{sparsity}/"
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        assert found, f"no golden outputs under {prefix}"
        return found

    get.tokens = tensors["tokens"]
    return get


@pytest.fixture
def pruned(golden, shared: Path, tmp_path: Path):
    def run(sparsity: float, n_participants: int = 4, **options) -> tuple[PruneResult, dict]:
        windows = [golden.tokens[2 * c : 2 * c + 2] for c in range(n_participants)]
        config = PruneConfig(sparsity=sparsity, **options)
        result = prune(shared / "golden" / "tiny-llama", windows, config, out=tmp_path / "run")
        weights: dict[str, torch.Tensor] = {}
        for file in result.model_dir.glob("*.safetensors"):
            weights |= load_file(file)
        return result, weights

    return run


def assert_same_zeros(found: dict, expected: dict) -> None:
    for name, weight in expected.items():
        assert torch.equal(found[name] == 0, weight == 0), name


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_votes(golden, pruned, sparsity):
    result, _ = pruned(sparsity)
    expected = golden("oneshot_votes", sparsity)
    assert set(result.votes) == set(expected)
    for name, votes in expected.items():
        assert torch.equal(result.votes[name].to(torch.int8), votes), name


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("group", ["row", "column"])
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_server_groups(golden, pruned, sparsity, group, strategy):
    _, weights = pruned(sparsity, strategy=strategy, server_group=group)
    assert_same_zeros(weights, golden(f"{strategy.replace('-', '')}_{group}", sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("group", ["row", "column"])
def test_scaled(golden, pruned, sparsity, group):
    _, weights = pruned(sparsity, server_group=group, scale_weights=True)
    for name, expected in golden(f"oneshot_{group}_scaled", sparsity).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("ties", ["index", "random", "magnitude"])
def test_server_layer_prunes_all_above_the_tied_count_and_none_below(golden, pruned, sparsity, ties):
    result, weights = pruned(sparsity, server_group="layer", ties=ties)
    expected = golden("oneshot_layer", sparsity)
    for name, votes in golden("oneshot_votes", sparsity).items():
        zeros = weights[name] == 0
        assert zeros.sum() == (expected[name] == 0).sum()
        threshold = votes.reshape(-1).sort(descending=True).values[zeros.sum() - 1]
        assert zeros[votes > threshold].all()
        assert not zeros[votes < threshold].any()
        assert result.sparsity[name] == zeros.double().mean()


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_centralized(golden, pruned, sparsity):
    _, weights = pruned(sparsity, strategy="centralized")
    assert_same_zeros(weights, golden("centralized", sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_local_only(golden, pruned, sparsity):
    result, weights = pruned(sparsity, strategy="local-only")
    assert len(result.model_dirs) == 4
    assert_same_zeros(weights, golden("local_client0", sparsity))


def test_pruned_model_keeps_the_other_weights_and_loads(shared, pruned):
    result, weights = pruned(0.5)
    for name, original in load_file(shared / "golden" / "tiny-llama" / "model.safetensors").items():
        kept = weights[name] != 0
        assert torch.equal(weights[name][kept], original[kept]), name
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    )
