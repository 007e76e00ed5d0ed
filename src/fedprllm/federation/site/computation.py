"""What every computation of a participant does: open model and text, ask for consent, keep what it shares.

The computation is a process of its own (`fedprllm.federation.site.worker`), which communicates only through
files in its spool.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from fedprllm.errors import UpdateError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.site.consent import (
    TextBudget,
    ask,
    check_text,
    own_seed,
    text_identity,
)
from fedprllm.federation.site.process import Failed
from fedprllm.federation.site.spool import Spool
from fedprllm.files import read_json, read_sealed, write_sealed

__all__ = ["Computation"]

_DECISION_POLL_S = 0.05
_RESULT_POLL_S = 0.5
_RESULT_WAIT_S = 600.0  # in which the result of an earlier run is fetched and built
_Decided = TypeVar("_Decided")


class Computation:
    """One participant's part in a run, which reads and writes its spool.

    Args:
        spool: The spool.
        settings: The participant's own settings.
        name: Its name.
        owner: Token of this process.
        local: The kit's ``local`` folder.
    """

    def __init__(self, spool: Spool, settings: SiteSettings, name: str, owner: str, local: Path) -> None:
        from fedprllm.config import PruneConfig

        self.spool, self.settings, self.name, self.owner = spool, settings, name, owner
        self.local = local
        self.job: dict[str, Any] = read_sealed(spool.path("job.json"))
        config = PruneConfig(**self.job["config"])
        self.config = config.model_copy(update={"device": settings.device or "cpu"})

    @property
    def home(self) -> Path:
        """The participant's folder with its ledger and runs."""
        return self.spool.folder.parent.parent

    def check_owner(self) -> None:
        """End this process if that of a later job of the same run has taken over."""
        if self.spool.owner != self.owner:
            os._exit(3)

    # Model, text and consent -------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the model, compare it with the coordinator's, and read the text."""
        from fedprllm.federation.site.model import open_model
        from fedprllm.models.fingerprints import model_digest
        from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates
        from fedprllm.pruning.inputs import make_participants

        expected = read_json(self.spool.path("fingerprints.json"))
        self.model = open_model(
            self.settings,
            self.job["model"],
            expected,
            self.config.dtype,
            self.config.device,
            self._exclude,
            self._earlier_result() if self.job.get("of") else None,
        )
        if self.job.get("heal") is None:
            self._check_blocks(self.model.n_blocks)
        self.digest = model_digest(expected)
        seed = own_seed(self.home) if self.settings.seed is None else self.settings.seed
        (self.participant,), config = make_participants(
            self.model,
            {self.name: list(self.settings.data)},
            self.config.model_copy(update={"seed": seed}),
        )
        self.config = self.config.model_copy(update={"window_length": config.window_length})
        self._check_same_text()
        if self.participant.notes:
            print("\n".join(self.participant.notes), file=sys.stderr)
            write_sealed(self.spool.path("notes.json"), {"notes": self.participant.notes})
        check_text(self.settings, len(self.participant.windows), self.participant.n_tokens)
        self._memory = HiddenMemory(self.spool.spilled_folder, self.settings.memory_limit)
        self.participant.hidden = HiddenStates(self._memory, self.name)

    @property
    def _exclude(self) -> tuple[str, ...]:
        heal = self.job.get("heal")
        return self.config.exclude if heal is None else tuple(heal["exclude"])

    def _earlier_result(self) -> Path:
        """The result that is to be healed, which may still be on its way."""
        from fedprllm.federation.site.model import earlier_result

        begin = time.monotonic()
        while True:
            try:
                return earlier_result(self._results, self.job["of"])
            except Failed:
                if not self.settings.result or time.monotonic() - begin > _RESULT_WAIT_S:
                    raise
            self.check_owner()
            time.sleep(_RESULT_POLL_S)

    @property
    def _results(self) -> Path:
        """Folder with the results of earlier runs."""
        return self.local.parent / "runs" if self.settings.out is None else Path(self.settings.out)

    def _check_same_text(self) -> None:
        """Refuse to continue a run with windows other than those it began with."""
        found = {"fingerprint": self.participant.fingerprint}
        if self.spool.known("text.json") not in (None, found):
            raise Failed(
                "data",
                message="the text, or the seed in windows-seed by which its windows are chosen, has changed "
                "since this run began: restore it, or let the run continue without this participant",
            )
        write_sealed(self.spool.path("text.json"), found)

    def _check_blocks(self, n_blocks: int) -> None:
        """Refuse to prune more blocks than this participant's settings grant."""
        most = max(1, int(n_blocks * Fraction(str(self.settings.block_fraction))))
        asked = len(self.job["blocks"])
        if asked > most:
            raise Failed(
                "too many blocks",
                message=f"the run asks for {asked} of {n_blocks} blocks, and this participant prunes at most "
                f"{most} (--block-fraction): ask the coordinator to set the run's block_fraction to "
                f"{self.name}={self.settings.block_fraction:g} or less",
            )

    def ask_for_consent(self, question: Callable[[int, int], Mapping[str, Any]]) -> None:
        """Ask the participant for consent, unless it wants none asked, and count the run against the text.

        Args:
            question: Makes the question, given how many runs will have used the text and how many may.
        """
        budget, text = TextBudget(self.home), text_identity(self.settings.data)
        if not self.settings.confirm:
            budget.spend(text, self.job["run"], self.settings.runs_per_text)
            return
        used = set(budget.runs_of(text)) | {self.job["run"]}
        asked = question(len(used), self.settings.runs_per_text)
        self.spool.set_status("waiting")
        ask(self.spool.folder, asked, lambda: self.spool.owner == self.owner)
        self.spool.set_status("working")
        budget.spend(text, self.job["run"], self.settings.runs_per_text)

    # What is shared and what comes back --------------------------------------------------------

    def keep(self, index: int, kind: str, tensors: Mapping[str, Any], n_tokens: int) -> None:
        """Write what is shared about a block, or in a round."""
        from fedprllm.federation.protocol import update as wire

        message = wire.Update(
            run_id=bytes.fromhex(self.job["run"]),
            participant=self.name,
            block=index,
            kind=kind,
            model_fingerprint=self.digest,
            tensors=tensors,
            n_tokens=n_tokens,
        )
        shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        summary = {"kind": kind, "n_tokens": n_tokens, "shapes": shapes}
        self.spool.keep_update(index, wire.encode(message), summary)

    def hidden_words(self, index: int, words: Any) -> dict[str, Any]:
        """Hide words, uint64 [n], once keys have been exchanged: the tensors of an update under masks."""
        import torch

        from fedprllm.federation.site.masking import Masking

        while not Masking(*self._masking).may_mask:
            self.check_owner()
            time.sleep(_DECISION_POLL_S)
        hidden = Masking(*self._masking).mask(index, words)
        return {"words": torch.from_numpy(hidden.view("<i8"))}

    @property
    def _masking(self) -> tuple[Any, ...]:
        return self.name, self.local, self.settings, self.spool, self.home

    def wait_for(self, index: int, decode: Callable[[bytes], _Decided]) -> _Decided:
        """Wait for the coordinator's decision about a block, or of a round."""
        path = self.spool.decision_path(index)
        while True:
            while not path.exists():
                self._check_decision_may_come(index)
                self.check_owner()
                time.sleep(_DECISION_POLL_S)
            try:
                return decode(path.read_bytes())
            except UpdateError as error:
                print(f"{path} is damaged, waiting for it again: {error}", file=sys.stderr)
                path.unlink(missing_ok=True)

    def _check_decision_may_come(self, index: int) -> None:
        """The coordinator sends its newest decision only: one that is lost behind it never comes again."""
        if self.spool.decision_path(index + 1).exists():
            raise Failed(
                "internal",
                message=f"the decision about block {index} is missing or damaged, and the walk must begin "
                f"again because of other damage in {self.spool.folder}: check the disk; the run can continue "
                "without this participant",
            )
