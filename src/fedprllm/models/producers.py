"""Find the Linears of a block that lose channels together, whatever the architecture calls them.

The input of an MLP's second Linear is computed channel by channel from the outputs of the first (and of its
gate). Without such an input channel, the matching outputs serve nothing. This is found by running a block
with random outputs of its Linears and following the graph that autograd records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedprllm.models.block import Linear, Producer
from fedprllm.models.probe import Returned, replaced_forwards

__all__ = ["find_producers"]

_TOLERANCE = 0.1  # of bfloat16 gradients; what is told apart is 1 and 2


def find_producers(
    linears: Mapping[str, Linear], forward: Callable[[Tensor], Any], hidden: Tensor
) -> dict[str, tuple[Producer, ...]]:
    """Find, for each Linear, those that compute its input channels one by one and for nothing else.

    Args:
        linears: The Linears of a block.
        forward: The forward pass of the block; its weights do not matter, because Linears are replaced.
        hidden: Hidden states of at least two tokens.

    Returns:
        Producers by the name of the Linear that reads them; Linears without any are left out.
    """
    run = _Run(hidden)
    functions = {linear.module: run.stand_in(name, linear.module) for name, linear in linears.items()}
    try:
        with replaced_forwards(functions), torch.enable_grad():
            output = Returned.hidden(forward(run.hidden.clone()))
    except Exception:  # noqa: BLE001  a block that cannot be run in this way just loses no channels
        return {}
    found = {
        name: producers
        for name, inputs in run.inputs.items()
        if (producers := _producers(inputs, run, linears[name].shape[1]))
    }
    return {
        name: producers
        for name, producers in found.items()
        if not any(run.is_read(producer.name, output, besides=name) for producer in producers)
    }


class _Run:
    """One forward pass in which every Linear returns random numbers."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden.detach().clone().requires_grad_()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(0)

    def stand_in(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """The forward pass of a Linear: remembers its input, and does not use it."""
        weight: Any = module.weight
        n_out = weight.shape[1 if isinstance(module, Conv1D) else 0]

        def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            # Positive numbers, because some activations have no slope elsewhere.
            values = torch.rand((*inputs.shape[:-1], n_out), generator=self._random) + 0.5
            self.inputs[name] = inputs
            self.outputs[name] = values.to(inputs).requires_grad_()
            return self.outputs[name].clone()

        return forward

    def is_read(self, name: str, output: Tensor, besides: str) -> bool:
        """Whether a Linear's output goes anywhere else than into one other Linear."""
        readers = [output, *(inputs for reader, inputs in self.inputs.items() if reader != besides)]
        return any(_slopes(each, [self.outputs[name]], torch.ones_like(each))[0].any() for each in readers)


def _producers(inputs: Tensor, run: _Run, width: int) -> tuple[Producer, ...]:
    """The Linears that the input consists of; empty if a channel of it is not computed by itself."""
    leaves = [run.hidden, *run.outputs.values()]
    plain = _slopes(inputs, leaves, _last_token(inputs, torch.ones(width)))
    if plain[0].any():
        return ()
    producers = []
    for name, slopes, leaf in zip(run.outputs, plain[1:], leaves[1:], strict=True):
        if not slopes.any():
            continue
        channels = _channels(inputs, leaf, slopes, width)
        if channels is None:
            return ()
        producers.append(Producer(name, channels))
    return tuple(producers)


def _channels(inputs: Tensor, leaf: Tensor, plain: Tensor, width: int) -> Tensor | None:
    """The input channel that each output affects; None if one affects several, another token or none.

    Channel numbers are read bit by bit: if all channels whose number has a bit count twice, the slope of an
    output doubles exactly if its channel does.
    """
    if plain[..., :-1, :].any() or not plain[..., -1, :].all() or leaf.shape[-1] % width:
        return None
    numbers = torch.arange(width)
    channels = torch.zeros(leaf.shape[-1], dtype=torch.int64)
    for bit in range((width - 1).bit_length()):
        has_bit = (numbers >> bit) & 1
        (slopes,) = _slopes(inputs, [leaf], _last_token(inputs, 1.0 + has_bit))
        ratio = (slopes / plain).reshape(-1, *slopes.shape[-2:])[0, -1].cpu().double()
        found = ratio.round().clamp(1, 2)
        if (ratio - found).abs().max() > _TOLERANCE:
            return None
        channels += (found.to(torch.int64) - 1) << bit
    counts = torch.bincount(channels, minlength=width)
    return channels if (counts == leaf.shape[-1] // width).all() and len(counts) == width else None


def _last_token(inputs: Tensor, values: Tensor) -> Tensor:
    """Numbers for the channels of the last token, and zeros for the other tokens."""
    weights = torch.zeros_like(inputs)
    weights[..., -1, :] = values.to(inputs)
    return weights


def _slopes(outputs: Tensor, leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum; zeros where there is no connection."""
    if not outputs.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(outputs, leaves, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)
    ]
