"""Layers beyond the last block that predict further tokens (multi-token prediction).

DeepSeek-V3, GLM-4.5 and others are published with such a layer, a block with experts of its own that
transformers does not load. Where weights are set to zero, it is kept bit by bit. Where blocks or experts are
removed, it would have more experts than the configuration says, or the number of a block that is gone, and
programs that load it would refuse the model; it is left out, and the configuration says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedprllm.models.guards import stored_prefix

if TYPE_CHECKING:
    from fedprllm.models.blockwise import BlockwiseModel

__all__ = ["further_layers", "note_on_further_layers", "without_further_layers"]

_NAMED = re.compile(r"(?:^|\.)(?:mtp|nextn)")
_ENTRY = re.compile(r"(?:^|_)(?:mtp|nextn)(?:_|$)")


def further_layers(model: BlockwiseModel) -> list[str]:
    """Names, as the files have them, of the tensors of layers that predict further tokens."""
    prefix = re.escape(stored_prefix(model.checkpoint, model.block_names[0]))

    def is_further(name: str) -> bool:
        numbered = re.match(rf"{prefix}\.(\d+)\.", name)
        return bool(_NAMED.search(name)) or (numbered is not None and int(numbered[1]) >= model.n_blocks)

    return [name for name in model.checkpoint.unknown if is_further(name)]


def without_further_layers(model: BlockwiseModel, content: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that counts no such layers, if the files have any; otherwise as it is."""
    return _without(content) if further_layers(model) else dict(content)


def _without(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _changed(name, value) for name, value in content.items()}


def _changed(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _without(value)
    if not _ENTRY.search(name):
        return value
    if isinstance(value, bool):
        return False
    return 0 if isinstance(value, int) and "num" in name else value


def note_on_further_layers(model: BlockwiseModel) -> list[str]:
    """A sentence for the record of a run that removes blocks or experts; nothing without such layers."""
    names = further_layers(model)
    if not names:
        return []
    return [
        f"left out of the pruned model, because they would not fit it: {len(names)} tensors of layers that "
        f"predict further tokens ('{names[0]}' is the first)"
    ]
