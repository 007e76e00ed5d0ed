"""The tokenizer of a model folder, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError

__all__ = ["load_tokenizer", "tokenizer_fingerprints"]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; code that the folder brings is never run.

    Raises:
        ModelError: The folder has none that can be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} has no usable tokenizer ({str(error).splitlines()[0]}), which text input requires: "
            "add one to the folder, or pass token windows from Python"
        ) from None


def tokenizer_fingerprints(folder: Path) -> dict[str, str]:
    """What makes two tokenizers give the same token ids: SHA-256 of its parts, by name.

    A folder without a tokenizer has the one part ``tokenizer`` with the value ``none``.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError:
        return {"tokenizer": "none"}
    parts: dict[str, Any] = {
        "tokenizer.vocabulary": sorted(tokenizer.get_vocab().items()),
        "tokenizer.special_tokens": {
            name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())
        },
    }
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are set by the caller.
        steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
        parts["tokenizer.rules"] = {name: rules.get(name) for name in steps}
    return {name: _digest(value) for name, value in parts.items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
