"""Read a safetensors checkpoint tensor by tensor, and write a pruned one shard by shard.

Nothing here holds more than the tensors it is asked for: a block is read when the walk reaches it, and
its pruned form is a shard of its own, written when the walk leaves it.
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
from fedprllm.files import read_json, save_tensors, write_json

__all__ = ["Checkpoint", "CheckpointWriter"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")


class Checkpoint:
    """The tensors of a model folder, by the names its transformers model uses.

    Args:
        folder: A Hugging Face folder with one or several safetensors files.
        prefix: Base-model prefix that the files may leave out (the hub's GPT-2 does).

    Raises:
        ModelError: The folder has no safetensors, or a file of its index is missing or broken.
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
            raise ModelError(f"no *.safetensors in {folder}: expected a Hugging Face model folder")
        self._file_of: dict[str, str] = {}
        for file in files:
            with self._open(file) as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {self.folder / file}: {error}") from None

    def _stored_name(self, name: str) -> str | None:
        short = name.removeprefix(self._prefix)
        return name if name in self._file_of else short if short in self._file_of else None

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def _by_file(self, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
        """Pairs of a tensor's name and its name in the file, by file."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._stored_name(name)
            if stored is None:
                raise ModelError(f"{self.folder} has no tensor '{name}'")
            by_file.setdefault(self._file_of[stored], []).append((name, stored))
        return by_file

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors, in the precision of the file, into memory of their own.

        The copy matters: without it the tensors would keep the whole file mapped.
        """
        tensors: dict[str, Tensor] = {}
        for file, wanted in self._by_file(names).items():
            with self._open(file) as opened:
                mapped = [opened.get_tensor(stored) for _, stored in wanted]
                tensors |= zip((name for name, _ in wanted), in_threads(Tensor.clone, mapped), strict=True)
        return tensors

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the type, shape and bytes of some tensors, of which a few are in memory at a time.

        Raises:
            ModelError: A tensor holds NaN or infinity (named).
        """
        # While one thread waits for the disk, another one computes.
        digests = in_threads(lambda name: _fingerprint(name, self.load([name])[name]), names)
        return dict(zip(names, digests, strict=True))

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """Precisions in which some tensors are stored; reads no values."""
        found: dict[str, torch.dtype] = {}
        for file, wanted in self._by_file(names).items():
            with self._open(file) as opened:
                # An empty slice costs nothing and knows its type.
                found |= {name: opened.get_slice(stored)[:0].dtype for name, stored in wanted}
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))


def _fingerprint(name: str, tensor: Tensor) -> str:
    if tensor.is_floating_point() and not _is_finite(tensor):
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"weight '{name}' holds NaN or infinity in {n_bad} of {tensor.numel()} places: "
            "the checkpoint is damaged; get it again"
        )
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity reach the sum, which is one pass without temporaries; a large sum may be infinite too.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class CheckpointWriter:
    """Writes a Hugging Face folder whose first shard holds all but the blocks, and one shard per block.

    The shards are whole or absent, and the index, without which transformers does not load them, comes
    last; writing a shard again is harmless.
    """

    def __init__(self, folder: Path, n_blocks: int) -> None:
        self.folder = folder
        self.n_shards = n_blocks + 1

    def shard_path(self, block: int | None) -> Path:
        """Path of a block's shard; None for the one that holds everything else."""
        number = 1 if block is None else block + 2
        return self.folder / f"model-{number:05d}-of-{self.n_shards:05d}.safetensors"

    def write(self, block: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard."""
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_tensors(self.shard_path(block), on_cpu, {"format": "pt"})

    def finish(self, source: Path) -> None:
        """Copy configuration and tokenizer from the source folder and write the index."""
        for path in sorted(source.iterdir()):
            is_weight = path.name.endswith(_WEIGHTS)
            if path.is_file() and not is_weight and path.suffix != ".py" and path.name != "README.md":
                shutil.copyfile(path, self.folder / path.name)
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
