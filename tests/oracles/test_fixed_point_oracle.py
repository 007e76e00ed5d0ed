"""Check sums of fixed-point numbers against fractions, which have no rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprllm.config import PruneConfig
from fedprllm.core.fixed_point import FixedPointSum, Grid
from fedprllm.errors import ModelError, UpdateError
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.walk import Walker
from fedprllm.sharing.gram_matrices import PRODUCTS, square, triangle
from fedprllm.sharing.input_sums import SQUARES, on_grid

COUNTS = Grid(fraction_bits=0, magnitude_bits=53, n_words=2)
GRIDS = {"squares": SQUARES, "products": PRODUCTS, "counts": COUNTS}
singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
unhurried = settings(deadline=None, max_examples=50)


def numbers_on(grid: Grid) -> st.SearchStrategy[float]:
    """float32 numbers of the grid: small, large, and of any size between."""
    limit = 2.0**grid.magnitude_bits
    drawn = st.floats(-limit, limit, width=32, exclude_min=True, exclude_max=True)
    tiny = st.integers(-5, 5).map(lambda n: n * 2.0**-grid.fraction_bits)
    on = st.one_of(drawn, tiny).map(lambda x: float(grid.rounded(torch.tensor([x]))[0]))
    return on.filter(lambda x: abs(x) < limit)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@unhurried
@given(st.data())
def test_a_sum_is_exact_and_rounded_once(grid: Grid, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(numbers_on(grid), min_size=1, max_size=20))
    total = FixedPointSum.zeros(grid, 1)
    for number in numbers:
        total.add(torch.tensor([number], dtype=torch.float32))
    exact = sum(map(Fraction, numbers))
    words = [int(word) for word in total.words[:, 0]]
    assert sum(word << 56 * place for place, word in enumerate(words)) == exact * 2**grid.fraction_bits
    value = total.value.numpy()[0]
    units = {"float32": Fraction(1, 2), "float64": Fraction(1)}  # the two words of a float64 round once each
    assert abs(Fraction(float(value)) - exact) <= units[value.dtype.name] * Fraction(
        float(np.spacing(abs(value)))
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@unhurried
@given(st.data())
def test_words_may_be_added_up_without_carrying(grid: Grid, data: st.DataObject) -> None:
    """What masked updates do: each word modulo 2^64, and the carries only in the end."""
    numbers = torch.tensor(data.draw(st.lists(numbers_on(grid), min_size=1, max_size=20)))
    total = FixedPointSum.zeros(grid, 1)
    for number in numbers:
        total.add(number[None])
    words = torch.stack([grid.words(number[None]) for number in numbers]).sum(dim=0)
    assert torch.equal(grid.numbers(words).view(torch.uint8), total.value.view(torch.uint8))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@unhurried
@given(singles)
def test_rounding_goes_to_the_nearest_number_of_the_grid(grid: Grid, value: float) -> None:
    tensor = torch.tensor([value], dtype=torch.float32)
    rounded = grid.rounded(tensor)
    on_grid = (Fraction(value) * 2**grid.fraction_bits).denominator == 1
    assert grid.holds(tensor) == (on_grid and abs(value) < 2.0**grid.magnitude_bits)
    if abs(value) < 2.0**grid.magnitude_bits / 2:
        assert grid.holds(rounded)
        assert abs(Fraction(float(rounded[0])) - Fraction(value)) <= Fraction(
            1, 2 ** (grid.fraction_bits + 1)
        )
        assert torch.equal(rounded, tensor) or not on_grid


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_on_no_grid(value: float) -> None:
    assert not any(grid.holds(torch.tensor([0.0, value])) for grid in GRIDS.values())


def test_a_sum_that_its_words_cannot_hold_is_refused() -> None:
    total = FixedPointSum.zeros(PRODUCTS, 2)
    largest = torch.tensor([-(2.0**34 - 2.0**10), 1.0])
    for _ in range(63):
        total.add(largest)
    with pytest.raises(UpdateError, match=r"must stay below 1\.1e\+12"):
        total.add(largest + largest)


@unhurried
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_a_triangle_is_half_of_a_symmetric_matrix(width: int, seed: int) -> None:
    half = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    rows = matrix.tolist()
    expected = [rows[i][j] for i in range(width) for j in range(i, width)]
    assert triangle(matrix).tolist() == expected
    assert torch.equal(square(triangle(matrix)), matrix)


def test_sums_that_no_grid_holds_are_refused_where_they_are_made() -> None:
    with pytest.raises(ModelError, match=r"'q' is 2.81e\+14: expected less than 2.81e\+14.*fewer windows"):
        on_grid(SQUARES, "q", torch.tensor([1.0, 2.0**48], dtype=torch.float64))
    with pytest.raises(ModelError, match=r"'q' is 3e\+10: expected less than 1.72e\+10"):
        on_grid(PRODUCTS, "q", torch.tensor([1.0, -3e10]))


@pytest.mark.parametrize(("factor", "words"), [(1e-5, "expected at least 6.1e-05"), (1e6, "fewer windows")])
def test_gram_matrices_of_tiny_and_of_huge_inputs_are_refused(
    tiny, windows, factor: float, words: str
) -> None:
    model, method = BlockwiseModel(tiny("llama")), pruning_method(PruneConfig(share="gram"))
    participant = Participant("one", windows(0))
    participant.enter(model)
    name = "model.layers.0.mlp.up_proj.weight"  # it scales the inputs of down_proj
    with model.block(0) as block:
        scaled = {name: factor * block.tensors[name]}
        with block.replaced(scaled), pytest.raises(ModelError, match=words):
            Walker(participant, method, model.n_blocks).contribute(block)
