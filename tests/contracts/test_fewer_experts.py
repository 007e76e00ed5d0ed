"""Models with fewer experts: which ones go, and that transformers computes what is left."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedprllm import ConfigError, ModelError, PruneConfig, UpdateError, prune
from fedprllm.core.sums import ExpertStatistics
from fedprllm.deciding.parts import lowest, n_removed
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.decision import decided_weights, encode_decision
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.models.fewer_experts import experts_of, fewer_experts, write_fewer_experts
from fedprllm.packing.message import unpack_message
from fedprllm.pruning.method import pruning_method
from fedprllm.sharing.expert_outputs import EXPERTS
from fedprllm.sharing.interface import Ballot
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import MIXTURES, save_tiny
from tests.zoo import model_types, tiny_config, windows_of

NAMES = ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "granitemoe", "olmoe", "nemotron-h"]
TWO = PruneConfig(structure="experts=2")


def mixtures_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a transformers model that hold the experts of a block."""
    return [module for module in model.modules() if getattr(module, "down_proj", None) is not None
            and not isinstance(module.down_proj, nn.Module)]  # fmt: skip


def reached(folder: Path, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each block with experts, the sums and counts of every expert in transformers' own pass."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[nn.Module, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for experts in mixtures_of(model):
        seen[experts] = calls = []
        experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
    with torch.no_grad():
        for window in tokens:
            model(window[None])
        for experts, calls in seen.items():
            yield sums_of(experts, *map(torch.cat, zip(*calls, strict=True)))


def sums_of(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    n = experts.down_proj.shape[0]
    sums, counts = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    experts._forward_pre_hooks.clear()
    for token in range(len(hidden)):
        for number, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            # The output of this expert alone, with a weight of 1.
            output = experts(hidden[token][None], torch.tensor([[number]]), torch.ones(1, 1))
            sums[number] += weight * float(output.norm())
            counts[number] += 1
    return sums, counts


def cut(folder: Path, removed: list[list[int]]) -> nn.Module:
    """The transformers model of a folder without some experts: every tensor that counts them, by hand."""
    dense = AutoModelForCausalLM.from_pretrained(folder)
    (n,) = {experts.down_proj.shape[0] for experts in mixtures_of(dense)}
    (n_removed,) = {len(gone) for gone in removed if gone}
    config = copy.deepcopy(dense.config)
    keys = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    setattr(config, next(key for key in keys if key in config.to_dict()), n - n_removed)
    smaller = AutoModelForCausalLM.from_config(config)
    state = dense.state_dict()
    for name, tensor in smaller.state_dict().items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        axes = [axis for axis in range(tensor.ndim) if tensor.shape[axis] != state[name].shape[axis]]
        for axis in axes:
            kept = [number for number in range(n) if number not in removed[block]]
            state[name] = state[name].index_select(axis, torch.tensor(kept))
    smaller.load_state_dict(state)
    return smaller.eval()


@pytest.fixture
def mixture(tiny, tmp_path):
    """``mixture(name)``: a tiny random mixture; DeepSeek's correction of scores is random too."""

    def get(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny(name), folder)
        weights = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for key, tensor in weights.items():
            if key.endswith("e_score_correction_bias"):
                assert not tensor.any()
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return get


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_the_model_without_the_experts(mixture, windows, tmp_path, name):
    tiny = functools.cache(mixture)
    result = prune(tiny(name), [windows(0, 3), windows(1, 3)], TWO, out=tmp_path / "run")
    removed = [block.removed_experts or [] for block in result.record.blocks]
    loaded, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = cut(tiny(name), removed)
    window = windows(5, 1)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(window).logits, expected(window).logits)
    assert weights_of(result.model_dir).keys() <= weights_of(tiny(name)).keys()
    assert result.record.reduction.n_parameters[1] == sum(p.numel() for p in loaded.parameters())
    assert result.record.n_prunable == sum(block.n_weights for block in result.record.blocks)
    assert result.record.n_prunable == sum(
        linear.n_weights for block in BlockwiseModel(result.model_dir).linears for linear in block.values()
    )
    assert result.record.sparsity == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_means_over_the_tokens_that_reach_an_expert(tiny, windows, tmp_path, name):
    texts = [windows(0, 3), windows(1, 2)]
    result = prune(tiny(name), texts, TWO, out=tmp_path / "run")
    found = [block.expert_scores for block in result.record.blocks if block.expert_scores]
    expected = list(reached(tiny(name), torch.cat(texts)))
    assert len(found) == len(expected)
    for scores, (sums, counts) in zip(found, expected, strict=True):
        means = sums / counts.clamp_min(1)
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_together_is_all_text_in_one_place(tiny, windows, tmp_path, name):
    texts = [windows(0, 3), windows(1, 2), windows(2, 1)]
    runs = [
        prune(tiny(name), texts, PruneConfig(structure="experts=2", **how), out=tmp_path / str(number))
        for number, how in enumerate([{}, {"strategy": "centralized"}, {"secure": True}])
    ]
    runs.append(prune(tiny(name), [torch.cat(texts)], TWO, out=tmp_path / "pooled"))
    scores = [[block.expert_scores for block in run.record.blocks] for run in runs]
    assert scores[0] == scores[1] == scores[2] == scores[3]
    for run in runs[1:]:
        assert_same_bits(runs[0].model_dir, run.model_dir)


def test_dense_blocks_stay_as_they_are(tiny, windows, tmp_path):
    result = prune(tiny("deepseek-v3"), [windows(0)], TWO, out=tmp_path / "run")
    first, *others = result.record.blocks
    assert (first.expert_scores, first.removed_experts) == ([], None)
    assert all(len(block.removed_experts) == 2 for block in others)
    before, after = weights_of(tiny("deepseek-v3")), weights_of(result.model_dir)
    inside = [name for name in before if ".layers.0." in name or "shared_expert" in name]
    assert inside
    assert all(torch.equal(before[name], after[name]) for name in inside)


def test_each_group_of_a_router_loses_equally_many(tiny, windows, tmp_path):
    folder = tmp_path / "uneven"
    shutil.copytree(tiny("deepseek-v3"), folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if any(f".experts.{number}.down_proj" in name for number in range(4)):
            tensor *= 1e-3  # all of the first group add less than any other
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for structure in ("experts=4", "experts=0.5"):
        config = PruneConfig(structure=structure)
        result = prune(folder, [windows(0, 4)], config, out=tmp_path / structure)
        for block in result.record.blocks[1:]:
            assert sum(number < 4 for number in block.removed_experts) == 2
            assert len(block.removed_experts) == 4
            for group in (range(4), range(4, 8)):
                lowest = sorted(group, key=lambda number: block.expert_scores[number])[:2]
                assert set(lowest) <= set(block.removed_experts)


@pytest.fixture
def specialized(tiny, tmp_path) -> Path:
    """A model whose router sends token 5 to expert 0 of each block, and never any other token."""
    folder = tmp_path / "specialized"
    shutil.copytree(tiny("mixtral"), folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    # One channel is large for token 5 only, and nothing in the blocks writes to it.
    embedding[:, 0] = -1.0
    embedding[5, 0] = 20.0
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "w2.weight", "down_proj.weight")):
            tensor[..., 0, :] = 0.0
        if name.endswith(("gate.weight", "router.weight")):
            tensor[0] = 0.0
            tensor[0, 0] = 30.0
        if name.endswith("layernorm.weight"):
            tensor[0] = 1.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_expert_of_one_domain_survives_if_that_domain_takes_part(specialized, windows, tmp_path):
    general = windows(0, 4).clamp_min(6)
    special = windows(1, 4).clamp_min(6)
    special[0, 3] = 5  # once, so that its sum is small and its mean is not
    config = PruneConfig(structure="experts=1")
    alone = prune(specialized, {"general": general}, config, out=tmp_path / "alone")
    together = prune(specialized, {"general": general, "special": special}, config, out=tmp_path / "together")
    for one, both in zip(alone.record.blocks, together.record.blocks, strict=True):
        assert one.expert_scores[0] == 0.0
        assert one.removed_experts == [0]
        assert both.expert_scores[0] > 0.0
        assert both.removed_experts != [0]
    assert any("no text reached 1 of 6 experts" in note for note in alone.record.deviations())


@pytest.mark.parametrize(
    ("name", "structure", "error", "words"),
    [
        ("llama", "experts=1", ModelError, "has no experts to remove"),
        ("mixtral", "experts=6", ConfigError, "would remove 6 of 6 experts: expected 1 to 5"),
        ("mixtral", "experts=9", ConfigError, "would remove 9 of 6 experts"),
        ("mixtral", "experts=0.01", ConfigError, "would remove 0 of 6 experts"),
        ("mixtral", "experts=5", ConfigError, "would leave 1 of 6 experts.* expected at least the 2"),
        ("olmoe", "experts=7", ConfigError, "would leave 1 of 8 experts"),
        ("deepseek-v3", "experts=3", ConfigError, "the same number from each of 2 groups"),
        ("deepseek-v3", "experts=6", ConfigError, "could choose 0 for a token"),
    ],
)
def test_what_cannot_be_removed_is_refused(tiny, windows, tmp_path, name, structure, error, words):
    with pytest.raises(error, match=words):
        prune(tiny(name), [windows(0)], PruneConfig(structure=structure), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "experts=1,heads=1"}, "in one run"),
        ({"structure": "experts=1,depth=1"}, "in one run"),
        ({"structure": "experts=1", "strategy": "local-only"}, "one model of all participants"),
        ({"structure": "experts=1", "strategy": "iterative"}, "use one-shot"),
        ({"structure": "experts=1.5"}, "whole number"),
        ({"structure": "experts=1", "exclude": ("*.q_proj",)}, "leave it out"),
        ({"structure": "experts=1", "criterion": "magnitude"}, "no text"),
        ({"share": "experts"}, "needs a structure"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig(**options)


def test_a_sum_and_a_count_for_each_expert_are_shared(tiny, windows, tmp_path):
    result = prune(tiny("deepseek-v3"), [windows(0)], TWO, out=tmp_path / "run")
    assert result.record.update_bytes_per_block == [16, 8 * 16, 8 * 16]


@contextmanager
def ballot(tiny, block: int, sums: list[int], counts: list[int]) -> Iterator[Ballot]:
    model = BlockwiseModel(tiny("deepseek-v3"))
    update = {"sums": torch.tensor(sums), "counts": torch.tensor(counts)}
    yield Ballot(model.linears[block], update, model.checkpoint.stored_name)


@pytest.mark.parametrize(
    ("block", "sums", "counts", "words"),
    [
        (1, [-1, *[0] * 7], [1, *[0] * 7], "negative"),
        (1, [0] * 8, [-1, *[0] * 7], "negative"),
        (1, [5, *[0] * 7], [0] * 8, "no token reached"),
        (0, [1], [1], "a block that has none"),
    ],
)
def test_impossible_updates_are_refused(tiny, block, sums, counts, words):
    with ballot(tiny, block, sums, counts) as found, pytest.raises(UpdateError, match=words):
        EXPERTS.check(found, pruning_method(TWO).target)


def test_updates_out_of_proportion_are_refused():
    def figures(total: float, most: float) -> dict[str, Tensor]:
        return {"sums": torch.tensor([total]).double(), "counts": torch.tensor([most]).double()}

    outstanding = EXPERTS.comparison.outstanding
    honest = {"a": figures(1.0, 0.5), "b": figures(2.0, 1.0), "c": figures(0.5, 0.1)}
    assert outstanding(honest, {}) == {}
    assert outstanding({**honest, "d": figures(0.0, 0.0)}, {}) == {}
    assert list(outstanding({**honest, "d": figures(90.0, 0.5)}, {})) == ["d"]
    assert list(outstanding({"d": figures(1.0, 1.01)}, {})) == ["d"]
    assert outstanding({"a": figures(0.0, 0.0)} | {"b": figures(0.0, 0.0), "c": figures(0.0, 0.0)}, {}) == {}


def test_a_decision_on_the_wire_holds_the_scores(tiny, windows, tmp_path):
    model = BlockwiseModel(tiny("deepseek-v3"))
    method = pruning_method(TWO)
    for index, n in ((0, 1), (1, 8)):
        with model.block(index) as block:
            totals = method.empty(block)
            sums = torch.arange(n) * 2**20 * min(1, n - 1)
            totals.add({"sums": sums, "counts": (sums > 0).long()}, 32)
            decision = method.decide(totals, block, method.target)
            message = encode_decision(decision, block, bytes(16), bytes(32))
            assert len(decided_weights(message, block, bytes(16), bytes(32))) == 0
            found = wire.decode(unpack_message(message, 2**20), expect=None, max_bytes=2**20)
            assert torch.equal(found.tensors["scores"], sums)
        assert decision.removed_experts == ([] if n == 1 else [0, 4])


@pytest.mark.parametrize(
    "removed",
    [
        [[], [0, 4]],  # too few blocks
        [[0, 4], [0, 4], [0, 4]],  # of a block without experts
        [[], [0, 4], [0]],  # another number in each
        [[], [0, 4], []],
        [[], [0, 8], [0, 4]],  # no such expert
        [[], range(8), range(8)],  # none left
        [[], [], []],
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(tiny, tmp_path, removed):
    with pytest.raises(ModelError, match="do not fit the model"):
        write_fewer_experts(tmp_path / "model", BlockwiseModel(tiny("deepseek-v3")), removed)
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_single_expert_stays(windows, tmp_path):
    def config():
        found = MIXTURES["mixtral"]()
        found.num_local_experts = found.num_experts_per_tok = 1
        return found

    save_tiny(config, tmp_path / "source")
    with pytest.raises(ModelError, match="each block has 1 experts in 1 groups"):
        prune(tmp_path / "source", [windows(0)], PruneConfig(structure="experts=1"), out=tmp_path / "run")


def test_a_router_that_looks_experts_up_is_refused(tiny):
    model = BlockwiseModel(tiny("mixtral"))
    path = experts_of(model).paths[1]
    around = model.skeleton.get_submodule(path.rpartition(".")[0])
    around.register_buffer("experts_of_token", torch.zeros(128, 2, dtype=torch.int64))
    with pytest.raises(ModelError, match="'experts_of_token' beside the experts"):
        fewer_experts(model, 4)


def test_a_killed_run_continues_with_the_same_bits(tiny, windows, tmp_path, monkeypatch):
    whole = prune(tiny("gpt-oss"), [windows(0)], TWO, out=tmp_path / "whole")
    write = CheckpointWriter.write

    def dies(self, block, tensors):
        if block == 1:
            raise KeyboardInterrupt
        write(self, block, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("gpt-oss"), [windows(0)], TWO, out=tmp_path / "killed")
    monkeypatch.setattr(CheckpointWriter, "write", write)
    again = prune(tiny("gpt-oss"), [windows(0)], TWO, out=tmp_path / "killed")
    assert_same_bits(whole.model_dir, again.model_dir)
    assert again.record.files.keys() == whole.record.files.keys()


def test_the_smaller_model_can_be_pruned_like_any_other(tiny, windows, tmp_path):
    smaller = prune(tiny("gpt-oss"), [windows(0, 4)], TWO, out=tmp_path / "a")
    sparse = prune(smaller.model_dir, [windows(0, 4)], PruneConfig(pattern="2:4"), out=tmp_path / "b")
    loaded = AutoModelForCausalLM.from_pretrained(sparse.model_dir)
    assert (loaded.config.num_local_experts, sparse.record.sparsity) == (4, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_routers_are_found(tiny, name):
    model = BlockwiseModel(tiny(name))
    experts = experts_of(model)
    assert (experts.n_groups, experts.n_chosen) == (2 if name == "deepseek-v3" else 1, 2)
    with_experts = [block for block, path in zip(model.block_names, experts.paths, strict=True) if path]
    routers = fewer_experts(model, experts.n_experts - 2).routers
    assert all(any(name.startswith(f"{block}.") for name in routers) for block in with_experts)
    each = 2 if name in ("deepseek-v3", "gpt-oss", "nemotron-h") else 1  # with biases
    assert len(routers) == each * len(with_experts)


def test_sums_do_not_depend_on_how_tokens_are_divided():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 8, generator=generator)
    weights = torch.rand(50, generator=generator)
    whole, parts = ExpertStatistics.zeros(2), ExpertStatistics.zeros(2)
    whole.add(1, outputs, weights)
    for token in torch.randperm(50, generator=generator).tolist():
        parts.add(1, outputs[token : token + 1], weights[token : token + 1])
    assert torch.equal(whole.sums, parts.sums)
    assert whole.counts.tolist() == parts.counts.tolist() == [0, 50]
    expected = float((weights * outputs.norm(dim=1)).double().sum())
    assert float(whole.sums[1]) * ExpertStatistics.UNIT == pytest.approx(expected, rel=1e-6)


def test_the_least_active_experts_are_chosen():
    assert lowest([0.3, 0.0, 0.2, 0.0], 2) == [1, 3]
    assert lowest([0.1, 0.1, 0.1], 1) == [0]
    assert lowest([0.3, 0.4, 0.1, 0.2], 2, 2) == [0, 2]
    assert n_removed(8, Fraction(2)) == n_removed(8, Fraction("0.25")) == 2
    assert n_removed(8, Fraction("0.3"), 4) == 4


# --- Further architectures ---

# Routers of further kinds: with a bias, with groups, after a convolution, beside linear attention.
ZOO = ["afmoe", "bailing_hybrid", "beam", "cohere2_moe", "ernie4_5_moe", "glm4_moe", "lfm2_moe", "qwen3_next"]


@pytest.mark.parametrize("name", [one for one in ZOO if one in model_types()])
def test_further_architectures_lose_experts_alike(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny(lambda: tiny_config(name), tmp_path / "model")
        texts = [windows_of(0), windows_of(1)]
        result = prune(tmp_path / "model", texts, TWO, out=tmp_path / "run")
        removed = [block.removed_experts or [] for block in result.record.blocks]
        loaded, report = AutoModelForCausalLM.from_pretrained(result.model_dir, output_loading_info=True)
        assert any(removed)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            expected = cut(tmp_path / "model", removed)(windows_of(5, 1)).logits
            assert torch.equal(loaded.eval()(windows_of(5, 1)).logits, expected)


# --- Layers that predict further tokens ---


def with_further_layer(source: Path, folder: Path, prefix: str, entry: str) -> Path:
    """A copy with a layer beyond the last block, like the last one, that config.json counts."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for name in [name for name in weights if name.startswith(f"model.layers.{last}.")]:
        weights[name.replace(f"model.layers.{last}.", prefix)] = weights[name].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, entry: 1}))
    return folder


FURTHER = {  # what transformers does not load
    "glm4_moe": ("model.layers.46.", "num_nextn_predict_layers"),
    "qwen3-moe": ("mtp.layers.0.", "mtp_num_hidden_layers"),
}


@pytest.mark.parametrize("structure", ["experts=2", "depth=1"])
@pytest.mark.parametrize("name", FURTHER)
def test_layers_that_predict_further_tokens_are_left_out_and_named(tiny, windows, tmp_path, name, structure):
    source = tmp_path / "source"
    save_tiny(lambda: tiny_config(name), source) if "_" in name else shutil.copytree(tiny(name), source)
    prefix, entry = FURTHER[name]
    folder = with_further_layer(source, tmp_path / "model", prefix, entry)
    result = prune(folder, [windows(0)], PruneConfig(structure=structure), out=tmp_path / "run")
    plain = prune(source, [windows(0)], PruneConfig(structure=structure), out=tmp_path / "plain")
    assert_same_bits(result.model_dir, plain.model_dir)
    assert json.loads((result.model_dir / "config.json").read_text())[entry] == 0
    assert any(f"predict further tokens ('{prefix}" in note for note in result.record.notes)
    assert plain.record.notes is None
    unstructured = prune(folder, [windows(0)], out=tmp_path / "unstructured")
    assert weights_of(unstructured.model_dir).keys() == weights_of(folder).keys()
    assert json.loads((unstructured.model_dir / "config.json").read_text())[entry] == 1


def test_experts_outside_the_blocks_are_refused(tiny, windows, tmp_path):
    folder = with_further_layer(tiny("qwen3-moe"), tmp_path / "model", "drafter.0.", "n_drafters")
    with pytest.raises(ModelError, match=r"'drafter\.0\.mlp\.experts\.0.*expected experts in the blocks"):
        prune(folder, [windows(0)], TWO, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
