"""Secure aggregation at a participant's site: its signing key, its roster, and its side of a run's session.

KIT/local/
  signing.key      private signing key (Ed25519), made here, readable by its owner only
  roster.json      public signing keys of all participants, pinned after their fingerprint was compared

RUN/secure/        what was answered in the session; deleted at the end of the run
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.errors import SecureError
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
from fedprllm.federation.site.unmask_ledger import Bounds, UnmaskLedger
from fedprllm.files import read_json, read_sealed, write_json, write_private
from fedprllm.secure.journal import FileJournal
from fedprllm.secure.keys import digest
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.terms import Limits, Roster

__all__ = ["Masking", "pin_roster", "pinned_roster", "signing_key"]

_KEY, _ROSTER = "signing.key", "roster.json"


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
        one, ledger = self._participant, UnmaskLedger(self._home)
        if op == "keys":
            return self._keys(Opening.read(payload))
        if op == "shares":
            return write_bytes_by_name(one.share(read_bytes_by_name(payload)))
        if op == "boxes":
            one.check_order("receive")
            boxes = read_bytes_by_name(payload)
            # Before receiving: from then on, updates are masked and may leave.
            self._contribute(ledger, {*boxes, self._name})
            one.receive(boxes)
            return b""
        agreement: Agreement = Agreement.read(payload)
        if op == "agree":
            one.check_survivors(agreement.by_sum)
            # Before signing: shares are given for whatever was signed.
            ledger.spend(self._by_quantity(agreement.survivors), self._least)
            return one.agree(agreement.by_sum, self._decisions(agreement))
        signatures = {name: bytes.fromhex(digits) for name, digits in agreement.signatures.items()}
        shares = one.unmask(agreement.by_sum, signatures, self._decisions(agreement))
        ledger.settle(self._job["run"], list(self._by_quantity(agreement.survivors)))
        found: Shares = {block: shares[sum_name(block)] for block in agreement.survivors}
        return write_shares(found)

    @property
    def may_mask(self) -> bool:
        """Whether the exchange of keys and shares is complete."""
        return self._participant.has_shares

    def mask(self, block: int, words: Any) -> Any:
        """Hide the update of a block, uint64 [n]."""
        return self._participant.mask(sum_name(block), words)

    def _keys(self, opening: Opening) -> bytes:
        job, fingerprints = self._job, read_json(self._spool.path("fingerprints.json"))
        mine = sorted(block for block, names in opening.contributors.items() if self._name in names)
        named = {name for names in opening.contributors.values() for name in names}
        if mine != sorted(job["blocks"]) or named != set(job["participants"]):
            raise SecureError("the contributors to the sums are not those of the run's request")
        terms = terms_of(opening.contributors, job, fingerprints)
        return self._participant.advertise(bytes.fromhex(opening.session), terms)

    def _contribute(self, ledger: UnmaskLedger, members: Collection[str]) -> None:
        """Refuse a run whose sums would tell too much, even if all members' updates arrive."""
        job, contributors = self._job, self._participant.terms.contributors
        expected = {
            block: [name for name in contributors[sum_name(block)] if name in members]
            for block in job["blocks"]
        }
        bounds = Bounds(self._least, self._participant.limit, self._limits.max_colluding)
        ledger.contribute(job["run"], self._by_quantity(expected), job["participants"], bounds)

    def _decisions(self, agreement: Agreement) -> bytes:
        """Digest of the decisions that this participant has received before the first of the blocks."""
        first = min(agreement.survivors, default=0)
        return decisions_digest([self._spool.decision_path(block) for block in range(first)])

    @property
    def _job(self) -> dict[str, Any]:
        return read_sealed(self._spool.path("job.json"))

    @property
    def _least(self) -> int:
        """Fewest updates of which two must be honest, and of which a combination of sums may consist."""
        return max(self._limits.min_sum, self._limits.max_colluding + 2)

    def _by_quantity(self, names: Mapping[int, Sequence[str]]) -> dict[str, Sequence[str]]:
        """Names by block as names by what the block's sum can be combined with."""
        fingerprints = read_json(self._spool.path("fingerprints.json"))
        model = digest(json.dumps(fingerprints, sort_keys=True).encode()).hex()
        about = f"{model} {text_identity(self._settings.data)} {_quantity(self._job)}"
        return {f"{about} {block}": found for block, found in names.items()}


def _quantity(job: Mapping[str, Any]) -> str:
    """What a run adds up. Sums of one quantity can be combined, whatever the runs' other options."""
    if job["survey"]:
        return "survey"
    if job.get("heal") is not None:
        return "gradients"
    # The average of weights follows from votes; all other sums are parts of Gram matrices, or like them.
    return "votes" if job["config"]["share"] in ("mask", "weights") else "sums"


def decisions_digest(paths: Sequence[Path]) -> bytes:
    """Digest of decisions in the order of their blocks; decisions that were not sent count as empty."""
    return digest(*(path.read_bytes() if path.exists() else b"" for path in paths))
