"""A participant's side of secure aggregation.

| step | asked | answered |
|---|---|---|
| advertise | session, terms | its public keys for this session, signed |
| share | everyone's public keys | a sealed box of shares of its secrets for each other participant |
| receive | the boxes for it | |
| mask | (its own update) | the update under masks |
| agree | whose updates have arrived | its signature that it was told this list |
| unmask | enough signatures on the same list | one share of each contributor's secrets |

In a sum that a contributor survived, the share is of the seed of its own mask; if its update did not arrive,
of the key behind the masks that it has in common with the others. Never both: together they would open its
update. Everything is checked against this participant's own roster and limits; the server is not trusted.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.errors import SecureError
from fedprllm.secure import keys
from fedprllm.secure.advert import Advert
from fedprllm.secure.journal import Entry, Journal, once
from fedprllm.secure.shamir import SECRET_BYTES, SHARE_BYTES, split
from fedprllm.secure.terms import Limits, Roster, Terms

if TYPE_CHECKING:
    from fedprllm.secure.words import Words

__all__ = ["SESSION_BYTES", "SecureParticipant", "pair_key", "self_key", "statement"]

SESSION_BYTES = 16

_STEPS = ("advertise", "share", "receive")

# The shares that one participant holds of another's secrets for a sum: of its mask key, and of its self seed.
_Pair = tuple[bytes, bytes]


def pair_key(secret: bytes, session: bytes, name: str, one: str, other: str) -> bytes:
    """Key of the mask that two contributors to a sum have in common."""
    return keys.derive(secret, b"pair", session, name.encode(), *sorted((one.encode(), other.encode())))


def self_key(seed: bytes, session: bytes, name: str, participant: str) -> bytes:
    """Key of the mask that a contributor to a sum has to itself."""
    return keys.derive(seed, b"self", session, name.encode(), participant.encode())


def statement(
    session: bytes,
    context: bytes,
    adverts: bytes,
    members: Collection[str],
    survivors: Mapping[str, Collection[str]],
    decisions: bytes,
) -> bytes:
    """What participants sign before anything is unmasked.

    Args:
        session: The session.
        context: `Terms.context`.
        adverts: Digest of all adverts.
        members: Participants whose shares everybody holds.
        survivors: Participants whose updates arrived, by name of the sum.
        decisions: Digest of all decisions so far, if participants follow them.
    """
    return keys.canonical(
        {
            "session": session.hex(),
            "context": context.hex(),
            "adverts": adverts.hex(),
            "members": sorted(members),
            "survivors": {name: sorted(names) for name, names in survivors.items()},
            "decisions": decisions.hex(),
        }
    )


class SecureParticipant:
    """One participant in one session.

    Args:
        name: Its name in the roster.
        identity: Its signing key.
        roster: The pinned roster.
        limits: Its own limits.
        journal: Its answers so far; a participant that was killed continues from them.

    Raises:
        SecureError: The roster holds another key for this name, or the journal is damaged.
    """

    def __init__(
        self, name: str, identity: Ed25519PrivateKey, roster: Roster, limits: Limits, journal: Journal
    ) -> None:
        if roster.key_of(name) != identity.public_key().public_bytes_raw():
            raise SecureError(f"the roster holds another key for '{name}': pin a roster with the present key")
        self.name, self._identity, self._roster = name, identity, roster
        self._limits, self._journal = limits, journal
        self._members: list[str] = []
        self._terms = Terms({})
        self._restore()

    def _restore(self) -> None:
        for step, remember in (
            ("advertise", self._remember_keys),
            ("share", self._remember_adverts),
            ("receive", self._remember_boxes),
        ):
            entry = self._journal.read(step)
            if entry is None:
                return
            remember(entry)

    @property
    def terms(self) -> Terms:
        """The terms of the session; empty before its keys were made."""
        return self._terms

    @property
    def limit(self) -> int:
        """The threshold of the session, once its keys were made."""
        return self._limit

    def check_order(self, step: str) -> None:
        """Check that the step before this one was taken.

        Raises:
            SecureError: It was not.
        """
        before = _STEPS[_STEPS.index(step) - 1]
        if self._journal.read(before) is None:
            raise SecureError(f"the step '{step}' was asked for before '{before}'")

    # ---- 1: keys -------------------------------------------------------------------------------------

    def advertise(self, session: bytes, terms: Terms) -> bytes:
        """Make this session's keys; returns the public ones, signed.

        Raises:
            SecureError: The terms violate this participant's limits, or were others before.
        """
        if len(session) != SESSION_BYTES:
            raise SecureError(f"session: expected {SESSION_BYTES} bytes, found {len(session)}")
        limit = terms.check(self._limits)
        for name in terms.participants:
            self._roster.key_of(name)
        mine = [name for name in terms.sums if self.name in terms.contributors[name]]
        if not mine:
            raise SecureError(f"'{self.name}' contributes to no sum of this session")
        question = keys.canonical({"session": session.hex(), **terms.as_json()})

        def make() -> tuple[bytes, bytes]:
            secret = [keys.new_private() for _ in range(1 + len(mine))]
            seeds = [secrets.token_bytes(SECRET_BYTES) for _ in mine]
            advert = Advert(
                self.name,
                session,
                terms.context(limit),
                keys.public_of(secret[0]),
                {name: keys.public_of(key) for name, key in zip(mine, secret[1:], strict=True)},
                {name: keys.digest(b"seed", seed) for name, seed in zip(mine, seeds, strict=True)},
            )
            return advert.signed(self._identity), b"".join([*secret, *seeds])

        entry = once(self._journal, "advertise", question, make)
        self._remember_keys(entry)
        return entry.answer

    def _remember_keys(self, entry: Entry) -> None:
        asked = json.loads(entry.question)
        self._session = bytes.fromhex(asked["session"])
        self._terms = Terms(asked["contributors"], asked["about"])
        self._limit = self._terms.check(self._limits)
        self._least = max(self._limit, self._limits.min_sum)
        self._context = self._terms.context(self._limit)
        self._mine = [name for name in self._terms.sums if self.name in self._terms.contributors[name]]
        kept = [entry.kept[i : i + SECRET_BYTES] for i in range(0, len(entry.kept), SECRET_BYTES)]
        self._box_private = kept[0]
        self._mask_private = dict(zip(self._mine, kept[1 : 1 + len(self._mine)], strict=True))
        self._seeds = dict(zip(self._mine, kept[1 + len(self._mine) :], strict=True))

    # ---- 2: shares -----------------------------------------------------------------------------------

    def share(self, adverts: Mapping[str, bytes]) -> dict[str, bytes]:
        """Split this participant's secrets; returns a sealed box for each other participant.

        Args:
            adverts: What each participant answered to `advertise`, by name.

        Raises:
            SecureError: An advert is not from a participant of the roster, or was made for another session
                or other terms; there are too few; or they were others before.
        """
        self.check_order("share")
        question = keys.canonical({name: advert.hex() for name, advert in adverts.items()})
        if self._journal.read("share") is None:
            self._check_adverts(adverts)

        def make() -> tuple[bytes, bytes]:
            self._read_adverts(adverts)
            dealt: dict[str, list[bytes]] = {name: [] for name in self._order}
            for name in self._mine:
                for secret in (self._mask_private[name], self._seeds[name]):
                    parts = split(secret, self._limit, len(self._order))
                    for holder, part in zip(self._order, parts, strict=True):
                        dealt[holder].append(part.to_bytes(SHARE_BYTES, "little"))
            own = b"".join(dealt.pop(self.name))
            boxes = {
                holder: keys.seal_box(
                    self._box_key(holder, self.name, holder), b"".join(parts), self._adverts_digest
                ).hex()
                for holder, parts in dealt.items()
            }
            return keys.canonical(boxes), own

        entry = once(self._journal, "share", question, make)
        self._remember_adverts(entry)
        return {name: bytes.fromhex(box) for name, box in json.loads(entry.answer).items()}

    def _check_adverts(self, adverts: Mapping[str, bytes]) -> None:
        if len(adverts) < self._least:
            raise SecureError(f"{len(adverts)} participants advertised keys: expected at least {self._least}")
        if self.name not in adverts:
            raise SecureError(f"the list of adverts lacks '{self.name}' itself")
        seen: set[bytes] = set()
        for name, message in adverts.items():
            if not Advert.is_signed(message, self._roster.key_of(name)):
                raise SecureError(f"the advert of '{name}' is not signed by the key in the pinned roster")
            self._check_advert(name, Advert.read(message), seen)

    def _check_advert(self, name: str, advert: Advert, seen: set[bytes]) -> None:
        if advert.name != name or advert.session != self._session:
            raise SecureError(f"the advert of '{name}' is of another participant or session")
        if advert.context != self._context:
            raise SecureError(
                f"'{name}' was asked for something else: the model, the configuration, the participants or "
                "their limits differ"
            )
        expected = [sum_ for sum_ in self._terms.sums if name in self._terms.contributors[sum_]]
        if sorted(advert.masks) != expected:
            raise SecureError(f"the advert of '{name}' has keys for other sums than the terms name")
        for key in (advert.box, *advert.masks.values()):
            if key in seen:
                raise SecureError(f"a key of '{name}' occurs twice")
            seen.add(key)

    def _read_adverts(self, adverts: Mapping[str, bytes]) -> None:
        self._order = sorted(adverts)
        self._peers = {name: Advert.read(adverts[name]) for name in self._order}
        self._adverts_digest = keys.digest(*(adverts[name] for name in self._order))

    def _remember_adverts(self, entry: Entry) -> None:
        asked = json.loads(entry.question)
        self._read_adverts({name: bytes.fromhex(advert) for name, advert in asked.items()})
        self._held = {self.name: self._shares(self.name, entry.kept)}

    def _shares(self, dealer: str, content: bytes) -> dict[str, _Pair]:
        """The shares of a dealer's secrets, by name of the sum."""
        names = sorted(self._peers[dealer].masks)
        if len(content) != 2 * SHARE_BYTES * len(names):
            raise SecureError(f"the box of '{dealer}' holds another number of shares than it has secrets")
        parts = [content[i : i + SHARE_BYTES] for i in range(0, len(content), SHARE_BYTES)]
        return {name: (parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(names)}

    def _box_key(self, other: str, dealer: str, holder: str) -> bytes:
        secret = keys.agreed(self._box_private, self._peers[other].box)
        return keys.derive(secret, b"box", self._session, dealer.encode(), holder.encode())

    # ---- 3: boxes ------------------------------------------------------------------------------------

    def receive(self, boxes: Mapping[str, bytes]) -> None:
        """Open the boxes that the other participants made for this one.

        Raises:
            SecureError: A box is damaged or from nobody in the list, there are too few, or they were others
                before.
        """
        self.check_order("receive")
        question = keys.canonical({name: box.hex() for name, box in boxes.items()})
        for name in boxes:
            if name not in self._peers or name == self.name:
                raise SecureError(f"a box from '{name}', which advertised no keys")
        if len(boxes) + 1 < self._least:
            raise SecureError(f"{len(boxes) + 1} participants shared keys: expected at least {self._least}")
        opened = {name: self._opened(name, box) for name, box in boxes.items()}
        self._remember_shares(opened, once(self._journal, "receive", question, lambda: (b"", b"")))

    def _opened(self, dealer: str, box: bytes) -> dict[str, _Pair]:
        content = keys.open_box(self._box_key(dealer, dealer, self.name), box, self._adverts_digest)
        return self._shares(dealer, content)

    def _remember_boxes(self, entry: Entry) -> None:
        boxes = {name: bytes.fromhex(box) for name, box in json.loads(entry.question).items()}
        self._remember_shares({name: self._opened(name, box) for name, box in boxes.items()}, entry)

    def _remember_shares(self, opened: Mapping[str, dict[str, _Pair]], entry: Entry) -> None:
        self._held |= opened
        self._members = sorted([*json.loads(entry.question), self.name])

    @property
    def has_shares(self) -> bool:
        """Whether the boxes have been received."""
        return bool(self._members)

    # ---- 4: the update -------------------------------------------------------------------------------

    def mask(self, name: str, words: Words) -> Words:
        """Hide an update: add the own mask, and those that cancel out with the other contributors'.

        Args:
            name: Name of the sum.
            words: The update, uint64 [n].

        Raises:
            SecureError: The sum would have too few contributors, or another update was masked before.
        """
        others = self._contributors(name)
        if self.name not in others:
            raise SecureError(f"'{self.name}' does not contribute to '{name}'")
        if len(others) < self._least:
            raise SecureError(
                f"'{name}' has {len(others)} contributors left: expected at least {self._least}"
            )
        # Processes that only pass messages on never need these.
        import numpy as np

        from fedprllm.secure.streams import apply_streams

        question = keys.digest(b"words", words.astype("<u8", copy=False).tobytes())

        def make() -> tuple[bytes, bytes]:
            hidden = words.copy()
            streams = [(self_key(self._seeds[name], self._session, name, self.name), True)]
            streams += [
                (self._pair(name, other), self.name < other) for other in others if other != self.name
            ]
            apply_streams(hidden, streams)
            return hidden.astype("<u8", copy=False).tobytes(), b""

        return np.frombuffer(once(self._journal, f"mask {name}", question, make).answer, "<u8").copy()

    def _contributors(self, name: str) -> list[str]:
        if name not in self._terms.contributors:
            raise SecureError(f"'{name}' is no sum of this session")
        if not self._members:
            raise SecureError("no update can be masked before the shares of secrets have been exchanged")
        return [member for member in self._members if member in self._terms.contributors[name]]

    def _pair(self, name: str, other: str) -> bytes:
        secret = keys.agreed(self._mask_private[name], self._peers[other].masks[name])
        return pair_key(secret, self._session, name, self.name, other)

    # ---- 5 and 6: agreement, and shares of the masks ---------------------------------------------------

    def check_survivors(self, survivors: Mapping[str, Collection[str]]) -> None:
        """Check lists of survivors before anything is signed or remembered.

        Raises:
            SecureError: A list has too few names or others than contributors, or there is no list.
        """
        if not survivors:
            raise SecureError("a list of no sums cannot be agreed on")
        for name, names in survivors.items():
            if len(set(names)) != len(names) or not set(names) <= set(self._contributors(name)):
                raise SecureError(f"the survivors of '{name}' are not among its contributors")
            if len(names) < self._least:
                raise SecureError(f"'{name}': a sum of {len(names)} updates, expected at least {self._least}")

    def agree(self, survivors: Mapping[str, Collection[str]], decisions: bytes = b"") -> bytes:
        """Sign whose updates have arrived, once for every sum.

        Args:
            survivors: Participants whose updates arrived, by name of the sum.
            decisions: Digest of all decisions so far, if participants follow them.

        Raises:
            SecureError: `check_survivors` refuses them, or a list was another before.
        """
        self.check_survivors(survivors)
        question = self._statement(survivors, decisions)
        entry = Entry(b"", b"")
        for name in sorted(survivors):
            entry = once(self._journal, f"agree {name}", question, lambda: (self._signature(question), b""))
        return entry.answer

    def _signature(self, said: bytes) -> bytes:
        return keys.sign(self._identity, b"agree", said)

    def _statement(self, survivors: Mapping[str, Collection[str]], decisions: bytes) -> bytes:
        return statement(
            self._session, self._context, self._adverts_digest, self._members, survivors, decisions
        )

    def unmask(
        self,
        survivors: Mapping[str, Collection[str]],
        signatures: Mapping[str, bytes],
        decisions: bytes = b"",
    ) -> dict[str, dict[str, bytes]]:
        """Give one share of each contributor's secrets, by name of the sum and name of the contributor.

        Args:
            survivors: The same as `agree` was asked.
            signatures: Answers to `agree` by name, at least as many as the threshold.
            decisions: The same as `agree` was asked.

        Raises:
            SecureError: This participant has not signed these survivors, or too few others have.
        """
        signed = {name: self._journal.read(f"agree {name}") for name in survivors}
        said = self._statement(survivors, decisions) if self.has_shares else b""
        for name, entry in signed.items():
            if entry is None or entry.question != said:
                raise SecureError(f"'{name}': this participant has not agreed to these survivors")
        if len(signatures) < self._limit:
            raise SecureError(f"{len(signatures)} participants agreed: expected at least {self._limit}")
        for name, signature in signatures.items():
            if name not in self._members or not keys.is_signed(
                self._roster.key_of(name), signature, b"agree", said
            ):
                raise SecureError(f"'{name}' has agreed to other survivors, or is not in the list")
        return {
            name: {
                dealer: self._held[dealer][name][1 if dealer in names else 0]
                for dealer in self._contributors(name)
            }
            for name, names in survivors.items()
        }

    def settle(self, name: str) -> None:
        """Forget the masked update of a sum that is known; it is not given again."""
        self._journal.write(f"mask {name}", Entry(b"settled", b""))

    def finish(self) -> None:
        """Forget the session and its keys."""
        self._journal.delete()
