"""Names of tensors: as the files of a checkpoint have them, and as the model that is pruned has them.

Newer versions of transformers rename tensors while they load them (GPT-NeoX's ``embed_out.weight`` becomes
``lm_head.weight``) and fuse the experts of a block, which `fedprllm.models.experts` takes apart again. The
headers of the files are enough to find out where each tensor of the model is stored, so a checkpoint is read
in place, and what is written has the names and the form that every version knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedprllm.errors import ModelError
from fedprllm.models.experts import FusedTensor, UnfusedExperts, fused_shapes

__all__ = ["Stored", "stored_tensors"]

# What transformers may do to the tensors of single experts, or of single matrices, to fuse them.
_FUSING = (("MergeModulelist",), ("MergeModulelist", "Concatenate"), ("Concatenate",))


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the model is stored: as a tensor of its own, or as an expert's part of a fused one.

    Attributes:
        key: Name of the stored tensor.
        expert: Index of the expert in the first dimension; None for a tensor of its own.
        half: 0 for the gate and 1 for up in a tensor that holds both; None if it holds one matrix.
        interleaved: Whether rows of gate and up alternate.
        transposed: Whether the stored matrices are [in, out].
    """

    key: str
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False

    def read(self, opened: Any) -> Tensor:
        """Read the tensor, and nothing else, from an open safetensors file."""
        if self.expert is None:
            tensor: Tensor = opened.get_tensor(self.key)
            return tensor
        return self.part(opened.get_slice(self.key)[self.expert : self.expert + 1][0])

    def shape(self, stored: Sequence[int]) -> list[int]:
        """The tensor's shape, given that of the stored one."""
        if self.expert is None:
            return list(stored)
        shape = list(stored[1:])
        if self.transposed:
            shape.reverse()
        return [shape[0] // (1 if self.half is None else 2), *shape[1:]]

    def part(self, of_expert: Tensor) -> Tensor:
        """The tensor as a view of what is stored of its expert."""
        whole = of_expert.T if self.transposed and of_expert.ndim == 2 else of_expert
        if self.half is None:
            return whole
        return whole[self.half :: 2] if self.interleaved else whole.chunk(2)[self.half]


def stored_tensors(skeleton: Any, keys: Iterable[str]) -> dict[str, Stored]:
    """Map the names in a model's state dict to where the tensors are stored.

    Tensors that transformers computes in another way from several stored ones, or from a part of one, are
    left out.

    Args:
        skeleton: The model with its experts taken apart, with or without weights.
        keys: Names in the files.

    Raises:
        ModelError: Two stored tensors belong to the same tensor of the model, or one to an expert that the
            configuration does not have.
    """
    find = _Finder(skeleton)
    found: dict[str, Stored] = {}
    for key in sorted(keys):
        for name, stored in find(key):
            if name in found:
                raise ModelError(
                    f"the checkpoint stores two tensors, '{found[name].key}' and '{key}', for '{name}' of "
                    f"{type(skeleton).__name__}: expected one; download the model again"
                )
            found[name] = stored
    return found


class _Finder:
    """The tensors of the model that a stored tensor holds."""

    def __init__(self, skeleton: Any) -> None:
        self._shapes, self._prefix = fused_shapes(skeleton), skeleton.base_model_prefix
        self._renamings, self._converters = _transforms(skeleton)
        self._fused: dict[str, tuple[str, FusedTensor]] = {
            f"{path}.{name}": (path, tensor)
            for path, module in skeleton.named_modules()
            if isinstance(module, UnfusedExperts)
            for name, tensor in module.fused.items()
        }

    def __call__(self, key: str) -> Iterator[tuple[str, Stored]]:
        """Yield names in the state dict, and where in the stored tensor each is."""
        name, pattern = self._renamed(key)
        if name in self._fused:
            yield from self._experts(key, pattern, *self._fused[name])
        elif name:
            yield name, Stored(key)

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """The name that transformers gives to a stored tensor, and the pattern by which it converts it."""
        if self._renamings or self._converters:
            from transformers.core_model_loading import rename_source_key

            name, pattern = rename_source_key(
                key, self._renamings, self._converters, self._prefix or None, self._shapes
            )
            if name in self._fused or (pattern is None and name in self._shapes):
                return str(name), pattern
        short = key.removeprefix(f"{self._prefix}.") if self._prefix else key
        full = f"{self._prefix}.{key}"
        return next((name for name in (key, full, short) if name in self._shapes), ""), None

    def _experts(
        self, key: str, pattern: str | None, path: str, tensor: FusedTensor
    ) -> Iterator[tuple[str, Stored]]:
        if pattern is None:
            yield from _parts_of_fused(key, path, tensor)
            return
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        steps = tuple(type(step).__name__ for step in converter.operations)
        part = _part_of(converter.source_patterns.index(pattern), len(converter.source_patterns), tensor)
        if steps not in _FUSING or part is None:
            return
        if steps == ("Concatenate",):
            for expert in range(tensor.shape[0]):
                yield f"{path}.{expert}.{part}", Stored(key, expert)
        elif (number := _number(key)) is not None:
            if number >= tensor.shape[0]:
                raise ModelError(
                    f"the checkpoint stores '{key}', and its config.json says {tensor.shape[0]} experts: "
                    "correct config.json, or download the model again"
                )
            yield f"{path}.{number}.{part}", Stored(key)


def _parts_of_fused(key: str, path: str, tensor: FusedTensor) -> Iterator[tuple[str, Stored]]:
    """The tensors in one that is stored as transformers holds it."""
    ending = "bias" if tensor.is_bias else "weight"
    for expert in range(tensor.shape[0]):
        for number, part in enumerate(tensor.parts):
            half = number if len(tensor.parts) > 1 else None
            yield (
                f"{path}.{expert}.{part}.{ending}",
                Stored(key, expert, half, tensor.interleaved, tensor.transposed),
            )


def _part_of(position: int, n_sources: int, tensor: FusedTensor) -> str | None:
    """The weight that one of several stored tensors becomes; None if it is not simply a matrix."""
    plain = not (tensor.interleaved or tensor.transposed or tensor.is_bias)
    return f"{tensor.parts[position]}.weight" if plain and n_sources == len(tensor.parts) else None


def _number(key: str) -> int | None:
    """The last number among the parts of a name: that of the expert."""
    found = re.findall(r"\.(\d+)(?=\.)", key)
    return int(found[-1]) if found else None


def _transforms(skeleton: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to names, and what it does to tensors; nothing in versions without either."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    transforms = get_model_conversion_mapping(skeleton)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    return [one for one in transforms if one not in converters], converters
