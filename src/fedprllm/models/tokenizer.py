"""Load and fingerprint the tokenizer of a model folder."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError

__all__ = ["load_tokenizer", "tokenizer_fingerprints"]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; code in the folder is never run.

    Raises:
        ModelError: The folder has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:  # of a missing file too
        if (folder / "tokenizer.model").exists() and find_spec("sentencepiece") is None:
            raise ModelError(
                f"{folder / 'tokenizer.model'} needs the package sentencepiece: pip install sentencepiece"
            ) from None
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder} has no usable tokenizer ({words}): text needs one. Add its files "
            "to the folder, or pass token windows from Python instead of text"
        ) from None


def tokenizer_fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of each part of a tokenizer that affects its token ids, by name.

    A folder without a tokenizer has a single part, ``tokenizer``, with the value ``none``.
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
        # Truncation and padding are left out because the caller sets them.
        steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
        parts["tokenizer.rules"] = {name: rules.get(name) for name in steps}
    return {name: _digest(value) for name, value in parts.items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
