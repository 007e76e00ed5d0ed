"""Annotated shapes are checked during tests, so every other test checks them as well."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from fedprllm.core.zeros import copy_pruned
from tests.shape_checks import check, jaxtyped


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(TypeCheckError, match=r"mask"):
        copy_pruned(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3))


def test_functions_inside_functions_are_checked_where_they_name_a_shape():
    @jaxtyped(typechecker=check)
    def total(row: Float[Tensor, " n"], again: Float[Tensor, " n"]) -> float:
        return float((row + again).sum())

    assert total(torch.ones(2), torch.ones(2)) == 4
    with pytest.raises(TypeCheckError):
        total(torch.ones(2), torch.ones(1))


def test_functions_without_shapes_are_left_as_they_are():
    def double(number: int) -> int:
        return 2 * number

    assert jaxtyped(typechecker=check)(double) is double
