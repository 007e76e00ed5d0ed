"""A transformers model that a program holds in memory, as a folder that can be read block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprllm.errors import ModelError

__all__ = ["model_folder", "source_name"]


@contextmanager
def model_folder(model: Any, tokenizer: Any = None) -> Iterator[str | Path]:
    """Where to read a model from, as long as the ``with`` block lasts.

    Args:
        model: Hub id, local folder or GGUF file, which are returned as they are; or a transformers model,
            which is written to a temporary folder.
        tokenizer: Of a transformers model; needed where text is to be tokenized.

    Raises:
        ModelError: ``model`` is of another type, or a tokenizer was given for a model that has its own.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise ModelError(
                f"a tokenizer was given for the model {model}, which brings its own: leave the tokenizer out"
            )
        yield model
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "a model must be a hub id, a path, or a transformers PreTrainedModel, found "
            f"{type(model).__name__}"
        )
    with tempfile.TemporaryDirectory(prefix="fedprllm-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        yield folder


def source_name(model: Any) -> str:
    """What a record calls a model: the user's word for it, or the name that a model object carries."""
    if isinstance(model, (str, Path)):
        return str(model)
    return str(getattr(model, "name_or_path", "")) or type(model).__name__
