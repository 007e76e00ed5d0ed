"""One participant's computation: a separate process that walks over all blocks for one run.

    python -m fedprllm.federation.site.worker SPOOL SETTINGS NAME OWNER

It communicates only through files in its spool (`fedprllm.federation.site.spool`) and uses no network, except
to fetch a model or data set from the hub if the settings say so. It ends when its parent process ends or when
another process takes over the spool. If it is killed at any point, the next process continues its work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprllm.errors import DataError, DiskFull, FedprllmError, SecureError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.site.computation import Computation
from fedprllm.federation.site.consent import Refused, check_request
from fedprllm.federation.site.process import Failed, end_with_parent, is_out_of_memory, limit_resources
from fedprllm.federation.site.spool import Spool
from fedprllm.files import free_bytes, is_full, read_json, read_sealed, save_tensors, write_sealed
from fedprllm.lean import start_lean
from fedprllm.process import use_large_pages

__all__ = ["main"]

_SPACE_POLL_S = 5.0


def main(arguments: list[str]) -> int:
    """Compute every update of a run.

    Args:
        arguments: Spool folder, settings file, name of the participant, and owner token.

    Returns:
        Exit status: 0 if all updates are ready, 1 after a failure recorded in the spool.
    """
    folder, settings_file, name, owner = arguments
    spool = Spool(Path(folder))
    local = Path(settings_file).parent
    settings = SiteSettings(**read_json(Path(settings_file)))
    end_with_parent()
    limit_resources(settings)
    with FileLock(spool.path(".lock")):
        while True:
            try:
                return _walk(spool, settings, name, owner, local)
            except (DiskFull, OSError) as error:
                _wait_for_space(spool, owner, error)


def _wait_for_space(spool: Spool, owner: str, error: DiskFull | OSError) -> None:
    """Tell the participant that its disk is full, and let the computation continue after a while."""
    print(error, file=sys.stderr)
    message = (
        f"the disk of {spool.folder} is full ({free_bytes(spool.folder) / 1e6:.0f} MB are free): free some "
        "space, and the computation goes on by itself"
    )
    with contextlib.suppress(DiskFull, OSError):
        spool.set_status("waiting", "disk full", message=message)
    time.sleep(_SPACE_POLL_S)
    if spool.owner != owner:
        os._exit(3)


def _walk(spool: Spool, settings: SiteSettings, name: str, owner: str, local: Path) -> int:
    """Walk to the end, or record why that is impossible.

    Raises:
        DiskFull: There is no space for what was computed.
        OSError: The same, where the system says it.
    """
    spool.set_status("working")
    try:
        _computation(spool)(spool, settings, name, owner, local).run()
    except Failed as failure:
        print(failure, file=sys.stderr)
        spool.set_status("failed", failure.code, failure.tensor, str(failure), failure.value)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        spool.set_status("failed", refusal.code, message=str(refusal))
    except SecureError as error:
        return _fail(spool, "not secure", error)
    except DataError as error:
        return _fail(spool, "data", error)
    except DiskFull:
        raise
    except FedprllmError as error:
        return _fail(spool, "compute", error)
    except OSError as error:
        if is_full(error):
            raise
        return _fail(spool, "internal", error)
    except MemoryError as error:
        return _fail(spool, "memory", error)
    except RuntimeError as error:
        return _fail(spool, "memory" if is_out_of_memory(error) else "internal", error)
    except Exception as error:  # noqa: BLE001  the coordinator gets the code, the log the traceback
        return _fail(spool, "internal", error)
    else:
        spool.set_status("done")
        return 0
    return 1


def _computation(spool: Spool) -> Any:
    """The class of what the coordinator asks for."""
    if read_sealed(spool.path("job.json")).get("heal") is None:
        return _Walk
    from fedprllm.federation.site.healing import HealingRounds

    return HealingRounds


def _fail(spool: Spool, code: str, error: BaseException) -> int:
    traceback.print_exception(error)
    words = f"{type(error).__name__}: {error}"
    if code == "memory":
        words = f"not enough memory ({words}): raise --memory-gb, or keep hidden states in files"
        words += " with --memory-limit"
    spool.set_status("failed", code, message=str(error) if isinstance(error, FedprllmError) else words)
    return 1


class _Walk(Computation):
    """One participant's walk over the blocks, which reads and writes its spool."""

    def run(self) -> None:
        check_request(self.settings, self.job)  # before the seconds that importing torch takes

        from fedprllm.federation.site.question import question_of
        from fedprllm.pruning.method import pruning_method, survey_method
        from fedprllm.pruning.survey import allocated
        from fedprllm.pruning.walk import Walker

        self.prepare()
        method: Any = survey_method(self.config) if self.job["survey"] else pruning_method(self.config)
        if self.job["outliers"]:
            method = method.with_sparsities(allocated(self.model, self._outliers(), self.config))
        self.ask_for_consent(
            lambda n_runs, most: question_of(self.job, method, self.model, self.participant, n_runs, most)
        )
        self.walker = Walker(self.participant, method, self.model.n_blocks, self.job["blocks"])
        start = self._resume() if method.uses_inputs else self.spool.n_ready
        for index in range(start, self.model.n_blocks):
            self.check_owner()
            self._step(index)
        self._memory.clear()
        self._say_what_was_reached()

    def _say_what_was_reached(self) -> None:
        """Tell the participant, and nobody else, how far its text reached a mixture's experts."""
        from fedprllm.pruning.records import ExpertsRecord

        reached = list(self.participant.reached.values())
        sentence = ExpertsRecord.total(reached).sentence(self.name) if reached else ""
        if sentence:
            print(sentence, file=sys.stderr)
            write_sealed(self.spool.path("notes.json"), {"notes": [*self.participant.notes, sentence]})

    def _outliers(self) -> list[Any]:
        from fedprllm.core.owl import Outliers

        return [Outliers(*counts) for counts in self.job["outliers"]]

    def _resume(self) -> int:
        """Restore the hidden states, and return the first block that has not been walked through yet."""
        from safetensors.torch import load_file

        self.walker.enter(self.model)
        if dropped := self.spool.drop_damaged():
            print(f"damaged and computed again: {', '.join(dropped)}", file=sys.stderr)
        n_walked = self.spool.n_walked
        if self.spool.n_ready < n_walked:
            # An update behind the walk is gone: only a walk from the beginning makes it again.
            shutil.rmtree(self.spool.hidden_path(0).parent, ignore_errors=True)
            return 0
        if n_walked:
            kept = load_file(self.spool.hidden_path(n_walked - 1))
            self.participant.hidden.fill(
                kept[str(number)].clone().to(self.model.device)
                for number in range(len(self.participant.windows))
            )
        return n_walked

    def _step(self, index: int) -> None:
        with self.model.block(index) as block:
            contribution = self.walker.contribute(block)
            self._keep_update(block, contribution.update)
            if not self.walker.walks_on(block):
                return
            weights = self._decision(block) if self.walker.follows_server else contribution.weights
            self.walker.advance(block, weights)
        hidden = {str(number): state.cpu() for number, state in enumerate(self.participant.hidden.kept())}
        self.spool.keep_hidden(index, lambda path: save_tensors(path, hidden))

    def _keep_update(self, block: Any, update: Any) -> None:
        """Write a block's update, unless it exists: an existing update may already have been sent.

        If only other participants prune the block, an empty file marks it as done, and nothing is shared.
        """
        from fedprllm.federation.protocol import update as wire
        from fedprllm.federation.protocol.names import to_wire

        if update is None:
            self.spool.keep_update(block.index, b"", {"kind": "none"})
        elif self.spool.update(block.index) is not None:
            return
        elif self.config.secure:
            self.keep(block.index, wire.MASKED, self._masked(block, update), 0)
        else:
            kind, n_tokens = self.walker.method.sharing.kind, self.participant.n_tokens
            self.keep(block.index, kind, to_wire(update, block.linears), n_tokens)

    def _masked(self, block: Any, update: Any) -> dict[str, Any]:
        """Hide an update, once keys have been exchanged."""
        from fedprllm.sharing.as_words import Layout

        config = self.walker.method.config
        assert config.window_length is not None, "the request is resolved"
        layout = Layout(
            self.walker.method.empty(block),
            len(self.job["participants"]),
            config.window_length,
            config.windows if config.weighting == "tokens" else 0,
        )
        return self.hidden_words(block.index, layout.pack(update, self.participant.n_tokens))

    def _decision(self, block: Any) -> Any:
        """Wait for the coordinator's decision about a block."""
        from fedprllm.federation.protocol.decision import decided_weights

        run = bytes.fromhex(self.job["run"])
        return self.wait_for(block.index, lambda message: decided_weights(message, block, run, self.digest))


if __name__ == "__main__":
    use_large_pages()
    start_lean()
    sys.exit(main(sys.argv[1:]))
