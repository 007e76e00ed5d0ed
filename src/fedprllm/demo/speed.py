"""How fast models generate text, measured so that it also holds on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["tokens_per_second"]

_PROMPT, _GENERATED = 8, 24
_REPEATS = 3


def tokens_per_second(models: Mapping[str, Path]) -> dict[str, float]:
    """Tokens that each model generates in a second of one thread, one by one; the models take turns.

    The time is that of the processor, so that other work on the machine hardly counts.

    Args:
        models: Folders of models by name. All are in memory at once.
    """
    n_threads = torch.get_num_threads()
    # Threads that wait for each other would count as work.
    torch.set_num_threads(1)
    try:
        opened = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for name, folder in models.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        for repeat in range(_REPEATS + 1):
            for name, model in opened.items():
                taken = _generate(model)
                if repeat:  # the first one warms up
                    seconds[name].append(taken)
    finally:
        torch.set_num_threads(n_threads)
    return {name: _GENERATED / median(each) for name, each in seconds.items()}


@torch.no_grad()
def _generate(model: Any) -> float:
    """Processor time of generating some tokens, in seconds."""
    prompt = torch.arange(_PROMPT)[None]
    start = time.process_time()
    model.generate(
        prompt, max_new_tokens=_GENERATED, min_new_tokens=_GENERATED, do_sample=False, pad_token_id=0
    )
    return time.process_time() - start
