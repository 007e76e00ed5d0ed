"""Secure aggregation at the coordinator: it passes the participants' messages on, and keeps what it needs to
continue after a crash.

RUN/federation/secure/
  session.json        the session, and which participants contribute to each block's sum
  adverts.json        public keys; once this exists, nobody else can join
  boxes.json          sealed boxes; once this exists, everybody can hide updates
  agreed-0007.json    whose updates of that block and later ones are added up; written before anybody is asked
  shares-0007.json    shares of masks for these blocks
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprllm.errors import SecureError, UpdateError
from fedprllm.federation.protocol.masks import (
    Agreement,
    Opening,
    Shares,
    read_bytes_by_name,
    sum_name,
    write_bytes_by_name,
)
from fedprllm.files import read_sealed, write_sealed
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Terms, threshold
from fedprllm.secure.words import Words

__all__ = ["Masks"]

_SESSION_BYTES = 16


class Masks:
    """The server's side of the session of one run, in files.

    Args:
        folder: Folder for its files.
        contributors: Participants that prune each block.
        max_colluding: Number of participants that may conspire with the server, as all of them assume.
    """

    def __init__(
        self, folder: Path, contributors: Mapping[int, Sequence[str]], max_colluding: int = 1
    ) -> None:
        self._folder = folder
        known = self._known("session")
        if known is None:
            known = {
                "session": secrets.token_hex(_SESSION_BYTES),
                "contributors": {str(block): list(names) for block, names in contributors.items()},
            }
            write_sealed(folder / "session.json", known)
        self.opening = Opening.model_validate(known)
        terms = Terms({sum_name(block): names for block, names in self.opening.contributors.items()})
        terms.check(Limits(max_colluding=max_colluding))
        self.limit = threshold(len(terms.participants), max_colluding)
        self._server = SecureServer(terms, self.limit, bytes.fromhex(self.opening.session))
        for name, advert in self._bytes("adverts").items():
            self._server.take_advert(name, advert)
        for name, boxes in (self._known("boxes") or {}).items():
            self._server.take_boxes(name, {one: bytes.fromhex(box) for one, box in boxes.items()})

    def _known(self, name: str) -> dict[str, Any] | None:
        try:
            return read_sealed(self._folder / f"{name}.json")
        except FileNotFoundError:
            return None

    def _bytes(self, name: str) -> dict[str, bytes]:
        return {one: bytes.fromhex(digits) for one, digits in (self._known(name) or {}).items()}

    @property
    def n_participants(self) -> int:
        """Number of participants of the run, for which the words have room."""
        return len({name for names in self.opening.contributors.values() for name in names})

    # ---- keys ----------------------------------------------------------------------------------------

    @property
    def has_adverts(self) -> bool:
        """Whether the list of participants with keys is closed."""
        return bool(self._server.adverts)

    @property
    def has_boxes(self) -> bool:
        """Whether the list of members is closed."""
        return bool(self._server.members)

    @property
    def members(self) -> list[str]:
        """Participants whose shares everybody holds."""
        return self._server.members

    def keep_adverts(self, answers: Mapping[str, bytes]) -> dict[str, str]:
        """Close the list of participants with keys; returns why answers were refused, by participant."""
        refused = self._taken(answers, self._server.take_advert)
        adverts = self._server.adverts
        write_sealed(self._folder / "adverts.json", {name: one.hex() for name, one in adverts.items()})
        return refused

    def adverts(self) -> bytes:
        """All public keys, for the participants."""
        return write_bytes_by_name(self._server.adverts)

    def keep_boxes(self, answers: Mapping[str, bytes]) -> dict[str, str]:
        """Close the list of members; returns why answers were refused, by participant."""
        read: dict[str, dict[str, bytes]] = {}
        refused = self._taken(answers, lambda name, box: read.__setitem__(name, read_bytes_by_name(box)))
        refused |= self._taken(read, self._server.take_boxes)
        boxes = {
            name: {one: box.hex() for one, box in read[name].items()} for name in read if name not in refused
        }
        write_sealed(self._folder / "boxes.json", boxes)
        return refused

    @staticmethod
    def _taken(answers: Mapping[str, Any], take: Any) -> dict[str, str]:
        refused = {}
        for name, answer in answers.items():
            try:
                take(name, answer)
            except (UpdateError, SecureError) as error:
                refused[name] = str(error)
        return refused

    def boxes_for(self, name: str) -> bytes:
        """The boxes for one participant."""
        return write_bytes_by_name(self._server.boxes_for(name))

    # ---- sums ----------------------------------------------------------------------------------------

    def agree_on(self, survivors: Mapping[int, Sequence[str]]) -> Agreement:
        """Close the lists of whose updates of some blocks are added up; a list never changes."""
        name = f"agreed-{min(survivors):04d}"
        known = self._known(name)
        if known is None:
            known = {"survivors": {str(block): sorted(names) for block, names in survivors.items()}}
            write_sealed(self._folder / f"{name}.json", known)
        return Agreement.model_validate(known)

    def has_shares(self, blocks: Sequence[int]) -> bool:
        """Whether the masks of some blocks can be taken off."""
        return (self._folder / f"shares-{min(blocks):04d}.json").exists()

    def keep_shares(self, blocks: Sequence[int], answers: Mapping[str, Shares]) -> None:
        """Keep shares of masks, by the participant that gave them."""
        kept = {
            holder: {
                str(block): {dealer: share.hex() for dealer, share in one.items()}
                for block, one in shares.items()
            }
            for holder, shares in answers.items()
        }
        write_sealed(self._folder / f"shares-{min(blocks):04d}.json", kept)

    def _round_of(self, block: int) -> str:
        """Number of the agreement that a block belongs to."""
        for path in sorted(self._folder.glob("agreed-*.json"), reverse=True):
            if str(block) in read_sealed(path)["survivors"]:
                return path.stem.rpartition("-")[2]
        raise SecureError(f"block {block}: the participants have not agreed on whose updates are added up")

    def survivors(self, block: int) -> list[str]:
        """Participants whose updates of a block are added up."""
        return list(
            read_sealed(self._folder / f"agreed-{self._round_of(block)}.json")["survivors"][str(block)]
        )

    def forget(self) -> None:
        """Delete the session, once the run is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def unmask(self, block: int, total: Words) -> None:
        """Take the masks off the sum of a block's updates, in place.

        Raises:
            UpdateError: The shares do not restore the masks.
        """
        kept = read_sealed(self._folder / f"shares-{self._round_of(block)}.json")
        answers = {
            holder: {dealer: bytes.fromhex(share) for dealer, share in shares[str(block)].items()}
            for holder, shares in kept.items()
            if str(block) in shares
        }
        self._server.unmask(sum_name(block), total, self.survivors(block), answers)
