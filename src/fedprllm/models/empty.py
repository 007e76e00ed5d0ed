"""Building a model without weights, quickly."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["LeaveEmpty"]

# By name: transformers replaces the functions of `torch.nn.init` while it initializes a model.
_RANDOM = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_"}


class LeaveEmpty(TorchFunctionMode):
    """Skips random initialization of tensors that have no memory.

    It would take most of the time of building a model, and its result does not exist.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if getattr(function, "__name__", "") in _RANDOM:
            tensor = args[0] if args else options["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **options)
