"""Sessions of secure aggregation between honest participants and a server, for the tests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.secure.journal import Journal, MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Roster, Terms
from fedprllm.secure.words import Words


@dataclass
class Session:
    """All parties of a session.

    Attributes:
        sent: The masked words that the server saw, by sum and participant.
    """

    terms: Terms
    identities: dict[str, Ed25519PrivateKey]
    limits: Limits
    participants: dict[str, SecureParticipant]
    server: SecureServer
    sent: dict[str, dict[str, Words]] = field(default_factory=dict)

    @property
    def roster(self) -> Roster:
        return Roster({name: key.public_key().public_bytes_raw() for name, key in self.identities.items()})

    def exchange(self, without: Collection[str] = ()) -> None:
        """Steps 1 to 3; participants in ``without`` vanish after they have advertised their keys."""
        for name, one in self.participants.items():
            self.server.take_advert(name, one.advertise(self.server.session, self.terms))
        there = [name for name in self.participants if name not in without]
        for name in there:
            self.server.take_boxes(name, self.participants[name].share(self.server.adverts))
        for name in there:
            self.participants[name].receive(self.server.boxes_for(name))

    def collect(self, sum_: str, updates: Mapping[str, Words], without: Collection[str] = ()) -> None:
        """Step 4 for one sum."""
        names = [name for name in self.server.contributors(sum_) if name not in without]
        self.sent[sum_] = {name: self.participants[name].mask(sum_, updates[name]) for name in names}

    def totals(
        self, sums: Collection[str], without: Collection[str] = (), also_without: Collection[str] = ()
    ) -> dict[str, Words]:
        """Steps 5 and 6; ``also_without`` vanish between them."""
        survivors = {sum_: sorted(self.sent[sum_]) for sum_ in sums}
        there = [name for name in self.server.members if name not in without]
        signatures = {name: self.participants[name].agree(survivors) for name in there}
        there = [name for name in there if name not in also_without]
        shares = {name: self.participants[name].unmask(survivors, signatures) for name in there}
        found = {}
        for sum_ in sums:
            total = np.add.reduce(list(self.sent[sum_].values()), dtype=np.uint64)
            answers = {name: given[sum_] for name, given in shares.items()}
            self.server.unmask(sum_, total, survivors[sum_], answers)
            found[sum_] = total
        return found


def new_session(
    m: int,
    sums: Collection[str] | Mapping[str, Collection[str]] = ("block 0", "block 1"),
    limits: Limits | None = None,
    journals: Callable[[str], Journal] = lambda name: MemoryJournal(),
    about: Mapping[str, object] | None = None,
) -> Session:
    """A session of m participants named p00, p01, and so on."""
    limits = limits or Limits()
    names = [f"p{index:02d}" for index in range(m)]
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    contributors = sums if isinstance(sums, Mapping) else dict.fromkeys(sums, names)
    terms = Terms(contributors, about or {"run": "test"})
    roster = Roster({name: key.public_key().public_bytes_raw() for name, key in identities.items()})
    participants = {
        name: SecureParticipant(name, key, roster, limits, journals(name)) for name, key in identities.items()
    }
    server = SecureServer(terms, terms.check(limits))
    return Session(terms, identities, limits, participants, server)


def random_words(session: Session, n: int = 257) -> dict[str, Words]:
    """An update of each participant."""
    return {name: np.frombuffer(secrets.token_bytes(8 * n), "<u8").copy() for name in session.participants}


def plain_sum(updates: Mapping[str, Words], names: Collection[str]) -> Words:
    """What the server is meant to learn."""
    return np.add.reduce([updates[name] for name in names], dtype=np.uint64)
