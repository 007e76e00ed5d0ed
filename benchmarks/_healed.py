"""Models that are pruned, healed and measured, several at a time in processes of their own.

Shared by `benchmarks.healing` and `benchmarks.healing_study`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.solvers import losses_of
from fedprllm import HealConfig, PruneConfig, heal, prune

__all__ = [
    "DENSE",
    "STARTS",
    "VOTES",
    "Healed",
    "add_options",
    "healed",
    "in_processes",
    "mean_of",
    "perplexities_of",
    "pruned",
    "workers",
]

DENSE = "dense"
VOTES = "votes, 50 %"
STARTS: dict[str, dict[str, Any]] = {
    VOTES: {},
    "gram with admm, 50 %": {"share": "gram", "strategy": "iterative"},
    "votes, 60 %": {"sparsity": 0.6},
    "votes, 6:8": {"pattern": "6:8"},
    "mlp=0.27": {"structure": "mlp=0.27", "strategy": "iterative"},
    "mlp=0.4": {"structure": "mlp=0.4", "strategy": "iterative"},
}


@dataclass(frozen=True)
class Healed:
    """One healing, and what to measure.

    Attributes:
        start: What was pruned, a key of ``STARTS``, or ``dense``.
        folder: Its model.
        dense: The dense model.
        texts: Participants' texts by name.
        held_out: Texts to measure on by name.
        rounds: Rounds of healing.
        round_windows: Windows of each participant in a round.
        learning_rate: Of healing.
        loss: ``text`` or ``dense``.
        max_gradient_norm: Of healing.
    """

    start: str
    folder: Path
    dense: Path
    texts: Mapping[str, Path]
    held_out: Mapping[str, Path]
    rounds: int
    round_windows: int = 1
    learning_rate: float = HealConfig().learning_rate
    loss: str = "text"
    max_gradient_norm: float = HealConfig().max_gradient_norm


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options that both benchmarks have."""
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows for pruning")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes")
    parser.add_argument("--processes", type=int, default=1, help="models at a time")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")


@contextmanager
def workers(options: argparse.Namespace) -> Iterator[ProcessPoolExecutor]:
    """Processes that compute with their share of the threads."""
    threads = max(1, torch.get_num_threads() // options.processes)
    with ProcessPoolExecutor(
        options.processes,
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    ) as pool:
        yield pool


def in_processes(
    pool: ProcessPoolExecutor, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Results of a function in the order of the jobs; each is printed on standard error as it comes."""
    futures = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
    results: list[Any] = [None] * len(jobs)
    for future in as_completed(futures):
        results[futures[future]] = future.result()
        print(jobs[futures[future]][0], future.result(), file=sys.stderr, flush=True)
    return results


def pruned(
    start: str, model: Path, texts: Mapping[str, Path], out: Path, options: argparse.Namespace
) -> Path:
    """Prune a model in one of the ways of ``STARTS``; returns its folder."""
    if start == DENSE:
        return model
    config = PruneConfig(
        windows=options.windows,
        window_length=options.length,
        dtype=options.dtype,
        device=options.device,
        **STARTS[start],
    )
    return prune(model, texts, config, out=out / start).model_dir


def perplexities_of(
    model: Path, held_out: Mapping[str, Path], options: argparse.Namespace
) -> dict[str, float]:
    """Perplexity on every text."""
    found = losses_of(model, held_out, options.length, options)
    return {text: math.exp(loss) for text, loss in found.items()}


def healed(job: Healed, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Heal and measure; returns perplexities by text, and how it went."""
    config = HealConfig(
        rounds=job.rounds,
        round_windows=job.round_windows,
        learning_rate=job.learning_rate,
        loss=job.loss,
        max_gradient_norm=job.max_gradient_norm,
        windows=max(HealConfig().windows, job.rounds * job.round_windows),
        window_length=options.length,
        dtype=options.dtype,
        device=options.device,
    )
    result = heal(job.folder, job.texts, config, out=out, dense=job.dense if job.loss == "dense" else None)
    return {
        "perplexities": perplexities_of(result.model_dir, job.held_out, options),
        "best round": result.record.best_round,
        "MB a round": round(result.record.update_bytes / 1e6, 2),
        "curve": [[number, round(loss, 4)] for number, loss in result.record.held_out],
    }


def mean_of(perplexities: Mapping[str, float], texts: Sequence[str]) -> float:
    """Geometric mean of the perplexities on some texts."""
    return math.exp(sum(math.log(perplexities[text]) for text in texts) / len(texts))
