"""Choose the structure that a run removes: prune the model with each, and measure it on held-out windows.

Nothing is learned from a participant's held-out windows; only the loss on them is measured. For each
structure the choice needs the sum of a participant's losses and the number of its tokens, nothing else.

RUN/choice.json      what has been measured, from which the choice follows
RUN/candidates/2/    the run of the third candidate; deleted once its model is measured
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.errors import DataError, ModelError, UpdateError
from fedprllm.evaluation.perplexity import losses_by_text
from fedprllm.files import write_sealed
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.progress import Progress
from fedprllm.pruning.candidates import Candidates
from fedprllm.pruning.held_out import LossSum, divided
from fedprllm.pruning.in_process import prune_in_process, walking
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.records import CandidateRecord, ChoiceRecord
from fedprllm.pruning.reduction import reduction
from fedprllm.pruning.run_folder import Run

__all__ = ["check_held_out", "choose"]

Sample = Mapping[str, Sequence[int]]


def check_held_out(participants: Sequence[Participant]) -> None:
    """Refuse participants that cannot hold a window out.

    Raises:
        DataError: A participant has a single window.
    """
    for participant in participants:
        if len(participant.windows) < 2:
            raise DataError(
                f"participant '{participant.name}' has 1 window: smaller measures on windows that are held "
                "out, and needs at least 2 of every participant; add text, choose shorter windows, or name "
                "the structure yourself"
            )


def choose(
    model: BlockwiseModel,
    participants: Sequence[Participant],
    samples: Sample,
    found: Candidates,
    config: PruneConfig,
    run: Run,
    progress: Progress,
) -> ChoiceRecord:
    """Measure every candidate that has not been measured yet.

    Args:
        model: The dense model.
        participants: All participants, in the order of their names.
        samples: The blocks that each participant prunes, by name.
        found: The structures to choose among.
        config: The resolved configuration.
        run: An open run, which stores what is measured.
        progress: Notified of every step.

    Raises:
        ModelError: No candidate gives a model.
        UpdateError: A participant's sums are out of proportion.
    """
    assert config.smaller is not None, "the run chooses a structure"
    trials = run.folder / "candidates"
    kept = run.kept("choice.json", "the structures are measured")
    nothing = {"smaller": config.smaller, "candidates": [], "refused": found.refused}
    choice = ChoiceRecord.model_validate(kept or nothing)
    for number, structure in enumerate(found.structures):
        if structure in choice.refused or structure in (one.structure for one in choice.candidates):
            continue
        trial = _Trial(model, participants, samples, config.with_structure(structure), progress)
        try:
            measured = trial.measured(trials / str(number))
        except ModelError as error:
            choice = choice.model_copy(update={"refused": {**choice.refused, structure: str(error)}})
        else:
            choice = choice.model_copy(update={"candidates": [*choice.candidates, measured]})
        write_sealed(run.folder / "choice.json", choice.as_json())
        shutil.rmtree(trials)
    shutil.rmtree(trials, ignore_errors=True)
    if not choice.candidates:
        raise ModelError(
            f"none of the structures {'; '.join(found.structures)} gives a model:\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in choice.refused.items())
        )
    return choice


class _Trial:
    """A run with one of the candidates, on the windows that are not held out."""

    def __init__(
        self,
        model: BlockwiseModel,
        participants: Sequence[Participant],
        samples: Sample,
        config: PruneConfig,
        progress: Progress,
    ) -> None:
        assert config.structure is not None, "a candidate is a structure"
        self.structure: str = config.structure
        self._model, self._samples, self._config = model, samples, config
        parts = {one.name: divided(one.windows) for one in participants}
        self._members = [Participant(name, learned) for name, (learned, _) in parts.items()]
        self._held_out = {name: list(held_out) for name, (_, held_out) in parts.items()}
        self._progress: Progress = lambda about, total: progress(f"{self.structure}: {about}", total)

    def measured(self, folder: Path) -> CandidateRecord:
        """Prune and measure the candidate.

        Raises:
            ModelError: It does not give a model, or the model's loss is not finite.
            UpdateError: A participant's sums are out of proportion.
        """
        config, method = self._config, pruning_method(self._config)
        with Run(folder, {"structure": self.structure}) as run:
            with walking(self._model, self._members, self._samples, config, run) as (walkers, samples):
                prune_in_process(self._model, walkers, {None: method}, run, self._progress, samples)
            total = self._total(BlockwiseModel(run.model_dir(), config.dtype, config.device))
            smaller = reduction(self._model, run.model_dir())
            assert smaller is not None, "a candidate removes something"
        return CandidateRecord(
            structure=self.structure, of_blocks=smaller.of_blocks, loss=total.mean, n_tokens=total.n_tokens
        )

    def _total(self, pruned: BlockwiseModel) -> LossSum:
        """The sum over participants of what each of them shares."""
        by_name = {
            name: _sum_of(losses, self._held_out[name])
            for name, losses in losses_by_text(pruned, self._held_out, self._progress).items()
        }
        if self._config.secure:
            return _under_masks(by_name, self.structure)
        return sum(by_name.values(), LossSum())


def _sum_of(losses: Sequence[float], windows: Sequence[Tensor]) -> LossSum:
    """One participant's losses.

    Raises:
        ModelError: One is not finite.
    """
    try:
        each = [LossSum.of(loss, len(window) - 1) for loss, window in zip(losses, windows, strict=True)]
    except UpdateError as error:
        raise ModelError(str(error)) from None
    return sum(each, LossSum())


def _under_masks(by_name: Mapping[str, LossSum], structure: str) -> LossSum:
    """The sum that a server would see if it sees nothing but sums."""
    from fedprllm.secure.in_process import Parties
    from fedprllm.secure.terms import Terms

    parties = Parties(Terms({structure: list(by_name)}, {"losses": structure}))
    for name, one in by_name.items():
        parties.add(structure, name, np.array([one.units, one.n_tokens], np.uint64))
    return LossSum(*map(int, parties.total(structure)))
