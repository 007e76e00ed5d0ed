"""Calls into transformers and the hub's client: without their messages, and their errors in one line."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

__all__ = ["quiet", "reason", "some_of"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' messages, warnings and progress bars."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    levels = [(logging, logging.get_verbosity()) for logging in (hub, transformers)]
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        # The progress bar over the tensors of a GGUF file ignores transformers' setting for progress bars.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)


def reason(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first.rstrip('.')}"


def some_of(names: list[str]) -> str:
    """The first five names, and the number of the others."""
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
