"""How fast models generate text, in tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fedprllm.progress import Progress

__all__ = ["tokens_per_second"]

_REPEATS = 2
_PROMPT = 8  # tokens


def tokens_per_second(models: Mapping[str, Path], progress: Progress, n_tokens: int = 24) -> dict[str, float]:
    """Measure the generation of one text at a time.

    Args:
        models: Folders of models by name.
        progress: Notified of every repeat.
        n_tokens: Number of tokens to generate.

    Returns:
        The highest of a few measurements by name. Models take turns, so that other work on the machine
        affects all of them.
    """
    found = dict.fromkeys(models, 0.0)
    with _no_bars():
        loaded = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for name, folder in models.items()
        }
    with progress("timing", (1 + _REPEATS) * len(models)) as advance:
        for repeat in range(1 + _REPEATS):
            for name, model in loaded.items():
                rate = _rate(model, n_tokens)
                if repeat:  # the first one warms up
                    found[name] = max(found[name], rate)
                advance(1)
    return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing bars among ours."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _rate(model: Any, n_tokens: int) -> float:
    prompt = torch.arange(1, 1 + _PROMPT)[None]
    begin = time.perf_counter()
    model.generate(prompt, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return n_tokens / (time.perf_counter() - begin)
