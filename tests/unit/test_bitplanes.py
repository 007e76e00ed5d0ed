"""Votes in bit planes give the same results as integer votes, for any size and number of participants."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from fedprllm.core import bitplanes
from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.core.groups import Grouping
from fedprllm.core.masks import most_voted, vote_dtype
from fedprllm.core.ties import TIES
from fedprllm.errors import UpdateError
from tests.isolation import torch_threads

GROUPINGS = st.builds(
    Grouping,
    st.sampled_from(["layer", "row", "column"]),
    st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.7, 0.99]),
)


@dataclass(frozen=True)
class Ballots:
    """Masks of ``n_participants`` participants, drawn from a few distinct ones with varying agreement."""

    shape: tuple[int, int]
    n_participants: int
    agreement: float
    seed: int

    def masks(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        common = torch.rand(self.shape, generator=generator)
        distinct = [
            torch.rand(self.shape, generator=generator) * (1 - self.agreement) + common * self.agreement < 0.5
            for _ in range(min(self.n_participants, 7))
        ]
        order = torch.randint(len(distinct), (self.n_participants,), generator=generator)
        return [distinct[index] for index in order.tolist()]

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Weights with few distinct magnitudes, so that tie keys are equal too."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(-3, 4, self.shape, generator=generator).to(dtype) / 4


@st.composite
def ballots(draw: st.DrawFn, multiple: int = 1) -> Ballots:
    shape = (draw(st.integers(1, 40)), multiple * draw(st.integers(1, 200 // multiple)))
    # Hypothesis prefers small numbers; 600 needs ten planes.
    n_participants = draw(st.integers(1, 20) | st.integers(1, 600) | st.integers(250, 260))
    agreement = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Ballots(shape, n_participants, agreement, draw(st.integers(0, 2**31)))


def votes_of(masks: list[torch.Tensor]) -> torch.Tensor:
    votes = torch.zeros(masks[0].shape, dtype=torch.int32)
    for mask in masks:
        votes += mask
    return votes


def packed_votes(masks: list[torch.Tensor]) -> PackedVotes:
    votes = PackedVotes(masks[0].numel())
    votes.add(*packed_all(masks))
    return votes


def packed_all(masks: list[torch.Tensor]) -> list[np.ndarray]:
    distinct = {id(mask): mask for mask in masks}
    packed = {key: pack(mask) for key, mask in distinct.items()}
    return [packed[id(mask)] for mask in masks]


def as_words(packed: np.ndarray) -> np.ndarray:
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


# --- Counts ---


@settings(deadline=None, max_examples=50)
@example(Ballots((3, 43), 600, 0.5, 0), [1])
@given(ballots(), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_counts_are_the_sum_of_the_masks(case: Ballots, sizes: list[int]) -> None:
    masks, votes, n_added = case.masks(), PackedVotes(int(np.prod(case.shape))), 0
    packed = packed_all(masks)
    while n_added < len(masks):
        for size in sizes:
            votes.add(*packed[n_added : n_added + size])
            n_added = min(n_added + size, len(masks))
    expected = votes_of(masks).reshape(-1)
    assert votes.total == len(masks)
    assert votes.counts().dtype == vote_dtype(len(masks))
    assert torch.equal(votes.counts().int(), expected)
    start, stop = sorted((case.seed % (len(expected) + 1), case.seed // 7 % (len(expected) + 1)))
    assert torch.equal(votes.counts(start, stop).int(), expected[start:stop])
    assert torch.equal(votes.histogram(), torch.bincount(expected, minlength=len(masks) + 1))
    planes = votes.planes()
    assert planes.shape == (len(masks).bit_length(), -(-len(expected) // 8))
    again = PackedVotes.of_planes(planes, len(expected))
    assert torch.equal(again.counts().int(), expected)
    assert again.counts().dtype == votes.counts().dtype


@pytest.mark.parametrize("every", [1, 5, 16, 23])
def test_reading_the_votes_does_not_change_them(every: int) -> None:
    masks, votes = Ballots((3, 50), 60, 0.5, every).masks(), PackedVotes(150)
    for index, mask in enumerate(masks):
        votes.add(pack(mask))
        if index % every == 0:
            assert torch.equal(votes.counts().int(), votes_of(masks[: index + 1]).reshape(-1))
    assert torch.equal(votes.counts().int(), votes_of(masks).reshape(-1))


def test_words_bytes_and_unaligned_bytes_are_the_same() -> None:
    mask = torch.rand((13, 77), generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    message = np.concatenate([np.zeros(3, np.uint8), packed])
    votes = PackedVotes(mask.numel())
    votes.add(packed, as_words(packed), message[3:], np.frombuffer(packed.tobytes(), np.uint8))
    votes.add(np.repeat(packed, 2)[::2])
    assert torch.equal(votes.counts(), mask.reshape(-1).byte() * 5)


def test_chunks_and_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitplanes, "_CHUNK", 3)
    monkeypatch.setattr(bitplanes, "_WORDS_PER_THREAD", 20)
    monkeypatch.setattr(bitplanes, "_COUNTED_AT_ONCE", 100)
    monkeypatch.setattr(bitplanes, "_SCORED_AT_ONCE", 100)
    monkeypatch.setattr(bitplanes, "_ROWS_SUMMED_AT_ONCE", 5)
    case = Ballots((23, 200), 37, 0.5, 5)
    with torch_threads(3):
        votes, expected = packed_votes(case.masks()), votes_of(case.masks())
        assert torch.equal(votes.counts().int(), expected.reshape(-1))
        assert torch.equal(votes.histogram(), torch.bincount(expected.reshape(-1), minlength=38))
        for grouping in (Grouping("column", 0.5), Grouping("row", 0.5, (2, 4))):
            found = votes.most_voted(case.weight(), grouping, "random", (3,))
            simple = most_voted(expected, case.weight(), grouping, "random", (3,))
            assert torch.equal(found.mask, simple.mask)
            assert found.n_ties == simple.n_ties


def test_the_masks_given_are_not_changed() -> None:
    packed = [np.full(128, 170, np.uint8) for _ in range(20)]
    votes = PackedVotes(1024)
    votes.add(*packed)
    votes.counts()
    assert all((mask == 170).all() for mask in packed)


@settings(deadline=None, max_examples=50)
@example(Ballots((3, 100), 5, 0.0, 0), [2**24, 1, 3, 2**24 - 1], Grouping("row", 0.5, (2, 4)), "magnitude")
@given(
    ballots(multiple=4),
    # A weight of 1 takes the path for unweighted votes, so both paths are mixed.
    st.lists(st.integers(1, 9) | st.just(1) | st.integers(1, 2**26), min_size=1, max_size=6),
    st.sampled_from(
        [Grouping(group, 0.5) for group in ("layer", "row", "column")] + [Grouping("row", 0.5, (2, 4))]
    ),
    st.sampled_from(sorted(TIES)),
)
def test_a_mask_may_count_more_than_once(
    case: Ballots, weights: list[int], grouping: Grouping, ties: str
) -> None:
    masks, votes = case.masks()[:40], PackedVotes(int(np.prod(case.shape)))
    expected = torch.zeros(case.shape, dtype=torch.int64)
    for index, mask in enumerate(masks):
        weight = weights[index % len(weights)]
        votes.add(pack(mask), weight=weight)
        expected += mask * weight
    assert votes.total == sum(weights[index % len(weights)] for index in range(len(masks)))
    assert votes.counts().dtype == vote_dtype(votes.total)
    assert torch.equal(votes.counts().long(), expected.reshape(-1))
    assert len(votes._planes) == votes.total.bit_length()
    found = votes.most_voted(case.weight(), grouping, ties, (case.seed,))
    simple = most_voted(expected, case.weight(), grouping, ties, (case.seed,))
    assert torch.equal(found.mask, simple.mask)
    assert found.n_ties == simple.n_ties


def test_masks_of_one_weight_may_be_added_together() -> None:
    masks, votes = packed_all(Ballots((3, 43), 9, 0.5, 0).masks()), PackedVotes(129)
    votes.add(*masks[:4], weight=6)
    votes.add(*masks[4:])
    expected = sum(6 * votes_of_one(mask) for mask in masks[:4]) + sum(map(votes_of_one, masks[4:]))
    assert torch.equal(votes.counts().int(), expected)
    assert torch.equal(votes.histogram(), torch.bincount(expected, minlength=4 * 6 + 5 + 1))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**20), st.integers(0, 2**32))
def test_votes_that_were_counted_elsewhere_are_the_same_votes(n: int, total: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, total + 1, n).astype(np.uint64)
    votes = PackedVotes.of_counts(counts, total)
    assert votes.counts().tolist() == counts.tolist()
    assert (votes.total, votes.n_weights) == (total, n)
    votes.add(pack(torch.ones(n, dtype=torch.bool)))
    assert votes.counts().tolist() == (counts + 1).tolist()


def votes_of_one(packed: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=129, bitorder="little")).int()


@pytest.mark.parametrize("n_participants", [1, 3, 4, 7, 31, 300, 1000])
def test_memory_is_one_bit_per_plane_plus_four_that_wait(n_participants: int) -> None:
    n_weights = 64 * 10
    votes = PackedVotes(n_weights)
    votes.add(*[np.full(n_weights // 64, 5, np.uint64)] * n_participants)
    held = [*votes._waiting, *votes._planes]
    n_waiting = min(n_participants.bit_length(), 4) if n_participants > 3 else 0
    assert sum(array.nbytes for array in held) * 8 == n_weights * (n_participants.bit_length() + n_waiting)
    votes.planes()
    assert votes._waiting == []


def test_no_votes() -> None:
    votes = PackedVotes(70)
    assert votes.counts().tolist() == [0] * 70
    assert votes.histogram().tolist() == [70]
    assert PackedVotes.of_planes(votes.planes(), 70).counts().tolist() == [0] * 70
    found = votes.most_voted(torch.ones(7, 10), Grouping("row", 0.5), "index")
    assert torch.equal(found.mask, torch.arange(10).expand(7, 10) < 5)
    assert found.n_ties == 35


# --- Selection ---


def assert_same_selection(case: Ballots, grouping: Grouping, ties: str, weight: torch.Tensor) -> None:
    masks = case.masks()
    expected = most_voted(votes_of(masks), weight, grouping, ties, ("server", case.seed))
    found = packed_votes(masks).most_voted(weight, grouping, ties, ("server", case.seed))
    assert torch.equal(found.mask, expected.mask)
    assert found.n_ties == expected.n_ties
    assert found.mask.is_contiguous()


@settings(deadline=None, max_examples=100)
@example(Ballots((5, 64), 600, 0.0, 0), Grouping("column", 0.5), "index", torch.float32)
@example(Ballots((40, 128), 1, 0.0, 0), Grouping("layer", 0.7), "random", torch.float32)
@given(
    ballots(),
    GROUPINGS,
    st.sampled_from(sorted(TIES)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_most_voted_is_that_of_plain_votes(
    case: Ballots, grouping: Grouping, ties: str, dtype: torch.dtype
) -> None:
    assert_same_selection(case, grouping, ties, case.weight(dtype))


@settings(deadline=None, max_examples=30)
@given(ballots(multiple=64), GROUPINGS, st.sampled_from(sorted(TIES)))
def test_most_voted_of_rows_of_whole_words(case: Ballots, grouping: Grouping, ties: str) -> None:
    assert_same_selection(case, grouping, ties, case.weight())


@settings(deadline=None, max_examples=40)
@given(ballots(multiple=8), st.sampled_from([(2, 4), (4, 8), (1, 4)]), st.sampled_from(sorted(TIES)))
def test_most_voted_of_n_m_patterns(case: Ballots, n_m: tuple[int, int], ties: str) -> None:
    assert_same_selection(case, Grouping("row", 0.5, n_m), ties, case.weight())


def test_voting_goes_on_after_a_selection() -> None:
    case = Ballots((9, 100), 25, 0.5, 1)
    votes, masks = PackedVotes(900), case.masks()
    for index, mask in enumerate(masks):
        votes.add(pack(mask))
        found = votes.most_voted(case.weight(), Grouping("row", 0.5), "magnitude")
        expected = most_voted(votes_of(masks[: index + 1]), case.weight(), Grouping("row", 0.5), "magnitude")
        assert torch.equal(found.mask, expected.mask)


# --- Refusals ---


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (
            np.zeros(8, np.uint8),
            r"70 weights: expected 9 bytes \(uint8\) or 2 words .* shape \(8,\) of uint8",
        ),
        (np.zeros(10, np.uint8), "found shape"),
        (np.zeros((1, 2), np.uint64), r"\(1, 2\)"),
        (np.full(9, 64, np.uint8), "unused bits"),
        (np.full(2, 64, np.uint64), "unused bits"),
        (as_words(np.arange(16, dtype=np.uint8)), "unused bits"),
    ],
)
def test_a_mask_of_another_matrix_is_refused_and_nothing_added(packed: np.ndarray, message: str) -> None:
    votes = PackedVotes(70)
    good = pack(torch.ones(7, 10, dtype=torch.bool))
    with pytest.raises(UpdateError, match=message):
        votes.add(good, packed)
    assert votes.total == 0
    votes.add(good)
    assert votes.counts().tolist() == [1] * 70
