"""Linears that a user excludes stay as they are, and everything else is pruned as without them."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fedprllm import ConfigError, ModelError, PruneConfig, prune
from fedprllm.cli.app import app
from fedprllm.models.blockwise import BlockwiseModel
from tests.contracts.test_walk import weights_of
from tests.models import ARCHITECTURES


def changed(model, result) -> set[str]:
    before, after = weights_of(model), weights_of(result.model_dir)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_excluded_linear_keeps_every_bit(architecture, tiny, windows, tmp_path):
    linears = [linear for block in BlockwiseModel(tiny(architecture)).linears for linear in block.values()]
    # The first Linear of a block is the one whose name stands for an input that others read, too.
    first = linears[0].path
    for share in ("mask", "statistics"):
        config = PruneConfig(exclude=[first], share=share, strategy="iterative", window_length=16)
        result = prune(tiny(architecture), [windows(0), windows(1)], config, out=tmp_path / share)
        expected = {linear.name for linear in linears if linear.path != first}
        assert changed(tiny(architecture), result) == expected
        assert set(result.sparsity) == expected
        assert all(sparsity == pytest.approx(0.5, abs=0.02) for sparsity in result.sparsity.values())


def test_the_others_are_pruned_as_if_nothing_was_excluded_before_them(tiny, windows, tmp_path):
    """The first block's masks do not depend on what else is pruned in it."""
    plain = prune(tiny("llama"), [windows(0), windows(1)], PruneConfig(window_length=16), out=tmp_path / "a")
    config = PruneConfig(exclude=["model.layers.0.self_attn.*"], window_length=16)
    result = prune(tiny("llama"), [windows(0), windows(1)], config, out=tmp_path / "b")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(plain.votes[name], result.votes[name])
    assert not any("layers.0.self_attn" in name for name in result.votes)
    assert any("layers.1.self_attn" in name for name in result.votes)


def test_the_record_says_what_stayed_dense(tiny, windows, tmp_path):
    config = PruneConfig(exclude=["*.down_proj"], window_length=16)
    result = prune(tiny("llama"), [windows(0)], config, out=tmp_path / "run")
    assert result.record.coverage == pytest.approx(0.8)
    assert "mlp.down_proj" in " ".join(result.record.deviations())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*.nothing", r"exclude '\*\.nothing' matches no Linear .*'self_attn\.q_proj' or '\*\.q_proj'"),
        ("*", "leaves nothing to prune in block 0"),
        ("model.layers.1.*", "leaves nothing to prune in block 1"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_before_anything_is_computed(
    pattern, words, tiny, windows, tmp_path
):
    with pytest.raises(ModelError, match=words):
        prune(tiny("llama"), [windows(0)], PruneConfig(exclude=[pattern]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_pattern_is_refused():
    with pytest.raises(ConfigError, match="exclude"):
        PruneConfig(exclude=[""])


def test_the_command_line_takes_several(tiny, tmp_path):
    words = ["prune", str(tiny("llama")), "--participant", "missing.txt", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--exclude", "*.x", "--exclude", "*.q_proj"])
    assert "exclude '*.x' matches no Linear" in str(result.exception)
