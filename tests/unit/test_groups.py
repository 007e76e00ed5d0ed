"""Comparison groups: exact numbers of weights to prune, and a split that can be reversed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprllm.core.groups import Grouping

GROUPS = ["layer", "row", "column"]


@pytest.mark.parametrize(
    ("sparsity", "n", "expected"),
    [
        (0.7, 90, 63),  # 62.99999999999999 in floats
        (0.29, 100, 29),  # 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (1e-5, 100_000, 1),
        (0.5, 7, 3),
        (0.999, 10, 9),
        (0.0, 10, 0),
        (0.7, 45_088_768, 31_562_137),
    ],
)
def test_the_floor_is_exact(sparsity: float, n: int, expected: int) -> None:
    assert Grouping("layer", sparsity).n_pruned((1, n)) == expected
    assert Grouping("row", sparsity).n_pruned((3, n)) == expected
    assert Grouping("column", sparsity).n_pruned((n, 3)) == expected


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 10**9))
def test_the_floor_is_that_of_integers(thousandths: int, n: int) -> None:
    assert Grouping("layer", thousandths / 1000).n_pruned((n, 1)) == thousandths * n // 1000


@pytest.mark.parametrize(("group", "size"), [("layer", 24), ("row", 6), ("column", 4)])
def test_group_sizes(group: str, size: int) -> None:
    assert Grouping(group, 0.5).group_size((4, 6)) == size


@pytest.mark.parametrize("n_m", [(2, 4), (4, 8), (1, 2), (0, 3), (3, 3)])
@pytest.mark.parametrize("group", GROUPS)
def test_a_pattern_takes_precedence(group: str, n_m: tuple[int, int]) -> None:
    grouping = Grouping(group, 0.9, n_m)
    assert grouping.group_size((5, 24)) == n_m[1]
    assert grouping.n_pruned((5, 24)) == n_m[1] - n_m[0]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n_m", [None, (2, 4)])
@pytest.mark.parametrize("shape", [(3, 8), (8, 4), (1, 4)])
def test_join_reverses_split(group: str, n_m: tuple[int, int] | None, shape: tuple[int, int]) -> None:
    grouping = Grouping(group, 0.5, n_m)
    matrix = torch.arange(shape[0] * shape[1]).reshape(shape)
    split = grouping.split(matrix)
    assert split.shape[1] == grouping.group_size(shape)
    assert torch.equal(grouping.join(split, shape), matrix)


def test_what_is_in_a_group() -> None:
    matrix = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert Grouping("layer", 0.5).split(matrix).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert Grouping("row", 0.5).split(matrix).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Grouping("column", 0.5).split(matrix).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert Grouping("column", 0.5, (1, 2)).split(matrix).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
