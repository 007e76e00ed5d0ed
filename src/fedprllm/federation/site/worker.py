"""The computation of one participant: a process of its own that walks over all blocks of one run.

    python -m fedprllm.federation.site.worker SPOOL SETTINGS NAME OWNER

It talks through files of its spool only (see `fedprllm.federation.site.spool`), knows no network, and ends
when the process that started it does, or when another one owns the spool. Killed at any point, it
continues where it was.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprllm.errors import DataError, FedprllmError, ModelError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.site.spool import Spool, write_bytes
from fedprllm.files import read_json, save_tensors, write_json
from fedprllm.process import use_large_pages

__all__ = ["main"]

_DECISION_POLL_S = 0.05


class _Failed(Exception):  # noqa: N818  it carries a status, it is no defect
    def __init__(self, code: str, tensor: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.code, self.tensor = code, tensor


def main(arguments: list[str]) -> int:
    """Compute every update of a run; 0 when all are there."""
    use_large_pages()
    folder, settings_file, name, owner = arguments
    spool = Spool(Path(folder))
    settings = SiteSettings(**read_json(Path(settings_file)))
    _end_with_parent()
    _limit(settings)
    with FileLock(spool.path(".lock")):
        return _walk(spool, settings, name, owner)


def _walk(spool: Spool, settings: SiteSettings, name: str, owner: str) -> int:
    spool.set_status("working")
    try:
        _Walk(spool, settings, name, owner).run()
    except _Failed as failure:
        print(failure, file=sys.stderr)
        spool.set_status("failed", failure.code, failure.tensor, str(failure))
    except DataError as error:
        return _fail(spool, "data", error)
    except FedprllmError as error:
        return _fail(spool, "compute", error)
    except MemoryError as error:
        return _fail(spool, "memory", error)
    except RuntimeError as error:
        # torch reports a failed allocation in its text only, on the CPU.
        out_of_memory = "alloc" in str(error) or "out of memory" in str(error)
        return _fail(spool, "memory" if out_of_memory else "internal", error)
    except Exception as error:  # noqa: BLE001  the coordinator learns the code, the log has the traceback
        return _fail(spool, "internal", error)
    else:
        spool.set_status("done")
        return 0
    return 1


def _fail(spool: Spool, code: str, error: BaseException) -> int:
    traceback.print_exception(error)
    spool.set_status("failed", code, message=f"{type(error).__name__}: {error}")
    return 1


def _end_with_parent() -> None:
    """End when the other side of standard input is gone, however it went."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def _limit(settings: SiteSettings) -> None:
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    if settings.memory_gb is not None:
        import resource

        # Data and private mappings: a mapped checkpoint does not count, every tensor does.
        limit = int(settings.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Walk:
    """One participant's walk, from its spool into its spool."""

    def __init__(self, spool: Spool, settings: SiteSettings, name: str, owner: str) -> None:
        from fedprllm.config import PruneConfig

        self.spool, self.settings, self.name, self.owner = spool, settings, name, owner
        self.job: dict[str, Any] = read_json(spool.path("job.json"))
        config = PruneConfig(**self.job["config"])
        self.config = config.model_copy(update={"device": settings.device or "cpu"})

    def run(self) -> None:
        from fedprllm.pruning.method import pruning_method, survey_method
        from fedprllm.pruning.survey import allocated
        from fedprllm.pruning.walk import Walker

        self._prepare()
        method: Any = survey_method(self.config) if self.job["survey"] else pruning_method(self.config)
        if self.job["outliers"]:
            method = method.with_sparsities(allocated(self.model, self._outliers(), self.config))
        self.walker = Walker(self.participant, method, self.model.n_blocks, self.job["blocks"])
        start = self._resume() if method.uses_inputs else self.spool.n_ready
        for index in range(start, self.model.n_blocks):
            self._check_owner()
            self._step(index)
        self._memory.clear()

    def _outliers(self) -> list[Any]:
        from fedprllm.core.owl import Outliers

        return [Outliers(*counts) for counts in self.job["outliers"]]

    def _check_owner(self) -> None:
        """End if a later process, of a later job of the same run, has taken over."""
        if self.spool.owner != self.owner:
            os._exit(3)

    def _prepare(self) -> None:
        """Read the model, compare it with the coordinator's, read the text."""
        from fedprllm.models.blockwise import BlockwiseModel
        from fedprllm.models.fingerprints import first_difference, model_digest, tensor_fingerprints
        from fedprllm.models.source import is_hub_id, resolve_model
        from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates
        from fedprllm.pruning.inputs import make_participants

        named = self.settings.model or self.job["model"]
        if self.settings.model is None and not is_hub_id(named):
            # Whatever lies at a path of the coordinator's here is not for it to choose.
            raise _Failed(
                "model missing",
                message=f"the coordinator keeps the model at {named}, a path on its own machine: get the "
                "same model, and name where it is here with --model",
            )
        try:
            folder = resolve_model(named)
        except ModelError as error:
            raise _Failed("model missing", message=str(error)) from None
        self.model = BlockwiseModel(folder, self.config.dtype, self.config.device)
        self._check_blocks(self.model.n_blocks)
        expected = read_json(self.spool.path("fingerprints.json"))
        found = tensor_fingerprints(self.model)
        different = first_difference(expected, found)
        if different is not None:
            raise _Failed(
                "model differs",
                different,
                f"the model at {named} is not the coordinator's: tensor '{different}' has other values; "
                "get the model from where the coordinator got it, or name it with --model",
            )
        self.digest = model_digest(expected)
        (self.participant,), self.config = make_participants(
            self.model, {self.name: list(self.settings.data)}, self.config
        )
        self._memory = HiddenMemory(self.spool.spilled_folder, self.settings.memory_limit)
        self.participant.hidden = HiddenStates(self._memory, self.name)

    def _check_blocks(self, n_blocks: int) -> None:
        """Refuse to prune more blocks than this participant's own settings grant."""
        most = max(1, int(n_blocks * Fraction(str(self.settings.block_fraction))))
        asked = len(self.job["blocks"])
        if asked > most:
            raise _Failed(
                "too many blocks",
                message=f"the run asks for {asked} of {n_blocks} blocks, this participant prunes {most}: "
                f"the run's block_fraction has to say {self.name}={self.settings.block_fraction:g} or less",
            )

    def _resume(self) -> int:
        """Bring the hidden states to the first block that is not walked yet."""
        from safetensors.torch import load_file

        self.walker.enter(self.model)
        n_walked = self.spool.n_walked
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
        save_tensors(self.spool.hidden_path(index), hidden)
        if index:
            self.spool.hidden_path(index - 1).unlink(missing_ok=True)

    def _keep_update(self, block: Any, update: Any) -> None:
        """Write what may leave; never again if it is there, for it may have been sent.

        Nothing leaves of a block that others prune: an empty file says that it is done.
        """
        from fedprllm.federation.protocol import update as wire
        from fedprllm.federation.protocol.names import to_wire

        index, kind = block.index, self.walker.method.sharing.kind
        path = self.spool.update_path(index)
        if update is None:
            write_json(self.spool.summary_path(index), {"kind": "none"})
            write_bytes(path, b"")
            return
        if path.exists():
            return
        tensors, n_tokens = to_wire(update, block.linears), self.participant.n_tokens
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
        write_json(self.spool.summary_path(index), summary)
        write_bytes(path, wire.encode(message))

    def _decision(self, block: Any) -> Any:
        """Wait for the coordinator's decision about a block."""
        from fedprllm.federation.protocol.decision import decided_weights

        path = self.spool.decision_path(block.index)
        while not path.exists():
            self._check_owner()
            time.sleep(_DECISION_POLL_S)
        return decided_weights(path.read_bytes(), block, bytes.fromhex(self.job["run"]), self.digest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
