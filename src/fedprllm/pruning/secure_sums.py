"""Secure aggregation with all participants in one process: what a federation does, without a network.

Every participant has keys of its own, hides its updates, agrees on who contributed, and gives shares of
masks; what is added up is what a server would see (`fedprllm.secure`). The result has the same bits as
without masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.models.block import Block
from fedprllm.pruning.masked_totals import layout_of, totals_of
from fedprllm.pruning.method import Method
from fedprllm.secure.in_process import Parties
from fedprllm.secure.terms import Limits, Terms
from fedprllm.sharing import Totals

__all__ = ["SecureSums", "check_contributors", "terms_of"]

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


class SecureSums:
    """The sums of a run under masks, with all parties in this process.

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
        terms = terms_of(samples, n_blocks, about)
        self.parties, self._n_participants = Parties(terms, _LIMITS), len(terms.participants)

    def add(
        self, block: Block, method: Method[Any], name: str, update: Mapping[str, Tensor], n_tokens: int
    ) -> None:
        """Hide one participant's update, and add what the server sees of it.

        Raises:
            UpdateError: The update holds numbers that are too large for sums under masks.
        """
        words = layout_of(block, method, self._n_participants).pack(update, n_tokens)
        self.parties.add(_name(block.index), name, words)

    def totals(self, block: Block, method: Method[Any]) -> Totals:
        """Unmask a block's sums, and check that honest participants can add up to them.

        Raises:
            UpdateError: They cannot. Nobody can say whose update is at fault.
        """
        n_added = len(self.parties.added(_name(block.index)))
        words = self.parties.total(_name(block.index))
        return totals_of(words, n_added, block, method, self._n_participants)
