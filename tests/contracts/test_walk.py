"""Properties that every architecture, strategy, group, pattern and criterion must have."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedprllm import PruneConfig, prune
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from tests.models import ARCHITECTURES, save_one_block

STRATEGIES = ["one-shot", "iterative", "centralized", "local-only"]
GROUPS = ["layer", "row", "column"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_same_bits(left: Path, right: Path) -> None:
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_is_the_models_own_forward_pass(tiny, windows, tmp_path, name):
    walked = BlockwiseModel(resolve_model(tiny(name), cache_dir=tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny(name)).eval()
    tokens = torch.cat([windows(0), windows(1)])
    hidden = list(walked.embed(tokens))
    for index in range(walked.n_blocks):
        with walked.block(index) as block:
            hidden = [block.forward(state) for state in hidden]
    with torch.no_grad(), walked.head():
        logits = model(tokens).logits
        for row, (state, window) in enumerate(zip(hidden, tokens, strict=True)):
            expected = torch.nn.functional.cross_entropy(logits[row, :-1], window[1:], reduction="none")
            # A chunk of 5 does not divide the window's 15 predictions.
            torch.testing.assert_close(walked.token_losses(state, window, chunk=5), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_of_the_blocks_and_nothing_else(tiny, windows, tmp_path, name):
    result = prune(tiny(name), [windows(0), windows(1)], PruneConfig(sparsity=0.5), out=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tiny(name))
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir)
    before, after = model.state_dict(), loaded.state_dict()
    in_blocks = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
        and ("layers." in path or "h." in path)
    }
    assert set(result.votes) == set(result.sparsity) == in_blocks
    for weight_name, weight in before.items():
        pruned = after[weight_name]
        if weight_name not in in_blocks:
            assert torch.equal(pruned, weight), f"{weight_name} must not change"
            continue
        zeros = pruned == 0
        assert zeros.sum() == weight.numel() // 2, weight_name
        assert torch.equal(pruned[~zeros], weight[~zeros])
        assert not torch.signbit(pruned[zeros]).any(), "zeros must be +0.0"
        assert result.votes[weight_name].shape == weight.shape
        assert not result.votes[weight_name].is_floating_point()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert (result.model_dir / "README.md").read_text().startswith("---")


def expected_zeros(shape: tuple[int, int], group: str, sparsity: float) -> int:
    n_out, n_in = shape
    size = {"layer": n_out * n_in, "row": n_in, "column": n_out}[group]
    return n_out * n_in // size * int(size * Fraction(str(sparsity)))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
@pytest.mark.parametrize(("local", "server"), list(itertools.product(GROUPS, GROUPS)))
def test_exactly_k_in_every_group(tiny, windows, tmp_path, strategy, local, server, sparsity):
    config = PruneConfig(sparsity=sparsity, strategy=strategy, local_group=local, server_group=server)
    participants = [windows(0), windows(1, 3), windows(2, 1)]
    result = prune(tiny("llama"), participants, config, out=tmp_path / "run")
    for name, weight in weights_of(result.model_dir).items():
        if name in result.votes:
            zeros = weight == 0
            assert zeros.sum() == expected_zeros(tuple(weight.shape), server, sparsity), name
            if server == "row":
                assert len(set(zeros.sum(dim=1).tolist())) == 1
            if server == "column":
                assert len(set(zeros.sum(dim=0).tolist())) == 1
            local_k = expected_zeros(tuple(weight.shape), local, sparsity)
            assert result.votes[name].sum() == 3 * local_k, name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "3:16"])
def test_n_m_patterns(tiny, windows, tmp_path, strategy, pattern):
    n, m = (int(part) for part in pattern.split(":"))
    config = PruneConfig(pattern=pattern, strategy=strategy)
    result = prune(tiny("llama"), [windows(0), windows(1)], config, out=tmp_path / "run")
    assert result.config.sparsity == pytest.approx(1 - n / m)
    for name, weight in weights_of(result.model_dir).items():
        if name in result.votes:
            assert ((weight.reshape(-1, m) != 0).sum(dim=1) == n).all(), name


@pytest.mark.parametrize("ties", ["index", "random", "magnitude"])
@pytest.mark.parametrize("strategy", ["one-shot", "iterative", "centralized"])
def test_order_of_participants_changes_nothing(tiny, windows, tmp_path, strategy, ties):
    config = PruneConfig(strategy=strategy, ties=ties)
    participants = [windows(0), windows(1, 3), windows(2, 1)]
    one = prune(tiny("qwen2"), participants, config, out=tmp_path / "one")
    other = prune(tiny("qwen2"), participants[::-1], config, out=tmp_path / "other")
    assert_same_bits(one.model_dir, other.model_dir)


@pytest.mark.parametrize("ties", ["index", "random", "magnitude"])
def test_same_seed_same_bits(tiny, windows, tmp_path, ties):
    config = PruneConfig(ties=ties, seed=3)
    one, other = (
        prune(tiny("llama"), [windows(0), windows(1)], config, out=tmp_path / name) for name in "ab"
    )
    assert_same_bits(one.model_dir, other.model_dir)


def test_another_seed_breaks_random_ties_differently(tiny, windows, tmp_path):
    one, other = (
        prune(
            tiny("llama"),
            [windows(0), windows(1)],
            PruneConfig(ties="random", seed=seed),
            out=tmp_path / str(seed),
        )
        for seed in (0, 1)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.votes[name], other.votes[name])
    assert not torch.equal(weights_of(one.model_dir)[name], weights_of(other.model_dir)[name])


def test_one_participant_is_local_only_and_centralized(tiny, windows, tmp_path):
    participants = [windows(0, 3)]
    folders = [
        prune(
            tiny("llama"), participants, PruneConfig(strategy=s, server_group="row"), out=tmp_path / s
        ).model_dir
        for s in STRATEGIES
    ]
    for folder in folders[1:]:
        assert_same_bits(folders[0], folder)


def test_identical_participants_are_that_participant(tiny, windows, tmp_path):
    one = prune(tiny("llama"), [windows(0)], out=tmp_path / "one")
    many = prune(tiny("llama"), [windows(0)] * 3, out=tmp_path / "many")
    assert_same_bits(one.model_dir, many.model_dir)
    name = next(iter(one.votes))
    assert torch.equal(one.votes[name] * 3, many.votes[name])


def test_local_only_models_are_those_of_each_participant_alone(tiny, windows, tmp_path):
    config = PruneConfig(strategy="local-only")
    participants = [windows(0), windows(1, 3)]
    together = prune(tiny("llama"), participants, config, out=tmp_path / "together")
    for number, (name, folder) in enumerate(together.model_dirs.items()):
        alone = prune(tiny("llama"), [participants[number]], config, out=tmp_path / f"alone-{name}")
        assert_same_bits(folder, alone.model_dir)


def test_magnitude_needs_no_text(tiny, windows, tmp_path):
    config = PruneConfig(criterion="magnitude", local_group="row", server_group="row", ties="magnitude")
    result = prune(tiny("llama"), [windows(0), windows(1)], config, out=tmp_path / "run")
    for name, weight in weights_of(result.model_dir).items():
        if name in result.votes:
            original = weights_of(tiny("llama"))[name]
            k = original.shape[1] // 2
            expected = torch.zeros_like(original, dtype=torch.bool)
            expected.scatter_(1, original.abs().argsort(dim=1)[:, :k], True)
            assert torch.equal(weight == 0, expected), name


def test_scaling_multiplies_the_kept_weights(tiny, windows, tmp_path):
    participants = [windows(0), windows(1), windows(2)]
    result = prune(tiny("gpt2"), participants, PruneConfig(scale_weights=True), out=tmp_path / "run")
    before, after = weights_of(tiny("gpt2")), weights_of(result.model_dir)
    plain = weights_of(prune(tiny("gpt2"), participants, out=tmp_path / "plain").model_dir)
    for name, votes in result.votes.items():
        expected = torch.where(plain[name] == 0, 0.0, before[name] * ((3 - votes.float()) / 3))
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_keep_the_precision_of_the_checkpoint(tiny, windows, tmp_path, dtype):
    source = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=getattr(torch, dtype))
    source.save_pretrained(tmp_path / "source")
    result = prune(tmp_path / "source", [windows(0)], PruneConfig(scale_weights=True), out=tmp_path / "run")
    assert {weight.dtype for weight in weights_of(result.model_dir).values()} == {getattr(torch, dtype)}
    low = prune(tmp_path / "source", [windows(0)], PruneConfig(dtype=dtype), out=tmp_path / "low")
    name = next(iter(low.votes))
    assert low.sparsity[name] == 0.5


def test_more_than_255_participants_are_counted(windows, tmp_path):
    save_one_block("opt", tmp_path / "one-block")
    result = prune(tmp_path / "one-block", [windows(0, 1, 4)] * 300, out=tmp_path / "run")
    assert max(int(votes.max()) for votes in result.votes.values()) == 300
    assert all(((votes == 0) | (votes == 300)).all() for votes in result.votes.values())


def test_only_the_participants_own_windows_are_forwarded(tiny, windows, tmp_path, monkeypatch):
    calls = []
    original = BlockwiseModel._call_block

    def counted(self, index, hidden):
        calls.append(tuple(hidden.shape))
        return original(self, index, hidden)

    monkeypatch.setattr(BlockwiseModel, "_call_block", counted)
    prune(tiny("llama"), [windows(0, 3), windows(1, 1)], out=tmp_path / "run")
    # Opening the model runs one block on two tokens, without weights, to find Linears that share inputs.
    assert calls[0] == (1, 2, 32)
    # Four windows: observed in each of the 3 blocks, and passed on through all but the last.
    assert calls[1:] == [(1, 16, 32)] * (4 * 3 + 4 * 2)
