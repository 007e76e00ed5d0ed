"""Find the Linears of a block that lose channels together, whatever the architecture calls them.

The input of an MLP's second Linear is computed channel by channel from the outputs of the first (and of its
gate), that of the output projection of attention head by head. Without such a channel or head, the matching
outputs serve nothing. This is found by running a block with random outputs of its Linears and following the
graph that autograd records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedprllm.models.block import Channels, Linear, Producer
from fedprllm.models.probe import Returned, replaced_forwards

__all__ = ["find_channels"]

_TOLERANCE = 0.1  # of bfloat16 gradients; what is told apart is 1 and 2


def find_channels(
    linears: Mapping[str, Linear], forward: Callable[[Tensor], Any], hidden: Tensor, n_heads: int = 0
) -> dict[str, Channels]:
    """Find the Linears whose input channels can be removed together with all that computes them.

    Args:
        linears: The Linears of a block.
        forward: The forward pass of the block; its weights do not matter, because Linears are replaced.
        hidden: Hidden states of at least two tokens.
        n_heads: Number of query heads; 0 if unknown.

    Returns:
        Channels by the name of the Linear that reads them; Linears whose input channels cannot be removed are
        left out.
    """
    run = _Run(hidden)
    functions = {linear.module: run.stand_in(name, linear.module) for name, linear in linears.items()}
    try:
        with replaced_forwards(functions), torch.enable_grad():
            output = Returned.hidden(forward(run.hidden.clone()))
    except Exception:  # noqa: BLE001  a block that cannot be run in this way just loses no channels
        return {}
    readers = run.readers(output)
    found = {}
    for name, inputs in run.inputs.items():
        if linears[name].family:
            continue  # experts have one width for all, and several share a tensor
        width = linears[name].shape[1]
        channels = _of_mlp(inputs, run, width) or _of_heads(inputs, run, width, n_heads)
        if channels is not None and all(readers[part.name] == {name} for part in channels.producers):
            found[name] = channels
    return found


class _Run:
    """One forward pass in which every Linear returns random numbers."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden.detach().clone().requires_grad_()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(0)

    def values(self, shape: Sequence[int]) -> Tensor:
        """Random numbers from 0.5 to 1.5."""
        return torch.rand(tuple(shape), generator=self._random) + 0.5

    def stand_in(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """The forward pass of a Linear: remembers its input, and does not use it."""
        weight: Any = module.weight
        n_out = weight.shape[1 if isinstance(module, Conv1D) else 0]

        def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            # Positive numbers, because some activations have no slope elsewhere.
            values = self.values((*inputs.shape[:-1], n_out))
            self.inputs[name] = inputs
            self.outputs[name] = values.to(inputs).requires_grad_()
            return self.outputs[name].clone()

        return forward

    def readers(self, output: Tensor) -> dict[str, set[str]]:
        """The Linears that read each Linear's output; an empty name stands for the block's own output."""
        found: dict[str, set[str]] = {name: set() for name in self.outputs}
        leaves = list(self.outputs.values())
        for reader, tensor in {**self.inputs, "": output}.items():
            # Random, because slopes of a plain sum vanish behind a normalization.
            weights = self.values(tensor.shape).to(tensor)
            for name, slopes in zip(found, _slopes(tensor, leaves, weights), strict=True):
                if slopes.any():
                    found[name].add(reader)
        return found


def _of_mlp(inputs: Tensor, run: _Run, width: int) -> Channels | None:
    """Channels that are each computed by themselves, from one or several Linears; otherwise None."""
    leaves = [run.hidden, *run.outputs.values()]
    values = run.values([width])
    plain = _slopes(inputs, leaves, _last_token(inputs, values))
    if plain[0].any():
        return None
    producers = []
    for name, slopes, leaf in zip(run.outputs, plain[1:], leaves[1:], strict=True):
        if not slopes.any():
            continue
        channels = _channels(inputs, leaf, slopes, values)
        if channels is None:
            return None
        producers.append(Producer(name, channels))
    one_group = torch.zeros(width, dtype=torch.int64)
    return Channels("mlp", tuple(producers), torch.arange(width), one_group) if producers else None


def _of_heads(inputs: Tensor, run: _Run, width: int, n_heads: int) -> Channels | None:
    """Channels of query heads that lie one after another; None if the input is something else.

    A query head reads its own rows of the query projection, and those of the key and value head that it
    shares with its group. Where every query head has its own, these go with it.
    """
    if n_heads < 2 or width % n_heads:
        return None
    size = width // n_heads
    units = torch.arange(width) // size
    values = run.values([width])
    leaves = [run.hidden, *run.outputs.values()]
    read: list[list[Tensor]] = []
    for head in range(n_heads):
        read.append(_slopes(inputs, leaves, _last_token(inputs, values * (units == head))))
        if read[-1][0].any():
            return None
    own: list[tuple[str, list[int]]] = []
    shared: list[tuple[str, list[int]]] = []
    for place, (name, leaf) in enumerate(run.outputs.items(), start=1):
        rows = torch.stack([_rows(of_head[place]) for of_head in read])
        if rows.any():
            n = leaf.shape[-1] // size
            heads = _one_head_each(rows, size) if leaf.shape[-1] == n * size else None
            if heads is None or n > n_heads:
                return None
            (own if n == n_heads else shared).append((name, heads))
    own = [(name, heads) for name, heads in own if heads == list(range(n_heads))]
    groups = shared[0][1] if shared else [0] * n_heads
    alike = all(heads == groups for _, heads in shared)
    if not own or not alike or len({groups.count(group) for group in groups}) > 1:
        return None
    producers = tuple(Producer(name, torch.arange(width)) for name, _ in own)
    return Channels("heads", producers, units, torch.tensor(groups))


def _rows(slopes: Tensor) -> Tensor:
    """Outputs that have a slope at any token."""
    return slopes.reshape(-1, slopes.shape[-1]).any(dim=0).cpu()


def _one_head_each(rows: Tensor, size: int) -> list[int] | None:
    """For each query head, the only head among a Linear's outputs that it reads; None if it reads several.

    Args:
        rows: Which outputs each query head reads, bool [heads, out].
        size: Number of outputs of a head.
    """
    heads = rows.reshape(len(rows), -1, size).any(dim=2)
    return heads.int().argmax(dim=1).tolist() if (heads.sum(dim=1) == 1).all() else None


def _channels(inputs: Tensor, leaf: Tensor, plain: Tensor, values: Tensor) -> Tensor | None:
    """The input channel that each output affects; None if one affects several, another token or none.

    Channel numbers are read bit by bit: if all channels whose number has a bit count twice, the slope of an
    output doubles exactly if its channel does.
    """
    width = len(values)
    if plain[..., :-1, :].any() or not plain[..., -1, :].all() or leaf.shape[-1] % width:
        return None
    numbers = torch.arange(width)
    channels = torch.zeros(leaf.shape[-1], dtype=torch.int64)
    for bit in range((width - 1).bit_length()):
        has_bit = (numbers >> bit) & 1
        (slopes,) = _slopes(inputs, [leaf], _last_token(inputs, values * (1 + has_bit)))
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
    # Given as its last argument, the weights would have torch import sympy.
    total = (outputs * weights).sum()
    found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)
    ]
