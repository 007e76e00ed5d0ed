"""Check FedSpaLLM's aggregation against loops, its limiting cases, and layer sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprllm.core.fedspallm import fedspallm
from fedprllm.core.groups import Grouping
from fedprllm.core.layer_sampling import sample_blocks, sampled_blocks
from fedprllm.core.masks import most_voted, prune_lowest
from fedprllm.core.ties import TIES
from tests.oracles.test_selection_oracle import groups_of

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sums(locals_: list[torch.Tensor], kept: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    weight_sum = sum(local * keep for local, keep in zip(locals_, kept, strict=True))
    return weight_sum, sum(keep.to(torch.uint8) for keep in kept)


def naive(
    locals_: list[torch.Tensor], kept: list[torch.Tensor], weight: torch.Tensor, grouping: Grouping
) -> tuple[list[list[float]], list[list[bool]]]:
    """The paper's procedure with ties by index: average, prune what all pruned, expand by votes."""
    n_out, n_in = weight.shape
    mask = [[False] * n_in for _ in range(n_out)]
    k = grouping.n_pruned((n_out, n_in))
    for places in groups_of(grouping, n_out, n_in):
        n_pruners = {(o, j): sum(not bool(keep[o, j]) for keep in kept) for o, j in places}
        by_all = [place for place in places if n_pruners[place] == len(kept)][:k]
        others = [place for place in places if place not in by_all]
        others.sort(key=lambda place: -n_pruners[place])
        for o, j in by_all + others[: k - len(by_all)]:
            mask[o][j] = True
    result = [[0.0] * n_in for _ in range(n_out)]
    for o in range(n_out):
        for j in range(n_in):
            if not mask[o][j]:
                values = [float(local[o, j]) for local, keep in zip(locals_, kept, strict=True) if keep[o, j]]
                result[o][j] = sum(values) / len(values) if values else float(weight[o, j])
    return result, mask


@st.composite
def groupings(draw: st.DrawFn) -> Grouping:
    group = draw(st.sampled_from(["layer", "row", "column"]))
    return Grouping(group, draw(st.integers(0, 99)) / 100, draw(st.sampled_from([None, (2, 4)])))


@unhurried
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 2**32),
    groupings(),
)
def test_agrees_with_the_loops(n_people, n_out, n_quads, keeping, seed, grouping) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_out, 4 * n_quads)
    weight = torch.randn(shape, generator=generator)
    locals_ = [torch.randn(shape, generator=generator) for _ in range(n_people)]
    # Arbitrary masks: all participants may have pruned more than k of a group, or nothing at all.
    kept = [torch.rand(shape, generator=generator) < keeping for _ in range(n_people)]
    found, pruned = fedspallm(*sums(locals_, kept), n_people, weight, grouping, "index")
    expected, mask = naive(locals_, kept, weight, grouping)
    assert pruned.mask.tolist() == mask
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (found[pruned.mask] == 0).all()
    assert not torch.signbit(found[pruned.mask]).any()


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_participant_gives_its_own_weights(ties: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    grouping = Grouping("row", 0.5)
    own = prune_lowest(weight.float().abs(), weight, grouping, "index").mask
    local = (weight * 1.5).masked_fill(own, 0.0)
    found, pruned = fedspallm(local.float(), (~own).to(torch.uint8), 1, weight, grouping, ties)
    assert torch.equal(found, local)
    assert found.dtype == dtype
    assert torch.equal(pruned.mask, own)
    assert pruned.n_ties == 0


@pytest.mark.parametrize("n_people", [2, 7, 200])
def test_identical_participants_are_that_participant(n_people: int) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    grouping = Grouping("layer", 0.5)
    own = prune_lowest(weight.float().abs(), weight, grouping, "index").mask
    counts = (~own).to(torch.uint8) * n_people
    weight_sum = (weight * ~own).double() * n_people
    found, pruned = fedspallm(weight_sum, counts, n_people, weight, grouping, "index")
    assert torch.equal(found, weight.masked_fill(own, 0.0))
    assert torch.equal(pruned.mask, own)


def test_the_mask_is_that_of_the_votes() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 8, generator=generator)
    votes = torch.randint(0, 4, (6, 8), generator=generator)
    for ties in TIES:
        expected = most_voted(votes, weight, Grouping("layer", 0.4), ties, (1,))
        _, pruned = fedspallm(weight * (3 - votes), 3 - votes, 3, weight, Grouping("layer", 0.4), ties, (1,))
        assert torch.equal(pruned.mask, expected.mask)
        assert pruned.n_ties == expected.n_ties


def test_a_kept_weight_that_no_participant_retained_keeps_its_value() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    none = torch.zeros(1, 4)
    found, pruned = fedspallm(none, none.to(torch.uint8), 5, weight, Grouping("layer", 0.5), "magnitude")
    assert found.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert pruned.n_ties == 2


def test_a_block_without_contributions_is_an_internal_error() -> None:
    zeros = torch.zeros(2, 2)
    with pytest.raises(AssertionError, match="no participant contributed"):
        fedspallm(zeros, zeros.to(torch.uint8), 0, zeros, Grouping("layer", 0.5), "index")


@unhurried
@given(st.integers(1, 100), st.integers(1, 80), st.integers(0, 5), st.text("0123456789abcdef", max_size=8))
def test_sampled_blocks(percent: int, n_blocks: int, seed: int, fingerprint: str) -> None:
    found = sampled_blocks(percent / 100, n_blocks, seed, fingerprint)
    assert len(found) == max(1, percent * n_blocks // 100)
    assert found == sorted(set(found))
    assert set(found) <= set(range(n_blocks))
    assert found == sampled_blocks(percent / 100, n_blocks, seed, fingerprint)


def test_blocks_are_drawn_evenly_and_differently_for_each_participant() -> None:
    draws = [sampled_blocks(0.25, 8, 0, f"fingerprint {participant}") for participant in range(400)]
    counts = [sum(block in draw for draw in draws) for block in range(8)]
    assert all(60 < count < 140 for count in counts)  # 100 expected, sigma 9
    assert sampled_blocks(0.25, 8, 0, "a" * 64) != sampled_blocks(0.25, 8, 1, "a" * 64)
    assert sampled_blocks(1.0, 8, 0, "any") == list(range(8))


def covering(fractions: dict[str, float], n_blocks: int, seed: int) -> dict[str, list[int]]:
    """Draw, then let the first participant that holds the most-drawn block exchange it for a missing one."""
    drawn = {name: sampled_blocks(fractions[name], n_blocks, seed, name) for name in sorted(fractions)}
    for block in range(n_blocks):
        everything = [number for own in drawn.values() for number in own]
        if block not in everything:
            spare = max(range(n_blocks), key=lambda number: (everything.count(number), -number))
            first = min(name for name, own in drawn.items() if spare in own)
            drawn[first] = sorted([number for number in drawn[first] if number != spare] + [block])
    return drawn


@unhurried
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 100), min_size=1, max_size=6),
    st.integers(1, 24),
    st.integers(0, 5),
)
def test_every_block_has_a_participant_and_none_prunes_more_than_declared(percents, n_blocks, seed) -> None:
    fractions = {name: percent / 100 for name, percent in percents.items()}
    declared = {name: max(1, percent * n_blocks // 100) for name, percent in percents.items()}
    found = sample_blocks(fractions, n_blocks, seed)
    if sum(declared.values()) < n_blocks:
        assert found is None
        return
    assert found is not None
    assert {name: len(set(own)) for name, own in found.items()} == declared
    assert {block for own in found.values() for block in own} == set(range(n_blocks))
    assert found == sample_blocks(dict(reversed(fractions.items())), n_blocks, seed)
    assert found == covering(fractions, n_blocks, seed)


def test_draws_that_cover_all_blocks_are_kept() -> None:
    fractions = {"a": 1.0, "b": 0.25, "c": 0.5}
    found = sample_blocks(fractions, 8, 3)
    assert found == {name: sampled_blocks(fraction, 8, 3, name) for name, fraction in fractions.items()}
