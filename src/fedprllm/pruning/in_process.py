"""Pruning with all participants in one process: they walk through the blocks together.

At any time memory holds one block, its votes, one participant's masks and all hidden states. The checkpoint
is read once and written once, regardless of the number of participants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.deciding import BlockDecision
from fedprllm.models.block import Block
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.progress import Progress
from fedprllm.pruning.aggregate import Aggregate, decide_and_write
from fedprllm.pruning.clock import Clock
from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates
from fedprllm.pruning.inputs import pool
from fedprllm.pruning.method import Method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import secure_sums
from fedprllm.pruning.records import ExpertsRecord
from fedprllm.pruning.result_writer import ResultWriter
from fedprllm.pruning.run_folder import Run
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.pruning.walk import Walker

if TYPE_CHECKING:
    from fedprllm.pruning.secure_sums import SecureSums

__all__ = ["prune_in_process", "walking"]

Advance = Callable[[int], None]
Sample = Mapping[str, Sequence[int]]


@contextmanager
def walking(
    model: BlockwiseModel, participants: Sequence[Participant], samples: Sample, config: PruneConfig, run: Run
) -> Iterator[tuple[list[Participant], dict[str, Sequence[int]]]]:
    """The participants that walk, and the blocks that each prunes; in the end, hidden states are cleared.

    Args:
        model: The model.
        participants: All participants, in the order of their names.
        samples: The blocks that each participant prunes, by name.
        config: The resolved configuration; its strategy may pool the text.
        run: An open run, whose folder holds the hidden states beyond the memory limit.
    """
    walkers = [pool(participants)] if STRATEGIES[config.strategy].pools_text else list(participants)
    memory = HiddenMemory(run.spilled_folder, config.memory_limit)
    for participant in walkers:
        participant.hidden = HiddenStates(memory, participant.name)
    yield walkers, {one.name: samples.get(one.name, list(range(model.n_blocks))) for one in walkers}
    memory.clear()


def prune_in_process(
    model: BlockwiseModel,
    participants: Sequence[Participant],
    methods: Mapping[str | None, Method[BlockDecision]],
    run: Run,
    progress: Progress,
    samples: Sample,
) -> None:
    """Prune all unfinished blocks and leave the complete model or models in the run's folder.

    Args:
        model: The model to prune.
        participants: The participants in the order of their names; under ``centralized``, the single
            participant that holds all windows.
        methods: The run's method under the key None, and the methods of participants that allocate sparsity
            for themselves under their names.
        run: An open run.
        progress: Notified of every participant's step.
        samples: The blocks that each participant prunes, by name.

    Raises:
        ModelError: An activation is not finite.
        RunError: The disk is full.
    """
    strategy = methods[None].strategy
    together = strategy.server_votes or strategy.pools_text
    names = [None] if together else [participant.name for participant in participants]
    for name in names:
        run.reopen_model(name)
    run.forget_damaged(restarts=methods[None].uses_inputs)
    writers = {
        name: ResultWriter(run.unfinished_model_dir(name), model, methods[None].config) for name in names
    }
    secure = secure_sums(samples, model.n_blocks, methods[None].config, survey=False)
    walk = _SharedWalk(model, participants, methods, run, writers, samples, secure)
    with progress("pruning", model.n_blocks * len(participants)) as advance:
        advance(run.n_finished * len(participants))
        walk.resume(run.n_finished)
        for index in range(run.n_finished, model.n_blocks):
            walk.step(index, advance)
    for name, writer in writers.items():
        writer.finish(run.records())
        run.publish_model(name)


class _SharedWalk:
    """All participants walking through the blocks together."""

    def __init__(
        self,
        model: BlockwiseModel,
        participants: Sequence[Participant],
        methods: Mapping[str | None, Method[BlockDecision]],
        run: Run,
        writers: Mapping[str | None, ResultWriter],
        samples: Sample,
        secure: SecureSums | None,
    ) -> None:
        self.model, self.run, self.writers, self._secure = model, run, writers, secure
        self.method = methods[None]
        self.walkers = [
            Walker(one, methods.get(one.name, self.method), model.n_blocks, samples[one.name])
            for one in participants
        ]

    def resume(self, n_finished: int) -> None:
        """Restore the hidden states before the first unfinished block."""
        if not self.method.uses_inputs or n_finished == self.model.n_blocks:
            return
        for walker in self.walkers:
            walker.enter(self.model)
        if n_finished:
            kept = self.run.hidden_after(n_finished - 1)
            for walker in self.walkers:
                walker.participant.hidden.fill(
                    kept[_hidden_name(walker, window)].clone().to(self.model.device)
                    for window in range(len(walker.participant.windows))
                )

    def step(self, index: int, advance: Advance) -> None:
        """Prune one block for all participants and save the result."""
        clock = Clock()
        for walker in self.walkers:
            walker.clock = clock
        with ExitStack() as stack:
            with clock.phase("read"):
                block = stack.enter_context(self.model.block(index))
            self._step(block, clock, advance)

    def _step(self, block: Block, clock: Clock, advance: Advance) -> None:
        aggregate = Aggregate(block, self.method, self._secure)
        own_ties: dict[str, int] = {}
        decision: BlockDecision | None = None
        for walker in self.walkers:
            contribution = walker.contribute(block)
            if contribution.update is not None:
                with clock.phase("vote"):
                    aggregate.add(walker.name, contribution.update, walker.participant.n_tokens)
            if contribution.decision is not None:
                own_ties[walker.name] = contribution.decision.n_ties
                self._write_own(walker, block, contribution.decision, clock)
                decision = None if self.method.strategy.server_votes else contribution.decision
            walker.advance(block, contribution.weights)
            del contribution  # its masks take a byte for each weight
            advance(1)
        if self.method.strategy.server_votes:
            decision = decide_and_write(aggregate, self.writers.get(None), clock=clock)
        assert decision is not None, "without a vote, every participant decides for itself"
        if self.method.strategy.follows_server:
            for walker in self.walkers:
                walker.advance(block, decision.weights)
        with clock.phase("record"):
            record = aggregate.record(
                decision, participant_ties=own_ties, experts=self._reached(block), seconds=clock
            )
            aggregate.keep(self.run, record, self._hidden(block))

    def _write_own(self, walker: Walker, block: Block, decision: BlockDecision, clock: Clock) -> None:
        """Write the block as this participant pruned it, if its own decision is a model."""
        strategy = self.method.strategy
        name = None if strategy.pools_text else walker.name
        if not strategy.server_votes and name in self.writers:
            with clock.phase("write"):
                self.writers[name].write(block.index, decision.weights.remaining(block.tensors))

    def _reached(self, block: Block) -> dict[str, ExpertsRecord]:
        """How far each participant's text reached the block's experts."""
        return {
            walker.name: walker.participant.reached[block.index]
            for walker in self.walkers
            if block.index in walker.participant.reached
        }

    def _hidden(self, block: Block) -> dict[str, Tensor]:
        """The next block's input by participant and window."""
        return {
            _hidden_name(walker, number): state
            for walker in self.walkers
            if walker.walks_on(block)
            for number, state in enumerate(walker.participant.hidden.kept())
        }


def _hidden_name(walker: Walker, window: int) -> str:
    """Participants with the same text still need separate states: they may prune different blocks."""
    return f"{walker.name}.{window}"
