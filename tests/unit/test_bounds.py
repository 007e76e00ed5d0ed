"""Bounds across ballots: honest sums of very different text pass, hostile ones are refused and named."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from fedprllm import PruneConfig, UpdateError, prune
from fedprllm.deciding.trim import trimmed_mean
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.norms import InputNorm
from fedprllm.models.source import resolve_model
from fedprllm.pruning.participant import Participant
from fedprllm.sharing import SHARING
from fedprllm.sharing.bounds import FACTOR, others_median, outstanding_sums, ratios_to_others
from fedprllm.sharing.input_sums import STATISTICS
from tests.library_text import KINDS, library_text
from tests.models import ARCHITECTURES

WIDTH = 64


def sums(n: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Sums of squares per token of ``n`` honest participants: each channel varies a little."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(WIDTH, generator=generator, dtype=torch.float64) + 0.1
    return {
        f"p{index}": {"in": channels * (0.5 + torch.rand(WIDTH, generator=generator, dtype=torch.float64))}
        for index in range(n)
    }


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 9])
def test_the_median_of_the_others_is_that_of_all_other_rows(n):
    generator = torch.Generator().manual_seed(n)
    values = torch.randint(0, 4, (n, 50), generator=generator).double()
    for row in range(n):
        for column in range(50):
            others = [float(values[other, column]) for other in range(n) if other != row]
            assert others_median(values)[row, column] == statistics.median_high(others)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda own: own * 1e30,
        lambda own: own * 30,
        lambda own: torch.where(torch.arange(WIDTH) % 2 == 0, 1e30, own),
        lambda own: torch.full_like(own, torch.inf),
    ],
)
@pytest.mark.parametrize("n", [3, 4, 16])
def test_sums_out_of_proportion_are_refused_and_named(n, spoil):
    figures = sums(n)
    assert outstanding_sums(figures, {}) == {}
    figures["p1"]["in"] = spoil(figures["p1"]["in"])
    refused = outstanding_sums(figures, {})
    assert list(refused) == ["p1"]
    assert "'in'" in refused["p1"]
    assert f"expected at most {FACTOR:g} times" in refused["p1"]


def test_silent_channels_that_are_loud_are_refused_although_the_total_is_usual():
    figures = sums(4)
    for values in figures.values():
        values["in"][: WIDTH - 1] *= 1e-6
    loud = figures["p2"]["in"]
    loud[: WIDTH - 1] = 2 * float(loud[-1])
    total, mean = ratios_to_others(torch.stack([values["in"] for values in figures.values()]))
    figures["p2"]["in"] = loud / float(total[2])  # Now its total is the others'.
    total, mean = ratios_to_others(torch.stack([values["in"] for values in figures.values()]))
    assert total[2] == pytest.approx(1)
    assert mean[2] > 5 * mean[[0, 1, 3]].max()


@pytest.mark.parametrize("n", [3, 4, 16])
@pytest.mark.parametrize("lie", [0.0, 1e-30, 1e30])
def test_no_single_participant_can_have_an_honest_one_refused(n, lie):
    figures = sums(n)
    figures["p0"]["in"] = torch.full_like(figures["p0"]["in"], lie)
    assert set(outstanding_sums(figures, {})) == ({"p0"} if lie > 1 else set())


def test_what_most_others_never_saw_is_no_reason_to_refuse():
    figures = sums(4)
    for name in ("p0", "p1", "p2"):
        figures[name]["in"] = torch.zeros(WIDTH, dtype=torch.float64)
    assert outstanding_sums(figures, {}) == {}


def test_two_participants_have_the_bound_of_the_model_only():
    norm = InputNorm(torch.full((WIDTH,), 2.0).double(), torch.zeros(WIDTH).double())
    figures = {name: {"in": torch.full((WIDTH,), 4.0).double()} for name in ("p0", "p1")}
    assert outstanding_sums(figures, {"in": norm}) == {}
    figures["p1"]["in"] *= 1.1
    assert outstanding_sums(figures, {}) == {}
    (reason,) = outstanding_sums(figures, {"in": norm}).values()
    assert "are 70.4 per token" in reason
    assert "expected at most 67.2" in reason


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_inputs_behind_norms_are_as_large_as_the_norm_says(tiny, windows, tmp_path, name, dtype):
    model = BlockwiseModel(resolve_model(tiny(name), cache_dir=tmp_path), dtype)
    participant = Participant("one", windows(0))
    participant.enter(model)
    for index in range(model.n_blocks):
        norms = model.input_norms(index)
        assert len(norms) == 2, "attention and feed-forward read a norm in each of these architectures"
        with model.block(index) as block:
            found = participant.observe(block, walk_on=True)
        for source, norm in norms.items():
            energy = norm.energy(found[source].sum_of_squares / participant.n_tokens)
            assert energy <= norm.most_energy
            if not norm.bias.any():  # an RMSNorm fixes the sum, up to its epsilon and rounding
                assert energy == pytest.approx(model.linears[index][source].shape[1], rel=0.03)


def test_a_norm_is_measured_whatever_its_weights_mean(tiny):
    """Gemma multiplies by 1 + w."""
    model = BlockwiseModel(tiny("gemma3"))
    with model.block(0) as block:
        weight = block.tensors["model.layers.0.input_layernorm.weight"]
        (norm, _) = model.input_norms(0).values()
        torch.testing.assert_close(norm.gain, 1 + weight.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["one-shot", "iterative"])
@pytest.mark.parametrize("share", ["statistics", "gram"])
def test_very_different_text_and_unequal_amounts_of_it_pass(small_model, tmp_path, share, strategy):
    texts = {kind: [library_text(kind)] for kind in KINDS}
    texts |= {"repeated": ["the same words again and again " * 400], "digits": ["3.14159 26535 " * 400]}
    participants = {
        name: _windows(small_model, text[0], 1 if name == "digits" else 8) for name, text in texts.items()
    }
    config = PruneConfig(share=share, strategy=strategy)
    result = prune(small_model, participants, config, out=tmp_path / "run")
    assert set(result.sparsity.values()) == {0.5}


def _windows(model, text: str, n: int) -> torch.Tensor:
    from fedprllm.models.tokenizer import load_tokenizer

    ids = load_tokenizer(model)(text[:20_000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: n * 64]).reshape(-1, 64)


def test_a_run_in_one_process_names_what_it_refuses(tiny, windows, tmp_path, monkeypatch):
    """The comparison is part of the one aggregation, so it cannot be left out of any runtime."""
    contribute = STATISTICS.contribute
    n_calls = 0

    def spoiled(seen, target):
        nonlocal n_calls
        n_calls += 1
        update = contribute(seen, target)
        return {name: 1e6 * tensor for name, tensor in update.items()} if n_calls == 2 else update

    monkeypatch.setitem(SHARING, "statistics", replace(STATISTICS, contribute=spoiled))
    named = {name: windows(index) for index, name in enumerate(("north", "south", "west"))}
    with pytest.raises(UpdateError, match=r"participant 'south', block 0: .*expected at most .*share masks"):
        prune(tiny("llama"), named, PruneConfig(share="statistics"), out=tmp_path / "run")


@pytest.mark.parametrize(("n", "n_cut"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (8, 2), (16, 4)])
def test_a_trimmed_mean_leaves_out_the_extremes_of_each_channel(n, n_cut):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    for column, mean in zip(values.T.tolist(), trimmed_mean(values).tolist(), strict=True):
        kept = sorted(column)[n_cut : n - n_cut]
        assert mean == pytest.approx(statistics.fmean(kept))
    assert torch.equal(trimmed_mean(values.flip(0)), trimmed_mean(values))


def test_one_participant_cannot_take_a_trimmed_mean_beyond_the_others():
    values = torch.rand(4, 9, dtype=torch.float64)
    honest = values[:3]
    for lie in (0.0, 1e30):
        values[3] = lie
        assert (trimmed_mean(values) <= honest.max(dim=0).values).all()
        assert (trimmed_mean(values) >= honest.min(dim=0).values).all()
