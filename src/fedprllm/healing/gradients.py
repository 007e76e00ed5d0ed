"""The gradient of a loss with one block in memory: forward block by block, and backward in reverse.

The forward pass keeps only the input of every block. The backward pass computes each block again and hands
the gradient of its input to the block before it, so the model is read twice in a round. If all blocks fit
into memory, they are read once for all rounds; if what a window's backward pass needs fits beside them, no
block is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedprllm.healing.objectives import NextToken, Objective
from fedprllm.models.block import Block, Hidden
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.open_blocks import OpenBlocks
from fedprllm.models.tunable import TunableParameters
from fedprllm.progress import Advance
from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates

__all__ = ["WindowGradient", "backward_bytes", "held_out_losses", "window_gradients"]

WindowGradient = tuple[Float[Tensor, " n"], float]
_NEXT_TOKEN = NextToken()


def window_gradients(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Float[Tensor, " n"],
    windows: Sequence[Tensor],
    blocks: OpenBlocks,
    memory: HiddenMemory,
    advance: Advance,
    objective: Objective = _NEXT_TOKEN,
    *,
    keep: bool = False,
) -> list[WindowGradient]:
    """Gradient of the sum of each window's losses with respect to the parameters, and that sum.

    Args:
        model: The model.
        tunable: Its parameters.
        vector: Their values.
        windows: Token windows.
        blocks: The model's blocks.
        memory: Memory for the inputs of all blocks.
        advance: Called once for each window and block.
        objective: The loss.
        keep: Keep what the backward pass of a window needs (`backward_bytes`), instead of computing blocks
            again; the blocks must stay. The result has the same bits.
    """
    if not windows:
        return []  # without reading the model for nothing
    # On the device once a round, not for every window and block.
    vector = vector.to(model.device)
    if keep:
        return _window_by_window(model, tunable, vector, windows, blocks, advance, objective)
    inputs = [HiddenStates(memory, f"heal-{index}") for index in range(model.n_blocks)]
    outputs = _forward(model, tunable, vector, windows, blocks, inputs, advance)
    gradients = [torch.zeros_like(vector) for _ in windows]
    losses, behind = [], []
    targets = objective.targets(windows)
    with model.head(), objective.head():
        for output, window, target, gradient in zip(outputs, windows, targets, gradients, strict=True):
            chunks = _ChunkLosses(tunable, objective, window, target)
            loss, back = _backward_head(tunable, vector, output, chunks, gradient)
            losses.append(loss)
            behind.append(back)
    for index in reversed(range(model.n_blocks)):
        values = _leaves(tunable, vector, index)
        with blocks.at(index) as block:
            for number, hidden in enumerate(inputs[index]):
                passed = _Pass.of(tunable, block, hidden, values)
                behind[number], found = passed.backward(behind[number])
                _put(tunable, gradients[number], index, found)
                advance(1)
        inputs[index].clear()
    return list(zip(gradients, losses, strict=True))


def held_out_losses(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Float[Tensor, " n"],
    windows: Sequence[Tensor],
    blocks: OpenBlocks,
    advance: Advance,
    objective: Objective = _NEXT_TOKEN,
) -> list[float]:
    """The sum of each window's losses in nats; arguments as in `window_gradients`."""
    if not windows:
        return []
    vector = vector.to(model.device)
    outputs = _forward(model, tunable, vector, windows, blocks, None, advance)
    values = tunable.of_block(vector, None)
    targets = objective.targets(windows)
    with model.head(), objective.head(), torch.no_grad():
        return [
            sum(float(loss) for loss in _ChunkLosses(tunable, objective, window, target).of(output, values))
            for output, window, target in zip(outputs, windows, targets, strict=True)
        ]


@torch.no_grad()
def _forward(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Tensor,
    windows: Sequence[Tensor],
    blocks: OpenBlocks,
    inputs: Sequence[HiddenStates] | None,
    advance: Advance,
) -> list[Hidden]:
    """Outputs of the last block; the inputs of every block are kept in ``inputs``."""
    hidden = list(model.embed(windows))
    for index in range(model.n_blocks):
        if inputs is not None:
            inputs[index].fill(hidden)
        values = tunable.of_block(vector, index)
        with blocks.at(index) as block:
            for number, state in enumerate(hidden):
                hidden[number] = tunable.run_block(block, state, values)
                advance(1)
    return hidden


def _leaves(tunable: TunableParameters, vector: Tensor, block: int | None) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in tunable.of_block(vector, block)]


@dataclass(frozen=True)
class _ChunkLosses:
    """The losses of a window, a chunk of positions at a time."""

    tunable: TunableParameters
    objective: Objective
    window: Tensor
    target: Hidden | None

    def of(self, hidden: Hidden, values: list[Tensor]) -> Iterator[Tensor]:
        """Yield the sum of the losses of each chunk, given the last block's output."""
        logits = self.tunable.logits(hidden, self.window, values)
        yield from self.objective.losses(logits, self.window, self.target)


def _backward_head(
    tunable: TunableParameters, vector: Tensor, hidden: Hidden, chunks: _ChunkLosses, gradient: Tensor
) -> tuple[float, Tensor]:
    """Put the gradient outside the blocks; returns the loss and the gradient of the last block's output."""
    values = _leaves(tunable, vector, None)
    leaf = hidden.detach().requires_grad_()
    back, total = torch.zeros_like(hidden), 0.0
    found = [torch.zeros_like(value) for value in values]
    with torch.enable_grad():
        for loss in chunks.of(leaf, values):
            grads = torch.autograd.grad(loss, [leaf, *values], allow_unused=True)
            total += float(loss.detach())
            back += _or_zeros(grads[0], back)
            for one, grad in zip(found, grads[1:], strict=True):
                one += _or_zeros(grad, one)
    _put(tunable, gradient, None, found)
    return total, back


@dataclass(frozen=True)
class _Pass:
    """A block's output for a window, and what its gradients are computed from."""

    leaf: Hidden
    values: list[Tensor]
    output: Hidden

    @classmethod
    def of(cls, tunable: TunableParameters, block: Block, hidden: Hidden, values: list[Tensor]) -> _Pass:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            return cls(leaf, values, tunable.run_block(block, leaf, values))

    def backward(self, behind: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the block's input and parameters, given that of its output."""
        grads = torch.autograd.grad(self.output, [self.leaf, *self.values], behind, allow_unused=True)
        return _or_zeros(grads[0], self.leaf), [
            _or_zeros(grad, value) for grad, value in zip(grads[1:], self.values, strict=True)
        ]


def _window_by_window(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Tensor,
    windows: Sequence[Tensor],
    blocks: OpenBlocks,
    advance: Advance,
    objective: Objective,
) -> list[WindowGradient]:
    """`window_gradients` where everything fits into memory: no block is computed again."""
    results = []
    embedded, targets = list(model.embed(windows)), objective.targets(windows)
    leaves = [_leaves(tunable, vector, index) for index in range(model.n_blocks)]
    with model.head(), objective.head():
        for window, hidden, target in zip(windows, embedded, targets, strict=True):
            passes: list[_Pass] = []
            for index, values in enumerate(leaves):
                with blocks.at(index) as block:
                    passes.append(_Pass.of(tunable, block, hidden, values))
                hidden = passes[-1].output.detach()
                advance(1)
            gradient = torch.zeros_like(vector)
            chunks = _ChunkLosses(tunable, objective, window, target)
            loss, behind = _backward_head(tunable, vector, hidden, chunks, gradient)
            for index in reversed(range(model.n_blocks)):
                behind, found = passes.pop().backward(behind)
                _put(tunable, gradient, index, found)
                advance(1)
            results.append((gradient, loss))
    return results


def backward_bytes(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Float[Tensor, " n"],
    window: Tensor,
    blocks: OpenBlocks,
) -> int:
    """Memory for what the backward pass of a window needs, in bytes, beside the blocks.

    It is found with the first block, and the same for every window of this length.
    """
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    (hidden,) = model.embed([window])
    values = _leaves(tunable, vector.to(model.device), 0)
    with blocks.at(0) as block, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held until all are counted, so that no two of them had the same address.
        kept = _Pass.of(tunable, block, hidden, values)
        for linear in block.linears.values():
            weight = linear.module.weight
            assert isinstance(weight, Tensor)
            found.pop(weight.untyped_storage().data_ptr(), None)
    return model.n_blocks * (kept.output.nbytes + sum(found.values()))


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Zeros where a tensor took no part, as an expert does that no token reached."""
    return torch.zeros_like(like) if gradient is None else gradient


def _put(tunable: TunableParameters, gradient: Tensor, block: int | None, found: Sequence[Tensor]) -> None:
    for view, value in zip(tunable.of_block(gradient, block), found, strict=True):
        view.copy_(value)
