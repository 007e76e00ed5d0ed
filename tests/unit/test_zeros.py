"""Zeros written and counted as bits, compared with floating-point comparisons to 0."""

from __future__ import annotations

import time

import pytest
import torch

from fedprllm.core import threads
from fedprllm.core.threads import in_threads, row_slices
from fedprllm.core.zeros import copy_pruned, count_zeros
from tests.isolation import torch_threads

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def two_threads():
    with torch_threads(2):
        yield


def weight_of(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiny = torch.finfo(dtype).tiny
    weight[0, :4] = torch.tensor([0.0, -0.0, tiny, -tiny], dtype=dtype)
    return weight


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruned_are_plus_zero_and_the_rest_keeps_its_bits(monkeypatch, dtype, transposed, at_once):
    monkeypatch.setattr(threads, "_AT_ONCE", at_once)
    weight, mask = weight_of(dtype), torch.rand(37, 24, generator=torch.Generator().manual_seed(1)) < 0.5
    if transposed:
        weight, mask = weight.T, mask.T
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    copied = torch.full_like(weight, torch.nan)
    copy_pruned(weight, mask, copied)
    assert (copied.view(bits)[mask] == 0).all()
    assert torch.equal(copied.view(bits)[~mask], weight.view(bits)[~mask])
    wider = torch.full(weight.shape, torch.nan, dtype=torch.float64)
    copy_pruned(weight, mask, wider)
    assert torch.equal(wider.view(torch.int64), copied.double().view(torch.int64))
    copy_pruned(weight, mask, weight)
    assert torch.equal(weight.view(bits), copied.view(bits))


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_zeros_are_counted_and_the_smallest_numbers_are_not(monkeypatch, dtype, at_once):
    monkeypatch.setattr(threads, "_AT_ONCE", at_once)
    weight = weight_of(dtype)
    assert count_zeros(weight) == int((weight == 0).sum()) == 2
    assert count_zeros(weight.T) == 2


def test_threads_of_pieces_compute_alone_and_leave_torch_as_it_was():
    with torch_threads(2):
        assert in_threads(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda piece: 1 // piece, range(4))
        assert torch.get_num_threads() == 2
        assert in_threads(lambda _: torch.get_num_threads(), [0]) == [2]


def test_threads_stay_alone_after_work_that_did_not_need_torch():
    threads._pool.cache_clear()  # threads of earlier tests have already used torch
    with torch_threads(3):
        in_threads(lambda _: time.sleep(0.02), range(3))
        assert in_threads(lambda _: torch.get_num_threads(), range(6)) == [1] * 6


def test_row_slices_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(threads, "_AT_ONCE", 100)
    for shape in ((1, 7), (10, 10), (11, 30), (3, 1000), (5, 1)):
        matrix = torch.zeros(shape)
        for rows in row_slices(matrix):
            matrix[rows] += 1
        assert (matrix == 1).all()
