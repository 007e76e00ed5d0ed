"""The sum that comes out is the plain sum, whoever drops out and whenever, and nothing else can be read."""

from __future__ import annotations

import numpy as np
import pytest

from fedprllm.errors import SecureError, UpdateError
from fedprllm.secure.in_process import Parties
from fedprllm.secure.terms import Limits, Terms, threshold
from fedprllm.secure.words import n_words, pack_counts, unpack_counts
from tests.secure.sessions import new_session, plain_sum, random_words

LIMITS = {3: Limits(), 4: Limits(), 8: Limits(max_colluding=2), 64: Limits(max_colluding=21)}


@pytest.mark.parametrize(
    ("m", "c", "t"), [(3, 1, 3), (4, 1, 3), (8, 2, 6), (16, 5, 11), (64, 21, 43), (5, 1, 4)]
)
def test_thresholds(m: int, c: int, t: int) -> None:
    assert threshold(m, c) == t


@pytest.mark.parametrize(("m", "c"), [(1, 0), (2, 1), (3, 2), (4, 3), (129, 1)])
def test_too_few_or_too_many_participants_have_no_threshold(m: int, c: int) -> None:
    with pytest.raises(SecureError, match="expected at least"):
        threshold(m, c)


STEPS = ["nobody", "before sharing", "before masking", "between sums", "before agreeing", "before unmasking"]


@pytest.mark.parametrize("m", [3, 4, 8, 64])
@pytest.mark.parametrize("step", STEPS)
def test_a_secure_sum_is_the_plain_sum_with_as_many_dropouts_as_allowed(m: int, step: str) -> None:
    session = new_session(m, limits=LIMITS[m])
    updates = random_words(session)
    gone = [] if step == "nobody" else sorted(updates)[::3][: m - session.server.limit]
    early = gone if step == "before sharing" else []
    unheard = gone if step in ("before masking", "before sharing") else []
    session.exchange(without=early)
    session.collect("block 0", updates, without=unheard)
    session.collect("block 1", updates, without=gone if step == "between sums" else unheard)
    silent = gone if step not in ("nobody", "before unmasking") else []
    totals = session.totals(["block 0", "block 1"], silent, gone)
    for sum_, total in totals.items():
        assert np.array_equal(total, plain_sum(updates, list(session.sent[sum_])))
    expected = m - len(gone) if step == "between sums" else m - len(unheard)
    assert len(session.sent["block 1"]) == expected


@pytest.mark.parametrize("step", ["before masking", "before unmasking"])
def test_one_dropout_more_ends_with_nothing_unmasked(step: str) -> None:
    session = new_session(8, limits=LIMITS[8])
    updates, gone = random_words(session), ["p00", "p03", "p07"]
    session.exchange()
    session.collect("block 0", updates, without=gone if step == "before masking" else ())
    with pytest.raises(
        SecureError, match=r"a sum of 5 updates, expected at least 6|5 participants gave shares"
    ):
        session.totals(["block 0"], without=(), also_without=gone)


def test_sums_that_only_some_contribute_to() -> None:
    names = [f"p{index:02d}" for index in range(5)]
    session = new_session(5, {"a": names, "b": names[:4], "c": names[1:]})
    updates = random_words(session)
    session.exchange()
    for sum_ in "abc":
        session.collect(sum_, updates, without=["p02"] if sum_ == "a" else ())
    for sum_, total in session.totals("abc").items():
        assert np.array_equal(total, plain_sum(updates, list(session.sent[sum_])))
    assert [len(session.sent[sum_]) for sum_ in "abc"] == [4, 4, 4]


def test_sums_may_be_opened_one_after_the_other() -> None:
    session = new_session(4)
    updates = random_words(session)
    session.exchange()
    for sum_ in ("block 0", "block 1"):
        session.collect(sum_, updates)
        assert np.array_equal(session.totals([sum_])[sum_], plain_sum(updates, list(updates)))


@pytest.mark.parametrize("content", ["zeros", "votes"])
def test_masked_words_of_any_update_look_alike(content: str) -> None:
    """Bytes of the masked update against a uniform distribution: the update leaves no trace in them."""
    session = new_session(3)
    n = 2**16
    votes = pack_counts(np.random.default_rng(0).random(n * 21) < 0.5, 3)[:n]
    update = np.zeros(n, np.uint64) if content == "zeros" else votes
    session.exchange()
    session.collect("block 0", dict.fromkeys(session.participants, update))
    for sent in session.sent["block 0"].values():
        counts = np.bincount(sent.view(np.uint8), minlength=256)
        expected = 8 * n / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert 140 < chi_squared < 390, "255 degrees of freedom: mean 255, standard deviation 23"
        ones = np.unpackbits(sent.view(np.uint8)).reshape(n, 64).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 6 * 0.5 / n**0.5, "every bit position is set half of the time"
    first, second, _ = session.sent["block 0"].values()
    assert not np.array_equal(first, second), "equal updates look different"


def test_the_same_chi_squared_finds_an_update_without_masks() -> None:
    votes = pack_counts(np.random.default_rng(0).random(2**16 * 21) < 0.5, 3)
    counts = np.bincount(votes.view(np.uint8), minlength=256)
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) > 10_000


@pytest.mark.parametrize("m", [3, 4])
def test_a_wrong_share_is_found_and_does_no_harm_if_there_is_one_to_spare(m: int) -> None:
    session = new_session(m)
    updates = random_words(session)
    session.exchange()
    session.collect("block 0", updates)
    survivors = {"block 0": sorted(updates)}
    signatures = {name: one.agree(survivors) for name, one in session.participants.items()}
    answers = {
        name: dict(one.unmask(survivors, signatures)["block 0"]) for name, one in session.participants.items()
    }
    answers["p01"]["p02"] = bytes(66)
    total = plain_sum(session.sent["block 0"], list(updates))
    if m > session.server.limit:
        session.server.unmask("block 0", total, survivors["block 0"], answers)
        assert np.array_equal(total, plain_sum(updates, list(updates)))
        return
    with pytest.raises(UpdateError, match="the shares of participant 'p02' do not restore its secret"):
        session.server.unmask("block 0", total, survivors["block 0"], answers)


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 13, 33, 64])
@pytest.mark.parametrize("n", [1, 20, 21, 22, 1000])
def test_counts_are_packed_as_specified(bits: int, n: int) -> None:
    counts = np.random.default_rng(bits).integers(0, 2 ** min(bits, 62), n).astype(np.uint64)
    words = pack_counts(counts, bits)
    k = n_words(n, bits)
    slow = [0] * k
    for index, count in enumerate(counts.tolist()):
        slow[index % k] += count << (bits * (index // k))
    assert words.tolist() == slow
    assert unpack_counts(words, bits, n).tolist() == counts.tolist()


def test_terms_that_leave_a_sum_to_few_are_refused_before_a_key_is_made() -> None:
    names = [f"p{index:02d}" for index in range(5)]
    with pytest.raises(SecureError, match=r"'lone' would be a sum of 1 updates, .* requires at least 4 of 5"):
        new_session(5, {"all": names, "lone": ["p03"]})
    with pytest.raises(SecureError, match="requires at least 5 of 5"):
        Terms({"all": names, "b": names[:4]}).check(Limits(min_sum=5))


def test_all_parties_in_one_process_add_up_any_words() -> None:
    names = ["north", "south", "west"]
    parties = Parties(Terms({"round 0": names, "round 1": names}))
    updates = {
        name: np.random.default_rng(i).integers(0, 2**63, 9, np.uint64) for i, name in enumerate(names)
    }
    for sum_ in ("round 0", "round 1"):
        for name in names:
            parties.add(sum_, name, updates[name])
        assert parties.added(sum_) == names
        assert np.array_equal(parties.total(sum_), plain_sum(updates, names))
    with pytest.raises(SecureError, match="asked a second time"):
        parties.add("round 0", "north", updates["south"])
