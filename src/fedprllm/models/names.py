"""Names of tensors: as the files of a checkpoint have them, and as the transformers model has them.

Newer versions of transformers rename tensors while they load them (GPT-NeoX's ``embed_out.weight`` becomes
``lm_head.weight``). The headers of the files are enough to apply the same renaming, so a checkpoint is read
in place, and what is written has the names that every version knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedprllm.errors import ModelError

__all__ = ["stored_names"]


def stored_names(skeleton: Any, keys: Iterable[str]) -> dict[str, str]:
    """Map the names in a model's state dict to the names in the files, as far as only names differ.

    Tensors that transformers computes from several stored ones, or from a part of one, are left out.

    Args:
        skeleton: The transformers model, with or without weights.
        keys: Names in the files.

    Raises:
        ModelError: Two stored tensors belong to the same tensor of the model.
    """
    state = skeleton.state_dict()
    rename = _Renaming(skeleton, state)
    found: dict[str, str] = {}
    for key in sorted(keys):
        name = rename(key)
        if name is None:
            continue
        if name in found:
            raise ModelError(
                f"the checkpoint stores two tensors, '{found[name]}' and '{key}', for '{name}' of "
                f"{type(skeleton).__name__}: expected one; download the model again"
            )
        found[name] = key
    return found


class _Renaming:
    """The name that transformers gives to a stored tensor."""

    def __init__(self, skeleton: Any, state: dict[str, Any]) -> None:
        self._state, self._prefix = state, skeleton.base_model_prefix
        self._renamings, self._converters = _transforms(skeleton)

    def __call__(self, key: str) -> str | None:
        """The name in the state dict; None if the model has no such tensor or not in this form."""
        renamed = self._by_transformers(key)
        if renamed is not None:
            return renamed
        short = key.removeprefix(f"{self._prefix}.") if self._prefix else key
        full = f"{self._prefix}.{key}"
        return next((name for name in (key, full, short) if name in self._state), None)

    def _by_transformers(self, key: str) -> str | None:
        if not self._renamings and not self._converters:
            return None
        from transformers.core_model_loading import rename_source_key

        name, converter = rename_source_key(
            key, self._renamings, self._converters, self._prefix or None, self._state
        )
        return str(name) if converter is None and name in self._state else None


def _transforms(skeleton: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to names, and what it does to tensors; nothing in versions without either."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    transforms = get_model_conversion_mapping(skeleton)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    return [one for one in transforms if one not in converters], converters
