"""Read a safetensors checkpoint tensor by tensor, and write a pruned checkpoint shard by shard.

Only the requested tensors are held in memory: a block is read when pruning reaches it, and its pruned weights
are written as a shard of their own when pruning moves on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprllm.core.threads import in_threads
from fedprllm.errors import ModelError
from fedprllm.files import flush_file, read_json, save_tensors, write_json

__all__ = ["Checkpoint", "CheckpointWriter", "tensor_fingerprint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")


class Checkpoint:
    """The tensors in a model folder, by their names in the transformers model.

    Args:
        folder: Hugging Face folder with one or more safetensors files.
        prefix: Base-model prefix that names in the files may omit (as in the hub's GPT-2).

    Raises:
        ModelError: The folder has no safetensors files, or a file in its index is missing or corrupted.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self._prefix = f"{prefix}." if prefix else ""
        if (folder / _INDEX).exists():
            files = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
        elif (folder / _SINGLE).exists():
            files = [_SINGLE]
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{folder} contains no *.safetensors files: expected a Hugging Face model folder; "
                "give another folder"
            )
        self._file_of: dict[str, str] = {}
        for file in files:
            with self._open(file) as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {self.folder / file}: {error}. Check its permissions, or download the model "
                "again"
            ) from None

    def _stored_name(self, name: str) -> str | None:
        short = name.removeprefix(self._prefix)
        return name if name in self._file_of else short if short in self._file_of else None

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as the files have them."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def _by_file(self, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
        """Group tensors by file, as pairs of a tensor's name and its name in the file."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._stored_name(name)
            if stored is None:
                raise ModelError(f"{self.folder} has no tensor '{name}': download the model again")
            by_file.setdefault(self._file_of[stored], []).append((name, stored))
        return by_file

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Load tensors into memory, in the precision of the file.

        The tensors are copied: uncopied ones would keep the whole file mapped.

        Raises:
            ModelError: A tensor is missing, or a file cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        for file, wanted in self._by_file(names).items():
            with self._open(file) as opened:
                mapped = [opened.get_tensor(stored) for _, stored in wanted]
                tensors |= zip((name for name, _ in wanted), in_threads(Tensor.clone, mapped), strict=True)
        return tensors

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the type, shape and bytes of each tensor; only a few tensors are in memory at a time.

        Raises:
            ModelError: A tensor contains NaN or infinity; the message names it.
        """
        # While one thread waits for the disk, another computes.
        digests = in_threads(lambda name: tensor_fingerprint(name, self.load([name])[name]), names)
        return dict(zip(names, digests, strict=True))

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The precision in which each tensor is stored; reads no values."""
        found: dict[str, torch.dtype] = {}
        for file, wanted in self._by_file(names).items():
            with self._open(file) as opened:
                # An empty slice has the type but loads nothing.
                found |= {name: opened.get_slice(stored)[:0].dtype for name, stored in wanted}
        return found

    @property
    def n_bytes(self) -> int:
        """Total size of all weight files in bytes."""
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))


def tensor_fingerprint(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes.

    Raises:
        ModelError: The tensor contains NaN or infinity; the message names it.
    """
    if tensor.is_floating_point() and not _is_finite(tensor):
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"weight '{name}' contains NaN or infinity in {n_bad} of {tensor.numel()} entries: expected "
            "finite numbers. The checkpoint is corrupted; download it again"
        )
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity propagate to the sum, which takes one pass without temporaries. A sum may overflow, so
    # entries are checked one by one if it is not finite.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class CheckpointWriter:
    """Writes a Hugging Face folder with one shard per block, after a first shard with everything else.

    Shards are written atomically, and the index, without which transformers does not load them, comes last.
    Writing a shard again is harmless.

    Args:
        folder: Folder to write to.
        n_blocks: Number of blocks in the model.
    """

    def __init__(self, folder: Path, n_blocks: int) -> None:
        self.folder = folder
        self.n_shards = n_blocks + 1

    def shard_path(self, block: int | None) -> Path:
        """Path of a block's shard; None gives the shard that holds everything else."""
        number = 1 if block is None else block + 2
        return self.folder / f"model-{number:05d}-of-{self.n_shards:05d}.safetensors"

    def write(self, block: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard."""
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_tensors(self.shard_path(block), on_cpu, {"format": "pt"})

    def finish(self, source: Path) -> None:
        """Copy the configuration and tokenizer from the source folder, and write the index."""
        for path in sorted(source.iterdir()):
            is_weight = path.name.endswith(_WEIGHTS)
            if path.is_file() and not is_weight and path.suffix != ".py" and path.name != "README.md":
                shutil.copyfile(path, self.folder / path.name)
                flush_file(self.folder / path.name)
        weight_map: dict[str, str] = {}
        total = 0
        for block in (None, *range(self.n_shards - 1)):
            path = self.shard_path(block)
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
            weight_map |= dict.fromkeys(names, path.name)
            total += path.stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / _INDEX, index)
