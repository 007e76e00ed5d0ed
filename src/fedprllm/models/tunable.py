"""The few parameters that healing trains: norms, biases, and one scale for each output row of every Linear.

Only so few that the gradient of all of them is small, yet enough to recover much of what pruning costs
(PERP, arXiv 2312.15230). A scale multiplies the output of its Linear and is folded into the weights at the
end, so a healed model has the tensors, shapes and zeros that it had before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedprllm.models.block import Block, Hidden, Linear
from fedprllm.models.blockwise import BlockwiseModel

__all__ = ["Slice", "TunableParameters"]

_TRAINED = ("weight", "bias")


@dataclass(frozen=True)
class Slice:
    """Where a tensor's parameters lie in the vector.

    Attributes:
        name: Name of the tensor; of a scale, that of its Linear's weight.
        start: Position of the first one.
        n: Their number.
        block: Index of the block; None outside all blocks.
        linear: The Linear that a scale belongs to; None for norms and biases.
    """

    name: str
    start: int
    n: int
    block: int | None
    linear: Linear | None = None


class TunableParameters:
    """The parameters that healing trains, as one vector.

    These are all vectors called weight or bias (those of norms, and biases), and a scale for each output row
    of every Linear that can be pruned.

    Args:
        model: The model to heal.

    Attributes:
        n: Length of the vector.
        slices: Where the parameters of each tensor lie in it.
    """

    def __init__(self, model: BlockwiseModel) -> None:
        self._model = model
        self.n = 0
        self.slices: list[Slice] = []
        self._by_block: dict[int | None, list[Slice]] = {}
        # A mixture has tens of thousands of parameters, so they are listed once.
        parameters = dict(model.skeleton.named_parameters(remove_duplicate=False))
        for index, linears in enumerate(model.linears):
            self._add_vectors(model.names_in_block(index), index, parameters)
            for linear in linears.values():
                self._add(linear.name, linear.shape[0], index, linear)
        self._add_vectors(model.vectors_after_blocks(), None, parameters)

    def _add_vectors(
        self, names: Iterable[str], block: int | None, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        for name in names:
            parameter = parameters.get(name)
            is_trained = name.rpartition(".")[2] in _TRAINED and parameter is not None and parameter.ndim == 1
            if parameter is not None and is_trained and parameter.is_floating_point():
                self._add(name, parameter.numel(), block)

    def _add(self, name: str, n: int, block: int | None, linear: Linear | None = None) -> None:
        self.slices.append(Slice(name, self.n, n, block, linear))
        self._by_block.setdefault(block, []).append(self.slices[-1])
        self.n += n

    def initial(self) -> Float[Tensor, " n"]:
        """The values with which the model computes what it computes now."""
        vector = torch.ones(self.n)
        stored = self._model.checkpoint.load(one.name for one in self.slices if one.linear is None)
        for one in self.slices:
            if one.linear is None:
                vector[one.start : one.start + one.n] = stored[one.name].to(torch.float32)
        return vector

    def of_block(self, vector: Float[Tensor, " n"], block: int | None) -> list[Tensor]:
        """Views of a vector: the parameters of one block, or of None, what lies outside all blocks."""
        return [vector[one.start : one.start + one.n] for one in self._of(block)]

    def _of(self, block: int | None) -> list[Slice]:
        return self._by_block.get(block, [])

    def run_block(self, block: Block, hidden: Hidden, values: list[Tensor]) -> Hidden:
        """Compute a block's output with other parameters.

        Args:
            block: The block.
            hidden: Its input.
            values: Its parameters, as from `of_block`.
        """
        prefix = f"{self._model.block_names[block.index]}."
        replaced, scales = self._replaced(block.index, values, prefix), {}
        for one, value in zip(self._of(block.index), values, strict=True):
            if one.linear is not None:
                scales[one.name] = value.to(self._model.device)
        with _scaled(block.linears, scales):
            return self._model.run_block(block.index, hidden, replaced)

    def _replaced(self, block: int | None, values: list[Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Tensors that replace parameters, in their precision, by their names without the prefix."""
        device, dtype = self._model.device, self._model.dtype
        return {
            one.name.removeprefix(prefix): value.to(device, dtype)
            for one, value in zip(self._of(block), values, strict=True)
            if one.linear is None
        }

    def logits(self, hidden: Hidden, window: Tensor, values: list[Tensor]) -> Iterator[Tensor]:
        """Yield logits (`BlockwiseModel.logits`) with other parameters outside the blocks."""
        return self._model.logits(hidden, window, parameters=self._replaced(None, values))

    def folded_block(self, block: Block, vector: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """The tensors of a block with the parameters in place of the old, in their stored precision."""
        changed = dict(block.tensors)
        for one, value in zip(self._of(block.index), self.of_block(vector, block.index), strict=True):
            changed[one.name] = _folded(block.tensors[one.name], value, one.linear)
        return changed

    def folded_outside(self, vector: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """The changed tensors outside the blocks, in their stored precision."""
        slices = self._of(None)
        stored = self._model.checkpoint.load(one.name for one in slices)
        return {
            one.name: _folded(stored[one.name], value, None)
            for one, value in zip(slices, self.of_block(vector, None), strict=True)
        }


def _folded(tensor: Tensor, value: Tensor, linear: Linear | None) -> Tensor:
    """A tensor with its new values; of a Linear's weight, with its rows scaled."""
    value = value.to(tensor.device)
    if linear is None:
        return value.to(tensor.dtype)
    scaled = linear.stored(linear.stored(tensor).to(torch.float32) * value[:, None]).to(tensor.dtype)
    # A negative scale would turn pruned weights into -0.0.
    return torch.where(tensor == 0, torch.zeros_like(tensor), scaled)


@contextmanager
def _scaled(linears: Mapping[str, Linear], scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the outputs of Linears, without their biases, inside the ``with`` block."""
    with ExitStack() as stack:
        for name, scale in scales.items():
            hook = linears[name].module.register_forward_hook(_scaling(scale))
            stack.callback(hook.remove)
        yield


def _scaling(scale: Tensor) -> Any:
    def apply(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        bias: Tensor | None = module.bias
        # In float32: bfloat16 has no number between 1 and 1.0078.
        exact = output.to(torch.float32)
        scaled = exact * scale if bias is None else (exact - bias) * scale + bias
        return scaled.to(output.dtype)

    return apply
