"""Properties that every way of sharing must have."""

from __future__ import annotations

import pytest
import torch

from fedprllm import ConfigError, PruneConfig, UpdateError, prune
from fedprllm.deciding import DECISIONS
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.method import pruning_method, survey_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.walk import Walker
from fedprllm.sharing import SHARING, update_bytes
from fedprllm.sharing.interface import Ballot, compared_sums
from tests.contracts.test_walk import assert_same_bits, weights_of
from tests.models import STRUCTURES

SHARES = [share for share in DECISIONS if share not in STRUCTURES]
STATISTICS_LIKE = ["statistics", "gram"]


def participants(windows):
    return [windows(0), windows(1, 3), windows(2, 1)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", ["one-shot", "iterative", "centralized", "local-only"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_exact_sparsity_and_order_of_participants(tiny, windows, tmp_path, share, strategy, pattern):
    config = PruneConfig(share=share, strategy=strategy, pattern=pattern, local_group="layer")
    one = prune(tiny("gpt2"), participants(windows), config, out=tmp_path / "one")
    other = prune(tiny("gpt2"), participants(windows)[::-1], config, out=tmp_path / "other")
    for name, folder in one.model_dirs.items():
        if strategy != "local-only" and (share, strategy) != ("gram", "centralized"):
            assert_same_bits(folder, other.model_dirs[name])
    assert set(one.sparsity.values()) == {0.5}
    for name, weight in weights_of(one.model_dir).items():
        if name in one.sparsity and pattern == "2:4":
            by_four = weight.T.reshape(-1, 4)  # GPT-2 stores [in, out]
            assert ((by_four == 0).sum(dim=1) >= 2).all(), name


@pytest.mark.parametrize("share", SHARES)
def test_identical_participants_are_that_participant(tiny, windows, tmp_path, share):
    # The damping of the other solvers depends on the number of tokens.
    solver = "sparsegpt" if share == "gram" else None
    config = PruneConfig(share=share, server_group="row", solver=solver)
    one = prune(tiny("llama"), [windows(0)], config, out=tmp_path / "one")
    four = prune(tiny("llama"), [windows(0)] * 4, config, out=tmp_path / "four")
    assert_same_bits(one.model_dir, four.model_dir)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_sparsity_zero_changes_nothing(tiny, windows, tmp_path, share, strategy):
    config = PruneConfig(sparsity=0.0, share=share, strategy=strategy)
    result = prune(tiny("qwen2"), participants(windows), config, out=tmp_path / "run")
    before = weights_of(tiny("qwen2"))
    for name, weight in weights_of(result.model_dir).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", ["wanda", "ria"])
@pytest.mark.parametrize("group", ["row", "layer", "column"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi"])
def test_statistics_block_by_block_are_centralized(tiny, windows, tmp_path, name, group, criterion):
    options = {"criterion": criterion, "local_group": group, "sparsity": 0.6}
    shared = PruneConfig(share="statistics", strategy="iterative", **options)
    pooled = PruneConfig(strategy="centralized", **options)
    federated = prune(tiny(name), participants(windows), shared, out=tmp_path / "federated")
    centralized = prune(tiny(name), participants(windows), pooled, out=tmp_path / "centralized")
    assert_same_bits(federated.model_dir, centralized.model_dir)


SOLVERS = [decision.name for decision in DECISIONS["gram"]]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_solver_prunes_exactly_what_was_asked_for(tiny, windows, tmp_path, solver, pattern):
    config = PruneConfig(share="gram", solver=solver, pattern=pattern)
    result = prune(tiny("gpt2"), participants(windows), config, out=tmp_path / "run")
    assert set(result.sparsity.values()) == {0.5}
    assert all(torch.isfinite(weight).all() for weight in weights_of(result.model_dir).values())
    few = [note for note in result.record.deviations() if "few for a solver" in note]
    assert len(few) == 2, "one sentence for each width"
    assert all(note.endswith("times)") for note in few)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gram_matrices_block_by_block_are_centralized(tiny, windows, tmp_path, solver):
    runs = {
        strategy: prune(
            tiny("llama"),
            participants(windows),
            PruneConfig(share="gram", solver=solver, strategy=strategy),
            out=tmp_path / strategy,
        )
        for strategy in ("iterative", "centralized")
    }
    ours, theirs = (weights_of(run.model_dir) for run in runs.values())
    differing = sum(int(((ours[name] == 0) != (theirs[name] == 0)).sum()) for name in ours)
    assert differing <= 2, "a different summation order may swap nearly equal scores"


def test_one_shot_statistics_need_one_pass(tiny, windows, tmp_path, monkeypatch):
    calls = []
    original = BlockwiseModel._call_block

    def counted(self, index, hidden):
        calls.append(hidden.shape[1])
        return original(self, index, hidden)

    monkeypatch.setattr(BlockwiseModel, "_call_block", counted)
    prune(
        tiny("llama"), [windows(0, 3), windows(1, 1)], PruneConfig(share="statistics"), out=tmp_path / "run"
    )
    assert calls.count(16) == 4 * 3, "each window passes once through each of the 3 blocks"


def test_one_shot_statistics_are_taken_from_the_unpruned_model(tiny, windows, tmp_path):
    """Compare with the dense model's sums, computed here with transformers' own forward pass."""
    from transformers import AutoModelForCausalLM

    from fedprllm.core.criteria import wanda
    from fedprllm.core.groups import Grouping
    from fedprllm.core.masks import prune_lowest

    result = prune(
        tiny("llama"), participants(windows), PruneConfig(share="statistics"), out=tmp_path / "run"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: sums.__setitem__(
                    name, sums.get(name, 0) + args[0][0].double().square().sum(dim=0)
                )
            )
    with torch.no_grad():
        for window in torch.cat(participants(windows)):
            model(window[None])
    pruned = weights_of(result.model_dir)
    for name, total in sums.items():
        weight = model.get_submodule(name).weight.detach()
        scores = wanda(weight, total.sqrt().float())
        mask = prune_lowest(scores, weight, Grouping("row", 0.5), "index").mask
        assert torch.equal(pruned[f"{name}.weight"] == 0, mask), name


def test_each_experts_input_is_shared_once_whatever_the_router_does(tiny):
    model = BlockwiseModel(tiny("qwen3-moe"))
    shapes = SHARING["statistics"].shapes(model.linears[1])
    of_experts = {name.split(".mlp.experts.")[1] for name in shapes if ".mlp.experts." in name}
    assert of_experts == {f"{n}.{part}.weight" for n in range(8) for part in ("gate_proj", "down_proj")}
    sums = {name: torch.ones(shape) for name, (shape, _) in shapes.items()}
    compared = compared_sums(sums, model.linears[1])
    assert {
        name.rpartition("*")[2]: float(values.max()) for name, values in compared.items() if "*" in name
    } == {
        ".gate_proj.weight": 8,
        ".down_proj.weight": 8,
    }
    assert len(compared) == len(shapes) - 14


def test_each_distinct_input_is_shared_once(tiny):
    model = BlockwiseModel(tiny("llama"))
    shapes = SHARING["statistics"].shapes(model.linears[1])
    assert {name.split(".", 3)[3]: shape for name, (shape, _) in shapes.items()} == {
        "self_attn.q_proj.weight": (32,),
        "self_attn.o_proj.weight": (32,),
        "mlp.gate_proj.weight": (32,),
        "mlp.down_proj.weight": (48,),
    }
    assert update_bytes(shapes) == 4 * (32 * 3 + 48)
    assert update_bytes(SHARING["mask"].shapes(model.linears[1])) == sum(
        linear.n_weights // 8 for linear in model.linears[1].values()
    )


@pytest.mark.parametrize(
    ("share", "architecture"),
    [(share, name) for share in SHARES for name in ("gpt2", "qwen3-moe")]
    + [(one, "qwen3-moe" if one == "experts" else "qwen2") for one in STRUCTURES],
)
def test_a_contribution_has_the_shapes_it_declares_and_passes_its_check(tiny, windows, share, architecture):
    model = BlockwiseModel(tiny(architecture))
    sharing, method = SHARING[share], pruning_method(PruneConfig(share=share, **STRUCTURES.get(share, {})))
    participant = Participant("one", windows(0))
    participant.enter(model)
    with model.block(0) as block:
        update = Walker(participant, method, model.n_blocks).contribute(block).update
        assert update is not None
        declared = sharing.shapes(block.linears)
        assert {name: (tuple(t.shape), t.dtype) for name, t in update.items()} == declared
        sharing.check(Ballot(block.linears, update, block.tensors.__getitem__), method.target)
        name = next(iter(update))
        damaged = dict(update)
        if share == "mask" or share == "weights":
            damaged[name] = torch.ones_like(update[name])
        else:
            damaged[name] = -update[name]
        with pytest.raises(UpdateError, match=name):
            sharing.check(Ballot(block.linears, damaged, block.tensors.__getitem__), method.target)


# A line for every way of sharing: what a hostile participant sends, and what its refusal says.
HOSTILE = {
    "mask": (torch.ones_like, "expected exactly"),
    "statistics": (lambda tensor: 1e30 * tensor, "expected at most"),
    "gram": (lambda tensor: 1e30 * tensor, "expected at most"),
    "weights": (lambda tensor: tensor if tensor.dtype == torch.bool else 1000 * tensor, "not the model's"),
    "outliers": (lambda tensor: tensor + 800, "of the block's scores are outliers"),
    **{kind: (lambda tensor: 1e30 * tensor, "expected at most") for kind in STRUCTURES},
}


def refusals(sharing, model, block, updates, n_tokens, target) -> dict[str, str]:
    """What the checks of each update, and then their comparison, refuse."""
    refused = {}
    for name, update in updates.items():
        try:
            sharing.check(Ballot(block.linears, update, block.tensors.__getitem__), target)
        except UpdateError as error:
            refused[name] = str(error)
    if sharing.comparison and not refused:
        figures = {
            name: sharing.comparison.figures(update, block.linears, n_tokens[name])
            for name, update in updates.items()
        }
        refused |= sharing.comparison.outstanding(figures, model.input_norms(block.index))
    return refused


# With experts, counts of outliers are as before: a block of several thousand scores, whatever they belong to.
@pytest.mark.parametrize(
    ("kind", "n", "architecture"),
    [(kind, n, "llama") for kind in SHARING if kind != "experts" for n in (3, 4)]
    + [(kind, 3, "qwen3-moe") for kind in [*SHARES, "experts"]],
)
def test_honest_updates_pass_and_a_hostile_one_is_refused(tiny, windows, kind, n, architecture):
    model, sharing = BlockwiseModel(tiny(architecture)), SHARING[kind]
    options = STRUCTURES.get(kind, {"allocation": "owl"})
    config = PruneConfig(share="mask" if kind == "outliers" else kind, **options)
    method = survey_method(config) if kind == "outliers" else pruning_method(config)
    people = [Participant(f"p{index}", windows(index, 1 + index)) for index in range(n)]
    for participant in people:
        participant.enter(model)
    with model.block(0) as block:
        updates = {one.name: Walker(one, method, model.n_blocks).contribute(block).update for one in people}
        n_tokens = {participant.name: participant.n_tokens for participant in people}
        assert refusals(sharing, model, block, updates, n_tokens, method.target) == {}
        spoil, words = HOSTILE[kind]
        updates["p1"] = {name: spoil(tensor.clone()) for name, tensor in updates["p1"].items()}
        refused = refusals(sharing, model, block, updates, n_tokens, method.target)
    assert list(refused) == ["p1"]
    assert words in refused["p1"]


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
def test_a_trimmed_mean_of_identical_participants_is_their_sum(tiny, windows, tmp_path, strategy):
    """With one and two participants nothing is left out; a decision needs no more than what it keeps."""
    for n in (1, 2, 4):
        runs = [
            prune(
                tiny("llama"),
                [windows(0)] * n,
                PruneConfig(share="statistics", strategy=strategy, aggregation=aggregation),
                out=tmp_path / f"{aggregation}-{n}",
            )
            for aggregation in ("sum", "trimmed")
        ]
        assert_same_bits(runs[0].model_dir, runs[1].model_dir)


def test_a_trimmed_mean_does_not_depend_on_the_order_of_participants(tiny, windows, tmp_path):
    config = PruneConfig(share="statistics", aggregation="trimmed", strategy="iterative")
    folders = [
        prune(tiny("llama"), ordered, config, out=tmp_path / str(number)).model_dir
        for number, ordered in enumerate((participants(windows), participants(windows)[::-1]))
    ]
    assert_same_bits(*folders)


def test_votes_can_weigh_tokens(tiny, windows, tmp_path):
    config = PruneConfig(weighting="tokens", scale_weights=True)
    result = prune(tiny("llama"), [windows(0, 1), windows(1, 3)], config, out=tmp_path / "run")
    name = next(iter(result.votes))
    assert set(result.votes[name].unique().tolist()) <= {0, 16, 48, 64}
    # The participant with three times as many tokens outvotes the other one everywhere.
    local = prune(tiny("llama"), [windows(1, 3)], PruneConfig(server_group="row"), out=tmp_path / "local")
    both = prune(
        tiny("llama"),
        [windows(0, 1), windows(1, 3)],
        PruneConfig(weighting="tokens", server_group="row", strategy="iterative"),
        out=tmp_path / "both",
    )
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights_of(local.model_dir)[first] == 0, weights_of(both.model_dir)[first] == 0)


def test_an_update_that_is_too_large_is_refused_with_its_size(tiny, windows, tmp_path):
    config = PruneConfig(share="gram", max_update_mb=0.001)
    pattern = r"would send 0\.011 MB for block 0, but max_update_mb allows 0\.001 MB"
    with pytest.raises(ConfigError, match=pattern):
        prune(tiny("llama"), [windows(0)], config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"share": "statistics", "scale_weights": True},
        {"share": "weights", "weighting": "tokens"},
        {"share": "statistics", "criterion": "magnitude"},
        {"share": "gram", "aggregation": "trimmed"},
    ],
)
def test_options_that_contradict_each_other(options):
    with pytest.raises(ConfigError):
        PruneConfig(**options)
