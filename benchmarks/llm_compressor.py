"""Centralized Wanda compared with llm-compressor's WandaPruningModifier: time, memory and masks.

Both prune the same Linears of SmolLM2-135M to 50 %, with the same 16 windows of 512 tokens, row by row, each
block on the outputs of the pruned blocks before it. Two bare forward passes over the windows are measured
too. Every run is a separate process, and the contenders take turns. ``prune_s`` compares our whole
``prune()``, which reads and writes the checkpoint block by block, with their ``oneshot()`` without loading
and saving. ``process_s`` is everything from start to exit, including imports and writing the checkpoint.

In the second part, both prune a few random bfloat16 blocks with the shape of LLaMA-7B. llm-compressor
offloads everything beyond 0.5 GB to disk.

    python -m benchmarks.llm_compressor [--quick] [--venv PATH]

llm-compressor is installed into a separate environment. The first run downloads several hundred MB.
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
import venv
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import platformdirs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks._harness import SEED, machine, print_json, print_table
from fedprllm.demo.compare import demo_model
from fedprllm.demo.texts import demo_texts
from fedprllm.files import write_json
from fedprllm.models.source import resolve_model
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.text.windows import token_windows

PACKAGE = "llmcompressor==0.14.0.1"
CONTENDERS = ("bare", "theirs", "ours")
_NAMES = {"bare": "two forward passes", "theirs": "llm-compressor", "ours": "fedprllm"}
FIGURES = ("prune_s", "process_s", "cpu_s", "peak_resident_mb", "peak_anonymous_mb")
_SCRIPT = Path(__file__).with_name("_wanda_contenders.py")
_LOOK_EVERY_S = 0.02


# ---- processes ---------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """Interpreter of an environment with llm-compressor and our version of torch, created if necessary."""
    python, ready = folder / "bin" / "python", folder / "installed.txt"
    if not ready.exists():
        print(f"installing {PACKAGE} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        pinned = f"torch=={torch.__version__.split('+')[0]}"
        constraints = folder / "constraints.txt"
        constraints.write_text(pinned + "\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        # torch first and alone, so that no other package chooses its build.
        for package in (pinned, PACKAGE):
            subprocess.run([*pip, package], check=True, stdout=sys.stderr)
        ready.write_text(PACKAGE + "\n", encoding="utf-8")
    return python


def measured(command: Sequence[str | Path], threads: int) -> dict[str, Any]:
    """Run a process. Returns the JSON it ends with, its wall and CPU seconds, and its peak memory."""
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    peaks = {"peak_resident_mb": 0.0, "peak_anonymous_mb": 0.0}
    used = os.times()
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | variables,
        )
        watch = threading.Thread(target=_watch, args=(process, peaks))
        watch.start()
        output, _ = process.communicate()
        seconds = time.perf_counter() - start
        watch.join()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{errors.read()[-3000:]}")
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return json.loads(output.splitlines()[-1]) | {"process_s": seconds, "cpu_s": cpu} | peaks


def _watch(process: subprocess.Popen[str], peaks: dict[str, float]) -> None:
    """Record a process's peaks: resident from the kernel's high-water mark, anonymous sampled at 50 Hz.

    Neither contender starts further processes.
    """
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(OSError, KeyError):  # the process may end during a sample
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            for name, field in (("peak_resident_mb", "VmHWM"), ("peak_anonymous_mb", "RssAnon")):
                peaks[name] = max(peaks[name], int(fields[field].split()[0]) * 1024 / 1e6)
        time.sleep(_LOOK_EVERY_S)


# ---- models and windows ------------------------------------------------------------------------------------


def in_dtype(model: Path, dtype: torch.dtype, folder: Path) -> Path:
    """Convert a model's weights to another precision, so that both contenders read what they compute with."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    tensors = load_file(model / "model.safetensors")
    converted = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(converted, folder / "model.safetensors", {"format": "pt"})
    _copy_tokenizer(model, folder)
    return folder


def llama_7b_shape(n_blocks: int, folder: Path, hidden: int, tokenizer: Path) -> Path:
    """Make random bfloat16 blocks with the shape of LLaMA-7B (hidden size 4096), in shards of 0.5 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=n_blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="500MB"
    )
    _copy_tokenizer(tokenizer, folder)  # llm-compressor requires one although it gets token ids
    return folder


def _copy_tokenizer(model: Path, folder: Path) -> None:
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)


def text_windows(model: Path, n_windows: int, length: int, folder: Path) -> Path:
    """Write token windows of the demonstration's texts to a file that both contenders read."""
    texts = [files[0] for files in demo_texts(folder / "texts").values()]
    tokenizer = load_tokenizer(model)
    windows = token_windows(
        texts, tokenizer, n_windows=n_windows, window_length=length, seed=SEED, bos="auto"
    )
    np.save(folder / "windows.npy", windows.numpy())
    return folder / "windows.npy"


def identical_share(ours: Path, theirs: Path) -> dict[str, Any]:
    """Share of identical bits in the two masks, over all blocks and per block.

    Where two scores are nearly equal, rounding decides. Since each block depends on the pruned blocks before
    it, masks that agree in the first blocks diverge with depth.
    """
    left, right = _tensors(ours), _tensors(theirs)
    names = [name for name in left if name.endswith("_proj.weight")]
    weights, differing = Counter[int](), Counter[int]()
    zeros_of_ours = zeros_of_theirs = 0
    for name in names:
        with safe_open(left[name], "pt") as a, safe_open(right[name], "pt") as b:
            zeros, others = a.get_tensor(name) == 0, b.get_tensor(name) == 0
        block = int(name.split(".")[2])
        weights[block] += zeros.numel()
        differing[block] += int((zeros != others).sum())
        zeros_of_ours += int(zeros.sum())
        zeros_of_theirs += int(others.sum())
    return {
        "n_weights": weights.total(),
        "identical_share": 1 - differing.total() / weights.total(),
        "identical_share_by_block": [1 - differing[block] / weights[block] for block in sorted(weights)],
        "sparsity_ours": zeros_of_ours / weights.total(),
        "sparsity_theirs": zeros_of_theirs / weights.total(),
    }


def _tensors(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    return found


# ---- the comparison ----------------------------------------------------------------------------------------


class Comparison:
    """Runs all contenders on one model, alternating."""

    def __init__(self, pythons: Mapping[str, Path], threads: int, folder: Path) -> None:
        self.pythons, self.threads, self.folder = pythons, threads, folder
        self.versions: dict[str, str] = {}

    def run(
        self,
        model: Path,
        windows: Path,
        dtype: str,
        repeats: int,
        contenders: Sequence[str] = CONTENDERS,
        offload: bool = False,
    ) -> dict[str, Any]:
        """Compute each contender's medians, the ratios to ours, and the share of identical mask bits."""
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        masks: dict[str, Any] = {}
        for repeat in range(repeats):
            models = {}
            for name in contenders:
                out = self.folder / f"{name}-out"
                command = [self.pythons[name], "-P", _SCRIPT, name, model, windows, out, dtype, self.threads]
                if offload and name == "theirs":
                    command.append(self.folder / "offloaded")
                runs[name].append(measured(command, self.threads))
                models[name] = runs[name][-1].pop("model_dir", "")
                self.versions |= runs[name][-1].pop("versions", {})
                shown = ", ".join(f"{key} {value:.1f}" for key, value in runs[name][-1].items())
                print(f"{dtype}, round {repeat + 1}, {name}: {shown}", file=sys.stderr)
            if not masks:
                masks = identical_share(Path(models["ours"]), Path(models["theirs"]))
            for leftover in [*(f"{name}-out" for name in contenders), "offloaded"]:
                shutil.rmtree(self.folder / leftover, ignore_errors=True)
        medians = {
            name: {figure: median(run[figure] for run in done) for figure in FIGURES}
            for name, done in runs.items()
        }
        ratios = {
            figure: median(
                ours[figure] / theirs[figure]
                for ours, theirs in zip(runs["ours"], runs["theirs"], strict=True)
            )
            for figure in FIGURES
        }
        return {"contenders": medians, "ours_of_theirs": ratios, "masks": masks, "repeats": repeats}


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Build the rows of each table, by title, for the terminal and the page."""
    windows = "{n_windows} windows of {window_length} tokens".format(**results)
    found = {}
    for dtype, compared in results["smollm2"].items():
        found[f"SmolLM2-135M, {windows}, {dtype}"] = _rows(compared)
    for n_blocks, compared in results["llama_7b_shape"].items():
        title = f"Shape of LLaMA-7B, {n_blocks} blocks, 2 windows, bfloat16, theirs with disk offload"
        stopped = [{"": "theirs", "stopped by": compared.get("stopped")}]
        found[title] = stopped if "stopped" in compared else _rows(compared)
    if further := _further_blocks(results["llama_7b_shape"]):
        found["Shape of LLaMA-7B: each further block, and all 32 by a straight line"] = further
    return found | {"Identical bits of the masks": _masks(results)}


def _rows(compared: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"": _NAMES[name], **figures} for name, figures in compared["contenders"].items()]
    return [*rows, {"": "fedprllm / llm-compressor", **compared["ours_of_theirs"]}]


def _further_blocks(large: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Extrapolate to one block and to the whole model, by a line through the smallest and largest run."""
    sizes = sorted((int(n) for n, compared in large.items() if "stopped" not in compared))
    if len(sizes) < 2:
        return []
    few, most = sizes[0], sizes[-1]
    rows = []
    for name in ("theirs", "ours"):
        low, high = (large[str(n)]["contenders"][name] for n in (few, most))
        slopes = {figure: (high[figure] - low[figure]) / (most - few) for figure in FIGURES}
        whole = {figure: high[figure] + slopes[figure] * (32 - most) for figure in FIGURES}
        rows += [{"": f"{_NAMES[name]}, a block", **slopes}, {"": f"{_NAMES[name]}, 32 blocks", **whole}]
    return rows


def _masks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    compared = {f"SmolLM2-135M, {dtype}": found for dtype, found in results["smollm2"].items()}
    compared |= {f"LLaMA-7B, {n} blocks": found for n, found in results["llama_7b_shape"].items()}
    return [
        {
            "": name,
            "weights": found["masks"]["n_weights"],
            "all blocks, %": f"{100 * found['masks']['identical_share']:.4f}",
            "first block, %": f"{100 * found['masks']['identical_share_by_block'][0]:.4f}",
            "last block, %": f"{100 * found['masks']['identical_share_by_block'][-1]:.4f}",
        }
        for name, found in compared.items()
        if "masks" in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path(platformdirs.user_cache_dir("fedprllm")) / f"bench-{PACKAGE.replace('==', '-')}"
    parser.add_argument(
        "--venv", type=Path, default=default, help=f"environment, created if necessary [{default}]"
    )
    parser.add_argument("--quick", action="store_true", help="use small sizes, to check that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="runs per contender; medians are reported")
    parser.add_argument("--windows", type=int, default=16, help="number of windows of 512 tokens [16]")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=[2, 4], help="numbers of blocks with LLaMA-7B's shape"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    here = Path(sys.executable)
    pythons = {"bare": here, "ours": here, "theirs": environment(options.venv)}
    n_windows, length = (2, 64) if options.quick else (options.windows, 512)
    with tempfile.TemporaryDirectory(prefix="llm-compressor-") as temporary:
        folder = Path(temporary)
        comparison = Comparison(pythons, options.threads, folder)
        smollm2 = resolve_model(demo_model())
        windows = text_windows(smollm2, n_windows, length, folder)
        models = {"float32": smollm2, "bfloat16": in_dtype(smollm2, torch.bfloat16, folder / "bfloat16")}
        compared = {
            dtype: comparison.run(model, windows, dtype, options.repeats) for dtype, model in models.items()
        }
        large = {
            str(n): _large(comparison, n, folder, 256 if options.quick else 4096, smollm2)
            for n in options.blocks
        }
    found = {
        "n_windows": n_windows,
        "window_length": length,
        "smollm2": compared,
        "llama_7b_shape": large,
        "versions": comparison.versions,
    }
    for title, rows in tables(found).items():
        print_table(title, rows)
    print_json("llm_compressor", options, about, **found)


def _large(
    comparison: Comparison, n_blocks: int, folder: Path, hidden: int, tokenizer: Path
) -> dict[str, Any]:
    """Compare both once on a few blocks of a large model, or report what stopped llm-compressor."""
    model = llama_7b_shape(n_blocks, folder / f"{n_blocks}-blocks", hidden, tokenizer)
    windows = folder / "large.npy"
    generator = torch.Generator().manual_seed(SEED)
    np.save(windows, torch.randint(32000, (2, 512), generator=generator).numpy())
    try:
        return comparison.run(model, windows, "bfloat16", 1, ("theirs", "ours"), offload=True)
    except RuntimeError as error:
        if " theirs " not in str(error).splitlines()[0]:
            raise
        print(error, file=sys.stderr)
        return {"stopped": str(error).splitlines()[-1]}
    finally:
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
