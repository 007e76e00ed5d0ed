"""Mixtures of experts: fused tensors of all experts taken apart into one Linear for each matrix.

Newer versions of transformers keep the weights of all experts of a block in two tensors, ``gate_up_proj`` and
``down_proj``, in classes marked with ``use_experts_implementation``. The mark promises one way of computing
(`transformers.integrations.moe`), so such a module can be given Linears of its own on the model without
weights, whatever the architecture. `fedprllm.models.names` says where their weights are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedprllm.core.sums import ExpertStatistics
from fedprllm.models.empty import LeaveEmpty

__all__ = [
    "FusedTensor",
    "UnfusedExperts",
    "fused_shapes",
    "fused_tensors",
    "observing_experts",
    "reaching_all_experts",
    "unfuse",
]

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class FusedTensor:
    """A tensor that holds one matrix, or two, or their biases, of every expert.

    Attributes:
        shape: Its shape; the first dimension counts experts.
        parts: Names of the Linears of an expert whose weights it holds: gate and up, or a single one.
        is_bias: Whether it holds biases.
        interleaved: Whether rows of gate and up alternate, instead of all rows of the gate coming first.
        transposed: Whether the matrices are stored as [in, out].
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    is_bias: bool
    interleaved: bool
    transposed: bool


class UnfusedExperts(nn.Module):
    """Experts with Linears of their own: ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj``.

    It is mixed into the class of a fused module, whose activation it calls (`unfuse`).

    Attributes:
        fused: The tensors that were taken apart, by name.
        n_experts: Number of experts.
        reaches_all: Whether every expert computes for every token, whatever the router says.
        n_groups: Number of groups of consecutive experts among which the router chooses first.
        n_chosen: Number of experts that the router chose for each token of the last forward pass.
        statistics: Sums to which what each expert adds to its tokens is added; None to add up nothing.
    """

    fused: dict[str, FusedTensor]
    n_experts: int
    reaches_all: bool
    n_groups: int = 1
    n_chosen: int = 0
    statistics: ExpertStatistics | None = None

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of the outputs of the experts that the router chose for each token."""
        output = torch.zeros_like(hidden_states)
        self.n_chosen = top_k_index.shape[-1]
        for number in range(self.n_experts):
            tokens, places = self._chosen(number, top_k_index)
            if len(tokens):
                result = self._expert(number, hidden_states[tokens])
                weights = top_k_weights[tokens, places]
                if self.statistics is not None:
                    self.statistics.add(number, result, weights)
                result = result * weights[:, None]
                output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def _chosen(self, number: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        if self.reaches_all:
            tokens = torch.arange(len(top_k_index), device=top_k_index.device)
            return tokens, torch.zeros_like(tokens)
        tokens, places = (top_k_index == number).nonzero(as_tuple=True)
        return tokens, places

    def _expert(self, number: int, inputs: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        own: Any = self
        if own.has_gate:
            gate, up = expert.gate_proj(inputs), expert.up_proj(inputs)
            both = torch.stack([gate, up], -2 if own.is_concatenated else -1).flatten(-2)
            inner = own._apply_gate(both)
        else:
            inner = own.act_fn(expert.up_proj(inputs))
        output: Tensor = expert.down_proj(inner)
        return own.post_expert_norm(output) if getattr(own, "has_post_expert_norm", False) else output


def unfuse(model: nn.Module) -> None:
    """Take apart all fused experts of a model without weights, in place."""
    n_groups = _n_groups(model)
    for module in list(model.modules()):
        tensors = fused_tensors(module)
        if tensors:
            _unfuse(module, tensors, n_groups)


def _n_groups(model: Any) -> int:
    """Number of groups of experts (DeepSeek's ``n_group``); 1 if the configuration has no such entry."""
    found = getattr(model.config.get_text_config(), "n_group", None)
    return found if isinstance(found, int) and found > 0 else 1


def fused_tensors(module: Any) -> dict[str, FusedTensor]:
    """The tensors of a marked module that hold all its experts; empty for any other module."""
    if isinstance(module, UnfusedExperts) or not all(hasattr(module, mark) for mark in _MARKS):
        return {}
    first = "gate_up_proj" if module.has_gate else "up_proj"
    expected = {first, "down_proj"}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in (first, "down_proj")}
    found = {name: p for name, p in module._parameters.items() if name in expected and p is not None}
    if found.keys() != expected or any(found[name].ndim != 3 for name in (first, "down_proj")):
        return {}
    return {name: _described(module, name, tuple(tensor.shape)) for name, tensor in found.items()}


def _described(module: Any, name: str, shape: tuple[int, ...]) -> FusedTensor:
    base = name.removesuffix("_bias")
    parts = ("gate_proj", "up_proj") if base == "gate_up_proj" else (base,)
    interleaved = len(parts) > 1 and not module.is_concatenated
    return FusedTensor(shape, parts, base != name, interleaved, module.is_transposed)


def _unfuse(module: Any, tensors: dict[str, FusedTensor], n_groups: int) -> None:
    dtype = module.down_proj.dtype
    for name in tensors:
        del module._parameters[name]
    module.__class__ = _mixed(module.__class__)
    module.fused, module.n_experts = tensors, tensors["down_proj"].shape[0]
    module.reaches_all, module.n_groups = False, n_groups
    with LeaveEmpty():
        for number in range(module.n_experts):
            expert = nn.Module()
            for tensor in tensors.values():
                if not tensor.is_bias:
                    _add_linears(expert, tensor, bias=module.has_bias, dtype=dtype)
            module.add_module(str(number), expert)


def _add_linears(expert: nn.Module, tensor: FusedTensor, *, bias: bool, dtype: torch.dtype) -> None:
    n_out, n_in = tensor.shape[:0:-1] if tensor.transposed else tensor.shape[1:]
    for part in tensor.parts:
        linear = nn.Linear(n_in, n_out // len(tensor.parts), bias=bias, dtype=dtype, device="meta")
        expert.add_module(part, linear)


@cache
def _mixed(original: Any) -> type[nn.Module]:
    """The class of a fused module with the forward pass of `UnfusedExperts`."""
    return type(f"Unfused{original.__name__}", (UnfusedExperts, original), {})


def fused_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model as transformers knows it, with its experts fused, by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            numbers = tuple(f"{path}.{number}." for number in range(module.n_experts))
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(numbers)}
            shapes |= {f"{path}.{name}": tensor.shape for name, tensor in module.fused.items()}
    return shapes


@contextmanager
def observing_experts(experts: UnfusedExperts, statistics: ExpertStatistics) -> Iterator[None]:
    """Add what each expert adds to its tokens to statistics inside the ``with`` block."""
    experts.statistics = statistics
    try:
        yield
    finally:
        experts.statistics = None


@contextmanager
def reaching_all_experts(module: nn.Module) -> Iterator[None]:
    """Let every expert compute for every token inside the ``with`` block, each on a copy of its own.

    What a Linear reads can then be observed without the choices of a router.
    """
    parts = [part for part in module.modules() if isinstance(part, UnfusedExperts)]
    try:
        for part in parts:
            part.reaches_all = True
        yield
    finally:
        for part in parts:
            part.reaches_all = False
