"""The identity of a model: its tensors, its configuration and its tokenizer.

With a different ``rope_theta`` or a different tokenizer, the same tensors are pruned differently. A model is
therefore identified by a table of names and values: the SHA-256 of every tensor, every configuration entry
that can change a computation, and the SHA-256 of each part of its tokenizer.
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
# Entries that only say where a model came from, how it is stored or what it returns.
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
_LONGEST = 200  # characters; longer values are replaced by their digest


def model_identity(model: BlockwiseModel, progress: Progress = silent) -> dict[str, str]:
    """The table that identifies a model, by name; tensors come first, in model order.

    Raises:
        ModelError: A weight contains NaN or infinity; the message names it.
    """
    tensors = tensor_fingerprints(model, progress)
    return tensors | _config_entries(model.config.to_dict()) | tokenizer_fingerprints(model.folder)


def _config_entries(values: Mapping[str, Any], prefix: str = _CONFIG) -> dict[str, str]:
    """The entries of a configuration as JSON; entries of nested parts go by their full dotted name."""
    entries: dict[str, str] = {}
    for name in sorted(values):
        value = values[name]
        if name in _NO_COMPUTATION or value is None:
            continue
        if isinstance(value, Mapping):
            entries |= _config_entries(value, f"{prefix}{name}.")
            continue
        text = json.dumps(value, sort_keys=True, default=str)
        # Long values, such as a list with the type of every layer, are replaced by their digest.
        entries[f"{prefix}{name}"] = text if len(text) <= _LONGEST else _digest(text)
    return entries


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def describe_difference(name: str, expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Describe a difference between the expected model and the one found.

    Args:
        name: Name of the first difference (see `fedprllm.models.fingerprints.first_difference`).
        expected: Identity of the expected model.
        found: Identity of the model that was found.
    """
    theirs, ours = expected.get(name), found.get(name)
    if name.startswith(_CONFIG):
        return f"{entry_name(name)}: {_shown(ours)} here, {_shown(theirs)} there"
    if name.startswith("tokenizer"):
        part = name.partition(".")[2].replace("_", " ")
        missing = "none" in (theirs, ours)
        if missing:
            return "one of them has no tokenizer"
        return f"the tokenizers differ in their {part or 'form'}"
    if theirs is None or ours is None:
        return f"tensor '{name}' is only {'here' if theirs is None else 'there'}"
    return f"tensor '{name}' has different values"


def entry_name(name: str) -> str:
    """The name of an entry as it appears in the model's own files."""
    return name.removeprefix(_CONFIG)


def number_of(name: str, table: Mapping[str, str]) -> float | None:
    """The value of a configuration entry if it is a number; a site reports no other values to the server."""
    if not name.startswith(_CONFIG) or name not in table:
        return None
    try:
        value = json.loads(table[name])
    except json.JSONDecodeError:  # a digest
        return None
    return float(value) if isinstance(value, (int, float)) else None


def _shown(value: str | None) -> str:
    return "not set (another version of transformers?)" if value is None else value
