"""The folder of healing; a killed one continues after its last finished round.

OUT/
  run.json                      identity: configuration, model, participants, versions
  rounds/round-0007.json        record of a round (written last: its existence marks the round as finished)
  state/round-0007.safetensors  the server's tensors after it; only the newest are kept
  model/                        the healed model, moved here as a whole once it is complete
  result.json                   the result (written last: its existence marks the folder as complete)
"""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors.torch import load_file

from fedprllm.errors import FedprllmWarning, RunError
from fedprllm.files import file_digest, save_tensors, write_sealed
from fedprllm.healing.records import HealRecord, RoundRecord
from fedprllm.healing.server import HealingServer
from fedprllm.pruning.run_folder import Run, check_files

__all__ = ["HealingRun"]


class HealingRun(Run):
    """The folder of one healing: a context manager that one process can hold at a time."""

    def _round_path(self, number: int) -> Path:
        return self.folder / "rounds" / f"round-{number:04d}.json"

    def _state_path(self, number: int) -> Path:
        return self.folder / "state" / f"round-{number:04d}.safetensors"

    def finish_round(self, record: RoundRecord, server: HealingServer) -> None:
        """Save the server's state after a round, and then the record, which marks it as finished."""
        path = self._state_path(record.number)
        save_tensors(path, server.tensors())
        digests = {path.relative_to(self.folder).as_posix(): file_digest(path)}
        record = record.model_copy(update={"files": digests, "figures": server.figures()})
        write_sealed(self._round_path(record.number), record.as_json())
        if record.number:
            self._state_path(record.number - 1).unlink(missing_ok=True)

    @property
    def n_finished(self) -> int:
        """Number of finished rounds."""
        number = 0
        while self._round_path(number).exists():
            number += 1
        return number

    def rounds(self) -> list[RoundRecord]:
        """The records of the finished rounds."""
        return [RoundRecord.read(self._round_path(number)) for number in range(self.n_finished)]

    def resume(self, server: HealingServer) -> list[RoundRecord]:
        """Give a server the state after the last finished round, and return the records so far.

        Warns:
            FedprllmWarning: The state is missing or damaged, so healing begins again.
        """
        try:
            records = self.rounds()
            if records:
                check_files(self.folder, records[-1].files)
        except RunError as error:
            warnings.warn(FedprllmWarning(f"{error}; healing begins again at round 0"), stacklevel=2)
            self._forget()
            return []
        if records:
            server.restore(load_file(self._state_path(records[-1].number)), records[-1].figures)
        return records

    def _forget(self) -> None:
        # Backwards: what a kill leaves must be without gaps.
        for path in sorted(self.folder.glob("rounds/round-*.json"), reverse=True):
            path.unlink()

    def check_result(self) -> None:
        """Check every file that the result names.

        Raises:
            RunError: One is missing or damaged; the message names it and what to do.
        """
        path = self.folder / "result.json"
        try:
            check_files(self.folder, HealRecord.read(path).files)
        except RunError as error:
            raise RunError(
                f"{error}. It was complete: restore the file, or delete {path} and repeat the command to "
                "have the model written again"
            ) from None
