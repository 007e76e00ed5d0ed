"""Bounds that a model's normalizations impose on the inputs of its Linears.

An RMSNorm or LayerNorm of n channels computes ``x = gain * z + bias`` with ``sum_j z_j^2 <= n`` for each
token. The module that normalizes an input is found by observing a forward pass, and its gain and bias are
measured by calling it, so nothing depends on the architecture or on how it stores the gain (``w`` or
``1 + w``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedprllm.models.block import Linear

__all__ = ["InputNorm", "input_norms", "watching_norms"]

_SCALE = 64.0  # large enough that the epsilon in a norm's denominator does not matter
_SEED = 0
# Rounding to bfloat16, the coarsest precision of a forward pass, changes a sum of squares by less than this.
_ROUNDING = 1.05


@dataclass(frozen=True)
class InputNorm:
    """A normalization: ``x = gain * z + bias`` with ``sum_j z_j^2 <= n``.

    Attributes:
        gain: Gain of each channel, float64.
        bias: Bias of each channel, float64; zeros for an RMSNorm.
    """

    gain: Float[Tensor, " in"]
    bias: Float[Tensor, " in"]

    @property
    def _size(self) -> Tensor:
        """Absolute gain, at least a thousandth of the largest: rounding dominates quotients below that."""
        size = self.gain.abs()
        return size.clamp(min=1e-3 * float(size.max()))

    def energy(self, per_token: Float[Tensor, " in"]) -> float:
        """``sum_j x_j^2 / gain_j^2``, given ``x_j^2`` averaged over tokens."""
        return float((per_token / self._size.square()).sum())

    @property
    def most_energy(self) -> float:
        """Upper bound on `energy` for any text: ``(sqrt(n) + |bias / gain|_2)^2`` (triangle inequality)."""
        most = math.sqrt(len(self.gain)) + float((self.bias / self._size).norm())
        return _ROUNDING * most**2


@contextmanager
def watching_norms(block: nn.Module, linears: Mapping[str, Linear]) -> Iterator[dict[str, nn.Module]]:
    """Find the module that produces each Linear's input in the forward pass inside the ``with`` block.

    Args:
        block: The block.
        linears: Its Linears, by the names of their weights.

    Yields:
        A dictionary, filled during the pass, from the name of a Linear's weight to the module. `input_norms`
        determines whether the module is a normalization.
    """
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    found: dict[str, nn.Module] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Outputs are kept alive so that no later tensor can have the same address.
        if len(args) == 1 and isinstance(output, Tensor):
            outputs.setdefault(output.data_ptr(), (module, output, output._version))

    def look_up(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001  torch's signature
            if args[0].data_ptr() in outputs:
                behind, output, version = outputs[args[0].data_ptr()]
                if output.shape[-1] == args[0].shape[-1] and output._version == version:
                    found[name] = behind

        return look

    own = {id(linear.module) for linear in linears.values()}
    with ExitStack() as stack:
        for module in block.modules():
            if id(module) not in own and not list(module.children()):
                stack.callback(module.register_forward_hook(remember).remove)
        for name, linear in linears.items():
            stack.callback(linear.module.register_forward_pre_hook(look_up(name)).remove)
        yield found


def input_norms(linears: Mapping[str, Linear]) -> dict[str, InputNorm]:
    """Measure the normalizations of a block's distinct inputs.

    Args:
        linears: Linears of the block, whose normalizations must have their weights in memory.

    Returns:
        The normalization of each distinct input that has one, by the name of the first Linear that reads it.
    """
    measured = {
        name: _measure(linear.norm, linear.shape[1])
        for name, linear in linears.items()
        if linear.norm is not None and linear.source == name
    }
    return {name: norm for name, norm in measured.items() if norm is not None}


@torch.no_grad()
def _measure(module: nn.Module, width: int) -> InputNorm | None:
    """Measure a module's gain and bias; None if it is not a normalization.

    An input that alternates between two values, with mean 0 and mean square 1, is its own normalization: the
    module maps it to ``gain * x + bias``, and its negative to ``-gain * x + bias``.
    """
    if width < 2:
        return None
    ones = torch.ones(width, dtype=torch.float64)
    ones[1::2] = -1
    unit = (ones - ones.mean()) / ones.std(correction=0)
    up, down = _call(module, _SCALE * unit), _call(module, -_SCALE * unit)
    norm = InputNorm((up - down) / 2 / unit, (up + down) / 2)
    return norm if _normalizes(module, norm) else None


def _normalizes(module: nn.Module, norm: InputNorm) -> bool:
    """Whether the output's energy stays within the bound for inputs of very different sizes."""
    if not (torch.isfinite(norm.gain).all() and torch.isfinite(norm.bias).all() and norm.gain.any()):
        return False
    generator = torch.Generator().manual_seed(_SEED)
    tried = torch.randn(4, len(norm.gain), generator=generator, dtype=torch.float64)
    sizes = torch.tensor([[0.1], [1.0], [100.0], [1000.0]], dtype=torch.float64)
    outputs = [_call(module, row) for row in tried * sizes + sizes]
    return all(norm.energy(output.square()) <= norm.most_energy for output in outputs)


def _call(module: nn.Module, values: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    like = next(iter(module.parameters()), torch.empty(0))
    output: Tensor = module(values.to(like)[None, None])
    return output.flatten().cpu().to(torch.float64)
