"""Sparsity allocation, layer sampling and N:M patterns under every way of sharing."""

from __future__ import annotations

import pytest
import torch

from fedprllm import ConfigError, PruneConfig, prune
from fedprllm.deciding import DECISIONS
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import STRUCTURES

SHARES = [share for share in DECISIONS if share not in STRUCTURES]


def participants(windows):
    return [windows(0), windows(1, 3), windows(2, 1)]


OWL = {"allocation": "owl", "owl_m": 3.0}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", ["one-shot", "iterative", "centralized", "local-only"])
def test_owl_prunes_as_much_as_uniform_and_in_any_order_of_participants(
    tiny, windows, tmp_path, share, strategy
):
    config = PruneConfig(share=share, strategy=strategy, local_group="layer", **OWL)
    named = dict(zip("abc", participants(windows), strict=True))
    result = prune(tiny("gpt2"), named, config, out=tmp_path / "run")
    blocks = result.record.blocks
    n_pruned = sum(linear.n_pruned for block in blocks for linear in block.linears.values())
    assert n_pruned == result.record.n_prunable // 2
    shares = [block.sparsity for block in blocks]
    assert len(set(shares)) > 1
    assert all(abs(share - 0.5) <= 0.08 + 1e-3 for share in shares)
    for ratios in result.record.outlier_ratios.values():
        assert all(0 < ratio < 1 for ratio in ratios)
    if share != "gram":
        other = prune(tiny("gpt2"), dict(reversed(named.items())), config, out=tmp_path / "other")
        assert_same_bits(result.model_dir, other.model_dir)


def test_owl_by_its_definition(tiny, windows, tmp_path):
    """Count outliers with transformers' own forward pass, and compare the model that the sparsities give."""
    from transformers import AutoModelForCausalLM

    from fedprllm.core.groups import Grouping
    from fedprllm.core.masks import prune_lowest
    from fedprllm.core.owl import allocate

    config = PruneConfig(strategy="local-only", sparsity=0.6, **OWL)
    result = prune(tiny("llama"), [windows(0)], config, out=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    ratios, shapes, first = [], [], {}
    for layer in model.model.layers:
        inputs: dict[str, list[torch.Tensor]] = {}
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, name=name, inputs=inputs: inputs.setdefault(name, []).append(
                    args[0].reshape(-1, args[0].shape[-1])
                )
            )
            for name, module in linears.items()
        ]
        with torch.no_grad():
            model(windows(0))
        for handle in handles:
            handle.remove()
        scores = {
            name: module.weight.detach().abs()
            * torch.cat(inputs[name]).double().square().sum(dim=0).sqrt().float()
            for name, module in linears.items()
        }
        flat = torch.cat([score.flatten() for score in scores.values()]).double()
        ratios.append(float((flat > 3.0 * flat.mean()).sum()) / flat.numel())
        shapes.append([tuple(score.shape) for score in scores.values()])
        first = first or scores
    assert result.record.outlier_ratios == {"participant-0": pytest.approx(ratios, abs=1e-12)}
    shares = allocate(ratios, shapes, "row", 0.6, 0.08)
    pruned = weights_of(result.model_dir)
    for (name, score), share in zip(first.items(), shares[0], strict=True):
        mask = prune_lowest(score, score, Grouping("row", share), "index").mask
        assert torch.equal(pruned[f"model.layers.0.{name}.weight"] == 0, mask), name


@pytest.mark.parametrize("share", ["mask", "weights"])
def test_participants_count_outliers_and_counts_add_up(tiny, windows, tmp_path, share):
    alone = [
        prune(tiny("llama"), {name: own}, PruneConfig(share=share, **OWL), out=tmp_path / name)
        for name, own in zip("ab", [windows(0), windows(1, 3)], strict=True)
    ]
    both = prune(
        tiny("llama"),
        {"a": windows(0), "b": windows(1, 3)},
        PruneConfig(share=share, **OWL),
        out=tmp_path / "both",
    )
    one, other = (run.record.outlier_ratios["model"] for run in alone)
    expected = [(left + right) / 2 for left, right in zip(one, other, strict=True)]
    assert both.record.outlier_ratios["model"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_statistics_with_owl_are_centralized_with_owl(tiny, windows, tmp_path, name):
    runs = [
        prune(
            tiny(name),
            participants(windows),
            PruneConfig(**options, **OWL),
            out=tmp_path / options["strategy"],
        )
        for options in ({"share": "statistics", "strategy": "iterative"}, {"strategy": "centralized"})
    ]
    assert runs[0].record.outlier_ratios == runs[1].record.outlier_ratios
    assert_same_bits(runs[0].model_dir, runs[1].model_dir)


@pytest.mark.parametrize("share", SHARES)
def test_owl_without_room_is_uniform(tiny, windows, tmp_path, share):
    uniform = prune(tiny("llama"), participants(windows), PruneConfig(share=share), out=tmp_path / "uniform")
    config = PruneConfig(share=share, allocation="owl", owl_lambda=0.0)
    assert_same_bits(
        uniform.model_dir, prune(tiny("llama"), participants(windows), config, out=tmp_path / "owl").model_dir
    )


def test_a_survey_is_not_repeated_when_a_run_is_resumed(tiny, windows, tmp_path, monkeypatch):
    from fedprllm.pruning import in_process, survey

    config = PruneConfig(**OWL)
    whole = prune(tiny("llama"), participants(windows), config, out=tmp_path / "whole")
    original = in_process._SharedWalk.step

    def killed(self, index, advance):
        if index == 1:
            raise KeyboardInterrupt
        original(self, index, advance)

    monkeypatch.setattr(in_process._SharedWalk, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), participants(windows), config, out=tmp_path / "run")
    monkeypatch.setattr(in_process._SharedWalk, "step", original)
    monkeypatch.setattr(survey, "_survey", lambda *_: pytest.fail("counted again"))
    continued = prune(tiny("llama"), participants(windows), config, out=tmp_path / "run")
    assert_same_bits(whole.model_dir, continued.model_dir)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_sampled_block_counts_only_the_participants_that_prune_it(tiny, windows, tmp_path, share, strategy):
    from fedprllm.core.layer_sampling import sample_blocks

    named = dict(zip("abc", participants(windows), strict=True))
    config = PruneConfig(share=share, strategy=strategy, block_fraction="a=0.7,b=0.4")
    result = prune(tiny("llama"), named, config, out=tmp_path / "run")
    sample = sample_blocks({"a": 0.7, "b": 0.4, "c": 1.0}, 3, 0)
    assert sample is not None
    assert {name: len(own) for name, own in sample.items()} == {"a": 2, "b": 1, "c": 3}
    for block in result.record.blocks:
        expected = [name for name, own in sample.items() if block.block in own]
        assert block.participants == expected
        assert block.sparsity == 0.5
    per_block = result.record.update_bytes_per_block
    for name, participant in result.record.participants.items():
        assert participant.n_blocks == len(sample[name])
        assert participant.update_bytes == sum(per_block[block] for block in sample[name])
    again = prune(tiny("llama"), dict(reversed(named.items())), config, out=tmp_path / "again")
    if share != "gram":
        assert_same_bits(result.model_dir, again.model_dir)


@pytest.mark.parametrize("share", ["mask", "weights"])
def test_a_block_with_one_participant_is_pruned_as_by_that_participant_alone(tiny, windows, tmp_path, share):
    """Earlier blocks stay unpruned for it, so the first block it prunes receives the dense model's inputs."""
    config = PruneConfig(share=share, block_fraction=0.4, server_group="row")
    named = dict(zip("abc", participants(windows), strict=True))
    result = prune(tiny("llama"), named, config, out=tmp_path / "run")
    pruned = weights_of(result.model_dir)
    dense = PruneConfig(share="statistics")  # observed on the unpruned model throughout
    for block in result.record.blocks:
        (name,) = block.participants
        alone = weights_of(prune(tiny("llama"), [named[name]], dense, out=tmp_path / name).model_dir)
        for weight in block.linears:
            assert torch.equal(pruned[weight], alone[weight]), weight


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["4:8", "1:4", "3:16"])
def test_n_m_keeps_at_most_n_of_m_consecutive_inputs(tiny, windows, tmp_path, share, name, pattern):
    n, m = (int(part) for part in pattern.split(":"))
    result = prune(
        tiny(name), participants(windows)[:2], PruneConfig(share=share, pattern=pattern), out=tmp_path / "run"
    )
    for weight_name, weight in weights_of(result.model_dir).items():
        if weight_name in result.sparsity:
            by_output = weight.T if name == "gpt2" else weight  # GPT-2 stores [in, out]
            assert ((by_output.reshape(-1, m) != 0).sum(dim=1) == n).all(), weight_name


@pytest.mark.parametrize("share", SHARES)
def test_one_participant_is_centralized(tiny, windows, tmp_path, share):
    """For every way of sharing, given the server's decision and the same comparison groups."""
    runs = [
        prune(
            tiny("gpt2"),
            [windows(0, 3)],
            PruneConfig(share=share, strategy=strategy, server_group="row"),
            out=tmp_path / strategy,
        )
        for strategy in ("iterative", "centralized")
    ]
    assert_same_bits(runs[0].model_dir, runs[1].model_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "owl", "pattern": "2:4"}, "fixes the sparsity of every block"),
        ({"block_fraction": 0}, r"block_fraction must lie in \(0, 1\], found 0"),
        ({"block_fraction": "a=0.5,b=2"}, "found 2 for participant 'b'"),
        ({"block_fraction": "half"}, "must be a number or NAME=F"),
        ({"block_fraction": 0.5, "strategy": "centralized"}, "no other participant to prune the rest"),
        ({"owl_lambda": 1.0}, "owl_lambda"),
        ({"owl_m": 0}, "owl_m"),
    ],
)
def test_impossible_allocations_and_fractions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        PruneConfig(**options)
    assert "value error" not in str(refused.value)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.1, "leaves some blocks without a participant: the 2 participants together prune"),
        ("x=0.5", "unknown participant 'x'"),
    ],
)
def test_blocks_without_a_participant_are_refused_before_any_computation(
    tiny, windows, tmp_path, fraction, message
):
    config = PruneConfig(block_fraction=fraction)
    with pytest.raises(ConfigError, match=message):
        prune(tiny("llama"), [windows(0), windows(1)], config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fractions_have_one_spelling():
    for given in ({"north": 0.25, "south": 1}, "north=0.25,south=1"):
        assert PruneConfig(block_fraction=given).block_fraction == "north=0.25,south=1"
    assert PruneConfig(block_fraction=0.5) == PruneConfig(block_fraction="0.5")
