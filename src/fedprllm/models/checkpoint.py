"""Read a safetensors checkpoint tensor by tensor, and write a pruned checkpoint shard by shard.

Only the requested tensors are held in memory: a block is read when pruning reaches it, and its pruned weights
are written as a shard of their own when pruning moves on.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprllm.core.threads import in_threads
from fedprllm.errors import ModelError
from fedprllm.files import flush_file, read_json, write_json
from fedprllm.models.names import Stored, stored_tensors
from fedprllm.models.side_files import side_files
from fedprllm.models.tensor_file import Made, Writable, made, write_tensors

__all__ = ["Checkpoint", "CheckpointWriter", "tensor_fingerprint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ROWS = 4096  # of a matrix, read at a time


class Checkpoint:
    """The tensors in a model folder, by their names in the transformers model.

    Args:
        folder: Hugging Face folder with one or more safetensors files.
        skeleton: The transformers model, with or without weights.

    Raises:
        ModelError: The folder has no safetensors files, or a file in its index is missing or corrupted, or
            two tensors belong to the same tensor of the model.
    """

    def __init__(self, folder: Path, skeleton: Any) -> None:
        self.folder = folder
        # Where there are both, transformers ignores the index.
        if (folder / _SINGLE).exists():
            files = [_SINGLE]
        elif (folder / _INDEX).exists():
            files = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
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
        self._stored = stored_tensors(skeleton, self._file_of)

    def _open(self, file: str | Path) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {self.folder / file}: {error}. Check its permissions, or download the model "
                "again"
            ) from None

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the model has in the files, or that of the tensor it is a part of."""
        return self._stored[name].key

    @property
    def names(self) -> list[str]:
        """Names of the model's tensors that the files contain."""
        return sorted(self._stored)

    @property
    def unknown(self) -> list[str]:
        """Names, as the files have them, of tensors that the transformers model does not have."""
        return sorted(self._file_of.keys() - {stored.key for stored in self._stored.values()})

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def _by_file(self, names: Iterable[str]) -> dict[str, list[tuple[str, Stored]]]:
        """Group tensors by file, as pairs of a tensor's name and its place in the file."""
        by_file: dict[str, list[tuple[str, Stored]]] = {}
        for name in names:
            stored = self._stored.get(name)
            if stored is None:
                raise ModelError(f"{self.folder} has no tensor '{name}': download the model again")
            by_file.setdefault(self._file_of[stored.key], []).append((name, stored))
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
                mapped = [stored.read(opened) for _, stored in wanted]
                tensors |= zip((name for name, _ in wanted), in_threads(_copied, mapped), strict=True)
        return tensors

    def load_from(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """Load tensors from a shard that `CheckpointWriter` wrote.

        Raises:
            ModelError: The shard cannot be read, or lacks one of them.
        """
        opened = self._open(path)
        try:
            return {name: _copied(self._stored[name].read(opened)) for name in names}
        except SafetensorError as error:
            raise ModelError(f"{path} cannot be read: {error}. Delete it") from None

    def unread(self, names: Iterable[str]) -> dict[str, Writable]:
        """Tensors under their names in the files, each read when it is written."""
        return {key: self._unread(key) for key in dict.fromkeys(self._stored[name].key for name in names)}

    def unread_unknown(self, keys: Iterable[str]) -> dict[str, Writable]:
        """Some of the `unknown` tensors, each read when it is written."""
        return {key: self._unread(key) for key in keys}

    def _unread(self, key: str) -> Made:
        return Made.like(self._mapped(key), lambda: self._mapped(key))

    def _mapped(self, key: str) -> Tensor:
        """A stored tensor whose entries are read when they are used."""
        with self._open(self._file_of[key]) as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and bits; a few rows are in memory at a time."""
        (one,), (two,) = (self._slices([each]) for each in (name, other))
        if (one.get_shape(), one.get_dtype()) != (two.get_shape(), two.get_dtype()):
            return False
        n_rows = (one.get_shape() or [1])[0]
        steps = range(0, n_rows, _ROWS)
        return all(_same_bits(one[at : at + _ROWS], two[at : at + _ROWS]) for at in steps)

    def _slices(self, names: Iterable[str]) -> list[Any]:
        """Tensors of which only what is indexed is read."""
        found = []
        for file, wanted in self._by_file(names).items():
            opened: Any = self._open(file)
            found += [opened.get_slice(stored.key) for _, stored in wanted]
        return found

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
                found |= {name: opened.get_slice(stored.key)[:0].dtype for name, stored in wanted}
        return found

    def as_stored(self, tensors: Mapping[str, Writable]) -> dict[str, Writable]:
        """Tensors of the model under the names and in the form of the files.

        Fused tensors are joined when they are written, one expert at a time.

        Args:
            tensors: Tensors by name; of a fused tensor, all parts of its first experts.
        """
        found: dict[str, Writable] = {}
        fused: dict[str, dict[int, list[tuple[Stored, Writable]]]] = {}
        for name, tensor in tensors.items():
            stored = self._stored[name]
            if stored.expert is None:
                found[stored.key] = tensor
            else:
                fused.setdefault(stored.key, {}).setdefault(stored.expert, []).append((stored, tensor))
        return found | {key: self._joined(key, of_expert) for key, of_expert in fused.items()}

    def _joined(self, key: str, of_expert: Mapping[int, Sequence[tuple[Stored, Writable]]]) -> Made:
        """A fused tensor of the first experts."""
        shape, dtype = self._mapped(key).shape[1:], of_expert[0][0][1].dtype

        def expert(number: int) -> Tensor:
            joined = torch.empty(shape, dtype=dtype)
            for stored, tensor in of_expert[number]:
                stored.part(joined).copy_(made(tensor))
            return joined

        return Made((len(of_expert), *shape), dtype, lambda: map(expert, range(len(of_expert))))

    @property
    def n_bytes(self) -> int:
        """Total size of all weight files in bytes."""
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


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


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


class CheckpointWriter:
    """Writes a Hugging Face folder with one shard per block, after a first shard with everything else.

    Shards are written atomically, and the index, without which transformers does not load them, comes last.
    Writing a shard again is harmless.

    Tensors get the names that they have in the source, and whatever else the source contains is kept.

    Args:
        folder: Folder to write to.
        source: The checkpoint that is pruned.
        n_blocks: Number of blocks in the model.
        kept: Indices of the blocks that the pruned model has, in order; all by default.
        prefix: What comes before a block's number in the source's names; needed if blocks are left out.
    """

    def __init__(
        self,
        folder: Path,
        source: Checkpoint,
        n_blocks: int,
        kept: Sequence[int] | None = None,
        prefix: str = "",
    ) -> None:
        self.folder, self.source = folder, source
        self._number = {
            index: number for number, index in enumerate(range(n_blocks) if kept is None else kept)
        }
        self._block = re.compile(rf"({re.escape(prefix)}\.)(\d+)(\..*)") if kept is not None else None
        self.n_shards = len(self._number) + 1

    def shard_path(self, block: int | None) -> Path:
        """Path of a block's shard; None gives the shard that holds everything else."""
        number = 1 if block is None else self._number[block] + 2
        return self.folder / f"model-{number:05d}-of-{self.n_shards:05d}.safetensors"

    def write(self, block: int, tensors: Mapping[str, Writable]) -> None:
        """Write a block's shard, given its tensors by their names in the transformers model."""
        self._save(block, self.source.as_stored(tensors))

    def _renumbered(self, name: str) -> str | None:
        """The name of a tensor of the source in the pruned model; None if its block is left out."""
        found = self._block.fullmatch(name) if self._block is not None else None
        if found is None:
            return name
        number = self._number.get(int(found[2]))
        return None if number is None else f"{found[1]}{number}{found[3]}"

    def _save(self, block: int | None, tensors: Mapping[str, Writable]) -> None:
        names = {name: self._renumbered(name) for name in tensors}
        kept = {new: tensors[name] for name, new in names.items() if new is not None}
        write_tensors(self.shard_path(block), kept, {"format": "pt"})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the blocks' tensors that have been written, by their names in the files."""
        found: dict[str, tuple[int, ...]] = {}
        for block in self._number:
            with safe_open(self.shard_path(block), framework="pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
        return found

    def finish(
        self,
        outside: Iterable[str],
        changed: Mapping[str, Any] = MappingProxyType({}),
        left_out: Collection[str] = (),
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write everything outside the blocks, copy the files that belong to the model, write the index.

        Args:
            outside: Names of the model's tensors outside all blocks.
            changed: Contents, as JSON values, of files that differ from the source's, by name.
            left_out: Names, as the files have them, of tensors to leave out that the transformers model does
                not have.
            tensors: Tensors outside the blocks that differ from the source's, by name.
        """
        unknown = [name for name in self.source.unknown if name not in left_out]
        stored = self.source.unread(outside) | self.source.as_stored(tensors)
        self._save(None, stored | self.source.unread_unknown(unknown))
        for path in side_files(self.source.folder):
            (self.folder / path.parent).mkdir(exist_ok=True)
            if path.as_posix() in changed:
                write_json(self.folder / path, changed[path.as_posix()])
                continue
            shutil.copyfile(self.source.folder / path, self.folder / path)
            flush_file(self.folder / path)
        weight_map: dict[str, str] = {}
        total = 0
        for block in (None, *self._number):
            path = self.shard_path(block)
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
            weight_map |= dict.fromkeys(names, path.name)
            total += path.stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / _INDEX, index)
