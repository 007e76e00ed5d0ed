"""What several sums tell together: no combination may consist of too few updates."""

from __future__ import annotations

import random
from itertools import product

import pytest

from fedprllm.errors import SecureError
from fedprllm.federation.site.unmask_ledger import Bounds, UnmaskLedger, exposed_by
from fedprllm.secure.terms import threshold

BOUNDS = Bounds(least=3, limit=4, max_colluding=1)


def sets(*words: str) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, words))


@pytest.mark.parametrize(
    ("sums", "least", "exposed"),
    [
        (sets("abcd"), 3, ""),
        (sets("ab"), 3, "ab"),
        (sets("abcd", "bcd"), 3, "a"),
        (sets("abcd", "abc", "abcd"), 3, "d"),
        (sets("abcde", "cdefg"), 3, ""),
        (sets("abcde", "cdefg"), 5, "abfg"),
        # No two of them differ by few names: 7 is what is left of all three.
        (sets("123456", "123", "4567"), 3, "7"),
        (sets("123456", "456789", "123789"), 3, ""),
        # With two conspirators, three names in a difference are one honest update.
        (sets("abcdefg", "defg"), 4, "abc"),
    ],
)
def test_the_few_that_a_combination_exposes(sums, least: int, exposed: str) -> None:
    assert exposed_by(sums, least) == sorted(exposed)


def slowly(sums, least: int, coefficients=range(-3, 4)) -> int:
    """Fewest names of any combination with small coefficients."""
    names = sorted(frozenset().union(*sums))
    found = [
        sum(sum(c for c, one in zip(chosen, sums, strict=True) if name in one) != 0 for name in names)
        for chosen in product(coefficients, repeat=len(sums))
    ]
    fewest = min((count for count in found if count), default=len(names))
    return fewest if fewest < least else 0


def test_it_finds_what_trying_all_small_coefficients_finds() -> None:
    rng, n_exposed = random.Random(0), 0
    for _ in range(300):
        names = "abcdefghij"[: rng.randint(4, 10)]
        sums = tuple(
            {frozenset(rng.sample(names, rng.randint(3, len(names)))) for _ in range(rng.randint(1, 4))}
        )
        least = rng.randint(2, 5)
        exposed, expected = exposed_by(sums, least), slowly(sums, least)
        assert bool(exposed) == bool(expected), (sums, least)
        assert expected <= len(exposed) < least
        n_exposed += bool(exposed)
    assert 50 < n_exposed < 250


def test_the_ledger_remembers_over_restarts_and_counts_each_quantity_alone(tmp_path) -> None:
    UnmaskLedger(tmp_path).spend({"model text votes 0": "abcd"}, 3)
    for _ in range(2):
        with pytest.raises(SecureError, match="differ by a only"):
            UnmaskLedger(tmp_path).spend({"model text votes 1": "bcd", "model text votes 0": "bcd"}, 3)
    UnmaskLedger(tmp_path).spend({"model text votes 0": "dcba"}, 3)
    UnmaskLedger(tmp_path).spend({"model text sums 0": "bcd"}, 3)
    UnmaskLedger(tmp_path).spend({"model text votes 1": "abc"}, 3)


def test_an_update_that_was_sent_into_the_dark_binds_the_participants(tmp_path) -> None:
    """A server may have opened another sum than the one that this participant was asked to sign, or none."""
    ledger = UnmaskLedger(tmp_path)
    ledger.contribute("run 1", {"x": "abcdef"}, "abcdef", BOUNDS)
    for other in ("abcde", "abcdefg", "abc"):
        with pytest.raises(SecureError, match="let the same participants take part"):
            UnmaskLedger(tmp_path).contribute("run 2", {"x": other}, other, BOUNDS)
    ledger.contribute("run 2", {"x": "abcde"}, "abcdef", BOUNDS)
    ledger.contribute("run 3", {"y": "abcd"}, "abcd", BOUNDS)
    for run in ("run 1", "run 2"):
        ledger.settle(run, ["x"])
    ledger.contribute("run 2", {"x": "abcde"}, "abcdef", BOUNDS)  # the run was killed, and goes on
    ledger.contribute("run 4", {"x": "abcdefghi"}, "abcdefghi", BOUNDS)


def test_a_run_whose_sums_would_expose_a_few_binds_nobody(tmp_path) -> None:
    ledger = UnmaskLedger(tmp_path)
    ledger.spend({"x": "abcd"}, 3)
    with pytest.raises(SecureError, match="differ by a only"):
        ledger.contribute("run 2", {"x": "bcd"}, "bcd", BOUNDS)
    ledger.contribute("run 3", {"x": "abcd"}, "abcd", BOUNDS)


@pytest.mark.parametrize(
    ("new", "limit", "refused"),
    [("n", 3, False), ("nop", 4, True), ("nopq", 5, False), ("nopqrstu", 7, False)],
)
def test_newcomers_cannot_open_a_sum_close_to_an_earlier_one(
    tmp_path, new: str, limit: int, refused: bool
) -> None:
    """Three newcomers and the conspirator w sign {b, c, w, n}, which differs from {a, b, c, w} by a and n."""
    ledger, participants = UnmaskLedger(tmp_path), "bcw" + new
    ledger.spend({"x": "abcw"}, 3)
    assert limit == threshold(len(participants), 1)
    bounds = Bounds(least=3, limit=limit, max_colluding=1)
    if new == "n":
        with pytest.raises(SecureError, match="differ by a, n only"):
            ledger.contribute("run", {"x": participants}, participants, bounds)
    elif refused:
        with pytest.raises(SecureError, match="3 of 6 participants were in no earlier sum of the same text"):
            ledger.contribute("run", {"x": participants}, participants, bounds)
    else:
        ledger.contribute("run", {"x": participants}, participants, bounds)


def test_only_so_many_different_sums_are_opened(tmp_path) -> None:
    ledger, names = UnmaskLedger(tmp_path), "abcdefghijklmnopqrstuvwxyz"
    for start in range(0, 16, 4):
        ledger.spend({"x": names[start : start + 4]}, 3)
    ledger.spend({"x": names[:4]}, 3)
    with pytest.raises(SecureError, match="4 sums of the same text over different participants"):
        ledger.spend({"x": names[16:20]}, 3)


def test_a_damaged_ledger_is_not_taken_for_an_empty_one(tmp_path) -> None:
    ledger = UnmaskLedger(tmp_path)
    ledger.spend({"x": "abcd"}, 3)
    path = tmp_path / "unmasked.json"
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(SecureError, match="restore it"):
        ledger.spend({"x": "bcd"}, 3)
