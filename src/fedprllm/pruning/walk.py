"""The walk: how a participant goes through the blocks of a model and what it contributes on the way.

    for block in model:
        contribution = walker.contribute(block)     # observe, decide locally, share
        ...                                         # the server decides, now or later
        walker.advance(block, weights)              # compute the next block's input

Blocks are observed, updates are made and hidden states advance only here, whether in a single process, at a
site, in a dry run, in a survey or in a study.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedprllm.core.masks import MaskViews
from fedprllm.core.sums import ChangeStatistics, ExpertStatistics
from fedprllm.deciding import BlockDecision, own_decision
from fedprllm.models.block import UNCHANGED, Block, Weights, return_freed_by
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.observe import BlockStatistics
from fedprllm.pruning.clock import Clock
from fedprllm.pruning.method import Method
from fedprllm.pruning.participant import Participant
from fedprllm.sharing import Seen, Totals
from fedprllm.sharing.expert_outputs import n_experts

__all__ = ["Contribution", "Walker"]


@dataclass
class Contribution:
    """The outcome of one participant's step on a block.

    Attributes:
        update: The tensors that the participant shares, by name; nothing else leaves it. None if it does not
            prune this block.
        decision: The participant's own decision, if it makes one.
        weights: The weights that replace the block's own when the participant walks on; None if it has
            already computed the next block's input or waits for the server's decision.
    """

    update: Mapping[str, Tensor] | None = None
    decision: BlockDecision | None = None
    weights: Weights | None = None


class Walker:
    """A participant walking through the blocks of a model.

    Args:
        participant: Holds the text and the hidden states.
        method: What the participant shares and whose decision it walks on with.
        n_blocks: Number of blocks in the model.
        blocks: Indices of the blocks that the participant prunes; it passes through the others unpruned or,
            following the server, with the server's weights. All blocks by default.
        clock: Records the time spent in each phase.
    """

    def __init__(
        self,
        participant: Participant,
        method: Method[Any],
        n_blocks: int,
        blocks: Collection[int] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.participant, self.method = participant, method
        self._n_blocks, self._blocks = n_blocks, range(n_blocks) if blocks is None else blocks
        self.clock = clock or Clock()

    @property
    def name(self) -> str:
        """The participant's name."""
        return self.participant.name

    @property
    def follows_server(self) -> bool:
        """Whether the participant walks on with the server's decisions."""
        return self.method.strategy.follows_server

    def enter(self, model: BlockwiseModel) -> None:
        """Compute the first block's input."""
        if self.method.uses_inputs:
            self.participant.enter(model)

    def walks_on(self, block: Block) -> bool:
        """Whether the block's output is needed as the next block's input."""
        return self.method.uses_inputs and block.index + 1 < self._n_blocks

    def contribute(self, block: Block) -> Contribution:
        """Observe a block and make the update that the participant shares.

        Raises:
            ModelError: An activation is not finite, or a Linear was never used.
        """
        method, strategy = self.method, self.method.strategy
        if block.index not in self._blocks:
            return Contribution(weights=None if strategy.follows_server else UNCHANGED)
        change = ChangeStatistics() if method.sharing.watches_change else None
        experts = ExpertStatistics.zeros(n_experts(block.linears)) if method.sharing.watches_experts else None
        statistics = self._observe(block, change, experts)
        with self.clock.phase("select"):
            own = self._decide(block, statistics) if method.sharing.shares_decision else None
            masks = MaskViews({} if own is None else own.masks)
            update = method.sharing.contribute(Seen(block, statistics, masks, change, experts), method.target)
        if own is None and not strategy.server_votes:
            own = self._decide_from(block, update)
        weights = None if own is None or strategy.follows_server else own.weights
        return Contribution(update, own, weights)

    def _observe(
        self, block: Block, change: ChangeStatistics | None, experts: ExpertStatistics | None
    ) -> BlockStatistics | None:
        if not self.method.uses_inputs:
            return None
        sharing, walk_on = self.method.sharing, self.walks_on(block) and self.method.walks_densely
        observed = replace(block, linears=dict(sharing.observes(block.linears)))
        with self.clock.phase("observe"):
            return self.participant.observe(
                observed, sharing.observation, walk_on=walk_on, change=change, experts=experts
            )

    def _decide(self, block: Block, statistics: BlockStatistics | None) -> BlockDecision:
        return own_decision(block, statistics, self.method.target, self.participant.fingerprint)

    def _decide_from(self, block: Block, update: Mapping[str, Tensor]) -> BlockDecision:
        """The decision that the server would make from this participant's update alone."""
        totals: Totals = self.method.empty(block)
        n_tokens = self.participant.n_tokens
        totals.add(update, n_tokens, self.method.vote_weight(n_tokens))
        decision = self.method.decide(totals, block, self.method.target)
        assert isinstance(decision, BlockDecision), "a survey makes no decision about a block"
        return decision

    def advance(self, block: Block, weights: Weights | None) -> None:
        """Compute the next block's input with ``weights`` in place of the block's own.

        Args:
            block: The block to which the participant has contributed.
            weights: ``Contribution.weights``, or the server's weights if the participant follows the server;
                with None, nothing is computed.
        """
        return_freed_by(block.linears)
        if weights is not None and self.walks_on(block):
            with self.clock.phase("advance"):
                self.participant.advance(block, weights)
