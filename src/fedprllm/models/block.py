"""One decoder block with its weights in memory, and its prunable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fedprllm.core.zeros import copy_pruned
from fedprllm.models.tensor_file import Made, Writable
from fedprllm.process import return_freed_memory

if TYPE_CHECKING:
    from fedprllm.models.experts import UnfusedExperts

__all__ = [
    "UNCHANGED",
    "Block",
    "Channels",
    "GivenWeights",
    "Hidden",
    "Linear",
    "NarrowedWeights",
    "Producer",
    "PrunedWeights",
    "Weights",
    "return_freed_by",
]

Hidden = Float[Tensor, "1 tokens hidden"]
_LARGE = 2**28  # bytes of a block; below, what the C library keeps is little, and used again sooner


@dataclass(frozen=True, eq=False)
class Producer:
    """A Linear whose outputs serve only to compute the input channels of another one.

    Attributes:
        name: Name of its weight.
        channels: For each of its outputs, the input channel of the other Linear that it affects, int64 [out].
    """

    name: str
    channels: Tensor

    @property
    def bias(self) -> str:
        """Name that its bias has, if it has one."""
        return f"{self.name.removesuffix('weight')}bias"


@dataclass(frozen=True, eq=False)
class Channels:
    """Input channels of a Linear that can be removed, together with all that computes them.

    Attributes:
        part: What they are: ``mlp`` or ``heads``.
        producers: The Linears that compute them.
        units: For each channel, the number of its unit; the channels of a unit (a head) go together,
            int64 [in].
        groups: For each unit, the number of its group; every group loses equally many units,
            int64 [units].
    """

    part: str
    producers: tuple[Producer, ...]
    units: Tensor
    groups: Tensor

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.groups)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1

    def renamed(self, names: Mapping[str, str]) -> Channels:
        """The same channels with other names of the producers."""
        producers = tuple(Producer(names[each.name], each.channels) for each in self.producers)
        return Channels(self.part, producers, self.units, self.groups)


@dataclass(frozen=True)
class Linear:
    """One prunable weight of a block.

    Attributes:
        name: Name of the weight in the checkpoint.
        path: Path of the module inside its block, such as ``self_attn.q_proj``.
        shape: Shape (out, in), whatever the orientation in the checkpoint.
        transposed: Whether the checkpoint stores [in, out] (GPT-2's Conv1D).
        dtype: Precision in the checkpoint.
        source: Name of the first Linear of the block that reads the same input: the query projection for key
            and value, the Linear itself if no Linear before it reads its input.
        module: The module that holds the weight.
        norm: The module whose output it reads, if that may be a normalization (`fedprllm.models.norms`).
        channels: How its input channels can be removed (`fedprllm.models.channels`); None if they cannot.
        family: For a Linear of an expert, the name that all experts' weights of its kind have in common, with
            ``*`` in place of the expert; empty for other Linears. Only those tokens reach an expert that a
            router sends to it, which may be none.
    """

    name: str
    path: str
    shape: tuple[int, int]
    transposed: bool
    dtype: torch.dtype
    source: str
    module: nn.Module = field(repr=False, compare=False)
    norm: nn.Module | None = field(default=None, repr=False, compare=False)
    channels: Channels | None = field(default=None, repr=False, compare=False)
    family: str = ""

    @property
    def n_weights(self) -> int:
        """Number of weights: out * in."""
        return self.shape[0] * self.shape[1]

    @property
    def expert(self) -> tuple[str, int] | None:
        """The path of the experts and the number of the one that it belongs to; None if to none."""
        experts, _, matrix = self.family.partition(".*")
        if not self.family:
            return None
        return experts, int(self.name.removeprefix(f"{experts}.").removesuffix(matrix))

    def view(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        """This Linear's tensor among those of its block, viewed as [out, in]."""
        return self.stored(tensors[self.name])

    def stored(self, matrix: Tensor) -> Tensor:
        """Convert a view between [out, in] and the orientation of the checkpoint, in either direction."""
        return matrix.T if self.transposed else matrix


def return_freed_by(linears: Mapping[str, Linear]) -> None:
    """Return to the system what the steps of a large block's walk have freed (docs/decisions/memory.md)."""
    if sum(linear.n_weights * linear.dtype.itemsize for linear in linears.values()) >= _LARGE:
        return_freed_memory()


@dataclass
class Block:
    """One decoder block with its weights in memory.

    Attributes:
        index: Position of the block in the model.
        linears: The prunable weights of the block, by name.
        tensors: All tensors of the block by name, in the precision and orientation of the checkpoint.
        call: Runs the forward pass: ``(index, hidden) -> hidden``.
        coverage: Share of the block's weight matrices that is prunable.
        notes: What about the block stays dense, in words.
        experts: The modules of its experts, taken apart; empty if it has none.
    """

    index: int
    linears: dict[str, Linear]
    tensors: dict[str, Tensor]
    call: Callable[[int, Hidden], Hidden]
    coverage: float | None = None
    notes: list[str] = field(default_factory=list)
    experts: Sequence[UnfusedExperts] = ()

    @property
    def device(self) -> torch.device:
        """The device that holds the block's tensors."""
        return next(iter(self.tensors.values())).device

    def matrix(self, name: str) -> Float[Tensor, "out in"]:
        """A prunable weight as an [out, in] matrix in float32."""
        return self.linears[name].view(self.tensors).to(torch.float32)

    def forward(self, hidden: Hidden) -> Hidden:
        """Compute the block's output for one window."""
        return self.call(self.index, hidden)

    @contextmanager
    def replaced(self, weights: Weights) -> Iterator[None]:
        """Compute with other weights (stored orientation, any precision) inside the ``with`` block."""
        with ExitStack() as stack:
            for name in weights:
                parameter: nn.Parameter = self.linears[name].module.weight  # type: ignore[assignment]
                own = self.tensors[name]
                if own.dtype == parameter.dtype and self.linears[name].family:
                    stack.enter_context(_replaced_while_called(self.linears[name].module, weights, name))
                elif own.dtype == parameter.dtype:
                    # The parameter may share memory with the block's tensor, so it must not be overwritten.
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = weights[name].to(own.dtype)
                else:
                    stack.callback(parameter.data.copy_, own)
                    weights.write(name, parameter.data)
            yield


@contextmanager
def _replaced_while_called(module: nn.Module, weights: Weights, name: str) -> Iterator[None]:
    """Compute with another weight inside the ``with`` block, which exists only during a call.

    The weights of all experts are most of a block, and one expert computes after the other.
    """
    parameter: nn.Parameter = module.weight  # type: ignore[assignment]
    own = parameter.data

    def before(*_: object) -> None:
        parameter.data = weights[name].to(own.dtype)

    def after(*_: object) -> None:
        parameter.data = own

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)
        stack.callback(after)
        yield


class Weights(Mapping[str, Tensor]):
    """Weights that replace a block's original ones, by name, in the orientation of the checkpoint."""

    def write(self, name: str, target: Tensor) -> None:
        """Write a weight to a tensor of the same shape, converting it to that tensor's precision."""
        target.copy_(self[name])

    def written(self, block: Block) -> Weights:
        """The same weights after the block's tensors have been overwritten with them."""
        return GivenWeights({name: block.tensors[name] for name in self})

    def cut(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002  a smaller model overrides it
        """What remains of a tensor of the block once its removed rows and columns are cut off."""
        return tensor

    def remaining(self, tensors: Mapping[str, Tensor]) -> dict[str, Writable]:
        """The tensors of the block with these weights, as the pruned model stores them."""
        return {name: self.cut(name, self.get(name, tensor)) for name, tensor in tensors.items()}


class GivenWeights(Weights):
    """Weights held in memory.

    Args:
        tensors: Weights by name; if empty, the block stays as it is.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class PrunedWeights(Weights):
    """A block's weights with exact +0.0 where masks prune; each is computed on access.

    Allocating memory for a block costs more than filling it. `write` allocates nothing, and ``[name]``
    allocates one weight.

    Args:
        block: The block, unpruned.
        masks: Prune masks of its Linears, [out, in] by weight name.
    """

    def __init__(self, block: Block, masks: Mapping[str, Tensor]) -> None:
        self._block, self._masks = block, masks

    def write(self, name: str, target: Tensor) -> None:
        """Write a pruned weight to a tensor of the same shape, converting it to that tensor's precision."""
        mask = self._block.linears[name].stored(self._masks[name])
        copy_pruned(self._block.tensors[name], mask, target)

    def remaining(self, tensors: Mapping[str, Tensor]) -> dict[str, Writable]:
        """The tensors of the block with these weights, each pruned when it is written."""
        pruned = {name: Made.like(tensors[name], partial(self.__getitem__, name)) for name in self}
        return {**tensors, **pruned}

    def __getitem__(self, name: str) -> Tensor:
        pruned = torch.empty_like(self._block.tensors[name])
        self.write(name, pruned)
        return pruned

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


class NarrowedWeights(Weights):
    """Weights of a block that loses channels: zeros in their columns, until they are cut off.

    A channel with a column of zeros has no effect, so a participant computes with the block as it is. The
    pruned model stores the block without these columns and without the rows and biases that produce them.

    Args:
        linears: The Linears of the block.
        removed: The removed input channels of each Linear that loses some, bool [in] by weight name.
        narrow: Their remaining columns, in the orientation and precision of the checkpoint.
    """

    def __init__(
        self, linears: Mapping[str, Linear], removed: Mapping[str, Tensor], narrow: Mapping[str, Tensor]
    ) -> None:
        self.removed, self.narrow = dict(removed), dict(narrow)
        self._linears = linears
        self._kept: dict[str, tuple[int, Tensor]] = {}  # axis and indices
        for name, gone in self.removed.items():
            linear = linears[name]
            self._kept[name] = (0 if linear.transposed else 1, _indices(~gone))
            assert linear.channels is not None, f"'{name}' cannot lose channels"
            for producer in linear.channels.producers:
                rows = _indices(~gone[producer.channels.to(gone.device)])
                self._kept[producer.name] = (1 if linears[producer.name].transposed else 0, rows)
                self._kept[producer.bias] = (0, rows)

    def __getitem__(self, name: str) -> Tensor:
        axis, kept = self._kept[name]
        narrow = self.narrow[name]
        shape = list(narrow.shape)
        shape[axis] = len(self.removed[name])
        return narrow.new_zeros(shape).index_copy_(axis, kept.to(narrow.device), narrow)

    def __iter__(self) -> Iterator[str]:
        return iter(self.narrow)

    def __len__(self) -> int:
        return len(self.narrow)

    def written(self, block: Block) -> Weights:  # noqa: ARG002
        """Itself: the columns to cut off must stay known."""
        return self

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What remains of a tensor of the block once its removed rows and columns are cut off."""
        if name not in self._kept:
            return tensor
        axis, kept = self._kept[name]
        return tensor.index_select(axis, kept.to(tensor.device))


def _indices(kept: Tensor) -> Tensor:
    return kept.nonzero().flatten()


UNCHANGED = GivenWeights({})
