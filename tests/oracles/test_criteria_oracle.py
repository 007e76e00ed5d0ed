"""Check every criterion against its formula, computed one weight at a time in Python."""

from __future__ import annotations

import math

import pytest
import torch

from fedprllm.core.criteria import CRITERIA

Matrix = list[list[float]]


def _wanda(weight: Matrix, norm: list[float], o: int, j: int) -> float:
    return abs(weight[o][j]) * norm[j]


def _magnitude(weight: Matrix, norm: list[float], o: int, j: int) -> float:
    return abs(weight[o][j])


def _ria(weight: Matrix, norm: list[float], o: int, j: int) -> float:
    if weight[o][j] == 0:
        return 0.0
    row_sum = sum(abs(value) for value in weight[o])
    column_sum = sum(abs(row[j]) for row in weight)
    return (abs(weight[o][j]) / row_sum + abs(weight[o][j]) / column_sum) * norm[j] ** 0.5


# An oracle for every row of the table.
ORACLES = {
    "wanda": _wanda,
    "magnitude": _magnitude,
    "ria": _ria,
}


@pytest.fixture
def weight() -> torch.Tensor:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weight[2, :] = 0.0
    weight[:, 3] = 0.0
    return weight


@pytest.fixture
def inputs() -> torch.Tensor:
    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(1)) * 3
    inputs[:, 4] = 0.0
    return inputs


def test_every_criterion_has_an_oracle() -> None:
    assert ORACLES.keys() == CRITERIA.keys()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores(name: str, dtype: torch.dtype, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    weight = weight.to(dtype)
    norm = [math.sqrt(sum(x * x for x in column)) for column in inputs.T.tolist()]
    found = CRITERIA[name].score(weight, torch.tensor(norm))
    rows = weight.tolist()
    expected = [[ORACLES[name](rows, norm, o, j) for j in range(5)] for o in range(7)]
    torch.testing.assert_close(found.float(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_ria_sums_of_long_float16_rows_do_not_overflow() -> None:
    weight = torch.full((3, 70_000), 2.0, dtype=torch.float16)
    found = CRITERIA["ria"].score(weight, torch.ones(70_000))
    torch.testing.assert_close(found, torch.full((3, 70_000), 1 / 70_000 + 1 / 3))


def test_a_constant_factor_of_the_norm_does_not_change_the_ranking_of_ria(weight, inputs) -> None:
    norm = inputs.norm(dim=0)
    score = CRITERIA["ria"].score
    ranks = [score(weight, norm * factor).flatten().argsort(stable=True) for factor in (1.0, 4.0, 1 / 64)]
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[0], ranks[2])
