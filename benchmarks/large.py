"""A model larger than memory: a checkpoint with LLaMA-7B's shape, pruned with one window per participant.

The checkpoint has random bfloat16 weights, 13.5 GB in one shard per block, written block by block to a
temporary folder. It is pruned one-shot with masks and with statistics, each in its own process tree, whose
memory is sampled. The yardsticks are measured in the same run: the bare forward passes of the same walk,
block by block from the same files (two per window with masks: observe and advance; one with statistics), and
the time the disk takes to read and write all bytes once. In each case, files are dropped from the page cache
beforehand, and everything is on disk at the end. Finally the written model is read block by block, to check
that its sparsity is exact everywhere and that a forward pass through its first block is finite.

Goals: a peak of 4 GiB, and 1.5 times the sum of the yardsticks.

    python -m benchmarks.large [--blocks 2] [--shape llama-7b] [--dtype float32] [--folder /big/disk]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import LlamaConfig

from benchmarks._checkpoint import as_it_is, write_random
from benchmarks._harness import SEED, machine
from fedprllm import PruneConfig, PruneResult, prune
from fedprllm.models.blockwise import DTYPES, BlockwiseModel

SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
}
N_PASSES = {"mask": 2, "statistics": 1}
_LOOK_EVERY_S = 0.02
_COPIED_AT_ONCE = 2**24


class Watch:
    """Peak memory in bytes of a process and its descendants: the largest sampled sum over the tree.

    Attributes:
        resident: Memory including mapped files.
        anonymous: Memory without mapped files, which the system cannot reclaim.
    """

    def __init__(self, pid: int) -> None:
        self.resident = self.anonymous = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            resident = anonymous = 0
            with suppress(psutil.Error, OSError):
                for process in (self._root, *self._root.children(recursive=True)):
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    fields = dict(line.split(":", 1) for line in lines)
                    resident += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
                    anonymous += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
            self.resident = max(self.resident, resident)
            self.anonymous = max(self.anonymous, anonymous)


def make_checkpoint(folder: Path, shape: str, n_blocks: int) -> int:
    """Write a model with random weights block by block. Returns the size of its weights in bytes."""
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": n_blocks}, vocab_size=32000)
    config.architectures = ["LlamaForCausalLM"]
    return write_random(folder / "model", config, as_it_is)


def participants(n: int, length: int) -> dict[str, torch.Tensor]:
    """Make participants with one window of random token ids each."""
    return {
        f"p{index}": torch.randint(32000, (1, length), generator=torch.Generator().manual_seed(SEED + index))
        for index in range(n)
    }


# Tasks that run in separate processes ----------------------------------------------------------------


def prune_here(settings: dict[str, Any]) -> dict[str, Any]:
    """Prune the model. Returns the seconds of each phase."""
    config = PruneConfig(share=settings["share"], dtype=settings["dtype"])
    windows_by_name = participants(settings["participants"], settings["length"])
    result = prune(settings["model"], windows_by_name, config, out=settings["out"])
    phases: dict[str, float] = {}
    for record in result.record.blocks:
        for phase, seconds in record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return {"phases_s": {phase: round(seconds, 2) for phase, seconds in phases.items()}}


def forward_here(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the bare forward passes through all blocks, in seconds, without the time to read the blocks."""
    model = BlockwiseModel(Path(settings["model"]), settings["dtype"])
    windows_by_name = participants(settings["participants"], settings["length"])
    hidden = list(model.embed([window for windows in windows_by_name.values() for window in windows]))
    seconds = 0.0
    for index in range(model.n_blocks):
        with model.block(index) as block:
            if index == 0:
                block.forward(hidden[0])  # warm up: the first product in a process is slow
            start = time.perf_counter()
            for _ in range(settings["passes"]):
                outputs = [block.forward(state) for state in hidden]
            seconds += time.perf_counter() - start
            hidden = outputs
    return {"forward_s": seconds}


def check_here(settings: dict[str, Any]) -> dict[str, Any]:
    """Check the written model, block by block."""
    out = Path(settings["out"])
    model = BlockwiseModel(PruneResult.load(out).model_dir, settings["dtype"])
    windows = next(iter(participants(1, settings["length"]).values()))
    (hidden,) = model.embed(windows)
    exact, finite = True, False
    for index in range(model.n_blocks):
        with model.block(index) as block:
            for name, linear in block.linears.items():
                exact &= int((block.tensors[name] == 0).sum()) == linear.n_weights // 2
            if index == 0:
                finite = bool(torch.isfinite(block.forward(hidden)).all())
    return {"exact_sparsity": exact, "first_block_is_finite": finite}


def in_own_process(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one of the tasks above in a process. Returns its result, its peak memory and its time with sync."""
    command = [sys.executable, "-m", "benchmarks.large", "--task", task, json.dumps(settings)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child, Watch(child.pid) as watch:
        assert child.stdout is not None
        output = child.stdout.read()
        if child.wait():
            raise SystemExit(f"{task} failed with status {child.returncode}")
    computed_s = time.perf_counter() - start
    os.sync()
    return {
        **json.loads(output.splitlines()[-1]),
        "wall_s": round(time.perf_counter() - start, 2),
        "before_sync_s": round(computed_s, 2),
        "peak_resident_gib": round(watch.resident / 2**30, 3),
        "peak_anonymous_gib": round(watch.anonymous / 2**30, 3),
    }


# The disk --------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(model: Path, folder: Path) -> dict[str, float]:
    """Measure the disk, in bytes per second: reading the model's files, and writing as much with sync."""
    forget(model)
    n_bytes, start = 0, time.perf_counter()
    buffer = bytearray(_COPIED_AT_ONCE)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while n_read := file.readinto(buffer):
                n_bytes += n_read
    read = n_bytes / (time.perf_counter() - start)
    start = time.perf_counter()
    copied = folder / "written"
    with copied.open("wb", buffering=0) as file:
        for _ in range(0, n_bytes, _COPIED_AT_ONCE):
            file.write(buffer)
        os.fsync(file.fileno())
    written = copied.stat().st_size / (time.perf_counter() - start)
    copied.unlink()
    return {"read_bytes_per_s": read, "written_bytes_per_s": written}


# The benchmark ---------------------------------------------------------------------------------------


def measure(folder: Path, shape: str, n_blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Make a model, prune it with masks and with statistics, and compare with the yardsticks."""
    n_bytes = make_checkpoint(folder, shape, n_blocks)
    model = folder / "model"
    disk = disk_speed(model, folder)
    disk_s = n_bytes / disk["read_bytes_per_s"] + n_bytes / disk["written_bytes_per_s"]
    common = {
        "model": str(model),
        "dtype": options.dtype,
        "participants": options.participants,
        "length": options.length,
        "threads": options.threads,
    }
    found: dict[str, Any] = {"blocks": n_blocks, "model_bytes": n_bytes, "disk": disk, "disk_s": disk_s}
    for share, n_passes in N_PASSES.items():
        forget(model)
        bare = in_own_process("forward", common | {"passes": n_passes})
        forget(model)
        out = str(folder / "run")
        ours = in_own_process("prune", common | {"share": share, "out": out})
        yardstick = bare["forward_s"] + disk_s
        ours |= in_own_process_result("check", common | {"out": out})
        ours |= {
            "forward_s": round(bare["forward_s"], 2),
            "yardstick_s": round(yardstick, 2),
            "ratio": round(ours["wall_s"] / yardstick, 3),
        }
        found[share] = ours
        print(f"{shape}, {n_blocks} blocks, {share}: {ours}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    return found


def in_own_process_result(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a process. Returns only its result."""
    measured = ("wall_s", "before_sync_s", "peak_resident_gib", "peak_anonymous_gib")
    return {name: value for name, value in in_own_process(task, settings).items() if name not in measured}


def extrapolated(one: dict[str, Any], two: dict[str, Any], n_blocks: int) -> dict[str, Any]:
    """Extrapolate from runs with one and two blocks to all blocks: fixed time plus time per block."""
    seconds = {}
    for share in N_PASSES:
        block_s = two[share]["wall_s"] - one[share]["wall_s"]
        seconds[share] = round(one[share]["wall_s"] + block_s * (n_blocks - 1), 1)
    block_bytes = two["model_bytes"] - one["model_bytes"]
    peaks = ("peak_resident_gib", "peak_anonymous_gib")
    return {
        "blocks": n_blocks,
        "model_bytes": one["model_bytes"] + block_bytes * (n_blocks - 1),
        "wall_s": seconds,
        # Further blocks do not change the peaks.
        **{peak: max(two[share][peak] for share in N_PASSES) for peak in peaks},
    }


@contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """Make a temporary folder for the duration of the block."""
    with tempfile.TemporaryDirectory(prefix="large-", dir=parent) as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="use a tiny model, to check that it runs")
    parser.add_argument("--blocks", type=int, help="number of blocks, if fewer than the model has")
    parser.add_argument("--participants", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="folder with space for twice the model and its votes")
    parser.add_argument("--no-70b", action="store_true", help="omit the blocks with LLaMA-70B's shape")
    options = parser.parse_args()
    if options.task:
        task, settings = options.task[0], json.loads(options.task[1])
        torch.set_num_threads(settings["threads"])
        tasks = {"prune": prune_here, "forward": forward_here, "check": check_here}
        print(json.dumps(tasks[task](settings)))
        return
    torch.set_num_threads(options.threads)
    about = machine()
    shape = "tiny" if options.quick else "llama-7b"
    n_blocks = options.blocks or SHAPES[shape]["num_hidden_layers"]
    with working_folder(options.folder) as folder:
        results = {shape: measure(folder, shape, n_blocks, options)}
    if not options.no_70b:
        larger = "tiny" if options.quick else "llama-70b"
        few = {}
        for n in (1, 2):
            with working_folder(options.folder) as folder:
                few[n] = measure(folder, larger, n, options)
        results["llama-70b"] = {
            "measured": few,
            "extrapolated": extrapolated(few[1], few[2], SHAPES[larger]["num_hidden_layers"]),
        }
    settings = {name: getattr(options, name) for name in ("quick", "participants", "length", "dtype")}
    print(json.dumps({"benchmark": "large", **settings, "seed": SEED, "machine": about, **results}))


if __name__ == "__main__":
    main()
