"""Check OWL: outlier ratios against loops, the paper's formula, and exact totals."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedprllm.core.groups import Grouping
from fedprllm.core.owl import Outliers, allocate, outliers, owl, split_exactly

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def papers_sparsities(ratios: list[float], sparsity: float, lam: float) -> list[float]:
    """The paper's formula for equal blocks: scale ratios to [0, 2 lam], center, add to the density."""
    lowest, highest = min(ratios), max(ratios)
    scaled = [(ratio - lowest) * (2 * lam / (highest - lowest)) for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    density = [value - mean + (1 - sparsity) for value in scaled]
    return [1 - value for value in density]


@st.composite
def models(draw: st.DrawFn) -> tuple[list[float], list[int], float, float]:
    """Draw outlier ratios and sizes of blocks, sparsity and lambda."""
    n_blocks = draw(st.integers(1, 12))
    ratios = draw(st.lists(st.floats(0, 1), min_size=n_blocks, max_size=n_blocks))
    sizes = draw(st.lists(st.integers(1, 10**9), min_size=n_blocks, max_size=n_blocks))
    return ratios, sizes, draw(st.integers(0, 99)) / 100, draw(st.integers(0, 30)) / 100


@pytest.mark.parametrize("m", [1.0, 3.0, 5.0])
def test_outliers_by_loops(m: float) -> None:
    generator = torch.Generator().manual_seed(0)
    linears = [torch.randn(shape, generator=generator).abs() ** 3 for shape in ((4, 9), (7, 5), (2, 3))]
    flat = [value for linear in linears for row in linear.tolist() for value in row]
    mean = sum(flat) / len(flat)
    found = outliers(lambda: iter(linears), m)
    assert found == Outliers(sum(value > m * mean for value in flat), 36 + 35 + 6)
    assert 0 < found.ratio == found.n_outliers / 77 < 1


def test_an_outlier_is_above_not_at_the_threshold() -> None:
    scores = torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0]])
    assert outliers(lambda: [scores], 5.0) == Outliers(0, 5)
    assert outliers(lambda: [scores], 4.75) == Outliers(1, 5)
    assert outliers(lambda: [scores * 0], 5.0) == Outliers(0, 5)


def test_counts_of_participants_add_up() -> None:
    assert Outliers(3, 100) + Outliers(1, 100) == Outliers(4, 200)
    assert (Outliers(3, 100) + Outliers(1, 100)).ratio == 0.02


@pytest.mark.parametrize("ratios", [[0.1, 0.2, 0.3, 0.4], [0.05, 0.01, 0.03], [0.9, 0.1]])
@pytest.mark.parametrize(("sparsity", "lam"), [(0.7, 0.08), (0.5, 0.05), (0.08, 0.08)])
def test_the_papers_formula_where_it_stays_within_lambda(ratios, sparsity, lam) -> None:
    expected = papers_sparsities(ratios, sparsity, lam)
    assert max(abs(value - sparsity) for value in expected) == pytest.approx(lam)
    assert owl(ratios, [1000] * len(ratios), sparsity, lam) == pytest.approx(expected)


def test_a_skewed_distribution_is_confined() -> None:
    ratios = [0.4, 0.0, 0.0, 0.0]
    assert min(papers_sparsities(ratios, 0.7, 0.08)) == pytest.approx(0.7 - 0.12)
    found = owl(ratios, [1000] * 4, 0.7, 0.08)
    assert found == pytest.approx([0.62, 0.7 + 0.08 / 3, 0.7 + 0.08 / 3, 0.7 + 0.08 / 3])


@unhurried
@given(models())
def test_confined_centered_and_in_the_order_of_the_outliers(model) -> None:
    ratios, sizes, sparsity, lam = model
    found = owl(ratios, sizes, sparsity, lam)
    assert all(abs(value - sparsity) <= lam + 1e-12 and 0 <= value <= 1 for value in found)
    mean = sum(size * value for size, value in zip(sizes, found, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity, abs=1e-12)
    by_outliers = sorted(zip(ratios, found, strict=True))
    assert all(more <= less for (_, less), (_, more) in pairwise(by_outliers))


@pytest.mark.parametrize("ratios", [[0.1, 0.1, 0.1], [0.0]])
def test_equal_ratios_are_uniform(ratios: list[float]) -> None:
    assert owl(ratios, [3, 5, 7][: len(ratios)], 0.7) == [0.7] * len(ratios)


def test_no_room_is_uniform() -> None:
    assert owl([0.1, 0.4], [3, 5], 0.7, lam=0.0) == [0.7, 0.7]
    assert owl([0.1, 0.4], [3, 5], 0.0) == [0.0, 0.0]


@unhurried
@given(models(), st.integers(1, 4))
def test_the_total_is_exact(model, n_linears: int) -> None:
    ratios, sizes, sparsity, lam = model
    sparsities = [value for value in owl(ratios, sizes, sparsity, lam) for _ in range(n_linears)]
    parts = [size for size in sizes for _ in range(n_linears)]
    total_k = int(sum(parts) * Fraction(str(sparsity)))
    found = split_exactly(total_k, parts, sparsities)
    assert sum(found) == total_k
    for count, size, value in zip(found, parts, sparsities, strict=True):
        assert 0 <= count <= size
        # One for rounding this part, one for rounding down the total.
        assert abs(count - size * value) < 2 + 1e-6


@unhurried
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 100)), min_size=1, max_size=8), st.integers(0, 100)
)
def test_largest_remainder(parts: list[tuple[int, int]], percent: int) -> None:
    sizes = [size for size, _ in parts]
    ratios = [share / 128 for _, share in parts]  # exact in floats
    total_k = sum(size * share for size, share in parts) * percent // 100 // 128
    found = split_exactly(total_k, sizes, ratios)
    quotas = [Fraction(size * share * total_k, sum(s * r for s, r in parts)) for size, share in parts]
    assume(total_k)
    assert sum(found) == total_k
    rounded_up = [
        quota - int(quota) for quota, count in zip(quotas, found, strict=True) if count > int(quota)
    ]
    others = [quota - int(quota) for quota, count in zip(quotas, found, strict=True) if count == int(quota)]
    assert all(int(quota) <= count <= quota + 1 for quota, count in zip(quotas, found, strict=True))
    assert not rounded_up or not others or min(rounded_up) >= max(others)


def test_among_equal_remainders_the_first_is_rounded_up() -> None:
    assert split_exactly(5, [3, 3, 3, 3], [0.5] * 4) == [2, 1, 1, 1]
    assert split_exactly(0, [3, 3], [0.0, 0.0]) == [0, 0]


@st.composite
def shaped_models(draw: st.DrawFn):
    """Draw ratios of blocks with Linears of the same few shapes, a group, sparsity and lambda."""
    n_blocks = draw(st.integers(1, 6))
    sizes = st.integers(1, 40)
    of_block = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4))
    ratios = draw(st.lists(st.integers(0, 100), min_size=n_blocks, max_size=n_blocks))
    group = draw(st.sampled_from(["layer", "row", "column"]))
    percents = draw(st.integers(0, 99)), draw(st.integers(0, 30))
    return [ratio / 1000 for ratio in ratios], [of_block] * n_blocks, group, *(p / 100 for p in percents)


@unhurried
@given(shaped_models())
def test_the_model_loses_as_many_weights_as_under_uniform_sparsity(model) -> None:
    ratios, shapes, group, sparsity, lam = model
    shares = allocate(ratios, shapes, group, sparsity, lam)
    total = found = 0
    smallest = []
    for of_block, of_shares in zip(shapes, shares, strict=True):
        for (n_out, n_in), share in zip(of_block, of_shares, strict=True):
            size = Grouping(group, sparsity).group_size((n_out, n_in))
            n_groups = n_out * n_in // size
            total += n_groups * Grouping(group, sparsity).n_pruned((n_out, n_in))
            k = Grouping(group, share).n_pruned((n_out, n_in))
            assert k == size * share, "every group loses whole weights"
            assert 0 <= k <= size
            found += n_groups * k
            smallest.append(n_groups)
    assert total - max(smallest) < found <= total
    if group == "layer":
        assert found == total


@pytest.mark.parametrize(("group", "step"), [("layer", 1 / 50_000), ("row", 1 / 500), ("column", 1 / 100)])
def test_each_block_follows_the_formula_up_to_rounding(group: str, step: float) -> None:
    ratios = [0.1, 0.2, 0.3, 0.4]
    found = allocate(ratios, [[(100, 500), (100, 500)]] * 4, group, 0.7, 0.08)
    for of_block, wanted in zip(found, papers_sparsities(ratios, 0.7, 0.08), strict=True):
        assert [float(share) for share in of_block] == pytest.approx([wanted, wanted], abs=step + 1e-12)


@pytest.mark.parametrize("group", ["layer", "row", "column"])
def test_equal_blocks_lose_exactly_as_much_as_under_uniform_sparsity(group: str) -> None:
    shapes = [[(6, 10), (9, 7)]] * 3
    for ratios, lam in (([0.2, 0.2, 0.2], 0.08), ([0.1, 0.4, 0.2], 0.0)):
        for of_block in allocate(ratios, shapes, group, 0.55, lam):
            for shape, share in zip(shapes[0], of_block, strict=True):
                found = Grouping(group, share).n_pruned(shape)
                assert found == Grouping(group, 0.55).n_pruned(shape)
