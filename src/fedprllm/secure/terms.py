"""What participants agree on before a session: who takes part, what is added up, and how many must remain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprllm.errors import SecureError
from fedprllm.secure.keys import canonical, digest

__all__ = ["MAX_PARTICIPANTS", "Limits", "Roster", "Terms", "threshold"]

MAX_PARTICIPANTS = 128  # the lower words of as many numbers add up without overflow
_GROUPS, _DIGITS = 12, 5


@dataclass(frozen=True)
class Roster:
    """The identities of a federation: the public key (Ed25519, 32 bytes) of every participant, by name.

    A participant pins the roster after all have compared its `fingerprint` on another channel, such as by
    telephone. Signatures of anyone else count for nothing, whatever the server says.
    """

    keys: Mapping[str, bytes]

    @property
    def fingerprint(self) -> str:
        """Twelve groups of five digits that are the same only for the same roster."""
        number = int.from_bytes(
            digest(b"roster", canonical({name: key.hex() for name, key in self.keys.items()})), "big"
        )
        groups = [number // 10 ** (_DIGITS * place) % 10**_DIGITS for place in range(_GROUPS)]
        return " ".join(f"{group:0{_DIGITS}}" for group in groups)

    def key_of(self, name: str) -> bytes:
        """A participant's public key.

        Raises:
            SecureError: The roster has no such participant.
        """
        if name not in self.keys:
            raise SecureError(
                f"'{name}' is not in the pinned roster: if it is a new participant, pin the new roster after "
                "comparing its fingerprint with the others'"
            )
        return self.keys[name]


@dataclass(frozen=True)
class Limits:
    """A participant's own limits, which no message can change.

    Attributes:
        min_sum: Fewest updates that a sum may consist of.
        max_colluding: Number of participants that may conspire with the server.
    """

    min_sum: int = 3
    max_colluding: int = 1


def threshold(n_participants: int, max_colluding: int) -> int:
    """Number of participants without which nothing can be unmasked: ``floor((m + c) / 2) + 1``.

    Two different lists of survivors cannot both find that many signatures, even if c participants sign both.

    Raises:
        SecureError: A sum could consist of fewer than two honest updates.
    """
    found = (n_participants + max_colluding) // 2 + 1
    if not found <= n_participants <= MAX_PARTICIPANTS or found - max_colluding < 2:
        raise SecureError(
            f"{n_participants} participants, of which {max_colluding} may conspire with the server: expected "
            f"at least {max_colluding + 2} and at most {MAX_PARTICIPANTS}, so that no sum tells one honest "
            "participant's update"
        )
    return found


@dataclass(frozen=True)
class Terms:
    """What the participants of a session must have been asked alike.

    Attributes:
        contributors: Names of the participants that contribute to each sum, by name of the sum.
        about: Everything else that determines what is computed, as JSON values: run, model, configuration.
    """

    contributors: Mapping[str, Collection[str]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def participants(self) -> list[str]:
        """All participants, in order."""
        return sorted({name for names in self.contributors.values() for name in names})

    @property
    def sums(self) -> list[str]:
        """Names of the sums, in order."""
        return sorted(self.contributors)

    def as_json(self) -> dict[str, Any]:
        """As a JSON value with one spelling."""
        return {
            "contributors": {name: sorted(names) for name, names in self.contributors.items()},
            "about": dict(self.about),
        }

    def context(self, limit: int) -> bytes:
        """SHA-256 of the terms and of the threshold; equal for all participants that were asked alike."""
        return digest(b"context", canonical({**self.as_json(), "threshold": limit}))

    def check(self, limits: Limits) -> int:
        """The threshold of a session under these terms.

        Raises:
            SecureError: A sum could consist of fewer updates than a participant's limits allow.
        """
        limit = threshold(len(self.participants), limits.max_colluding)
        least = max(limit, limits.min_sum)
        for name in self.sums:
            if len(set(self.contributors[name])) < least:
                raise SecureError(
                    f"'{name}' would be a sum of {len(set(self.contributors[name]))} updates, and this "
                    f"participant requires at least {least} of {len(self.participants)}: let more "
                    "participants prune it (block_fraction), or share in the clear"
                )
        return limit
