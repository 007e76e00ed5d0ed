"""All participants in one process: one walk over the blocks, taken by everyone together.

In memory at any time: one block, its votes, one participant's masks of it and everyone's hidden states.
The checkpoint is read once and written once, whatever the number of participants.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.zeros import count_zeros
from fedprllm.federation.agreement import Agreement
from fedprllm.models.blocks import Block, BlockwiseModel, Linear
from fedprllm.models.checkpoint import CheckpointWriter
from fedprllm.participant import Participant
from fedprllm.progress import Progress
from fedprllm.runs import Run
from fedprllm.sharing import SHARING, BlockDecision, Contribution, Totals
from fedprllm.strategies import STRATEGIES
from fedprllm.votes import save_votes

__all__ = ["block_record", "prune_in_process"]


class _Clock(defaultdict[str, float]):
    """Seconds spent by phase."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] += time.perf_counter() - start


def prune_in_process(
    model: BlockwiseModel,
    participants: Sequence[Participant],
    config: PruneConfig,
    run: Run,
    progress: Progress,
    samples: Mapping[str, Sequence[int]] | None = None,
    own_linears: Mapping[str, Sequence[dict[str, Linear]]] | None = None,
) -> None:
    """Walk all blocks that are not finished yet, and leave the complete model(s) in the run's folder.

    Args:
        model: the model to prune.
        participants: in any order; under ``centralized`` the one that holds all windows.
        config: the resolved configuration.
        run: an open run.
        progress: told of every participant's step.
        samples: the blocks that each participant prunes, by name; all of them if left out.
        own_linears: the Linears as each participant prunes them, where it allocates sparsity for itself.

    Raises:
        ModelError: activations that are not finite.
        RunError: the disk is full.
    """
    strategy = STRATEGIES[config.strategy]
    outputs = [None] if strategy.server_votes or strategy.pools_text else [p.name for p in participants]
    writers = {
        name: CheckpointWriter(run.unfinished_model_dir(name), model.n_blocks)
        for name in outputs
        if not run.model_dir(name).exists()
    }
    every = {person.name: range(model.n_blocks) for person in participants}
    walk = _Walk(model, participants, config, run, writers, samples or every, own_linears or {})
    with progress("pruning", model.n_blocks * len(participants)) as advance:
        advance(run.n_finished * len(participants))
        walk.resume(run.n_finished)
        for index in range(run.n_finished, model.n_blocks):
            walk.step(index, advance)
    outside = model.names_outside_blocks()
    for name, writer in writers.items():
        writer.write(None, model.checkpoint.load(outside))
        writer.finish(model.folder)
        run.publish_model(name)


class _Walk:
    """The walk of all participants, block by block."""

    def __init__(
        self,
        model: BlockwiseModel,
        participants: Sequence[Participant],
        config: PruneConfig,
        run: Run,
        writers: Mapping[str | None, CheckpointWriter],
        samples: Mapping[str, Sequence[int]],
        own_linears: Mapping[str, Sequence[dict[str, Linear]]],
    ) -> None:
        self.model, self.participants, self.config = model, participants, config
        self.run, self.writers = run, writers
        self.samples, self.own_linears = samples, own_linears
        self.strategy, self.sharing = STRATEGIES[config.strategy], SHARING[config.share]
        self.uses_inputs = CRITERIA[config.criterion].uses_inputs

    def resume(self, n_finished: int) -> None:
        """Bring everyone's hidden states to the first block that is not finished."""
        if not self.uses_inputs or n_finished == self.model.n_blocks:
            return
        for participant in self.participants:
            participant.enter(self.model)
        if n_finished:
            kept = self.run.hidden_after(n_finished - 1)
            for participant in self.participants:
                participant.hidden.fill(
                    kept[_hidden_name(participant, window)].clone().to(self.model.device)
                    for window in range(len(participant.windows))
                )

    def step(self, index: int, advance: Any) -> None:
        """Prune one block for everyone and keep the result."""
        clock = _Clock()
        with ExitStack() as stack:
            with clock.phase("read"):
                block = stack.enter_context(self.model.block(index))
            self._step(block, clock, advance)

    def _step(self, block: Block, clock: _Clock, advance: Any) -> None:
        sampled = [person for person in self.participants if block.index in self.samples[person.name]]
        totals = self.sharing.zeros(block)
        agreement = Agreement(block, self.config.seed)
        own_ties: dict[str, int] = {}
        walks_on = self.uses_inputs and block.index + 1 < self.model.n_blocks
        for participant in self.participants:
            if participant not in sampled:
                self._pass_by(participant, block, clock, walks_on)
                advance(1)
                continue
            block = self._as_pruned_by(participant, block)
            contribution = self._contribute(participant, block, clock, walks_on)
            own = contribution.own
            with clock.phase("vote"):
                totals.add(contribution.update, self._weight_of(participant))
                if own is not None:
                    agreement.add({name: pruned.mask for name, pruned in own.masks.items()})
            if not self.strategy.server_votes:
                own = decided = own or self._decide_alone(participant, block, contribution)
                name = None if self.strategy.pools_text else participant.name
                with clock.phase("write"):
                    self._write(name, block, decided)
            if own is not None:
                own_ties[participant.name] = sum(pruned.n_ties for pruned in own.masks.values())
                if walks_on and not self.strategy.follows_server:
                    with clock.phase("advance"):
                        participant.advance(block, own.weights)
            advance(1)
        if self.strategy.server_votes:
            with clock.phase("aggregate"):
                decided = self.sharing.decide(totals, block, self.config)
                decided.take_effect(block)
            with clock.phase("write"):
                self._write(None, block, decided)
        if walks_on and self.strategy.follows_server:
            with clock.phase("advance"):
                for participant in self.participants:
                    participant.advance(block, decided.weights)
        hidden = {
            _hidden_name(participant, number): state
            for participant in self.participants
            for number, state in enumerate(participant.hidden.kept())
            if walks_on
        }
        with clock.phase("record"):
            record = block_record(block, totals, decided, own_ties, agreement)
            record["participants"] = [person.name for person in sampled]
            save_votes(self.run.votes_path(block.index), totals.votes, block.linears)
        self.run.finish_block(block.index, record | {"seconds": clock}, hidden)

    def _pass_by(self, participant: Participant, block: Block, clock: _Clock, walks_on: bool) -> None:
        """Walk on with the unpruned block, unless the server's decision is waited for."""
        if walks_on and not self.strategy.follows_server:
            with clock.phase("advance"):
                participant.advance(block, {})

    def _as_pruned_by(self, participant: Participant, block: Block) -> Block:
        """The block with the sparsity that a participant has allocated for itself, if it did."""
        own = self.own_linears.get(participant.name)
        return block if own is None else replace(block, linears=own[block.index])

    def _weight_of(self, participant: Participant) -> int:
        """What a participant's vote counts."""
        return participant.windows.numel() if self.config.weighting == "tokens" else 1

    def _contribute(
        self, participant: Participant, block: Block, clock: _Clock, walks_on: bool
    ) -> Contribution:
        statistics = None
        if self.uses_inputs:
            walk_densely = walks_on and self.sharing.walks_densely(self.strategy)
            with clock.phase("observe"):
                statistics = participant.observe(block, self.sharing.observation, walk_on=walk_densely)
        with clock.phase("select"):
            return self.sharing.contribute(block, statistics, self.config, participant.fingerprint)

    def _decide_alone(
        self, participant: Participant, block: Block, contribution: Contribution
    ) -> BlockDecision:
        """The decision from one participant's update alone."""
        totals = self.sharing.zeros(block)
        totals.add(contribution.update, self._weight_of(participant))
        return self.sharing.decide(totals, block, self.config)

    def _write(self, name: str | None, block: Block, decision: BlockDecision) -> None:
        if name in self.writers:
            self.writers[name].write(block.index, {**block.tensors, **decision.weights})


def _hidden_name(participant: Participant, window: int) -> str:
    return f"{participant.fingerprint}.{window}"


def block_record(
    block: Block, totals: Totals, decided: BlockDecision, own_ties: dict[str, int], agreement: Agreement
) -> dict[str, Any]:
    """What a run keeps of a finished block, as JSON values: counts, never text."""
    linears: dict[str, Any] = {}
    for name, linear in block.linears.items():
        linears[name] = {
            "kind": linear.kind,
            "shape": list(linear.shape),
            "n_zeros": count_zeros(decided.weights[name]),
            "n_pruned": int(decided.masks[name].mask.count_nonzero()),
            "n_ties": decided.masks[name].n_ties,
        }
        if decided.masks[name].n_close is not None:
            linears[name]["n_close"] = decided.masks[name].n_close
        # Votes that count tokens have too many values for a histogram.
        if name in totals.votes and totals.weight == totals.n_participants:
            linears[name]["vote_histogram"] = totals.votes[name].histogram().tolist()
    return {
        "block": block.index,
        "linears": linears,
        "sparsity": _share_pruned(linears),
        "participant_ties": own_ties,
        "agreement": agreement.summary(),
        "notes": decided.notes,
    }


def _share_pruned(linears: Mapping[str, Any]) -> float:
    """Share of a block's prunable weights that its mask prunes."""
    n_weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears.values())
    return float(sum(linear["n_pruned"] for linear in linears.values()) / n_weights)
