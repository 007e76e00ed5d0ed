"""All parties of one session in one process: the participants, and the server that sees only masked words.

    parties = Parties(Terms({"round 0": ["north", "south", "west"]}))
    for name, words in updates.items():
        parties.add("round 0", name, words)
    total = parties.total("round 0")

It protects nobody, because the process holds all keys. It does what a federation does, with the same bits.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.secure.journal import MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Roster, Terms
from fedprllm.secure.words import Words

__all__ = ["Parties"]


class Parties:
    """A session whose keys and shares have been exchanged.

    Args:
        terms: What is added up, by whom.
        limits: Limits of every participant.

    Raises:
        SecureError: A sum would consist of too few updates.
    """

    def __init__(self, terms: Terms, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        identities = {name: Ed25519PrivateKey.generate() for name in terms.participants}
        roster = Roster({name: one.public_key().public_bytes_raw() for name, one in identities.items()})
        self.participants = {
            name: SecureParticipant(name, identity, roster, limits, MemoryJournal())
            for name, identity in identities.items()
        }
        self._server = SecureServer(terms, terms.check(limits))
        self._sums: dict[str, Words] = {}
        self._added: dict[str, list[str]] = {}
        self._exchange(terms)

    def _exchange(self, terms: Terms) -> None:
        server = self._server
        for name, one in self.participants.items():
            server.take_advert(name, one.advertise(server.session, terms))
        for name, one in self.participants.items():
            server.take_boxes(name, one.share(server.adverts))
        for name, one in self.participants.items():
            one.receive(server.boxes_for(name))

    def add(self, sum_: str, name: str, words: Words) -> None:
        """Hide one participant's words, uint64 [n], and add what the server sees of them."""
        masked = self.participants[name].mask(sum_, words)
        self.participants[name].settle(sum_)
        if sum_ in self._sums:
            np.add(self._sums[sum_], masked, out=self._sums[sum_])
        else:
            self._sums[sum_] = masked
        self._added.setdefault(sum_, []).append(name)

    def added(self, sum_: str) -> list[str]:
        """Participants whose words are in a sum, in order."""
        return sorted(self._added[sum_])

    def total(self, sum_: str) -> Words:
        """Take the masks off a sum, uint64 [n]; what it was made of is forgotten."""
        words, names = self._sums.pop(sum_), self.added(sum_)
        survivors = {sum_: names}
        signatures = {name: one.agree(survivors) for name, one in self.participants.items()}
        answers = {name: one.unmask(survivors, signatures)[sum_] for name, one in self.participants.items()}
        self._server.unmask(sum_, words, names, answers)
        return words
