"""Dealing windows out to participants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedprllm.errors import ConfigError, DataError
from fedprllm.text.partition import partition


def numbered(sizes: list[int]) -> list[torch.Tensor]:
    """Files of windows in which no two windows are equal."""
    ids = torch.arange(2 * sum(sizes)).view(-1, 2)
    return list(ids.split(sizes))


def rows(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [row for tensor in tensors for row in tensor.tolist()]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    n_participants=st.integers(1, 9),
    method=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e12]),
    seed=st.integers(0, 1000),
)
def test_every_window_goes_to_exactly_one_participant(sizes, n_participants, method, alpha, seed) -> None:
    files = numbered(sizes)
    arguments = {"method": method, "alpha": alpha, "seed": seed}
    if sum(sizes) < n_participants:
        with pytest.raises(DataError, match=f"{n_participants} participants .* found {sum(sizes)}"):
            partition(files, n_participants, **arguments)
        return
    parts = partition(files, n_participants, **arguments)
    assert len(parts) == n_participants
    assert min(map(len, parts)) >= 1
    assert sorted(rows(parts)) == sorted(rows(files))
    if method == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = partition(files, n_participants, **arguments)
    assert all(map(torch.equal, parts, again))


@pytest.mark.parametrize("method", ["iid", "dirichlet"])
def test_partition_depends_on_the_seed(method) -> None:
    first, second = (partition(numbered([50, 50]), 4, method=method, alpha=1.0, seed=seed) for seed in (0, 1))
    assert rows(first) != rows(second)


def test_iid_mixes_the_files() -> None:
    parts = partition(numbered([50, 50]), 2, method="iid", alpha=1.0, seed=0)
    for part in parts:
        assert 10 < int((part[:, 0] < 100).sum()) < 40


def test_file_gives_file_i_to_participant_i_mod_n() -> None:
    files = numbered([3, 4, 5])
    parts = partition(files, 2, method="file", alpha=1.0, seed=0)
    assert rows(parts[:1]) == rows([files[0], files[2]])
    assert rows(parts[1:]) == rows([files[1]])


@pytest.mark.parametrize("sizes", [[9, 9], [9, 0, 9]])
def test_fewer_files_with_text_than_participants(sizes) -> None:
    with pytest.raises(DataError, match="3 participants need one with text each, found 2"):
        partition(numbered(sizes), 3, method="file", alpha=1.0, seed=0)


def test_dirichlet_goes_from_one_owner_to_equal_shares() -> None:
    files = numbered([101, 101])
    for part in partition(files, 4, method="dirichlet", alpha=1e12, seed=0):
        counts = [int(sum(row in file.tolist() for row in part.tolist())) for file in files]
        assert all(count in (25, 26) for count in counts)
    concentrated = partition(files, 4, method="dirichlet", alpha=1e-3, seed=0)
    assert sorted(map(len, concentrated))[:2] == [1, 1]


def test_dirichlet_takes_windows_from_the_whole_file() -> None:
    parts = partition(numbered([100]), 2, method="dirichlet", alpha=1e12, seed=0)
    for part in parts:
        assert 10 < int((part[:, 0] < 100).sum()) < 40


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha must be greater than 0"):
        partition(numbered([9]), 2, method="dirichlet", alpha=alpha, seed=0)


def test_unknown_partition_and_no_participants() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dirichlet'"):
        partition(numbered([9]), 2, method="dirichle", alpha=1.0, seed=0)
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        partition(numbered([9]), 0, method="iid", alpha=1.0, seed=0)
