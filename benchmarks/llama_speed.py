"""How much faster smaller models are in llama.cpp: a prompt of 256 tokens, and 16 tokens one by one.

Models of random weights with the shapes of SmolLM2-135M and of a model with a billion parameters, whose MLPs
are as wide as `benchmarks.structure` says, are quantized by `llama-quantize` to Q8_0 and run by `llama-bench`
with one thread and weights as they are in the file, in turns. The time is the processor time that a further
repeat takes, so that neither loading the model nor other work on the machine counts.

llama.cpp is not part of this project: name the folder with its tools.

    python -m benchmarks.llama_speed --tools llama.cpp/build/bin [--repeats 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np

from benchmarks._harness import given, machine
from benchmarks.structure import _SHAPES, _width

_WORK = {"prefill": ("-p", "256", "-n", "0"), "decode": ("-p", "0", "-n", "16")}
# Weights stay as they are in the file: other layouts need instructions that some virtual machines lack.
_HOW = ("-t", "1", "--no-warmup", "--repack", "0")
_PARTS = {"dense": 0.0, "10 %": 0.1, "20 %": 0.2}
_FEW, _MANY = 1, 3  # repeats within one process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-bench")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", default=list(_SHAPES), choices=list(_SHAPES))
    parser.add_argument("--quick", action="store_true", help="one shape once, to check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.shapes = 1, options.shapes[:1]
    with tempfile.TemporaryDirectory() as temporary:
        speed = [_ratios(name, options, Path(temporary)) for name in options.shapes]
    result = {"benchmark": "llama-speed", "quick": options.quick, "options": given(), "speed": speed}
    print(json.dumps(result | {"machine": machine()}))


def _ratios(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """How many times faster the smaller models are."""
    models = {part: _model(_SHAPES[name], share, options.tools, scratch) for part, share in _PARTS.items()}
    row: dict[str, Any] = {"shape": name}
    for work, arguments in _WORK.items():
        seconds: dict[str, list[float]] = {part: [] for part in models}
        for _ in range(options.repeats):
            for part, model in models.items():
                command = [str(options.tools / "llama-bench"), "-m", str(model), *_HOW]
                few, many = (_seconds([*command, *arguments, "-r", str(n)]) for n in (_FEW, _MANY))
                seconds[part].append((many - few) / (_MANY - _FEW))
        dense = median(seconds["dense"])
        for part in ("10 %", "20 %"):
            row[f"{work}, {part} smaller"] = round(dense / median(seconds[part]), 3)
        row[f"{work}, dense: CPU seconds"] = round(dense, 3)
    for model in models.values():
        model.unlink()
    print(row, file=sys.stderr)
    return row


def _seconds(command: Sequence[str]) -> float:
    """Processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _model(shape: Mapping[str, Any], share: float, tools: Path, scratch: Path) -> Path:
    """A GGUF file of random weights in Q8_0."""
    width = _width(shape, share) if share else shape["intermediate_size"]
    plain, quantized = scratch / "plain.gguf", scratch / f"{shape['hidden_size']}-{width}.gguf"
    _write(plain, {**shape, "intermediate_size": width})
    subprocess.run([tools / "llama-quantize", plain, quantized, "Q8_0"], capture_output=True, check=True)
    plain.unlink()
    return quantized


def _write(path: Path, shape: Mapping[str, Any]) -> None:
    hidden, width, n_blocks = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    n_heads, n_key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // n_heads)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    draw = np.random.default_rng(0)

    def add(name: str, *size: int) -> None:
        values = np.ones(size, np.float32)
        if len(size) > 1:
            values = (draw.standard_normal(size, np.float32) * 0.02).astype(np.float16)
        writer.add_tensor(f"{name}.weight", values)

    add("token_embd", shape["vocab_size"], hidden)
    add("output_norm", hidden)
    key_width = hidden // n_heads * n_key_heads
    for block in range(n_blocks):
        matrices = {"attn_q": (hidden, hidden), "attn_k": (key_width, hidden), "attn_v": (key_width, hidden)}
        matrices |= {"attn_output": (hidden, hidden), "ffn_gate": (width, hidden), "ffn_up": (width, hidden)}
        for name, size in {**matrices, "ffn_down": (hidden, width)}.items():
            add(f"blk.{block}.{name}", *size)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{name}", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    return {"times as fast as the dense model, in CPU seconds of one thread, Q8_0": result["speed"]}


def time(result: Mapping[str, Any], work: str) -> float:
    """Longest time of a model that is a fifth smaller, relative to the dense one of the same shape."""
    return float(max(1 / row[f"{work}, 20 % smaller"] for row in result["speed"]))


if __name__ == "__main__":
    main()
