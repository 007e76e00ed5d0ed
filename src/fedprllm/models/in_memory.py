"""Turn a transformers model in memory into a folder that can be read block by block."""

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
    """Provide a place to read a model from for the duration of the ``with`` block.

    Args:
        model: Hub id, local folder or GGUF file, which is yielded as it is; or a transformers model, which is
            written to a temporary folder.
        tokenizer: Tokenizer of a transformers model; required to tokenize text.

    Raises:
        ModelError: ``model`` has another type, or a tokenizer was given for a model that has its own.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise ModelError(
                f"a tokenizer was given for the model {model}, which comes with its own: "
                "leave the tokenizer out"
            )
        yield model
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "the model must be a hub id, a path or a transformers PreTrainedModel, found "
            f"{type(model).__name__}"
        )
    with tempfile.TemporaryDirectory(prefix="fedprllm-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        yield folder


def source_name(model: Any) -> str:
    """Name of a model in records: the hub id or path as given, or the name stored in the model object."""
    if isinstance(model, (str, Path)):
        return str(model)
    return str(getattr(model, "name_or_path", "")) or type(model).__name__
