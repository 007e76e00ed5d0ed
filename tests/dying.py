"""Runs in processes that kill themselves at a given moment.

They are forked from a process that has imported torch once, which takes longer than the runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from fedprllm import PruneConfig, prune
from fedprllm.pruning.run_folder import Run

_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.dying", "fedprllm.pruning.in_process"])


def people() -> list[torch.Tensor]:
    """Windows of two participants."""
    return [torch.randint(4, 128, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]


def exit_code(function: Callable[..., None], *arguments: object) -> int | None:
    """How a process that calls a function of a module ended; a signal is negative."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


def prune_and_die(model: Path, out: Path, config: PruneConfig, phase: str, block: int, spills: bool) -> None:
    """Kill this process before or after a block is finished; ``spills``: hidden states lie in files."""
    torch.set_num_threads(1)
    finish_block = Run.finish_block

    def dying(self: Run, index: int, *arguments: object) -> None:
        if index == block and phase == "before":
            assert list(self.spilled_folder.glob("*.safetensors")) or not spills
            os.kill(os.getpid(), signal.SIGKILL)
        finish_block(self, index, *arguments)  # type: ignore[arg-type]
        if index == block and phase == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    Run.finish_block = dying  # type: ignore[method-assign]
    prune(model, people(), config, out=out)
