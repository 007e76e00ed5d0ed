"""Which sums of its text a participant has helped to unmask, so that no two of them tell too much together.

FOLDER/unmasked.json   by model, text, quantity and block: the participants of each sum that was signed, and
                       of each run whose sum is not known
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from fedprllm.errors import RunError, SecureError
from fedprllm.files import read_sealed, write_sealed

__all__ = ["Bounds", "OpenedSum", "UnmaskLedger", "exposed_by"]

_LEDGER = "unmasked.json"
# Different sums of one text. The work to check all their combinations grows exponentially.
_MOST_SUMS = 4


@dataclass(frozen=True)
class Bounds:
    """What a session of secure aggregation requires.

    Attributes:
        least: Fewest updates that a sum, and a combination of sums, may consist of.
        limit: Number of participants without which nothing can be unmasked.
        max_colluding: Number of participants that may conspire with the server.
    """

    least: int
    limit: int
    max_colluding: int


class OpenedSum(NamedTuple):
    """Sums that a participant has signed, or to which it has sent an update.

    Attributes:
        model: Digest of the model.
        text: Digest of the text.
        quantity: ``votes``, ``sums`` or ``survey``.
        blocks: Indices of the blocks.
        participants: Participants in the sum; if it is not known, those of the run.
        is_known: Whether this participant knows what was opened.
    """

    model: str
    text: str
    quantity: str
    blocks: list[int]
    participants: list[str]
    is_known: bool


class UnmaskLedger:
    """Remembers whose updates were in each sum that this participant has helped to unmask.

    Sums of the same quantity over different participants can be combined: of two sums over almost the same
    participants, the difference is a sum over the few that are in one only. No combination of the sums known
    here may be one of fewer updates than a sum may consist of.

    A participant whose update has left knows what it was added to only once it has seen enough signatures.
    Until then, only the same participants may add up the same text again: of them, too few are left that have
    not signed the first sum, and these refuse another.

    Args:
        folder: The participant's folder with its ledger and runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / _LEDGER, FileLock(folder / ".unmasked.lock")

    def contribute(
        self, run: str, expected: Mapping[str, Sequence[str]], participants: Sequence[str], bounds: Bounds
    ) -> None:
        """Record that updates will be sent in a run, whose sums are not known yet.

        Args:
            run: Id of the run.
            expected: Participants that contribute to each sum, by what it can be combined with.
            participants: All participants of the run.
            bounds: What the run's session requires.

        Raises:
            SecureError: The sums would tell too much, or it is not known what an earlier update was added
                to, and others took part then, or participants that were in no earlier sum could open one
                that tells too much.
        """
        with self._lock:
            known = self._known()
            for about, names in expected.items():
                entry = known.setdefault(about, _new())
                for earlier in entry["open"].values():
                    if earlier is not None:
                        _check_same(earlier, sorted(participants))
                _check(entry["sums"], sorted(names), bounds.least)
                _check_strangers(entry["sums"], set(names), set(participants), bounds)
                entry["open"].setdefault(run, sorted(participants))  # a run that goes on asks again
            write_sealed(self._path, known)

    def spend(self, survivors: Mapping[str, Sequence[str]], least: int) -> None:
        """Record that sums will be unmasked, unless one of them tells too much together with earlier ones.

        Args:
            survivors: Participants whose updates are in each sum, by what it can be combined with.
            least: Fewest updates that a sum, and a combination of sums, may consist of.

        Raises:
            SecureError: It does; the message names the participants that would be exposed.
        """
        with self._lock:
            known, is_new = self._known(), False
            for about, names in survivors.items():
                sums = known.setdefault(about, _new())["sums"]
                if _check(sums, sorted(names), least):
                    sums.append(sorted(names))
                    is_new = True
            if is_new:
                write_sealed(self._path, known)

    def settle(self, run: str, quantities: Sequence[str]) -> None:
        """Record that enough participants have signed the sums of a run: there can be no others."""
        with self._lock:
            known = self._known()
            for about in quantities:
                known.setdefault(about, _new())["open"][run] = None
            write_sealed(self._path, known)

    def sums(self) -> list[OpenedSum]:
        """What was opened: consecutive blocks with the same participants together."""
        by_list: dict[tuple[Any, ...], list[int]] = {}
        for about, entry in self._known().items():
            model, text, quantity, block = about.split(" ")
            for names in entry["sums"]:
                by_list.setdefault((model, text, quantity, True, *names), []).append(int(block))
            for names in filter(None, entry["open"].values()):
                by_list.setdefault((model, text, quantity, False, *names), []).append(int(block))
        return [
            OpenedSum(model, text, quantity, sorted(set(blocks)), list(names), is_known)
            for (model, text, quantity, is_known, *names), blocks in by_list.items()
        ]

    def _known(self) -> dict[str, Any]:
        try:
            return read_sealed(self._path)
        except FileNotFoundError:
            return {}
        except RunError as error:
            raise SecureError(f"{error}. It says which sums were unmasked: restore it") from None


def _new() -> dict[str, Any]:
    """Lists of participants: by sum that was signed, and by run whose sum is not known (None: it is now)."""
    return {"sums": [], "open": {}}


def _check_same(earlier: Sequence[str], participants: Sequence[str]) -> None:
    """Refuse other participants than in a run whose sums this participant does not know."""
    if list(earlier) != list(participants):
        differing = ", ".join(sorted(set(earlier) ^ set(participants)))
        raise SecureError(
            "an update of the same text was sent in an earlier run that ended, for this participant, before "
            f"it was known what it is part of, and this run differs by {differing}: let the same "
            "participants take part, or use another text"
        )


def _check_strangers(
    sums: Sequence[Sequence[str]], contributors: Set[str], participants: Set[str], bounds: Bounds
) -> None:
    """Refuse a run in which newcomers could open a sum close to an earlier one, which they do not know."""
    for earlier in map(frozenset, sums):
        if len(participants - earlier) + bounds.max_colluding < bounds.limit:
            continue
        n_added = max(0, max(bounds.limit, bounds.least) - len(contributors & earlier))
        n_differing = max(1, len(earlier - contributors) + n_added)
        if n_differing < bounds.least:
            raise SecureError(
                f"{len(participants - earlier)} of {len(participants)} participants were in no earlier sum "
                f"of the same text, and could add it up so that only {n_differing} names differ: let fewer "
                "new participants take part at once, or use another text"
            )


def _check(sums: Sequence[Sequence[str]], names: list[str], least: int) -> bool:
    """Compare the participants of a sum with those of earlier ones; returns whether they are new.

    Raises:
        SecureError: Together they tell too much.
    """
    if names in sums:
        return False
    if len(sums) == _MOST_SUMS:
        raise SecureError(
            f"{_MOST_SUMS} sums of the same text over different participants were opened before: let the "
            "same participants as in one of them take part"
        )
    if exposed := exposed_by(tuple(map(frozenset, (*sums, names))), least):
        raise SecureError(
            f"this sum and earlier ones of the same text differ by {', '.join(exposed)} only, and would "
            "reveal what they share: let the same participants take part"
        )
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
