"""Check SparseGPT against a slow optimal brain surgeon, and properties it must have."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprllm.core.criteria import CRITERIA
from fedprllm.core.groups import Grouping
from fedprllm.core.masks import prune_lowest
from fedprllm.core.solvers.sparsegpt import sparsegpt
from fedprllm.core.sums import GramStatistics
from fedprllm.core.ties import TIES
from fedprllm.errors import ModelError

unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def problem(
    n_out: int, n_in: int, n_tokens: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs with channels of different scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    mixing = torch.eye(n_in) + 0.5 * torch.randn(n_in, n_in, generator=generator)
    scales = torch.rand(n_in, generator=generator) * 3 + 0.1
    inputs = torch.randn(n_tokens, n_in, generator=generator) @ mixing * scales
    return weight.to(dtype), inputs.to(dtype)


def brain_surgery(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    sparsity: float,
    n_m: tuple[int, int] | None,
    block_size: int,
    damping: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune column by column, inverting each trailing Hessian on its own: float64, no Cholesky."""
    weight, (n_out, n_in) = weight.double().clone(), weight.shape
    hessian = 2 / len(inputs) * (inputs.T @ inputs).double()
    dead = [float(hessian[j, j]) == 0 for j in range(n_in)]
    mean = sum(float(hessian[j, j]) for j in range(n_in)) / max(n_in - sum(dead), 1)
    for j in range(n_in):
        hessian[j, j] = 1 if dead[j] else hessian[j, j] + damping * mean
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(n_in)]

    def cost(o: int, j: int) -> tuple[int, float]:
        w = float(weight[o, j])
        return (0, abs(w)) if dead[j] else (1, w * w / float(inverse[j][0, 0]))

    def lowest(places: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
        return sorted(places, key=lambda place: cost(*place))[:k]

    def floor(n_columns: int) -> int:
        return int(n_out * n_columns * Fraction(str(sparsity)))

    mask = torch.zeros(n_out, n_in, dtype=torch.bool)
    for j in range(n_in):
        if n_m and j % n_m[1] == 0:
            for o in range(n_out):
                for place in lowest([(o, j + i) for i in range(n_m[1])], n_m[1] - n_m[0]):
                    mask[place] = True
        elif not n_m and j % block_size == 0:
            end = min(j + block_size, n_in)
            places = [(o, i) for o in range(n_out) for i in range(j, end)]
            for place in lowest(places, floor(end) - floor(j)):
                mask[place] = True
        for o in range(n_out):
            if mask[o, j]:
                weight[o, j:] -= weight[o, j] / inverse[j][0, 0] * inverse[j][0]
                weight[o, j] = 0
    return weight, mask


PATTERNS = [(0.5, None), (0.3, None), (0.77, None), (0.5, (2, 4)), (0.25, (3, 4)), (2 / 3, (1, 3))]


@pytest.mark.parametrize(("sparsity", "n_m"), PATTERNS)
@pytest.mark.parametrize("block_size", [1, 5, 8, 128])
@pytest.mark.parametrize("n_tokens", [40, 7])  # 7 tokens: a singular Gram matrix
def test_agrees_with_brain_surgery(sparsity, n_m, block_size: int, n_tokens: int) -> None:
    weight, inputs = problem(6, 24, n_tokens)
    found = sparsegpt(weight, inputs.T @ inputs, sparsity, n_m, block_size=block_size)
    expected, mask = brain_surgery(weight, inputs, sparsity, n_m, block_size)
    assert torch.equal(found.pruned.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-11)
    assert found.damping == 0.01
    assert found.n_dead == 0


@pytest.mark.parametrize(("sparsity", "n_m"), [(0.3, None), (0.6, None), (0.5, (2, 4))])
def test_dead_channels_agree_too(sparsity: float, n_m) -> None:
    weight, inputs = problem(6, 24)
    inputs[:, [2, 3, 11]] = 0.0
    found = sparsegpt(weight, inputs.T @ inputs, sparsity, n_m, block_size=8)
    expected, mask = brain_surgery(weight, inputs, sparsity, n_m, 8)
    assert torch.equal(found.pruned.mask, mask)
    assert mask[:, [2, 3]].all()
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-11)
    assert found.n_dead == 3


def test_with_all_inputs_zero_it_prunes_by_magnitude() -> None:
    weight, _ = problem(4, 8, dtype=torch.float32)
    found = sparsegpt(weight, torch.zeros(8, 8), 0.5)
    expected = prune_lowest(weight.abs(), weight, Grouping("layer", 0.5), "index")
    assert torch.equal(found.pruned.mask, expected.mask)
    assert torch.equal(found.weight, weight.masked_fill(expected.mask, 0.0))
    assert found.n_dead == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_close_to_double(dtype: torch.dtype) -> None:
    weight, inputs = problem(16, 64, 200)
    weight = weight.to(dtype)
    gram = inputs.T @ inputs
    found = sparsegpt(weight, gram.float(), 0.5)
    expected = sparsegpt(weight.double(), gram, 0.5)
    assert found.weight.dtype == torch.float32
    assert (found.pruned.mask != expected.pruned.mask).sum() <= 2
    same = found.pruned.mask == expected.pruned.mask
    torch.testing.assert_close(found.weight[same], expected.weight.float()[same], rtol=1e-2, atol=1e-3)


@unhurried
@given(
    st.integers(1, 7),
    st.integers(1, 20),
    st.integers(0, 999),
    st.integers(1, 9),
    st.integers(0, 2**32),
    st.data(),
)
def test_exactly_k_weights_are_zero(n_out, n_in, thousandths, block_size, seed, data) -> None:
    weight, inputs = problem(n_out, n_in, seed=seed, dtype=torch.float32)
    n_dead = data.draw(st.integers(0, n_in))
    inputs[:, :n_dead] = 0.0
    ties = data.draw(st.sampled_from(sorted(TIES)))
    found = sparsegpt(weight, inputs.T @ inputs, thousandths / 1000, block_size=block_size, ties=ties)
    k = n_out * n_in * thousandths // 1000
    assert int(found.pruned.mask.sum()) == k
    assert torch.equal(found.weight == 0, found.pruned.mask)
    assert not torch.signbit(found.weight[found.pruned.mask]).any()
    assert torch.isfinite(found.weight).all()


@unhurried
@given(st.integers(1, 5), st.integers(1, 6), st.data(), st.integers(1, 20), st.integers(0, 2**32))
def test_a_pattern_is_kept_in_every_group(n_out, n_groups, data, block_size, seed) -> None:
    m = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(0, m))
    weight, inputs = problem(n_out, n_groups * m, seed=seed, dtype=torch.float32)
    found = sparsegpt(weight, inputs.T @ inputs, 0.5, (n, m), block_size=block_size)
    assert (found.pruned.mask.reshape(-1, m).sum(dim=1) == m - n).all()
    assert torch.equal(found.weight == 0, found.pruned.mask)


def test_exactly_k_where_all_scores_are_equal() -> None:
    weight = torch.ones(6, 10)
    found = sparsegpt(weight, torch.eye(10), 0.35, block_size=4)
    assert int(found.pruned.mask.sum()) == 21
    # Per block 8 of 24 (floor 8.4), 8 of 24 (floor 16.8), 5 of 12, each chosen among many equal scores.
    assert found.pruned.mask.reshape(6, 10)[:, :4].sum() == 8
    assert found.pruned.n_ties == 21
    assert torch.equal(found.pruned.mask[:2, :4], torch.ones(2, 4, dtype=torch.bool))


def test_random_ties_depend_on_the_seed_only() -> None:
    weight = torch.ones(6, 10)
    masks = [
        sparsegpt(weight, torch.eye(10), 0.5, ties="random", seed_parts=(seed,)).pruned.mask
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsity_zero_changes_nothing(dtype: torch.dtype) -> None:
    weight, inputs = problem(5, 20, dtype=dtype)
    inputs[:, 3] = 0.0
    gram = (inputs.T @ inputs).float()
    before = gram.clone(), weight.clone()
    for n_m in (None, (4, 4)):
        found = sparsegpt(weight, gram, 0.0, n_m, block_size=8)
        assert torch.equal(found.weight, weight.float())
        assert not found.pruned.mask.any()
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_reconstructs_better_than_masks_without_update(seed: int, n_m) -> None:
    weight, inputs = problem(32, 64, 256, seed)

    def error(pruned: torch.Tensor) -> float:
        return float((inputs @ (weight - pruned).T).norm())

    found = sparsegpt(weight, inputs.T @ inputs, 0.5, n_m, block_size=16)
    ours = error(found.weight)
    assert ours < error(weight.masked_fill(found.pruned.mask, 0.0))
    for name in ("magnitude", "wanda", "ria"):
        scores = CRITERIA[name].score(weight, inputs.norm(dim=0))
        for group in ("layer", "row"):
            mask = prune_lowest(scores, weight, Grouping(group, 0.5, n_m), "index").mask
            assert ours < 0.9 * error(weight.masked_fill(mask, 0.0)), (name, group)


def test_sums_of_two_halves_give_the_weights_of_the_pooled_text() -> None:
    weight, inputs = problem(8, 32, 100, dtype=torch.float32)
    inputs = (inputs * 16).round()  # integers make the products exact, so the sums have the same bits
    halves = [GramStatistics.zeros(32), GramStatistics.zeros(32)]
    pooled = GramStatistics.zeros(32)
    halves[0].add(inputs[:30])
    halves[1].add(inputs[30:])
    pooled.add(inputs)
    merged = sparsegpt(weight, (halves[0] + halves[1]).gram, 0.5)
    expected = sparsegpt(weight, pooled.gram, 0.5)
    assert torch.equal(merged.weight, expected.weight)
    assert torch.equal(merged.pruned.mask, expected.pruned.mask)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_the_scale_of_the_gram_matrix_cancels(factor: float) -> None:
    weight, inputs = problem(8, 32, 100, dtype=torch.float32)
    inputs[:, 5] = 0.0
    gram = inputs.T @ inputs
    assert torch.equal(sparsegpt(weight, gram * factor, 0.5).weight, sparsegpt(weight, gram, 0.5).weight)


def test_only_the_upper_triangle_of_the_gram_matrix_is_read() -> None:
    weight, inputs = problem(8, 32, 100)
    gram = inputs.T @ inputs
    upper = gram.triu() + torch.full_like(gram, torch.nan).tril(diagonal=-1)
    assert torch.equal(sparsegpt(weight, upper, 0.5).weight, sparsegpt(weight, gram, 0.5).weight)


def pair(correlation: float) -> torch.Tensor:
    """A Gram matrix of two channels; with a correlation above 1 it is invalid and not positive definite."""
    return torch.tensor([[1.0, correlation], [correlation, 1.0]])


@pytest.mark.parametrize(
    ("correlation", "expected"), [(0.9, 0.01), (1.0, 0.01), (1.05, 0.1), (1.5, 1.0), (10.0, 10.0)]
)
def test_a_failed_factorization_raises_and_reports_the_damping(correlation: float, expected: float) -> None:
    found = sparsegpt(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), pair(correlation), 0.5)
    assert found.damping == pytest.approx(expected)
    assert int(found.pruned.mask.sum()) == 2


@pytest.mark.parametrize("gram", [pair(20.0), pair(float("nan")), -pair(0.0), pair(float("inf"))])
def test_a_matrix_that_is_no_gram_matrix_is_refused(gram: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"Gram matrix of 2 inputs cannot be factorized.*10 times"):
        sparsegpt(torch.ones(3, 2), gram, 0.5)
