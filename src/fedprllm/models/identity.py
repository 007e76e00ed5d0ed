"""What makes two copies of a model the same: its tensors, its configuration and its tokenizer.

Another ``rope_theta`` or another tokenizer prunes another model from the same tensors. So a model is
identified by a table of names and values: the SHA-256 of every tensor, every entry of the configuration that
can change a computation, and the SHA-256 of the parts of its tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import tensor_fingerprints
from fedprllm.models.tokenizer import tokenizer_fingerprints
from fedprllm.progress import Progress, silent

__all__ = ["describe_difference", "entry_name", "model_identity", "number_of"]

_CONFIG = "config."
# Entries that say where a model came from, how it is stored or how text is generated with it.
_NO_COMPUTATION = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "attn_implementation",
    "_attn_implementation",
}
_LONGEST = 200  # characters of a value that is kept as it is


def model_identity(model: BlockwiseModel, progress: Progress = silent) -> dict[str, str]:
    """The table that identifies a model, by name; tensors first, in the order of the model.

    Raises:
        ModelError: A weight is not finite (named).
    """
    tensors = tensor_fingerprints(model, progress)
    return tensors | _config_entries(model.config.to_dict()) | tokenizer_fingerprints(model.folder)


def _config_entries(values: Mapping[str, Any], prefix: str = _CONFIG) -> dict[str, str]:
    """Entries of a configuration as JSON, those of its parts under their full name."""
    entries: dict[str, str] = {}
    for name in sorted(values):
        value = values[name]
        if name in _NO_COMPUTATION or value is None:
            continue
        if isinstance(value, Mapping):
            entries |= _config_entries(value, f"{prefix}{name}.")
            continue
        text = json.dumps(value, sort_keys=True, default=str)
        # A long list, such as the kind of every layer, goes by its digest.
        entries[f"{prefix}{name}"] = text if len(text) <= _LONGEST else _digest(text)
    return entries


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def describe_difference(name: str, expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Say in words what differs between the model that was expected and the one that was found.

    Args:
        name: Name of the first difference (see `fedprllm.models.fingerprints.first_difference`).
        expected: Identity of the model that was expected.
        found: Identity of the one that was found.
    """
    theirs, ours = expected.get(name), found.get(name)
    if name.startswith(_CONFIG):
        return f"{entry_name(name)}: {_shown(ours)} here, {_shown(theirs)} there"
    if name.startswith("tokenizer"):
        part = name.partition(".")[2].replace("_", " ")
        missing = "none" in (theirs, ours)
        return "one of them has no tokenizer" if missing else f"the tokenizer has another {part or 'form'}"
    if theirs is None or ours is None:
        return f"tensor '{name}' is only {'here' if theirs is None else 'there'}"
    return f"tensor '{name}' has other values"


def entry_name(name: str) -> str:
    """The name of an entry as the model's own files have it."""
    return name.removeprefix(_CONFIG)


def number_of(name: str, table: Mapping[str, str]) -> float | None:
    """The value of an entry of the configuration if it is a number, which is all that a site tells of it."""
    if not name.startswith(_CONFIG) or name not in table:
        return None
    try:
        value = json.loads(table[name])
    except json.JSONDecodeError:  # a digest
        return None
    return float(value) if isinstance(value, (int, float)) else None


def _shown(value: str | None) -> str:
    return "not set (another version of transformers?)" if value is None else value
