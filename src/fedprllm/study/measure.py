"""Measure a cell: perplexities, bytes, and how its prunes were decided."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprllm.api import prune
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.zeros import count_zeros
from fedprllm.evaluation.perplexity import Perplexity, losses_by_text, perplexities, perplexities_of
from fedprllm.models.block import UNCHANGED, Block, PrunedWeights, Weights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.progress import Progress
from fedprllm.pruning.aggregate import Aggregate
from fedprllm.pruning.inputs import pool
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.sharing import SHARING, update_bytes
from fedprllm.study.kept_updates import KeptWalk, KeptWalks, is_served
from fedprllm.study.questions import Cell
from fedprllm.study.records import CellRecord

__all__ = ["Lab", "n_alone", "passes"]

Advance = Callable[[int], None]
Texts = Mapping[str, Sequence[Tensor]]


class Lab:
    """Measures cells on one model.

    Args:
        model: The dense model.
        walks: The participants' stored walks.
        scratch: Folder for ordinary runs, which are deleted once they are measured.
    """

    def __init__(self, model: BlockwiseModel, walks: KeptWalks, scratch: Path) -> None:
        self._model, self._walks, self._scratch = model, walks, scratch

    def dense(self, texts: Texts, advance: Advance) -> list[Perplexity]:
        """Perplexities of the unpruned model."""
        return perplexities(self._model, texts, _forwarded(advance))

    def measure(
        self, cell: Cell, participants: list[Participant], texts: Texts, n_models: int, advance: Advance
    ) -> CellRecord:
        """Measure everything that a study records about a cell.

        Args:
            cell: The cell.
            participants: Its participants.
            texts: Token windows to measure on, by name of the text.
            n_models: Maximum number of models pruned alone to measure.
            advance: Called with the number of windows that went through a block.
        """
        start = time.perf_counter()
        method = self._from_walks if is_served(cell.config) else self._from_run
        record = method(cell, participants, texts, n_models, advance)
        return record.model_copy(update={"seconds": round(time.perf_counter() - start, 3)})

    def _record(
        self, cell: Cell, participants: Sequence[Participant], sent: Sequence[int], **measured: Any
    ) -> CellRecord:
        """The record of a cell for which a participant shares ``sent`` bytes by block."""
        return CellRecord(
            setting=cell.setting,
            seed=cell.config.seed,
            n_participants=len(participants),
            participants=[participant.name for participant in participants],
            n_tokens=sum(participant.n_tokens for participant in participants),
            update_bytes=sum(sent),
            update_bytes_per_block=max(sent),
            n_prunable=self._model.n_prunable,
            **measured,
        )

    # Ordinary runs -----------------------------------------------------------------------------

    def _from_run(
        self, cell: Cell, participants: list[Participant], texts: Texts, n_models: int, advance: Advance
    ) -> CellRecord:
        """Measure an ordinary run, which lets a study compare anything that a run can do."""
        folder = self._scratch / cell.key
        windows = {participant.name: participant.windows for participant in participants}
        each = _passes_each(cell) * (sum(map(len, windows.values())) // len(windows))
        result = prune(
            self._model.folder,
            windows,
            cell.config,
            out=folder,
            progress=_forwarded(advance, "pruning", each),
        )
        measured = _Measured(texts, advance)
        for name, model_dir in list(result.model_dirs.items())[:n_models]:
            measured.add(name, BlockwiseModel(model_dir, cell.config.dtype, cell.config.device))
        run = result.record
        linears = [linear for _, linear in run.linears()]
        shutil.rmtree(folder)
        return self._record(
            cell,
            participants,
            # The bytes actually sent: a participant may not prune every block.
            run.update_bytes_per_block,
            made="run",
            models=measured.models,
            window_losses=measured.losses,
            n_zeros=run.n_zeros,
            n_pruned=sum(linear.n_pruned for linear in linears),
            n_ties=sum(linear.n_ties for linear in linears),
        )

    # Stored walks ------------------------------------------------------------------------------

    def _from_walks(
        self, cell: Cell, participants: list[Participant], texts: Texts, n_models: int, advance: Advance
    ) -> CellRecord:
        """Measure decisions made from stored walks, without writing a pruned model."""
        strategy = STRATEGIES[cell.config.strategy]
        walking = [pool(participants)] if strategy.pools_text else participants
        if not strategy.server_votes:
            walking = walking[:n_models]
        walks = {
            participant.name: self._walks.of(participant, cell.config, advance) for participant in walking
        }
        counts: Counter[str] = Counter()
        voted: Counter[int] = Counter()
        measured = _Measured(texts, advance)
        if strategy.server_votes:
            agreement = _MeanAgreement()
            decide = self._server(cell, walking, walks, counts, voted, agreement)
            measured.add("model", self._model, decide)
            shapes = [SHARING[cell.config.share].shapes(linears) for linears in self._model.linears]
            sent = [update_bytes(block) for block in shapes]
            extra = {
                "pruned_by_votes": [voted[n] for n in range(len(walking) + 1)] if voted else None,
                "agreement": agreement.mean(),
            }
        else:
            extra, sent = {}, [0]
            for name, walk in walks.items():
                decide = self._own(cell, walk, counts)
                measured.add(name, self._model, decide)
            counts = Counter({key: value // len(walks) for key, value in counts.items()})
            counts["n_ties"] = sum(walk.record.n_ties for walk in walks.values()) // len(walks)
        return self._record(
            cell,
            participants,
            sent,
            made="derived",
            models=measured.models,
            window_losses=measured.losses,
            **counts,
            **extra,
        )

    def _server(
        self,
        cell: Cell,
        participants: Sequence[Participant],
        walks: Mapping[str, KeptWalk],
        counts: Counter[str],
        voted: Counter[int],
        agreement: _MeanAgreement,
    ) -> Callable[[Block], Weights]:
        """The server's decision about a block, from stored updates."""
        method = pruning_method(cell.config)

        def decide(block: Block) -> Weights:
            aggregate = Aggregate(block, method)
            shapes = method.sharing.shapes(block.linears)
            plain = {name: torch.zeros(shape, dtype=torch.int32) for name, (shape, _) in shapes.items()}
            for participant in participants:
                update = walks[participant.name].update(block, shapes)
                aggregate.add(participant.name, update, participant.n_tokens)
                if method.sharing.shares_decision:
                    for name, votes in plain.items():
                        votes += update[name]
            agreement.add(aggregate.agreement(), block)
            decision = aggregate.decide()
            for name, pruned in decision.masks.items():
                counts["n_pruned"] += int(pruned.mask.sum())
                counts["n_ties"] += pruned.n_ties
                counts["n_zeros"] += count_zeros(decision.weights[name])
                if method.sharing.shares_decision:
                    times = torch.bincount(plain[name][pruned.mask.cpu()])
                    voted.update(dict(enumerate(times.tolist())))
            return decision.weights

        return decide

    def _own(self, cell: Cell, walk: KeptWalk, counts: Counter[str]) -> Callable[[Block], Weights]:
        """One participant's own decision about a block."""
        sharing = SHARING[cell.config.share]

        def decide(block: Block) -> Weights:
            masks = walk.update(block, sharing.shapes(block.linears))
            on_device = {name: mask.to(block.tensors[name].device) for name, mask in masks.items()}
            weights = PrunedWeights(block, on_device)
            counts["n_pruned"] += sum(int(mask.sum()) for mask in masks.values())
            counts["n_zeros"] += sum(map(count_zeros, weights.values()))
            return weights

        return decide


class _Measured:
    """Losses of the models of a cell on the same texts."""

    def __init__(self, texts: Texts, advance: Advance) -> None:
        self._texts, self._advance = texts, advance
        self.models: dict[str, list[Perplexity]] = {}
        self.losses: dict[str, dict[str, list[float]]] = {}

    def add(
        self, name: str, model: BlockwiseModel, weights_of: Callable[[Block], Weights] = lambda _: UNCHANGED
    ) -> None:
        """Measure a model; `weights_of` is that of `fedprllm.evaluation.perplexity.perplexities`."""
        losses = losses_by_text(model, self._texts, _forwarded(self._advance), weights_of)
        self.models[name] = perplexities_of(model, self._texts, losses)
        self.losses[name] = losses


class _MeanAgreement:
    """Agreement of masks [participant, participant], averaged over all Linears weighted by their size."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._n_weights = 0

    def add(self, by_path: Mapping[str, list[list[float]]], block: Block) -> None:
        for linear in block.linears.values():
            if linear.path in by_path:
                size = linear.n_weights
                matrix = torch.tensor(by_path[linear.path], dtype=torch.float64) * size
                self._sum = matrix if self._sum is None else self._sum + matrix
                self._n_weights += size

    def mean(self) -> list[list[float]] | None:
        """The matrix; None if no participant shared masks."""
        if self._sum is None:
            return None
        return [[round(value, 5) for value in row] for row in (self._sum / self._n_weights).tolist()]


def n_alone(cell: Cell, n_participants: int, at_most: int) -> int:
    """Number of models pruned alone to measure: a sample, unless each participant has different text."""
    return min(n_participants, at_most) if cell.partition == "iid" else n_participants


def passes(cell: Cell, participants: Sequence[Participant], walks: KeptWalks) -> dict[str, int]:
    """Number of windows that must go through the model to prune, by walk; shared walks count once."""
    config, each = cell.config, _passes_each(cell)
    if not each:
        return {}
    walking = [pool(participants)] if STRATEGIES[config.strategy].pools_text else participants
    if not is_served(config):
        return {cell.key: sum(each * len(participant.windows) for participant in walking)}
    return {
        walks.key(participant, config): each * len(participant.windows)
        for participant in walking
        if not walks.has(participant, config)
    }


def _passes_each(cell: Cell) -> int:
    """How often a window goes through each block: to observe it and, if needed, to walk on once pruned."""
    if not CRITERIA[cell.config.criterion].uses_inputs:
        return 0
    strategy = STRATEGIES[cell.config.strategy]
    return 2 if SHARING[cell.config.share].shares_decision or strategy.follows_server else 1


def _forwarded(advance: Advance, only: str = "", each: int = 1) -> Progress:
    """Report each step of an inner task, or of one of its parts, as ``each`` steps of the whole."""

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:  # noqa: ARG001  the signature of Progress
        counted = not only or description == only
        yield lambda n_steps: advance(n_steps * each if counted else 0)

    return progress
