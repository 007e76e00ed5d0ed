"""Collect statistics of the inputs of a block's Linears during its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fedprllm.core.sums import GramStatistics, InputStatistics
from fedprllm.models.block import Block, Hidden

__all__ = ["BlockStatistics", "Observation", "inputs_shared", "observing", "tokens_of_experts"]

# Statistics of the input of each Linear of a block, by weight name. Linears that read the same tensor (query,
# key and value; gate and up) share one object.
BlockStatistics = dict[str, InputStatistics | GramStatistics]
# Makes empty statistics for an input with the given number of channels.
Observation = Callable[[int], InputStatistics | GramStatistics]


@contextmanager
def observing(
    block: Block, statistics: BlockStatistics, observation: Observation = InputStatistics.zeros
) -> Iterator[None]:
    """Add the inputs of every Linear that runs inside the ``with`` block to its statistics."""
    last_input: Tensor | None = None
    last_name = ""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001  torch's signature
            nonlocal last_input, last_name
            inputs = args[0]
            if inputs is last_input:
                # The previous Linear read the same tensor and has already counted it.
                statistics[name] = statistics[last_name]
                return
            if name not in statistics:
                statistics[name] = observation(inputs.shape[-1])
            statistics[name].add(inputs)
            last_input, last_name = inputs, name

        return add

    with ExitStack() as stack:
        for name, linear in block.linears.items():
            hook: Any = linear.module.register_forward_pre_hook(watch(name))
            stack.callback(hook.remove)
        yield


def tokens_of_experts(block: Block, statistics: BlockStatistics) -> list[int]:
    """Number of tokens that reached each expert of a block; empty if it has none."""
    tokens: dict[str, int] = {}
    for name, linear in block.linears.items():
        if linear.family:
            experts, _, matrix = linear.family.partition("*")
            expert = name.removeprefix(experts).removesuffix(matrix)
            tokens[f"{experts}{expert}"] = statistics[name].n_tokens
    return list(tokens.values())


def inputs_shared(block: Block, hidden: Hidden) -> dict[str, str]:
    """Map the path of each Linear to the path of the first Linear that receives the same tensor.

    A Linear that shares its input with no earlier one, or takes no part in the forward pass, maps to itself.
    """
    statistics: BlockStatistics = {}
    with observing(block, statistics):
        block.forward(hidden)
    first: dict[int, str] = {}
    return {
        linear.path: first.setdefault(id(statistics[name]), linear.path)
        if name in statistics
        else linear.path
        for name, linear in block.linears.items()
    }
