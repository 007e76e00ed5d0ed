"""The server's side of secure aggregation: it passes messages on, and takes the masks off sums."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping

from fedprllm.errors import SecureError, UpdateError
from fedprllm.secure import keys
from fedprllm.secure.participant import SESSION_BYTES, SIGNATURE_BYTES, pair_key, self_key
from fedprllm.secure.shamir import combine
from fedprllm.secure.streams import apply_streams
from fedprllm.secure.terms import Terms
from fedprllm.secure.words import Words

__all__ = ["SecureServer"]


class SecureServer:
    """The server in one session.

    Args:
        terms: What is added up.
        limit: The threshold (`fedprllm.secure.terms.threshold`).
        session: The session; by default, a new one.
    """

    def __init__(self, terms: Terms, limit: int, session: bytes | None = None) -> None:
        self.terms, self.limit = terms, limit
        self.session = session or secrets.token_bytes(SESSION_BYTES)
        self.adverts: dict[str, bytes] = {}
        self._boxes: dict[str, Mapping[str, bytes]] = {}

    def take_advert(self, name: str, advert: bytes) -> None:
        """Keep a participant's public keys for the others."""
        self.adverts[name] = advert

    def take_boxes(self, name: str, boxes: Mapping[str, bytes]) -> None:
        """Keep a participant's boxes for the others.

        Raises:
            UpdateError: It has not made a box for exactly each of the others.
        """
        if set(boxes) != set(self.adverts) - {name}:
            raise UpdateError(f"participant '{name}' has not made a box of shares for each of the others")
        self._boxes[name] = boxes

    @property
    def members(self) -> list[str]:
        """Participants whose boxes have arrived."""
        return sorted(self._boxes)

    def boxes_for(self, name: str) -> dict[str, bytes]:
        """The boxes that the other members made for a participant."""
        return {dealer: boxes[name] for dealer, boxes in self._boxes.items() if dealer != name}

    def contributors(self, name: str) -> list[str]:
        """Members that contribute to a sum."""
        return [member for member in self.members if member in self.terms.contributors[name]]

    def unmask(
        self,
        name: str,
        total: Words,
        survivors: Collection[str],
        answers: Mapping[str, Mapping[str, bytes]],
    ) -> None:
        """Take the masks off a sum, in place.

        Args:
            name: Name of the sum.
            total: Sum of the survivors' masked words, modulo 2^64.
            survivors: Participants whose updates were added up.
            answers: Shares of each contributor's secrets, by name of the participant that gave them.

        Raises:
            SecureError: Fewer participants answered than the threshold.
            UpdateError: Shares do not restore what a participant advertised.
        """
        if len(answers) < self.limit:
            raise SecureError(
                f"{len(answers)} participants gave shares: expected at least {self.limit}; the sum of "
                f"'{name}' stays masked"
            )
        order = sorted(self.adverts)
        holders = sorted(answers)[: self.limit]
        streams = []
        for dealer in self.contributors(name):
            shares = {
                order.index(holder) + 1: int.from_bytes(answers[holder][dealer], "little")
                for holder in holders
            }
            streams += self._streams_of(name, dealer, combine(shares), survivors)
        apply_streams(total, streams)

    def _streams_of(
        self, name: str, dealer: str, secret: bytes, survivors: Collection[str]
    ) -> list[tuple[bytes, bool]]:
        """The masks that a contributor's secret takes off the sum, each with whether to add it."""
        advert = self._advert(dealer)["sums"][name]
        if dealer in survivors:
            if keys.digest(b"seed", secret).hex() != advert["self"]:
                raise self._wrong(dealer)
            return [(self_key(secret, self.session, name, dealer), False)]
        if keys.public_of(secret).hex() != advert["mask"]:
            raise self._wrong(dealer)
        return [
            (pair_key(keys.agreed(secret, public), self.session, name, dealer, survivor), dealer < survivor)
            for survivor in survivors
            for public in [bytes.fromhex(self._advert(survivor)["sums"][name]["mask"])]
        ]

    def _advert(self, name: str) -> dict[str, dict[str, dict[str, str]]]:
        advert: dict[str, dict[str, dict[str, str]]] = json.loads(self.adverts[name][SIGNATURE_BYTES:])
        return advert

    @staticmethod
    def _wrong(dealer: str) -> UpdateError:
        return UpdateError(
            f"the shares of participant '{dealer}' do not restore its secret: a participant has given wrong "
            "ones; begin the run again"
        )
