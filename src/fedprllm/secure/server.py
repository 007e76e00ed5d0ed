"""The server's side of secure aggregation: it passes messages on, and takes the masks off sums."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping

from fedprllm.errors import SecureError, UpdateError
from fedprllm.secure import keys
from fedprllm.secure.advert import Advert
from fedprllm.secure.participant import SESSION_BYTES, pair_key, self_key
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
        self._read: dict[str, Advert] = {}

    def take_advert(self, name: str, advert: bytes) -> None:
        """Keep a participant's public keys for the others.

        Raises:
            UpdateError: They are not the keys of this participant for this session.
        """
        try:
            read = Advert.read(advert)
        except SecureError as error:
            raise UpdateError(f"participant '{name}': {error}") from None
        if (read.name, read.session) != (name, self.session):
            raise UpdateError(f"participant '{name}' has sent keys of another participant or session")
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
        streams = []
        for dealer in self.contributors(name):
            shares = {holder: self._share(answers, holder, dealer) for holder in answers}
            streams += self._streams_of(name, dealer, shares, survivors)
        apply_streams(total, streams)

    @staticmethod
    def _share(answers: Mapping[str, Mapping[str, bytes]], holder: str, dealer: str) -> int:
        if dealer not in answers[holder]:
            raise UpdateError(f"participant '{holder}' gave no share of the secrets of '{dealer}'")
        return int.from_bytes(answers[holder][dealer], "little")

    def _streams_of(
        self, name: str, dealer: str, shares: Mapping[str, int], survivors: Collection[str]
    ) -> list[tuple[bytes, bool]]:
        """The masks that a contributor's secret takes off the sum, each with whether to add it."""
        advert = self._advert(dealer)
        if dealer in survivors:
            seed = self._restored(
                dealer, shares, lambda secret: keys.digest(b"seed", secret) == advert.seeds[name]
            )
            return [(self_key(seed, self.session, name, dealer), False)]
        private = self._restored(dealer, shares, lambda secret: keys.public_of(secret) == advert.masks[name])
        return [
            (
                pair_key(
                    keys.agreed(private, self._advert(survivor).masks[name]),
                    self.session,
                    name,
                    dealer,
                    survivor,
                ),
                dealer < survivor,
            )
            for survivor in survivors
        ]

    def _restored(self, dealer: str, shares: Mapping[str, int], is_right: Callable[[bytes], bool]) -> bytes:
        """A secret from any shares that restore it; one wrong share does no harm if there is one to spare."""
        order = sorted(self.adverts)
        for holders in self._holders(sorted(shares)):
            secret = combine({order.index(holder) + 1: shares[holder] for holder in holders})
            if is_right(secret):
                return secret
        raise UpdateError(
            f"the shares of participant '{dealer}' do not restore its secret: a participant has given wrong "
            "ones; begin the run again"
        )

    def _holders(self, names: list[str]) -> Iterator[list[str]]:
        yield names[: self.limit]
        if len(names) > self.limit:
            for left_out in names[: self.limit]:
                yield [name for name in names if name != left_out][: self.limit]

    def _advert(self, name: str) -> Advert:
        if name not in self._read:
            self._read[name] = Advert.read(self.adverts[name])
        return self._read[name]
