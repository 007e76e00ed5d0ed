"""One decoder block with its weights in memory, and its prunable weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fedprllm.core.zeros import copy_pruned

__all__ = ["UNCHANGED", "Block", "GivenWeights", "Hidden", "Linear", "PrunedWeights", "Weights"]

Hidden = Float[Tensor, "1 tokens hidden"]


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
    family: str = ""

    @property
    def n_weights(self) -> int:
        """Number of weights: out * in."""
        return self.shape[0] * self.shape[1]

    def view(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "out in"]:
        """This Linear's tensor among those of its block, viewed as [out, in]."""
        return self.stored(tensors[self.name])

    def stored(self, matrix: Tensor) -> Tensor:
        """Convert a view between [out, in] and the orientation of the checkpoint, in either direction."""
        return matrix.T if self.transposed else matrix


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
    """

    index: int
    linears: dict[str, Linear]
    tensors: dict[str, Tensor]
    call: Callable[[int, Hidden], Hidden]
    coverage: float | None = None
    notes: list[str] = field(default_factory=list)

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
                if own.dtype == parameter.dtype:
                    # The parameter may share memory with the block's tensor, so it must not be overwritten.
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = weights[name].to(own.dtype)
                else:
                    stack.callback(parameter.data.copy_, own)
                    weights.write(name, parameter.data)
            yield


class Weights(Mapping[str, Tensor]):
    """Weights that replace a block's original ones, by name, in the orientation of the checkpoint."""

    def write(self, name: str, target: Tensor) -> None:
        """Write a weight to a tensor of the same shape, converting it to that tensor's precision."""
        target.copy_(self[name])


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

    def __getitem__(self, name: str) -> Tensor:
        pruned = torch.empty_like(self._block.tensors[name])
        self.write(name, pruned)
        return pruned

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)


UNCHANGED = GivenWeights({})
