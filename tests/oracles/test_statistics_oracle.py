"""Check statistics: those of parts add up to those of the whole, and to sums in Python."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedprllm.core.sums import GramStatistics, InputStatistics
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.pruning.participant import Participant

KINDS = [InputStatistics, GramStatistics]


def sums(statistics: InputStatistics | GramStatistics) -> torch.Tensor:
    return statistics.gram if isinstance(statistics, GramStatistics) else statistics.sum_of_squares


def observed(kind: type, *passes: torch.Tensor, **options):
    statistics = kind.zeros(passes[0].shape[-1], **options)
    for inputs in passes:
        statistics.add(inputs)
    return statistics


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))


def test_sums_by_loops(inputs: torch.Tensor) -> None:
    tokens = inputs.double().reshape(-1, 6).tolist()
    gram = [[sum(token[i] * token[j] for token in tokens) for j in range(6)] for i in range(6)]
    expected = torch.tensor(gram, dtype=torch.float64)
    found = observed(GramStatistics, inputs)
    torch.testing.assert_close(found.gram, expected, rtol=1e-5, atol=1e-5)
    for statistics in (found, observed(InputStatistics, inputs)):
        torch.testing.assert_close(statistics.sum_of_squares, expected.diagonal(), rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics.norm, expected.diagonal().sqrt().float())
        assert statistics.sum_of_squares.dtype == torch.float64
        assert statistics.n_tokens == 30


@pytest.mark.parametrize("kind", KINDS)
def test_merged_halves_are_the_pooled_text(kind: type, inputs: torch.Tensor) -> None:
    merged = observed(kind, inputs[0]) + observed(kind, inputs[1:])
    pooled = observed(kind, inputs)
    torch.testing.assert_close(sums(merged), sums(pooled), rtol=1e-5, atol=1e-5)
    assert merged.n_tokens == pooled.n_tokens == 30


def test_merged_halves_are_exact_where_the_products_are(inputs: torch.Tensor) -> None:
    whole = (inputs * 8).round()
    merged = observed(GramStatistics, whole[0]) + observed(GramStatistics, whole[1:])
    assert torch.equal(merged.gram, observed(GramStatistics, whole).gram)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_neither_part(kind: type, inputs: torch.Tensor) -> None:
    left, right = observed(kind, inputs[0]), observed(kind, inputs[1])
    before = sums(left).clone(), sums(right).clone()
    merged = left + right
    merged.add(inputs[2])
    assert torch.equal(sums(left), before[0])
    assert torch.equal(sums(right), before[1])
    assert left.n_tokens == right.n_tokens == 10


@pytest.mark.parametrize("kind", KINDS)
def test_small_passes_after_a_large_one_are_not_lost(kind: type) -> None:
    # The spacing of float32 at 1e8 is 8, so adding 1 a hundred times would leave 1e8 unchanged.
    passes = [torch.full((1, 1), 1e4)] + [torch.ones(1, 1)] * 100
    assert observed(kind, *passes).sum_of_squares.item() == 1e8 + 100


def test_gram_keeps_the_precision_asked_for(inputs: torch.Tensor) -> None:
    found = observed(GramStatistics, *inputs, dtype=torch.float32)
    assert found.gram.dtype == torch.float32
    assert found.sum_of_squares.dtype == torch.float64
    torch.testing.assert_close(
        found.gram.double(), observed(GramStatistics, inputs).gram, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_summed_in_float32(kind: type) -> None:
    # 300^2 exceeds the range of float16.
    assert observed(kind, torch.full((4, 1), 300.0, dtype=torch.float16)).sum_of_squares.item() == 4 * 300**2


def test_linears_that_read_the_same_tensor_share_its_statistics(tiny, windows, tmp_path) -> None:
    model = BlockwiseModel(resolve_model(tiny("llama"), cache_dir=tmp_path))
    participant = Participant("site", windows(0))
    participant.enter(model)
    with model.block(0) as block:
        found = participant.observe(block)
    by_end = {".".join(name.split(".")[-3:-1]): statistics for name, statistics in found.items()}
    assert by_end["self_attn.q_proj"] is by_end["self_attn.k_proj"] is by_end["self_attn.v_proj"]
    assert by_end["mlp.gate_proj"] is by_end["mlp.up_proj"]
    assert len({id(statistics) for statistics in found.values()}) == 4

    whole = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in by_end}
    for name in by_end:
        module = whole.get_submodule(f"model.layers.0.{name}")
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].double()))
    with torch.no_grad():
        whole(windows(0))
    for name, statistics in by_end.items():
        expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[name]]).square().sum(dim=0)
        torch.testing.assert_close(statistics.sum_of_squares, expected, rtol=1e-4, atol=1e-9)
        assert statistics.n_tokens == windows(0).numel()
