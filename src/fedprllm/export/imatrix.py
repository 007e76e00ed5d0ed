"""The shared sums as an importance matrix: llama.cpp's quantization then follows everybody's text.

llama.cpp weights the rounding errors of a matrix by the mean square of each of its input channels over some
text. Participants share exactly these sums with ``--share statistics`` and, on the diagonal, with ``gram``.

The file is a GGUF file as `llama-imatrix` writes it: for each weight ``NAME.in_sum2``, float32 [1, in], the
sums of squares, and ``NAME.counts``, float32 [1, 1], the number of tokens; the names are llama.cpp's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from fedprllm.errors import RunError
from fedprllm.files import atomic_path
from fedprllm.pruning.records import RunRecord
from fedprllm.pruning.run_folder import check_files
from fedprllm.pruning.stored_sums import read_sums

__all__ = ["ImportanceMatrix", "export_importance_matrix"]

# Model types of transformers whose architecture has another name in GGUF files, apart from "_" and "_text".
_ARCHITECTURES = {
    "mistral": "llama",
    "ministral": "llama",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "gemma3_text": "gemma3",
    "gpt_bigcode": "starcoder",
    "qwen2_5": "qwen2",
    "cohere": "command-r",
    "RefinedWebModel": "falcon",
}


class ImportanceMatrix(NamedTuple):
    """What was exported.

    Attributes:
        path: The file.
        n_weights: Number of weights with an entry.
        n_tokens: Number of tokens behind the sums, in the block with the fewest.
        left_out: Names of weights for which llama.cpp has no name of their own.
    """

    path: Path
    n_weights: int
    n_tokens: int
    left_out: list[str]


class _Entry(NamedTuple):
    name: str
    sums: np.ndarray
    n_tokens: int


def export_importance_matrix(
    run: str | Path, path: str | Path, architecture: str | None = None
) -> ImportanceMatrix:
    """Write the sums of a complete run as an importance matrix for `llama-quantize --imatrix`.

    Args:
        run: Folder of a run in which participants shared statistics or Gram matrices.
        path: File to write; an existing file is replaced once the new one is complete.
        architecture: Name of the model's architecture in GGUF files, if its type does not tell.

    Raises:
        RunError: The run is not complete, kept no sums or is damaged, or the architecture is not known to
            llama.cpp.
    """
    run, path = Path(run), Path(path)
    record = RunRecord.read(run / "result.json")
    check_files(run, {name: digest for name, digest in _sums(run, record) if digest})
    names = _names(run, record, architecture)
    entries, left_out = [], []
    for name, sums, n_tokens in _entries(run, record):
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            left_out.append(name)
        else:
            entries.append(_Entry(known, sums, n_tokens))
    if not entries:
        raise RunError(
            f"none of the weights of {run} has a name in llama.cpp ({left_out[0]} for example): name the "
            "architecture with --architecture"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        _write(unfinished, entries, record)
    return ImportanceMatrix(path, len(entries), min(entry.n_tokens for entry in entries), left_out)


def _sums(run: Path, record: RunRecord) -> Iterator[tuple[str, str | None]]:
    """Path of each block's sums relative to the run's folder, with its digest if that is known."""
    for block in record.blocks:
        name = f"sums/block-{block.block:04d}.safetensors"
        if not (run / name).exists() and name not in (block.files or {}):
            shared = record.config.share
            raise RunError(
                f"{run} has no sums of block {block.block}; participants shared {shared}: run with --share "
                "statistics (with --sparsity 0 to only collect the sums), or with --share gram"
            )
        yield name, (block.files or {}).get(name)


def _entries(run: Path, record: RunRecord) -> Iterator[_Entry]:
    for name, _ in _sums(run, record):
        sums = read_sums(run / name)
        for weight, squares in sums.of_weight.items():
            yield _Entry(weight, squares.numpy().astype(np.float32), sums.n_tokens)


def _names(run: Path, record: RunRecord, architecture: str | None) -> gguf.TensorNameMap:
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name = architecture or _architecture(run, record, known)
    if name not in known:
        raise RunError(
            f"llama.cpp knows no architecture '{name}': name the one that its GGUF files of this model have "
            "(general.architecture) with --architecture"
        )
    return gguf.get_tensor_name_map(known[name], len(record.blocks))


def _architecture(run: Path, record: RunRecord, known: dict[str, gguf.MODEL_ARCH]) -> str:
    config = run / next(iter(record.models.values())) / "config.json"
    try:
        model_type = str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{config} does not tell the type of the model ({error}): restore it") from None
    candidates = [_ARCHITECTURES.get(model_type, model_type), model_type.removesuffix("_text")]
    candidates += [name.replace("_", separator) for name in candidates for separator in ("-", "")]
    return next((name for name in candidates if name in known), model_type)


def _write(path: Path, entries: Sequence[_Entry], record: RunRecord) -> None:
    participants = record.participants.values()
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [f"fedprllm: {len(participants)} participants"])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, record.n_windows)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, max(one.window_length for one in participants))
    for name, sums, n_tokens in entries:
        writer.add_tensor(f"{name}.in_sum2", sums.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), n_tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
