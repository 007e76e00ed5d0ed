"""Token windows that nobody has to share: written by the model itself, or random.

Calibration on text that the model writes follows Williams et al., "Self-calibration for language model
quantization and pruning" (2024): samples at temperature 1, each begun with nothing but the first token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from fedprllm.core.ties import generator
from fedprllm.files import save_tensors
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tokenizer import load_tokenizer

__all__ = ["generated_windows", "random_windows"]

Windows = Int[Tensor, "n_windows window_length"]
_BATCH = 16


def random_windows(model: BlockwiseModel, n_windows: int, length: int, seed: int) -> Windows:
    """Windows of random tokens, each as likely as any other."""
    size = _vocabulary(model)
    return torch.randint(size, (n_windows, length), generator=generator("random tokens", seed))


def generated_windows(model: BlockwiseModel, n_windows: int, length: int, seed: int, path: Path) -> Windows:
    """Windows that the model writes itself, at temperature 1.

    The whole model must fit into memory.

    Args:
        model: The model.
        n_windows: Number of windows.
        length: Tokens per window.
        seed: Seed of the samples.
        path: File in which they are kept for the next time; it is read if it exists.
    """
    if not path.exists():
        save_tensors(path, {"windows": _written(model, n_windows, length, seed)})
    return load_file(path)["windows"]


@torch.no_grad()
def _written(model: BlockwiseModel, n_windows: int, length: int, seed: int) -> Windows:
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype).to(model.device).eval()
    # An end-of-text token starts another text, and nothing of the model's own settings applies.
    first, size = load_tokenizer(model.folder).bos_token_id, _vocabulary(model)
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_length=length,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(range(size, model.vocabulary_size)) or None,
    )
    windows = []
    for start in range(0, n_windows, _BATCH):
        draw = generator("generated text", seed, start)
        n = min(_BATCH, n_windows - start)
        begun = torch.randint(size, (n, 1), generator=draw) if first is None else torch.full((n, 1), first)
        with torch.random.fork_rng():
            torch.manual_seed(draw.initial_seed())
            windows.append(whole.generate(begun.to(model.device), generation_config=plain).cpu())
    return torch.cat(windows)


def _vocabulary(model: BlockwiseModel) -> int:
    """Number of token ids that the tokenizer can give; the embedding may have more rows."""
    return min(model.vocabulary_size, len(load_tokenizer(model.folder)))
