"""Secure aggregation with all participants in one process: what a federation does, without a network.

Every participant has keys of its own, hides its updates, agrees on who contributed, and gives shares of
masks; what is added up is what a server would see (`fedprllm.secure`). The result has the same bits as
without masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.models.block import Block
from fedprllm.pruning.masked_totals import layout_of, totals_of
from fedprllm.pruning.method import Method
from fedprllm.secure.journal import MemoryJournal
from fedprllm.secure.participant import SecureParticipant
from fedprllm.secure.server import SecureServer
from fedprllm.secure.terms import Limits, Roster, Terms
from fedprllm.secure.words import Words
from fedprllm.sharing import Totals

__all__ = ["SecureSession", "SecureSums", "check_contributors", "terms_of"]

_LIMITS = Limits()


def _name(block: int) -> str:
    return f"block {block:04d}"


def terms_of(samples: Mapping[str, Sequence[int]], n_blocks: int, about: Mapping[str, Any]) -> Terms:
    """The terms of a run: one sum for each block, over the participants that prune it.

    Args:
        samples: The blocks that each participant prunes, by name.
        n_blocks: Number of blocks in the model.
        about: What determines the run's computation, as JSON values.
    """
    contributors = {
        _name(block): [name for name, blocks in samples.items() if block in blocks]
        for block in range(n_blocks)
    }
    return Terms(contributors, about)


def check_contributors(samples: Mapping[str, Sequence[int]], n_blocks: int) -> None:
    """Refuse a run in which a sum would consist of too few updates, before anything is computed.

    Raises:
        SecureError: There are fewer than three participants, or too few of them prune some block.
    """
    terms_of(samples, n_blocks, {}).check(_LIMITS)


class SecureSession:
    """All parties of one session: the participants, and the server that sees only masked words.

    Args:
        terms: The sums, and who contributes to each.

    Raises:
        SecureError: A sum would consist of too few updates.
    """

    def __init__(self, terms: Terms) -> None:
        identities = {name: Ed25519PrivateKey.generate() for name in terms.participants}
        roster = Roster({name: one.public_key().public_bytes_raw() for name, one in identities.items()})
        self._participants = {
            name: SecureParticipant(name, identity, roster, _LIMITS, MemoryJournal())
            for name, identity in identities.items()
        }
        self._server = SecureServer(terms, terms.check(_LIMITS))
        self._sums: dict[str, Words] = {}
        self._added: dict[str, list[str]] = {}
        self._exchange(terms)

    def _exchange(self, terms: Terms) -> None:
        server = self._server
        for name, one in self._participants.items():
            server.take_advert(name, one.advertise(server.session, terms))
        for name, one in self._participants.items():
            server.take_boxes(name, one.share(server.adverts))
        for name, one in self._participants.items():
            one.receive(server.boxes_for(name))

    @property
    def n_participants(self) -> int:
        """Number of participants."""
        return len(self._participants)

    def hide(self, sum_: str, name: str, words: Words) -> None:
        """Hide one participant's words, uint64 [n], and add what the server sees of them to a sum."""
        masked = self._participants[name].mask(sum_, words)
        self._participants[name].settle(sum_)
        if sum_ in self._sums:
            np.add(self._sums[sum_], masked, out=self._sums[sum_])
        else:
            self._sums[sum_] = masked
        self._added.setdefault(sum_, []).append(name)

    def reveal(self, sum_: str) -> tuple[Words, list[str]]:
        """Take the masks off a sum; returns it and whose words are in it."""
        words, names = self._sums.pop(sum_), sorted(self._added.pop(sum_))
        survivors = {sum_: names}
        signatures = {name: one.agree(survivors) for name, one in self._participants.items()}
        answers = {name: one.unmask(survivors, signatures)[sum_] for name, one in self._participants.items()}
        self._server.unmask(sum_, words, names, answers)
        return words, names


class SecureSums:
    """The sums of a run's updates, block by block.

    Args:
        samples: The blocks that each participant prunes, by name.
        n_blocks: Number of blocks in the model.
        config: The resolved configuration.
        survey: Whether the updates are those of a survey.

    Raises:
        SecureError: A sum would consist of too few updates.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[int]], n_blocks: int, config: PruneConfig, *, survey: bool
    ) -> None:
        about = {"config": config.model_dump(mode="json"), "survey": survey}
        self._session = SecureSession(terms_of(samples, n_blocks, about))

    def add(
        self, block: Block, method: Method[Any], name: str, update: Mapping[str, Tensor], n_tokens: int
    ) -> None:
        """Hide one participant's update, and add what the server sees of it.

        Raises:
            UpdateError: The update holds numbers that are too large for sums under masks.
        """
        words = layout_of(block, method, self._session.n_participants).pack(update, n_tokens)
        self._session.hide(_name(block.index), name, words)

    def totals(self, block: Block, method: Method[Any]) -> Totals:
        """Unmask a block's sums, and check that honest participants can add up to them.

        Raises:
            UpdateError: They cannot. Nobody can say whose update is at fault.
        """
        words, names = self._session.reveal(_name(block.index))
        return totals_of(words, len(names), block, method, self._session.n_participants)
