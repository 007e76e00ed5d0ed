"""Secure aggregation at a participant's site: its signing key, its roster, and its side of a run's session.

KIT/local/
  signing.key      private signing key (Ed25519), made here, readable by its owner only
  roster.json      public signing keys of all participants, pinned after their fingerprint was compared

RUN/secure/        what was answered in the session; deleted at the end of the run
FOLDER/unmasked.json   which sums this participant has helped to unmask
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock

from fedprllm.errors import RunError, SecureError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.masks import (
    Agreement,
    Opening,
    Shares,
    read_bytes_by_name,
    sum_name,
    terms_of,
    write_bytes_by_name,
    write_shares,
)
from fedprllm.federation.site.consent import text_identity
from fedprllm.federation.site.spool import Spool
from fedprllm.files import read_json, read_sealed, write_json, write_private, write_sealed
from fedprllm.secure.journal import FileJournal
from fedprllm.secure.keys import digest
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.terms import Limits, Roster

__all__ = ["Masking", "UnmaskLedger", "exposed_by", "pin_roster", "pinned_roster", "signing_key"]

_KEY, _ROSTER, _LEDGER = "signing.key", "roster.json", "unmasked.json"
# Different sums of one text. The work to check all their combinations grows exponentially.
_MOST_SUMS = 4


def signing_key(local: Path, *, make: bool = False) -> Ed25519PrivateKey:
    """The participant's private signing key.

    Args:
        local: The kit's ``local`` folder.
        make: Make one if there is none.

    Raises:
        SecureError: There is none.
    """
    path = local / _KEY
    if not path.exists():
        if not make:
            raise SecureError(f"{path} is missing: make it with 'fedprllm roster key {local.parent}'")
        write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes())


def pin_roster(local: Path, roster: Roster) -> None:
    """Keep a roster as the one whose signatures count."""
    write_json(local / _ROSTER, {name: key.hex() for name, key in sorted(roster.keys.items())})


def pinned_roster(local: Path) -> Roster:
    """The roster whose signatures count.

    Raises:
        SecureError: None is pinned.
    """
    path = local / _ROSTER
    if not path.exists():
        raise SecureError(f"no roster is pinned: 'fedprllm roster pin {local.parent} ROSTER' does it")
    return Roster({name: bytes.fromhex(key) for name, key in read_json(path).items()})


class UnmaskLedger:
    """Remembers whose updates were in each sum that this participant has helped to unmask.

    Sums of the same quantity over different participants can be combined: of two sums over almost the same
    participants, the difference is a sum over the few that are in one only. No combination of the sums known
    here may be one of fewer updates than a sum may consist of.

    Args:
        folder: The participant's folder with its ledger and runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / _LEDGER, FileLock(folder / ".unmasked.lock")

    def spend(self, survivors: Mapping[str, Sequence[str]], least: int) -> None:
        """Record that sums will be unmasked, unless one of them tells too much together with earlier ones.

        Args:
            survivors: Participants whose updates are in each sum, by what it has in common with others that
                it can be combined with: model, text, quantity and block.
            least: Fewest updates that a sum, and a combination of sums, may consist of.

        Raises:
            SecureError: It does; the message names the participants that would be exposed.
        """
        with self._lock:
            known, is_new = self._known(), False
            for about, names in survivors.items():
                is_new |= _add(known.setdefault(about, []), sorted(names), least)
            if is_new:
                write_sealed(self._path, known)

    def _known(self) -> dict[str, Any]:
        try:
            return read_sealed(self._path)
        except FileNotFoundError:
            return {}
        except RunError as error:
            raise SecureError(f"{error}. It says which sums were unmasked: restore it") from None


def _add(sums: list[list[str]], names: list[str], least: int) -> bool:
    """Add the participants of a sum to those of earlier ones; returns whether they are new.

    Raises:
        SecureError: Together they tell too much.
    """
    if names in sums:
        return False
    if len(sums) == _MOST_SUMS:
        raise SecureError(
            f"{_MOST_SUMS} sums of the same text over different participants were opened before: let the same "
            "participants as in one of them take part"
        )
    if exposed := exposed_by(tuple(map(frozenset, (*sums, names))), least):
        raise SecureError(
            f"this sum and earlier ones of the same text differ by {', '.join(exposed)} only, and would reveal "
            "what they share: let the same participants take part"
        )
    sums.append(names)
    return True


@lru_cache(maxsize=64)
def exposed_by(sums: tuple[frozenset[str], ...], least: int) -> list[str]:
    """Names of fewer than ``least`` participants of whose updates a combination of sums consists.

    Participants that are in the same sums form a group, which has one coefficient in every combination. The
    groups whose coefficient is 0 span less than all groups do; so it is enough to look at each set of groups
    that spans one dimension less.

    Args:
        sums: Participants whose updates are in each sum.
        least: Fewest updates of which a combination may consist.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(frozenset().union(*sums)):
        groups.setdefault(tuple(int(name in names) for names in sums), []).append(name)
    rank = _rank(list(groups))
    for chosen in combinations(groups, rank - 1):
        if _rank(chosen) < rank - 1:
            continue
        left = [name for group, names in groups.items() if _rank([*chosen, group]) == rank for name in names]
        if len(left) < least:
            return sorted(left)
    return []


def _rank(rows: Sequence[Sequence[int]]) -> int:
    """Rank of a matrix of whole numbers, without rounding."""
    left = [[Fraction(value) for value in row] for row in rows]
    rank = 0
    while left:
        row = left.pop()
        pivot = next((column for column, value in enumerate(row) if value), None)
        if pivot is None:
            continue
        rank += 1
        left = [
            [one - other[pivot] / row[pivot] * mine for one, mine in zip(other, row, strict=True)]
            for other in left
        ]
    return rank


class Masking:
    """A participant's side of the session of one run.

    Args:
        name: Its name.
        local: The kit's ``local`` folder.
        settings: Its own settings.
        spool: The run's spool.
        home: The participant's folder with its ledger and runs.

    Raises:
        SecureError: It has no signing key or roster.
    """

    def __init__(self, name: str, local: Path, settings: SiteSettings, spool: Spool, home: Path) -> None:
        self._settings, self._spool, self._home = settings, spool, home
        self._limits = Limits(settings.min_sum, settings.max_colluding)
        self._participant = SecureParticipant(
            name, signing_key(local), pinned_roster(local), self._limits, FileJournal(spool.path("secure"))
        )
        self._name = name

    def answer(self, op: str, payload: memoryview) -> bytes:
        """Answer one step of the protocol.

        Raises:
            SecureError: Answering could reveal this participant's update.
            UpdateError: The request cannot be read.
        """
        one = self._participant
        if op == "keys":
            return self._keys(Opening.read(payload))
        if op == "shares":
            return write_bytes_by_name(one.share(read_bytes_by_name(payload)))
        if op == "boxes":
            one.receive(read_bytes_by_name(payload))
            return b""
        agreement: Agreement = Agreement.read(payload)
        if op == "agree":
            one.check_survivors(agreement.by_sum)
            self._check_ledger(agreement)  # before signing: shares are given for whatever was signed
            return one.agree(agreement.by_sum, self._decisions(agreement))
        signatures = {name: bytes.fromhex(digits) for name, digits in agreement.signatures.items()}
        shares = one.unmask(agreement.by_sum, signatures, self._decisions(agreement))
        found: Shares = {block: shares[sum_name(block)] for block in agreement.survivors}
        return write_shares(found)

    @property
    def may_mask(self) -> bool:
        """Whether the exchange of keys and shares is complete."""
        return FileJournal(self._spool.path("secure")).read("receive") is not None

    def mask(self, block: int, words: Any) -> Any:
        """Hide the update of a block, uint64 [n]."""
        return self._participant.mask(sum_name(block), words)

    def _keys(self, opening: Opening) -> bytes:
        job, fingerprints = (
            read_sealed(self._spool.path("job.json")),
            read_json(self._spool.path("fingerprints.json")),
        )
        mine = sorted(block for block, names in opening.contributors.items() if self._name in names)
        named = {name for names in opening.contributors.values() for name in names}
        if mine != sorted(job["blocks"]) or named != set(job["participants"]):
            raise SecureError("the contributors to the sums are not those of the run's request")
        terms = terms_of(opening.contributors, job, fingerprints)
        return self._participant.advertise(bytes.fromhex(opening.session), terms)

    def _decisions(self, agreement: Agreement) -> bytes:
        """Digest of the decisions that this participant has received before the first of the blocks."""
        first = min(agreement.survivors, default=0)
        return decisions_digest([self._spool.decision_path(block) for block in range(first)])

    def _check_ledger(self, agreement: Agreement) -> None:
        model = digest(
            json.dumps(read_json(self._spool.path("fingerprints.json")), sort_keys=True).encode()
        ).hex()
        quantity = _quantity(read_sealed(self._spool.path("job.json")))
        about = f"{model} {text_identity(self._settings.data)} {quantity}"
        survivors = {f"{about} {block}": names for block, names in agreement.survivors.items()}
        UnmaskLedger(self._home).spend(
            survivors, max(self._limits.min_sum, self._limits.max_colluding + 2)
        )


def _quantity(job: Mapping[str, Any]) -> str:
    """What a run adds up. Sums of one quantity can be combined, whatever the runs' other options."""
    if job["survey"]:
        return "survey"
    # The average of weights follows from votes; all other sums are parts of Gram matrices, or like them.
    return "votes" if job["config"]["share"] in ("mask", "weights") else "sums"


def decisions_digest(paths: Sequence[Path]) -> bytes:
    """Digest of decisions in the order of their blocks; decisions that were not sent count as empty."""
    return digest(*(path.read_bytes() if path.exists() else b"" for path in paths))
