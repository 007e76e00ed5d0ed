"""Prune a model for two participants in a process of its own, and watch its memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import SEED
from benchmarks.large import Watch
from fedprllm import PruneConfig, prune

__all__ = ["GIB", "watched_pruning"]

GIB = 2**30


def watched_pruning(folder: Path, vocabulary: int, length: int) -> tuple[Watch, dict[str, Any]]:
    """Prune ``folder/model`` one-shot with masks, in bfloat16, to ``folder/run``.

    Args:
        folder: Folder that holds the model.
        vocabulary: Number of token ids.
        length: Tokens of the one window that each participant has.

    Returns:
        The peaks in bytes, and the figures to report.
    """
    words = [str(folder), str(vocabulary), str(length)]
    start = time.perf_counter()
    with (
        subprocess.Popen([sys.executable, "-m", "benchmarks._watched", *words]) as child,
        Watch(child.pid) as watch,
    ):
        if child.wait():
            raise SystemExit(f"pruning failed with status {child.returncode}")
    return watch, {
        "peak_anonymous_gib": round(watch.anonymous / GIB, 3),
        "peak_resident_gib": round(watch.resident / GIB, 3),
        "wall_s": round(time.perf_counter() - start, 1),
    }


def main(folder: Path, vocabulary: int, length: int) -> None:
    """Prune in this process."""
    generator = torch.Generator().manual_seed(SEED)
    windows = {
        name: torch.randint(vocabulary, (1, length), generator=generator) for name in ("north", "south")
    }
    prune(folder / "model", windows, PruneConfig(dtype="bfloat16"), out=folder / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
