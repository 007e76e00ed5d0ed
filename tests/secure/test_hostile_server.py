"""What a server that does not keep to the protocol asks for, and that it gets no answer."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.errors import SecureError, UpdateError
from fedprllm.secure import keys
from fedprllm.secure.advert import Advert
from fedprllm.secure.journal import FileJournal, MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.terms import Limits, Roster, Terms
from tests.secure.sessions import Session, new_session, plain_sum, random_words


@pytest.fixture
def session() -> Session:
    return new_session(4)


def advertised(session: Session) -> dict[str, bytes]:
    return {
        name: one.advertise(session.server.session, session.terms)
        for name, one in session.participants.items()
    }


# ---- keys --------------------------------------------------------------------------------------------


def test_a_minted_participant_is_in_no_roster(session: Session) -> None:
    """The server has made up a participant that signs with a key of its own."""
    identity = Ed25519PrivateKey.generate()
    terms = Terms({name: [*names, "eve"] for name, names in session.terms.contributors.items()})
    roster = Roster({**session.roster.keys, "eve": identity.public_key().public_bytes_raw()})
    eve = SecureParticipant("eve", identity, roster, Limits(), MemoryJournal())
    with pytest.raises(SecureError, match="'eve' is not in the pinned roster"):
        session.participants["p00"].advertise(session.server.session, terms)
    adverts = {**advertised(session), "eve": eve.advertise(session.server.session, terms)}
    with pytest.raises(SecureError, match="'eve' is not in the pinned roster"):
        session.participants["p00"].share(adverts)


def test_a_replaced_key_is_not_signed(session: Session) -> None:
    adverts = advertised(session)
    adverts["p01"] = adverts["p01"].replace(b'"box":"', b'"box":"00', 1)
    with pytest.raises(SecureError, match="advert of 'p01' is not signed by the key in the pinned roster"):
        session.participants["p00"].share(adverts)


def test_another_identity_under_a_known_name_is_refused(session: Session) -> None:
    identity = Ed25519PrivateKey.generate()
    roster = Roster({**session.roster.keys, "p01": identity.public_key().public_bytes_raw()})
    double = SecureParticipant("p01", identity, roster, Limits(), MemoryJournal())
    adverts = {**advertised(session), "p01": double.advertise(session.server.session, session.terms)}
    with pytest.raises(SecureError, match="advert of 'p01' is not signed"):
        session.participants["p00"].share(adverts)


def test_a_participant_refuses_a_roster_with_another_key_of_its_own(session: Session) -> None:
    with pytest.raises(SecureError, match="the roster holds another key for 'p00'"):
        SecureParticipant("p00", Ed25519PrivateKey.generate(), session.roster, Limits(), MemoryJournal())


def test_an_advert_under_another_name_is_refused(session: Session) -> None:
    adverts = advertised(session)
    adverts["p02"] = adverts["p01"]
    with pytest.raises(SecureError, match="advert of 'p02' is not signed"):
        session.participants["p00"].share(adverts)


@pytest.mark.parametrize("change", ["configuration", "session", "sums", "limits"])
def test_a_participant_that_was_asked_for_something_else_is_noticed(session: Session, change: str) -> None:
    adverts = advertised(session)
    terms, own_session, limits = session.terms, session.server.session, session.limits
    if change == "configuration":
        terms = replace(terms, about={"run": "test", "criterion": "magnitude"})
    elif change == "session":
        own_session = bytes(16)
    elif change == "sums":
        terms = Terms(
            {name: names for name, names in terms.contributors.items() if name == "block 0"}, terms.about
        )
    else:
        limits = Limits(max_colluding=2)  # another threshold
    other = SecureParticipant("p03", session.identities["p03"], session.roster, limits, MemoryJournal())
    adverts["p03"] = other.advertise(own_session, terms)
    with pytest.raises(SecureError, match=r"'p03' (is of another|was asked for something else)"):
        session.participants["p00"].share(adverts)


def test_a_key_that_occurs_twice_is_refused(session: Session) -> None:
    """A participant that copies another's keys would be the other's double in every mask."""
    adverts = advertised(session)
    copied = replace(Advert.read(adverts["p01"]), name="p02")
    adverts["p02"] = copied.signed(session.identities["p02"])
    with pytest.raises(SecureError, match="a key of 'p02' occurs twice"):
        session.participants["p00"].share(adverts)


def test_a_key_with_which_everybody_agrees_on_the_same_secret_is_refused(session: Session) -> None:
    adverts = advertised(session)
    degenerate = replace(Advert.read(adverts["p01"]), box=bytes(32))
    adverts["p01"] = degenerate.signed(session.identities["p01"])
    with pytest.raises(SecureError, match="public key for key agreement is not valid"):
        session.participants["p00"].share(adverts)


def test_steps_out_of_order_are_refused_in_words(session: Session) -> None:
    one = session.participants["p00"]
    for ask, words in (
        (lambda: one.share({}), "'share' was asked for before 'advertise'"),
        (lambda: one.receive({}), "'receive' was asked for before 'share'"),
        (lambda: one.agree(FULL), "'block 0' is no sum of this session"),
        (lambda: one.unmask(FULL, {}), "has not agreed to these survivors"),
    ):
        with pytest.raises(SecureError, match=words):
            ask()


def test_too_few_participants_get_no_shares(session: Session) -> None:
    adverts = advertised(session)
    with pytest.raises(SecureError, match="2 participants advertised keys: expected at least 3"):
        session.participants["p00"].share({name: adverts[name] for name in ("p00", "p01")})
    with pytest.raises(SecureError, match="lacks 'p00' itself"):
        session.participants["p00"].share({name: adverts[name] for name in ("p01", "p02", "p03")})


BODIES = [
    b"",
    b"[]",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"box":1,"context":1,"name":"p01","session":1,"sums":1}',
    b'{"box":"","context":"","name":"p01","session":"","sums":{}}',
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body[:20]))
def test_an_advert_that_its_participant_signed_may_still_be_anything(session: Session, body: bytes) -> None:
    """A participant that conspires with the server signs whatever it likes."""
    adverts = advertised(session)
    adverts["p01"] = keys.sign(session.identities["p01"], b"advert", body) + body
    with pytest.raises(SecureError, match="an advert of keys"):
        session.participants["p00"].share(adverts)
    with pytest.raises(UpdateError, match="participant 'p01': an advert of keys"):
        session.server.take_advert("p01", adverts["p01"])


def test_an_advert_has_one_spelling(session: Session) -> None:
    body, rng = advertised(session)["p01"][64:], random.Random(0)
    n_read = 0
    for _ in range(3000):
        start = rng.randrange(len(body))
        new = rng.choice([b"", b" ", rng.randbytes(1), b"0", b'"', body[start : start + 2]])
        broken = body[:start] + new + body[start + rng.randint(0, 2) :]
        try:
            advert = Advert.read(bytes(64) + broken)
        except SecureError:
            continue
        n_read += 1
        assert advert._body == broken
    assert 10 < n_read < 2000


def test_a_server_takes_only_what_a_participant_may_send(session: Session) -> None:
    adverts = advertised(session)
    with pytest.raises(UpdateError, match="participant 'p02' has sent keys of another participant"):
        session.server.take_advert("p02", adverts["p01"])
    session.server.adverts = adverts
    boxes = session.participants["p00"].share(adverts)
    del boxes["p03"]
    with pytest.raises(UpdateError, match="participant 'p00' has not made a box of shares for each"):
        session.server.take_boxes("p00", boxes)


# ---- boxes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["altered", "swapped", "of another session", "of nobody", "too few"])
def test_boxes_that_were_tampered_with_are_refused(session: Session, change: str) -> None:
    adverts = advertised(session)
    session.server.adverts = adverts
    for name, one in session.participants.items():
        session.server.take_boxes(name, one.share(adverts))
    boxes = session.server.boxes_for("p00")
    words = "changed on its way or belongs to another session"
    if change == "altered":
        boxes["p01"] = boxes["p01"][:-1] + bytes([boxes["p01"][-1] ^ 1])
    elif change == "swapped":
        boxes["p01"], boxes["p02"] = boxes["p02"], boxes["p01"]
    elif change == "of another session":
        other = new_session(4)
        other.exchange()
        boxes["p01"] = other.server.boxes_for("p00")["p01"]
    elif change == "of nobody":
        boxes["eve"], words = boxes["p01"], "'eve', which advertised no keys"
    else:
        boxes, words = {"p01": boxes["p01"]}, "2 participants shared keys: expected at least 3"
    with pytest.raises(SecureError, match=words):
        session.participants["p00"].receive(boxes)


# ---- masks and agreement -----------------------------------------------------------------------------


def ready(session: Session) -> dict[str, np.ndarray]:
    updates = random_words(session)
    session.exchange()
    for sum_ in session.terms.sums:
        session.collect(sum_, updates)
    return updates


def test_two_updates_are_never_hidden_under_the_same_mask(session: Session) -> None:
    """Their difference would be in the clear."""
    updates = ready(session)
    one = session.participants["p00"]
    assert np.array_equal(one.mask("block 0", updates["p00"]), session.sent["block 0"]["p00"])
    with pytest.raises(SecureError, match="mask block 0: asked a second time with another content"):
        one.mask("block 0", updates["p00"] + np.uint64(1))


def test_nothing_is_masked_before_shares_were_exchanged(session: Session) -> None:
    updates = random_words(session)
    advertised(session)
    with pytest.raises(SecureError, match="before the shares of secrets have been exchanged"):
        session.participants["p00"].mask("block 0", updates["p00"])


def test_only_sums_of_the_session_are_masked(session: Session) -> None:
    updates = ready(session)
    with pytest.raises(SecureError, match="'block 7' is no sum of this session"):
        session.participants["p00"].mask("block 7", updates["p00"])


Lists = dict[str, list[str]]
ALL = ["p00", "p01", "p02", "p03"]
FULL: Lists = {"block 0": ALL, "block 1": ALL}


def test_a_second_list_of_survivors_is_refused(session: Session) -> None:
    """With two lists, both kinds of shares of one contributor could be asked for."""
    ready(session)
    one = session.participants["p00"]
    one.agree(FULL)
    for lists in ({"block 0": ALL[:3], "block 1": ALL}, {"block 0": ALL}, {"block 1": ALL[:3]}):
        with pytest.raises(SecureError, match="asked a second time with another content"):
            one.agree(lists)
    assert one.agree(FULL) == one.agree(FULL)


BAD_LISTS: dict[str, tuple[Lists, str]] = {
    "too few": ({"block 0": ALL[:2]}, "'block 0': a sum of 2 updates, expected at least 3"),
    "twice": ({"block 0": ["p00", "p01", "p01"]}, "survivors of 'block 0' are not among"),
    "stranger": ({"block 0": [*ALL, "eve"]}, "survivors of 'block 0' are not among"),
    "no sum": ({"block 9": ALL}, "'block 9' is no sum of this session"),
    "nothing": ({}, "a list of no sums"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_cannot_be_is_not_signed(session: Session, case: str) -> None:
    ready(session)
    lists, words = BAD_LISTS[case]
    with pytest.raises(SecureError, match=words):
        session.participants["p00"].agree(lists)


def test_shares_need_the_threshold_of_signatures_on_the_same_list(session: Session) -> None:
    ready(session)
    less: Lists = {"block 0": ALL[:3], "block 1": ALL[:3]}
    signatures = {name: session.participants[name].agree(FULL) for name in ALL[:3]}
    other = session.participants["p03"].agree(less)
    one = session.participants["p00"]
    with pytest.raises(SecureError, match="2 participants agreed: expected at least 3"):
        one.unmask(FULL, {name: signatures[name] for name in ALL[:2]})
    with pytest.raises(SecureError, match="'p03' has agreed to other survivors"):
        one.unmask(FULL, {**signatures, "p03": other})
    with pytest.raises(SecureError, match="'eve' has agreed to other survivors, or is not in the list"):
        one.unmask(FULL, {**signatures, "eve": signatures["p00"]})
    with pytest.raises(SecureError, match="has not agreed to these survivors"):
        one.unmask(less, signatures)
    with pytest.raises(SecureError, match="has not agreed to these survivors"):
        session.participants["p03"].unmask(FULL, signatures)
    assert one.unmask(FULL, signatures)


def test_decisions_are_part_of_what_is_signed(session: Session) -> None:
    """A server that told participants different decisions would get no sum."""
    ready(session)
    lists: Lists = {"block 0": ALL}
    told = {name: (b"one" if name != "p03" else b"another").ljust(32) for name in ALL}
    signatures = {name: session.participants[name].agree(lists, told[name]) for name in ALL}
    with pytest.raises(SecureError, match="'p03' has agreed to other survivors"):
        session.participants["p00"].unmask(lists, signatures, told["p00"])


def test_both_kinds_of_share_of_one_contributor_never_leave(session: Session) -> None:
    """What a participant gives for a contributor that survived does not open the keys of its other masks."""
    updates = random_words(session)
    session.exchange()
    session.collect("block 0", updates, without=["p03"])
    survivors: Lists = {"block 0": ALL[:3]}
    signatures = {name: session.participants[name].agree(survivors) for name in ALL}
    given = {name: session.participants[name].unmask(survivors, signatures)["block 0"] for name in ALL}
    held = {name: session.participants[name]._held for name in ALL}
    for name in ALL:
        for dealer, share in given[name].items():
            mask_share, self_share = held[name][dealer]["block 0"]
            assert share == (mask_share if dealer == "p03" else self_share)
            assert mask_share != self_share


# ---- restarts ----------------------------------------------------------------------------------------


def restarted(session: Session, name: str, journal: Callable[[str], FileJournal]) -> None:
    """Kill a participant and start it again from its journal."""
    session.participants[name] = SecureParticipant(
        name, session.identities[name], session.roster, session.limits, journal(name)
    )


def test_a_participant_that_is_restarted_between_any_two_steps_gives_the_same_bytes(tmp_path) -> None:
    def journal(name: str) -> FileJournal:
        return FileJournal(tmp_path / name)

    session = new_session(4, journals=journal)
    updates, p00 = random_words(session), "p00"

    def twice(step: Callable[[SecureParticipant], object]) -> object:
        first = step(session.participants[p00])
        restarted(session, p00, journal)
        second = step(session.participants[p00])
        assert str(first) == str(second)
        restarted(session, p00, journal)
        return second

    adverts = advertised(session)
    session.server.adverts = adverts
    twice(lambda one: one.advertise(session.server.session, session.terms))
    for name, one in session.participants.items():
        session.server.take_boxes(name, one.share(adverts))
    twice(lambda one: one.share(adverts))
    for name, one in session.participants.items():
        one.receive(session.server.boxes_for(name))
    twice(lambda one: one.receive(session.server.boxes_for(p00)))
    session.collect("block 0", updates)
    twice(lambda one: one.mask("block 0", updates[p00]).tolist())
    survivors: Lists = {"block 0": ALL}
    signatures = {name: one.agree(survivors) for name, one in session.participants.items()}
    twice(lambda one: one.agree(survivors))
    twice(lambda one: one.unmask(survivors, signatures))
    answers = {
        name: one.unmask(survivors, signatures)["block 0"] for name, one in session.participants.items()
    }
    total = plain_sum(session.sent["block 0"], ALL)
    session.server.unmask("block 0", total, ALL, answers)
    assert np.array_equal(total, plain_sum(updates, ALL))
    with pytest.raises(SecureError, match="asked a second time with another content"):
        session.participants[p00].mask("block 0", updates["p01"])


def test_keys_are_readable_by_their_owner_only_and_gone_in_the_end(tmp_path) -> None:
    session = new_session(3, journals=lambda name: FileJournal(tmp_path / name))
    ready(session)
    files = list((tmp_path / "p00").iterdir())
    assert files
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    session.participants["p00"].finish()
    assert not (tmp_path / "p00").exists()


def test_a_damaged_journal_ends_the_session(tmp_path) -> None:
    session = new_session(3, journals=lambda name: FileJournal(tmp_path / name))
    ready(session)
    for file in (tmp_path / "p00").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(SecureError, match="is damaged: begin the run again, in a new session"):
        restarted(session, "p00", lambda name: FileJournal(tmp_path / name))


def test_an_answer_is_on_disk_before_it_is_given(tmp_path, monkeypatch) -> None:
    session = new_session(3, journals=lambda name: FileJournal(tmp_path / name))
    updates = random_words(session)
    session.exchange()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileJournal, "write", full)
    one = session.participants["p00"]
    with pytest.raises(OSError, match="No space"):
        one.mask("block 0", updates["p00"])
    with pytest.raises(OSError, match="No space"):
        one.agree({"block 0": ALL[:3]})


def test_a_replay_of_an_earlier_session_is_refused(session: Session) -> None:
    adverts = advertised(session)
    later = new_session(4)
    later.identities = session.identities
    for name in later.participants:
        later.participants[name] = SecureParticipant(
            name, session.identities[name], session.roster, Limits(), MemoryJournal()
        )
    fresh = {
        name: one.advertise(b"another session!", session.terms) for name, one in later.participants.items()
    }
    fresh["p02"] = adverts["p02"]
    with pytest.raises(SecureError, match="advert of 'p02' is of another participant or session"):
        later.participants["p00"].share(fresh)


def test_the_fingerprint_of_a_roster_tells_every_difference(session: Session) -> None:
    roster = session.roster
    groups = roster.fingerprint.split()
    assert len(groups) == 12
    assert all(len(group) == 5 and group.isdigit() for group in groups)
    reordered = Roster(dict(reversed(roster.keys.items())))
    assert reordered.fingerprint == roster.fingerprint
    for other in ({"p00": bytes(32)}, {"p04": roster.keys["p00"]}):
        assert Roster({**roster.keys, **other}).fingerprint != roster.fingerprint
