"""Shared by the benchmarks: alternating repeats, medians, the machine, peak memory and a line of JSON.

Contenders alternate within a run, so that other load on the machine affects all of them equally. Compare the
ratios, not the seconds. Seconds are wall time; CPU seconds (all threads) are given too, because they also
hold on a busy machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

SEED = 0
_COPIED_BYTES = 2**28  # eight times the largest cache encountered so far


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one per repeat."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return median(self.cpu)

    def per(self, n: int) -> Timing:
        """Divide by the ``n`` operations of each repeat."""
        return Timing(tuple(wall / n for wall in self.wall), tuple(cpu / n for cpu in self.cpu))

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "min_seconds": min(self.wall),
            "repeats": len(self.wall),
        }


def arguments(description: str, repeats: int) -> argparse.Namespace:
    """Parse the common options ``--quick``, ``--repeats`` and ``--threads``, and set threads and seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="use small sizes, to check that it runs")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="runs per contender; medians are reported"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch and fedprllm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    return options


def given() -> list[str]:
    """The options with which this process was started, without the paths of this machine."""
    return ["FOLDER" if Path(word).is_dir() else word for word in sys.argv[1:]]


def alternate(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time every contender ``repeats`` times, alternating, after one warm-up run of each."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            contender()
            seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
            if repeat:
                wall[name].append(seconds)
                cpu[name].append(cpu_seconds)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in contenders}


def copier(threads: int) -> tuple[Callable[[], None], int]:
    """Make a contender that copies memory with ``threads``. Returns it and the bytes it reads and writes."""
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def copy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

    return copy, 2 * _COPIED_BYTES


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Call a module-level function in a new process, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def rss_bytes(peak: bool = False) -> int:
    """Current or peak resident memory of this process in bytes (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """Describe the machine and versions that the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
    }


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table of rows with the same keys. Floats have three significant digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(shown, row.values()))
    Console(width=140).print(table)


def shown(value: object) -> str:
    """Format a figure for display, with three significant digits and separated thousands."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def print_json(benchmark: str, options: argparse.Namespace, about: Mapping[str, Any], **results: Any) -> None:
    """Print settings, machine and results as JSON, in the last line of output."""
    settings = {"quick": options.quick, "repeats": options.repeats, "seed": SEED}
    print(json.dumps({"benchmark": benchmark, **settings, "machine": about, **results}), flush=True)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of this checkout, marked as dirty if files that the figures depend on have changed."""
    here = Path(__file__).parent
    try:
        commit = ["git", "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(commit, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        # Not docs/, where a run of all benchmarks leaves earlier results.
        changed = ["git", "diff", "--quiet", "HEAD", "--", ".", "../src"]
        differs = subprocess.run(changed, cwd=here, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}-dirty" if differs else found
