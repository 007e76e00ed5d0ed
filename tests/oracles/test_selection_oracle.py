"""Check exact selection against a sort in Python, for every comparison group and tie rule."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprllm.core.groups import Grouping
from fedprllm.core.masks import count_close, most_voted, prune_lowest
from fedprllm.core.selection import select_lowest
from fedprllm.core.ties import TIES

SEED_PARTS = (3, "server", "weight")
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def groups_of(grouping: Grouping, n_out: int, n_in: int) -> list[list[tuple[int, int]]]:
    """The positions of each group, in the order of the tie rule ``index``."""
    if grouping.n_m:
        m = grouping.n_m[1]
        return [[(o, j) for j in range(a, a + m)] for o in range(n_out) for a in range(0, n_in, m)]
    if grouping.group == "row":
        return [[(o, j) for j in range(n_in)] for o in range(n_out)]
    if grouping.group == "column":
        return [[(o, j) for o in range(n_out)] for j in range(n_in)]
    return [[(o, j) for o in range(n_out) for j in range(n_in)]]


def naive(
    scores: torch.Tensor, weight: torch.Tensor, grouping: Grouping, ties: str
) -> tuple[torch.Tensor, int]:
    values = scores.tolist()
    keys = torch.zeros(scores.shape)
    if ties == "magnitude":
        keys = weight.abs()
    elif ties == "random":
        keys = TIES["random"](weight, SEED_PARTS)
    key = keys.tolist()
    mask, n_ties = torch.zeros(scores.shape, dtype=torch.bool), 0
    for places in groups_of(grouping, *scores.shape):
        if grouping.n_m:
            k = grouping.n_m[1] - grouping.n_m[0]
        else:
            share = Fraction(str(grouping.sparsity))
            k = len(places) * share.numerator // share.denominator
        order = sorted(places, key=lambda p: (values[p[0]][p[1]], key[p[0]][p[1]], places.index(p)))
        taken, left = order[:k], {values[o][j] for o, j in order[k:]}
        for o, j in taken:
            mask[o, j] = True
            n_ties += values[o][j] in left
    return mask, n_ties


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Grouping, str]:
    """Draw scores with many ties, weights with some, a grouping and a tie rule."""
    n_m = draw(st.sampled_from([None, None, None, (2, 4), (1, 3), (4, 8), (0, 2), (2, 2)]))
    n_out = draw(st.integers(1, 6))
    n_in = draw(st.integers(1, 3)) * n_m[1] if n_m else draw(st.integers(1, 9))
    n_values = draw(st.sampled_from([1, 2, 5, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randint(n_values, (n_out, n_in), generator=generator)
    weight = torch.randint(-3, 4, (n_out, n_in), generator=generator) / 2
    group = draw(st.sampled_from(["layer", "row", "column"]))
    sparsity = draw(st.integers(0, 99)) / 100
    return scores, weight, Grouping(group, sparsity, n_m), draw(st.sampled_from(sorted(TIES)))


@unhurried
@given(cases(), st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_prune_lowest(case, dtype: torch.dtype) -> None:
    scores, weight, grouping, ties = case
    found = prune_lowest(scores.to(dtype), weight, grouping, ties, SEED_PARTS)
    mask, n_ties = naive(scores, weight, grouping, ties)
    assert torch.equal(found.mask, mask)
    assert found.n_ties == n_ties


@unhurried
@given(cases(), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
def test_most_voted(case, dtype: torch.dtype) -> None:
    votes, weight, grouping, ties = case
    votes = votes.clamp(max=255)
    found = most_voted(votes.to(dtype), weight, grouping, ties, SEED_PARTS)
    mask, n_ties = naive(-votes, weight, grouping, ties)
    assert torch.equal(found.mask, mask)
    assert found.n_ties == n_ties


@unhurried
@given(cases(), st.integers(0, 9))
def test_select_lowest_by_index(case, k: int) -> None:
    scores = case[0]
    k = min(k, scores.shape[1])
    found, _ = select_lowest(scores, k)
    for row, marked in zip(scores.tolist(), found.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda j: (row[j], j))[:k]
        assert [j for j, pruned in enumerate(marked) if pruned] == sorted(expected)


def test_the_tie_rule_is_called_only_if_a_tie_has_to_be_decided() -> None:
    def refuse() -> torch.Tensor:
        pytest.fail("no tie has to be decided here")

    # Both equal scores of the first row are marked, and neither of the second row.
    found, n_ties = select_lowest(torch.tensor([[1, 1, 2, 3], [7, 0, 1, 7]]), 2, refuse)
    assert found.tolist() == [[True, True, False, False], [False, True, True, False]]
    assert n_ties == 0
    for k in (0, 4):
        assert int(select_lowest(torch.zeros(1, 4), k, refuse)[0].sum()) == k


@pytest.mark.parametrize("group", ["layer", "row", "column"])
def test_count_close_against_loops(group: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 40, generator=generator)
    # Many scores are within or just beyond rounding error of another one in their row or column.
    scores[3:] = scores[:3] * (1 + 2.0**-22)
    scores[:, 10:20] = scores[:, :10] * (1 + 2.0**-22)
    scores[:, 20:30] = scores[:, :10] * (1 + 2.0**-12)
    grouping = Grouping(group, 0.5)
    mask = prune_lowest(scores, scores, grouping, "index").mask
    expected = 0
    for values, pruned in zip(grouping.split(scores).tolist(), grouping.split(mask).tolist(), strict=True):
        lowest_kept = min(value for value, gone in zip(values, pruned, strict=True) if not gone)
        expected += sum(
            gone and value >= lowest_kept * (1 - 2.0**-21) for value, gone in zip(values, pruned, strict=True)
        )
    assert count_close(scores, mask, grouping) == expected
    assert group == "layer" or 0 < expected < mask.sum()
    assert count_close(scores, torch.zeros_like(mask), grouping) == 0
    assert count_close(scores, torch.ones_like(mask), grouping) == 0
