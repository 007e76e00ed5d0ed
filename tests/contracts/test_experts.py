"""Mixtures of experts: the same bits as a naive run on the fused model, in the form of the source."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedprllm import PruneConfig, prune
from fedprllm.deciding.decision import UNREACHED
from fedprllm.errors import ModelError
from fedprllm.models import conversion
from fedprllm.models.block import PrunedWeights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.experts import UnfusedExperts, fused_shapes
from fedprllm.models.fingerprints import tensor_fingerprints
from fedprllm.models.skeleton import build_skeleton
from fedprllm.models.source import resolve_model
from fedprllm.models.tensor_file import Made, made
from fedprllm.pruning.records import FEW_TOKENS
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import MIXTURES
from tests.naive_run import Whole, differences


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return shapes


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded whole")

    monkeypatch.setattr(conversion, "_loaded", refuse)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.usefixtures("no_conversion")
def test_votes_and_weights_are_those_of_a_naive_run(name, tiny, windows, tmp_path) -> None:
    participants = [windows(0), windows(1, 3), windows(2, 1)]
    result = prune(tiny(name), participants, out=tmp_path / "run")
    assert differences(tiny(name), participants, result) == []
    assert stored_shapes(result.model_dir) == stored_shapes(tiny(name))
    assert any(record.experts for record in result.record.blocks)


@pytest.mark.parametrize("name", MIXTURES)
def test_block_by_block_is_the_models_own_forward_pass(tiny, windows, name) -> None:
    walked, whole = BlockwiseModel(resolve_model(tiny(name))), Whole(tiny(name)).model
    window = windows(0)[0]
    (hidden,) = walked.embed([window])
    for index in range(walked.n_blocks):
        with walked.block(index) as block:
            hidden = block.forward(hidden)
    with torch.no_grad(), walked.head():
        logits = whole(window[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        torch.testing.assert_close(walked.token_losses(hidden, window), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_shared_sums_give_the_bits_of_all_text_in_one_place(name, tiny, windows, tmp_path) -> None:
    participants = [windows(0), windows(1, 3), windows(2, 1)]
    together = PruneConfig(share="statistics", strategy="iterative")
    one = prune(tiny(name), participants, together, out=tmp_path / "one")
    other = prune(tiny(name), participants, PruneConfig(strategy="centralized"), out=tmp_path / "other")
    assert_same_bits(one.model_dir, other.model_dir)


SETTINGS: dict[str, dict[str, Any]] = {
    "gram": {"share": "gram", "strategy": "iterative"},
    "sparsegpt": {"share": "gram", "solver": "sparsegpt", "strategy": "iterative"},
    "weights": {"share": "weights", "local_group": "layer"},
    "2:4": {"pattern": "2:4"},
    "owl": {"allocation": "owl", "strategy": "iterative"},
    "ria": {"criterion": "ria"},
    "tokens": {"weighting": "tokens"},
    "local-only": {"strategy": "local-only"},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mixtral", one) for one in SETTINGS] + [("gpt-oss", one) for one in ("gram", "owl")],
)
def test_every_setting_prunes_experts_exactly(name, settings, tiny, windows, tmp_path) -> None:
    config = PruneConfig(**SETTINGS[settings])
    result = prune(tiny(name), [windows(0), windows(1)], config, out=tmp_path / "run")
    record, n_pruned = result.record, 0
    for folder in result.model_dirs.values():
        before, after = Whole(tiny(name)), Whole(folder)
        for block in record.blocks:
            for weight, linear in block.linears.items():
                zeros = int((after.matrix(weight) == 0).sum())
                assert after.matrix(weight).shape == before.matrix(weight).shape == linear.shape
                n_pruned += zeros
                if config.allocation == "uniform" and settings != "weights":
                    assert zeros == linear.n_weights // 2, weight
        for path, tensor in before.model.state_dict().items():
            if "router" in path or ".gate." in path:
                assert torch.equal(tensor, after.model.state_dict()[path]), "routers are never pruned"
    assert n_pruned == pytest.approx(len(result.model_dirs) * record.n_prunable // 2, rel=0.05)


# --- Experts that a text does not reach ---


@pytest.mark.parametrize("share", ["mask", "statistics", "admm", "sparsegpt", "alps"])
def test_an_expert_that_no_text_reaches_is_pruned_by_magnitude(share, tiny, windows, tmp_path) -> None:
    way = {"share": share} if share in ("mask", "statistics") else {"share": "gram", "solver": share}
    config = PruneConfig(**way, strategy="iterative", local_group="layer")
    folder = _with_two_idle_experts(tiny("mixtral"), tmp_path / "model")
    result = prune(folder, [windows(0), windows(1)], config, out=tmp_path / "run")
    before, after = Whole(folder), Whole(result.model_dir)
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.5.{part}.weight"
        weight = before.matrix(name)
        smallest = weight.abs().flatten().argsort()[: weight.numel() // 2]
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[smallest] = True
        assert torch.equal(after.matrix(name).flatten() == 0, expected), name
        kept = after.matrix(name) != 0
        assert torch.equal(after.matrix(name)[kept], weight[kept]), "a solver has nothing to correct"
    notes = result.record.deviations()
    assert any(note.startswith("the text of 'participant-0' reached ") for note in notes)
    assert any(UNREACHED in note for note in notes) == (share != "mask")
    reached = result.record.blocks[0].experts["participant-0"]
    assert (reached.n_experts, reached.n_unreached) == (6, 2)


def _with_two_idle_experts(source: Path, folder: Path) -> Path:
    """A copy whose first router knows one direction: it sends tokens to experts 0 and 1, or to 2 and 3."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (router,) = (name for name in tensors if "layers.0" in name and name.endswith(".gate.weight"))
    tensors[router] = torch.tensor([1.0, 0.5, -1.0, -0.5, 0.0, 0.0])[:, None] * tensors[router][:1]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_few_tokens_are_said(tiny, windows, tmp_path) -> None:
    result = prune(tiny("qwen3-moe"), [windows(0, 1)], out=tmp_path / "run")
    reached = result.record.blocks[0].experts["participant-0"]
    assert reached.n_experts == 8
    # 16 tokens reach two experts each: not all of the 8 can get 10.
    assert reached.n_few + reached.n_unreached >= 8 - 32 // FEW_TOKENS
    (note,) = result.record.deviations()
    assert f"fewer than {FEW_TOKENS} tokens" in note


def test_a_specialist_is_not_refused(tiny, windows, tmp_path) -> None:
    """One participant's text may reach an expert a hundred times as often as the others'."""
    config = PruneConfig(share="statistics", strategy="iterative")
    word = torch.full((4, 16), 77)
    participants = [windows(0), windows(1), windows(2), word]
    assert prune(tiny("qwen3-moe"), participants, config, out=tmp_path / "run").sparsity


# --- Files ---


@pytest.mark.parametrize("name", ["qwen3-moe", "granitemoe"])
@pytest.mark.usefixtures("no_conversion")
def test_pickled_experts_keep_their_form(name, tiny, windows, tmp_path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((tiny(name) / "config.json").read_text())
    torch.save(load_file(tiny(name) / "model.safetensors"), folder / "pytorch_model.bin")
    found = resolve_model(folder, cache_dir=tmp_path / "cache")
    assert stored_shapes(found) == stored_shapes(tiny(name))
    result = prune(found, [windows(0)], out=tmp_path / "run")
    expected = prune(tiny(name), [windows(0)], out=tmp_path / "expected")
    assert_same_bits(result.model_dir, expected.model_dir)


@pytest.mark.usefixtures("no_conversion")
def test_experts_that_are_stored_fused_stay_fused(tiny, windows, tmp_path) -> None:
    """A checkpoint in transformers' own form: Mixtral's experts in two tensors for each block."""
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
    folder = tmp_path / "fused"
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    result = prune(folder, [windows(0)], out=tmp_path / "run")
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights_of(result.model_dir)
    assert stored_shapes(result.model_dir) == stored_shapes(folder)
    expected = prune(tiny("mixtral"), [windows(0)], out=tmp_path / "expected")
    theirs = Whole(expected.model_dir).model.state_dict()
    for path, tensor in Whole(result.model_dir).model.state_dict().items():
        assert torch.equal(tensor, theirs[path]), path


@pytest.mark.parametrize("name", MIXTURES)
def test_taking_apart_changes_no_name_that_transformers_knows(name, tiny) -> None:
    skeleton = build_skeleton(tiny(name))
    assert any(isinstance(module, UnfusedExperts) for module in skeleton.modules())
    expected = {n: tuple(t.shape) for n, t in Whole(tiny(name)).model.state_dict().items()}
    assert fused_shapes(skeleton) == expected


def test_only_the_experts_asked_for_are_read(tiny, monkeypatch) -> None:
    model = BlockwiseModel(tiny("gpt-oss"))
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (0, 3)]
    found = model.checkpoint.load(names)
    stored = load_file(tiny("gpt-oss") / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    for expert, name in zip((0, 3), names, strict=True):
        assert torch.equal(found[name], stored[expert].T)
        assert found[name].is_contiguous()


@pytest.mark.parametrize("name", ["gpt-oss", "granitemoe"])
def test_fused_tensors_are_joined_one_expert_at_a_time(name, tiny) -> None:
    model, stored = BlockwiseModel(tiny(name)), load_file(tiny(name) / "model.safetensors")
    with model.block(1) as block:
        found = model.checkpoint.as_stored(block.tensors)
        joined = {key: tensor for key, tensor in found.items() if isinstance(tensor, Made)}
        assert joined
        for key, tensor in joined.items():
            parts = list(tensor.parts())
            assert len(parts) == tensor.shape[0] == 6
            assert all(part.shape == stored[key].shape[1:] for part in parts)
            assert torch.equal(torch.stack(parts), stored[key])


def test_a_participants_own_model_is_pruned_while_it_is_written(tiny) -> None:
    model = BlockwiseModel(tiny("mixtral"))
    with model.block(0) as block:
        masks = {name: torch.ones(linear.shape, dtype=torch.bool) for name, linear in block.linears.items()}
        found = PrunedWeights(block, masks).remaining(block.tensors)
        assert found.keys() == block.tensors.keys()
        for name, tensor in found.items():
            assert isinstance(tensor, Made) == (name in block.linears)
            assert bool(made(tensor).any()) != (name in block.linears)


def test_a_block_that_was_released_holds_nothing(tiny) -> None:
    """The caller still has it while the next one is read."""
    model = BlockwiseModel(tiny("mixtral"))
    with model.block(0) as block:
        tensors = [weakref.ref(tensor) for tensor in block.tensors.values()]
    assert tensors
    assert not any(tensor() is not None for tensor in tensors)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("n_experts", [4, 8])
def test_another_number_of_experts_than_stored_is_refused(name, n_experts, tiny, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(name), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_local_experts"] == 6
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": n_experts}))
    with pytest.raises(ModelError, match=r"config\.json|missing"):
        resolve_model(folder, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_an_expert_that_is_missing_or_not_finite_is_named(name, tiny, windows, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(name), folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(tensors) if "experts" in key and "down" in key and "bias" not in key)
    tensors[key].view(-1)[-1] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\..*experts\.\d+\.down_proj\.weight.* contains NaN"):
        tensor_fingerprints(BlockwiseModel(folder))
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"incomplete, download it again|down_proj' has the shape \[7, 32, 16\]"
    ):
        resolve_model(folder, cache_dir=tmp_path / "cache")
