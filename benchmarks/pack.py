"""The packed size of a pruned model, and of what participants of a federation download.

SmolLM2-135M in bfloat16, pruned to 50 % by shared sums, which only zeroes weights, and by Gram matrices with
ADMM, which changes the weights that it keeps; and with the pattern 6:8. The packed model (`fedprllm pack`) is
compared with the file of the dense one, and the decisions that participants download with their length before
packing. Embeddings are not pruned, so the whole file takes more than the weights of the blocks.

    python -m benchmarks.pack [--texts FOLDER] [--windows 4] [--length 512] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._harness import given, machine
from benchmarks.solvers import texts_of
from fedprllm import PruneConfig, prune
from fedprllm.core.masks import PruneMask
from fedprllm.deciding import BlockDecision
from fedprllm.demo.compare import demo_model
from fedprllm.federation.protocol.decision import encode_decision
from fedprllm.models.block import GivenWeights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.packing.archive import pack, unpack

_SUMS = {"strategy": "iterative", "share": "statistics"}
_GRAM = {"strategy": "iterative", "share": "gram"}
_WAYS: dict[str, dict[str, Any]] = {
    "statistics, 50 %": {"sparsity": 0.5, **_SUMS},
    "Gram with ADMM, 50 %": {"sparsity": 0.5, **_GRAM},
    "Gram with ADMM, 6:8": {"pattern": "6:8", **_GRAM},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts, as in benchmarks.solvers")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ways", nargs="*", default=list(_WAYS), choices=list(_WAYS))
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes [float32]")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.length = 1, 64
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(_result(options, Path(temporary))))


def _result(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    dense = _in_bfloat16(resolve_model(options.model or demo_model()), scratch / "dense")
    texts, _ = texts_of(options.texts, scratch)
    n_dense = _file_bytes(dense)
    rows = [_row("dense", _packed(dense, scratch), n_dense)]
    for way in options.ways:
        config = PruneConfig(
            windows=options.windows, window_length=options.length, dtype=options.dtype, **_WAYS[way]
        )
        result = prune(dense, texts, config, out=scratch / "run" / way)
        row = _row(way, _packed(result.model_dir, scratch), n_dense)
        rows.append(row | _downloads(dense, result.model_dir))
        print(rows[-1], file=sys.stderr)
    return {
        "benchmark": "pack",
        "quick": options.quick,
        "options": given(),
        "windows": options.windows,
        "window_length": options.length,
        "dense_bytes": n_dense,
        "rows": rows,
        "machine": machine(),
    }


def _in_bfloat16(source: Path, folder: Path) -> Path:
    """A copy of the model in bfloat16."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _packed(folder: Path, scratch: Path) -> dict[str, Any]:
    """Bytes of the packed model, whole and without what is outside of the blocks, and seconds."""
    start = time.perf_counter()
    whole = pack(folder, scratch / "model.fedpack")
    packed_s = time.perf_counter() - start
    unpack(scratch / "model.fedpack", again := scratch / "again")
    unpacked_s = time.perf_counter() - start - packed_s
    for path in folder.glob("*.safetensors"):
        if path.read_bytes() != (again / path.name).read_bytes():
            raise SystemExit(f"{path} did not come back bit by bit")
    matrices, n_bytes = _matrices_of_blocks(folder, scratch / "blocks")
    inner = pack(matrices, scratch / "blocks.fedpack")
    for path in sorted(again.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again.rmdir()
    return {
        "bytes": whole.n_packed_bytes,
        "block_bytes": inner.n_packed_bytes,
        "block_bytes_dense": n_bytes,
        "pack_s": packed_s,
        "unpack_s": unpacked_s,
    }


def _matrices_of_blocks(folder: Path, target: Path) -> tuple[Path, int]:
    """The prunable matrices alone, as a folder that can be packed."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text("{}")
    wanted = {name for linears in BlockwiseModel(folder).linears for name in linears}
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name in wanted}  # noqa: SIM118
    save_file(tensors, target / "model.safetensors")
    return target, sum(tensor.nbytes for tensor in tensors.values())


def _downloads(dense: Path, pruned: Path) -> dict[str, float]:
    """Bytes of all decisions that a participant downloads, and of the same weights with their zeros."""
    model, other = BlockwiseModel(dense, "bfloat16"), BlockwiseModel(pruned, "bfloat16")
    n_sent = n_plain = 0
    for index in range(model.n_blocks):
        with model.block(index) as block, other.block(index) as found:
            weights = {name: found.tensors[name] for name in block.linears}
            masks = {name: PruneMask(linear.view(weights) == 0, 0) for name, linear in block.linears.items()}
            decision = BlockDecision(masks, GivenWeights(weights))
            n_sent += len(encode_decision(decision, block, bytes(16), bytes(32)))
            n_plain += sum(weight.nbytes for weight in weights.values())
    return {"download_bytes": n_sent, "download_bytes_plain": n_plain}


def _row(name: str, packed: Mapping[str, Any], n_dense: int) -> dict[str, Any]:
    return {
        "model": name,
        "packed / dense file": round(packed["bytes"] / n_dense, 3),
        "the blocks' matrices alone": round(packed["block_bytes"] / packed["block_bytes_dense"], 3),
        **{key: packed[key] for key in ("bytes", "pack_s", "unpack_s")},
    }


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's table."""
    rows = [
        {
            "": row["model"],
            "MB packed": round(row["bytes"] / 1e6, 1),
            "packed / dense file": row["packed / dense file"],
            "the blocks' matrices alone": row["the blocks' matrices alone"],
            "a participant downloads, MB": _megabytes(row, "download_bytes"),
            "the same weights as they are, MB": _megabytes(row, "download_bytes_plain"),
        }
        for row in result["rows"]
    ]
    return {f"dense file: {result['dense_bytes'] / 1e6:.1f} MB in bfloat16": rows}


def _megabytes(row: Mapping[str, Any], key: str) -> float | str:
    return round(row[key] / 1e6, 1) if key in row else ""


def ratio(result: Mapping[str, Any], key: str) -> float:
    """Size with half of the weights zero relative to dense, the larger one of the two ways."""
    return float(max(row[key] for row in result["rows"] if row["model"].endswith("50 %")))


if __name__ == "__main__":
    main()
