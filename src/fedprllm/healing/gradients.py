"""The gradient of a loss with one block in memory: forward block by block, and backward in reverse.

The forward pass keeps only the input of every block. The backward pass computes each block again and hands
the gradient of its input to the block before it, so the model is read twice in a round; if all blocks fit
into memory, they are read once for all rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedprllm.models.block import Block, Hidden
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tunable import TunableParameters
from fedprllm.progress import Advance
from fedprllm.pruning.hidden_states import HiddenMemory, HiddenStates

__all__ = ["OpenBlocks", "WindowGradient", "held_out_losses", "window_gradients"]

WindowGradient = tuple[Float[Tensor, " n"], float]


class OpenBlocks:
    """The blocks of a model, one at a time in memory or, if they may stay, all.

    Args:
        model: The model.
        stay: Whether blocks stay in memory until the ``with`` block ends.
    """

    def __init__(self, model: BlockwiseModel, *, stay: bool) -> None:
        self._model, self._stay = model, stay
        self._stack = ExitStack()
        self._open: dict[int, Block] = {}

    def __enter__(self) -> OpenBlocks:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    @contextmanager
    def at(self, index: int) -> Iterator[Block]:
        """Have a block in memory inside the ``with`` block."""
        with ExitStack() as stack:
            if index not in self._open:
                keeper = self._stack if self._stay else stack
                block = keeper.enter_context(self._model.block(index))
                if not self._stay:
                    yield block
                    return
                self._open[index] = block
            yield self._open[index]


def window_gradients(
    model: BlockwiseModel,
    tunable: TunableParameters,
    vector: Float[Tensor, " n"],
    windows: Sequence[Tensor],
    blocks: OpenBlocks,
    memory: HiddenMemory,
    advance: Advance,
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
    """
    if not windows:
        return []  # without reading the model for nothing
    inputs = [HiddenStates(memory, f"heal-{index}") for index in range(model.n_blocks)]
    outputs = _forward(model, tunable, vector, windows, blocks, inputs, advance)
    gradients = [torch.zeros(tunable.n) for _ in windows]
    losses, behind = [], []
    with model.head():
        for output, window, gradient in zip(outputs, windows, gradients, strict=True):
            loss, back = _backward_head(tunable, vector, output, window, gradient)
            losses.append(loss)
            behind.append(back)
    for index in reversed(range(model.n_blocks)):
        values = _leaves(tunable, vector, index)
        with blocks.at(index) as block:
            for number, hidden in enumerate(inputs[index]):
                behind[number], found = _backward(tunable, block, hidden, values, behind[number])
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
) -> list[float]:
    """The sum of each window's losses in nats; arguments as in `window_gradients`."""
    if not windows:
        return []
    outputs = _forward(model, tunable, vector, windows, blocks, None, advance)
    values = tunable.of_block(vector, None)
    with model.head(), torch.no_grad():
        return [
            sum(float(loss) for _, loss in _chunk_losses(tunable, output, window, values))
            for output, window in zip(outputs, windows, strict=True)
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


def _chunk_losses(
    tunable: TunableParameters, hidden: Hidden, window: Tensor, values: list[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of positions of a chunk and the sum of their losses."""
    start = 1
    for logits in tunable.logits(hidden, window, values):
        tokens = window[start : start + len(logits)].to(logits.device)
        start += len(logits)
        yield len(logits), nn.functional.cross_entropy(logits, tokens, reduction="sum")


def _backward_head(
    tunable: TunableParameters, vector: Tensor, hidden: Hidden, window: Tensor, gradient: Tensor
) -> tuple[float, Tensor]:
    """Put the gradient outside the blocks; returns the loss and the gradient of the last block's output."""
    values = _leaves(tunable, vector, None)
    leaf = hidden.detach().requires_grad_()
    back, total = torch.zeros_like(hidden), 0.0
    found = [torch.zeros_like(value) for value in values]
    with torch.enable_grad():
        for _, loss in _chunk_losses(tunable, leaf, window, values):
            grads = torch.autograd.grad(loss, [leaf, *values], allow_unused=True)
            total += float(loss.detach())
            back += _or_zeros(grads[0], back)
            for one, grad in zip(found, grads[1:], strict=True):
                one += _or_zeros(grad, one)
    _put(tunable, gradient, None, found)
    return total, back


def _backward(
    tunable: TunableParameters, block: Block, hidden: Hidden, values: list[Tensor], behind: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of a block's input and parameters, given that of its output."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = tunable.run_block(block, leaf, values)
        grads = torch.autograd.grad(output, [leaf, *values], behind, allow_unused=True)
    return _or_zeros(grads[0], hidden), [
        _or_zeros(grad, value) for grad, value in zip(grads[1:], values, strict=True)
    ]


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Zeros where a tensor took no part, as an expert does that no token reached."""
    return torch.zeros_like(like) if gradient is None else gradient


def _put(tunable: TunableParameters, gradient: Tensor, block: int | None, found: Sequence[Tensor]) -> None:
    for view, value in zip(tunable.of_block(gradient, block), found, strict=True):
        view.copy_(value)
