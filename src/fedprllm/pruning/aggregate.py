"""From contributions to a pruned block: add up the updates, decide, record, write the shard.

Updates are summed and turned into a decision only here, whether the run takes place in one process, at the
coordinator of a federation, in a survey or in a study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from fedprllm.core.zeros import count_zeros
from fedprllm.deciding import BlockDecision
from fedprllm.errors import UpdateError
from fedprllm.models.block import Block, Linear, return_freed_by
from fedprllm.models.norms import input_norms
from fedprllm.pruning.agreement import Agreement
from fedprllm.pruning.clock import Clock
from fedprllm.pruning.method import Method
from fedprllm.pruning.records import BlockRecord, LinearRecord
from fedprllm.pruning.result_writer import ResultWriter
from fedprllm.pruning.run_folder import Run
from fedprllm.pruning.stored_sums import save_sums
from fedprllm.pruning.stored_votes import save_votes
from fedprllm.sharing import Totals
from fedprllm.sharing.interface import Tensors

__all__ = ["Aggregate", "decide_and_write"]

if TYPE_CHECKING:
    from fedprllm.pruning.secure_sums import SecureSums

_Decided = TypeVar("_Decided")


class Aggregate(Generic[_Decided]):
    """One block's sums over participants, and the decision they lead to.

    Args:
        block: The unpruned block.
        method: What participants share and how a decision is made from it.
        secure: Adds updates up under masks; by default they are added up in the clear.

    Attributes:
        totals: The sums so far; under masks, they are empty until the decision.
    """

    def __init__(self, block: Block, method: Method[_Decided], secure: SecureSums | None = None) -> None:
        self.block, self.method, self._secure = block, method, secure
        self.totals: Totals = method.empty(block)
        self._figures: dict[str, Tensors] = {}
        self._agreement = Agreement(block, method.config.seed)
        self._n_tokens: dict[str, int] = {}

    def add(self, name: str, update: Mapping[str, Tensor], n_tokens: int) -> None:
        """Add one participant's update.

        The sums are exact and do not depend on the order of participants; what is recorded about them is in
        the order in which they are added, that of their names.

        Args:
            name: Name of the participant.
            update: The tensors it shared, by name.
            n_tokens: Number of its calibration tokens.
        """
        self._n_tokens[name] = n_tokens
        if self._secure is not None:
            self._secure.add(self.block, self.method, name, update, n_tokens)
            return
        self.totals.add(update, n_tokens, self.method.vote_weight(n_tokens))
        self._agreement.add(update)
        if comparison := self.method.sharing.comparison:
            self._figures[name] = comparison.figures(update, self.block.linears, n_tokens)

    def take(self, totals: Totals, names: Sequence[str]) -> None:
        """Take sums that were added up under masks.

        Args:
            totals: The sums.
            names: Participants whose updates are in them.
        """
        self.totals = totals
        self._n_tokens = dict.fromkeys(names, 0)

    def decide(self) -> _Decided:
        """Decide from the current sums.

        Raises:
            UpdateError: A participant's update is out of proportion to the others' or to the model. A
                coordinator refuses such updates before it adds anything up (`Ballots.outstanding`). Under
                masks: the sum is none that honest participants can add up to.
        """
        return_freed_by(self.block.linears)
        if self._secure is not None:
            self.totals = self._secure.totals(self.block, self.method)
        for name, reason in self._outstanding().items():
            raise UpdateError(
                f"participant '{name}', block {self.block.index}: {reason}. Its text may be far from all "
                "other text, or too little: give it more text, leave it out, or share masks"
            )
        return self.method.decide(self.totals, self.block, self.method.target)

    def _outstanding(self) -> dict[str, str]:
        comparison = self.method.sharing.comparison
        if comparison is None:
            return {}
        return comparison.outstanding(self._figures, input_norms(self.block.linears))

    def agreement(self) -> dict[str, list[list[float]]]:
        """Pairwise agreement of the participants' masks (see `Agreement.summary`)."""
        return self._agreement.summary()

    def record(self, decision: BlockDecision, **about: Any) -> BlockRecord:
        """Summarize the finished block for the run's record: counts, never text.

        Args:
            decision: The decision about the block.
            about: Further fields of the record.
        """
        linears = {
            name: self._linear(linear, decision)
            for name, linear in self.block.linears.items()
            if decision.keeps(linear)
        }
        n_pruned = sum(linear.n_pruned for linear in linears.values())
        return BlockRecord(
            block=self.block.index,
            linears=linears,
            sparsity=n_pruned / sum(linear.n_weights for linear in linears.values()),
            agreement=self.agreement(),
            notes=[*self.block.notes, *decision.notes],
            coverage=self.block.coverage,
            influence=decision.influence,
            expert_scores=decision.expert_scores,
            removed_experts=decision.removed_experts or None,
            participants=list(self._n_tokens),
            **about,
        )

    def _linear(self, linear: Linear, decision: BlockDecision) -> LinearRecord:
        pruned, votes = decision.masks.get(linear.name), self.totals.votes.get(linear.name)
        # Votes weighted by tokens take too many values for a histogram.
        counted = votes is not None and self.totals.weight == self.totals.n_participants
        weight = decision.weights.get(linear.name, self.block.tensors[linear.name])
        weight = linear.stored(decision.weights.cut(linear.name, weight))
        shape = (weight.shape[0], weight.shape[1])
        return LinearRecord(
            path=linear.path,
            shape=shape,
            dense_shape=linear.shape if shape != linear.shape else None,
            n_zeros=count_zeros(weight),
            n_pruned=int(pruned.mask.count_nonzero()) if pruned else 0,
            n_ties=pruned.n_ties if pruned else 0,
            n_close=pruned.n_close if pruned else None,
            vote_histogram=votes.histogram().tolist() if counted and votes is not None else None,
        )

    def keep(
        self,
        run: Run,
        record: BlockRecord,
        hidden: Mapping[str, Tensor] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """Write votes, sums, hidden states and finally the record, which marks the block as finished.

        Args:
            run: The run, open.
            record: The block's record.
            hidden: Hidden states after the block.
            files: Further files that belong to the block.
        """
        index, linears = self.block.index, self.block.linears
        save_votes(run.votes_path(index), self.totals.votes, linears)
        if squares := self.method.sharing.squares:
            save_sums(run.sums_path(index), squares(self.totals, linears), linears, self.totals.n_tokens)
        run.finish_block(self.block.index, record, hidden, files)


def decide_and_write(
    aggregate: Aggregate[BlockDecision],
    writer: ResultWriter | None,
    announce: Callable[[BlockDecision], object] | None = None,
    clock: Clock | None = None,
) -> BlockDecision:
    """Decide about a block, apply the decision to it and write the pruned block.

    Args:
        aggregate: The sums over all participants.
        writer: Writer of the pruned model; None if the block has already been written.
        announce: Called with the decision before it is applied, while the block still has its own weights.
        clock: Records the time spent.
    """
    with clock.phase("aggregate") if clock else nullcontext():
        decision = aggregate.decide()
        if announce is not None:
            announce(decision)
        decision.take_effect(aggregate.block)
        return_freed_by(aggregate.block.linears)
    with clock.phase("write") if clock else nullcontext():
        if writer is not None:
            writer.write(aggregate.block.index, decision.weights.remaining(aggregate.block.tensors))
    return decision
