"""The shared sums as an importance matrix: llama.cpp's quantization then follows everybody's text.

llama.cpp weights the rounding errors of a matrix by the mean square of each of its input channels over some
text. Participants share exactly these sums with ``--share statistics`` and, on the diagonal, with ``gram``.

The file is a GGUF file as `llama-imatrix` writes it: for each weight ``NAME.in_sum2``, float32 [1, in], the
sums of squares, and ``NAME.counts``, float32 [1, 1], the number of tokens; the names are llama.cpp's own.

llama.cpp keeps the matrices of all experts of a block in one tensor, whose entry has a row for each expert:
[experts, in] and [experts, 1]. Participants do not share how many of their tokens reached an expert, so the
count of an expert is that of all tokens, or 0 if none reached it. Quantization compares the channels of one
expert only with each other, so that the sums matter in proportion; an expert with a count of 0 is quantized
without an importance matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from torch import Tensor

from fedprllm.errors import RunError
from fedprllm.files import atomic_path
from fedprllm.pruning.records import RunRecord
from fedprllm.pruning.run_folder import check_files
from fedprllm.pruning.stored_sums import read_sums

__all__ = ["ImportanceMatrix", "export_importance_matrix"]

# Model types of transformers whose architecture has another name in GGUF files, apart from "_" and "_text".
_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ministral": "llama",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "gemma3_text": "gemma3",
    "gpt_bigcode": "starcoder",
    "qwen2_5": "qwen2",
    "cohere": "command-r",
    "RefinedWebModel": "falcon",
}


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"\D+\.(\d+)\..*experts\.(gate|up|down)_proj\.weight")


class ImportanceMatrix(NamedTuple):
    """What was exported.

    Attributes:
        path: The file.
        n_weights: Number of entries; the matrices of all experts of a block have one.
        n_tokens: Number of tokens behind the sums, in the block with the fewest.
        n_unreached: Number of experts' matrices that no token reached.
        left_out: Names of weights for which llama.cpp has no name of their own.
    """

    path: Path
    n_weights: int
    n_tokens: int
    n_unreached: int
    left_out: list[str]


class _Entry(NamedTuple):
    name: str
    sums: np.ndarray  # float32 [matrices, in]
    counts: np.ndarray  # float32 [matrices, 1]


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
    entries: list[_Entry] = []
    left_out: list[str] = []
    n_tokens = []
    for file, _ in _sums(run, record):
        sums = read_sums(run / file)
        n_tokens.append(sums.n_tokens)
        for name, weights in _together(sums.of_weight).items():
            known = _known(names, name)
            if known is None:
                left_out += weights
            else:
                entries.append(_entry(known, [sums.of_weight[each] for each in weights], sums.n_tokens))
    if not entries:
        raise RunError(
            f"none of the weights of {run} has a name in llama.cpp ({left_out[0]} for example): name the "
            "architecture with --architecture"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        _write(unfinished, entries, record)
    n_unreached = sum(int((entry.counts == 0).sum()) for entry in entries)
    return ImportanceMatrix(path, len(entries), min(n_tokens), n_unreached, left_out)


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


def _together(weights: Iterable[str]) -> dict[str, list[str]]:
    """Names of weights by the name that llama.cpp looks for: those of all experts have one, without a number.

    Experts of which some are missing, because they were excluded, keep their own names.
    """
    found: dict[str, list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in weights:
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            found[name] = [name]
        else:
            experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = name
    for joined, numbered in experts.items():
        if sorted(numbered) == list(range(len(numbered))):
            found[joined] = [numbered[number] for number in range(len(numbered))]
        else:
            found |= {name: [name] for name in numbered.values()}
    return found


def _known(names: gguf.TensorNameMap, name: str) -> str | None:
    """llama.cpp's name of a weight, or of a weight of all experts of a block."""
    found: str | None = names.get_name(name, try_suffixes=(".weight",))
    fused = _FUSED.fullmatch(name)
    if found is None and fused is not None:  # transformers has one form for experts, and many names
        found = names.get_name(f"blk.{fused[1]}.ffn_{fused[2]}_exps.weight", try_suffixes=(".weight",))
    return found


def _entry(name: str, sums: Sequence[Tensor], n_tokens: int) -> _Entry:
    """The entry of a weight, or of a weight of all experts; one that no token reached has a count of 0."""
    values = np.stack([each.numpy() for each in sums]).astype(np.float32)
    counts = np.full((len(sums), 1), n_tokens, np.float32)
    if len(sums) > 1:
        counts[~values.any(axis=1)] = 0
    return _Entry(name, values, counts)


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
    for name, sums, counts in entries:
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
