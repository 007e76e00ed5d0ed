"""Find a model's decoder blocks and their Linears, whatever the architecture calls them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedprllm.errors import ModelError
from fedprllm.models.block import Linear

__all__ = ["find_blocks", "find_linears"]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def find_blocks(skeleton: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Find the outermost module list with the most parameters in which every module contains Linears.

    Returns:
        The name of the list and its modules.

    Raises:
        ModelError: The model has no such list.
    """
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in skeleton.named_modules():
        if not isinstance(module, nn.ModuleList) or (best[1] and name.startswith(f"{best[1]}.")):
            continue
        if len(module) and all(any(map(_is_linear, block.modules())) for block in module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = (size, name, list(module))
    if not best[2]:
        raise ModelError(
            f"{type(skeleton).__name__} has no decoder blocks: expected a list of modules that contain "
            "Linear layers; use another model"
        )
    return best[1], best[2]


def find_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """Every Linear of a block by the name of its weight; ``source`` is still each Linear's own name."""
    linears = {}
    for path, module in block.named_modules():
        if _is_linear(module):
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.T.shape if transposed else module.weight.shape)
            name = f"{prefix}.{path}.weight"
            linears[name] = Linear(
                name, path, (shape[0], shape[1]), transposed, module.weight.dtype, name, module
            )
    return linears
