"""Perplexity by the protocol of the literature, block by block like everything else.

Documents are joined by blank lines, tokenised and cut into non-overlapping windows; perplexity is
``exp(mean negative log-likelihood of each window's tokens 1..)`` over all windows (Frantar & Alistarh 2023,
Sun et al. 2023). It differs in one point: a tokenizer that adds a beginning-of-sequence token gets one in
every window, because some models (Gemma) fail without it; ``bos="start"`` is the literature's way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from fedprllm.errors import DataError, ModelError
from fedprllm.evaluation.results import Perplexity
from fedprllm.models.block import UNCHANGED, Block, Weights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.progress import Progress, silent
from fedprllm.text.sources import Source, named_sources
from fedprllm.text.windows import Bos, evaluation_windows

__all__ = ["Perplexity", "evaluate", "load_tokenizer", "perplexities", "window_length_for"]

DEFAULT_WINDOW_LENGTH = 2048


def window_length_for(model: BlockwiseModel, asked: int | None) -> int:
    """The asked window length, or 2048 tokens, or less if the model takes less.

    Raises:
        DataError: more tokens are asked for than the model takes.
    """
    limit = model.max_window_length
    if asked is None:
        return min(DEFAULT_WINDOW_LENGTH, limit or DEFAULT_WINDOW_LENGTH)
    if limit is not None and asked > limit:
        raise DataError(f"window length {asked} exceeds the {limit} tokens the model takes at most")
    return asked


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} has no usable tokenizer ({str(error).splitlines()[0]}): text needs one; give token "
            "windows from Python instead"
        ) from None


def perplexities(
    model: BlockwiseModel,
    texts: Mapping[str, Sequence[Int[Tensor, " tokens"]]],
    progress: Progress = silent,
    weights_of: Callable[[Block], Weights] = lambda _: UNCHANGED,
) -> list[Perplexity]:
    """Perplexity of a model on several texts, in one walk over its blocks.

    Args:
        model: the model.
        texts: token windows by name of the text.
        progress: told of every window and block.
        weights_of: weights to take in place of the model's own, by name: a pruned model need not be written
            to be measured.
    """
    windows = [window for text in texts.values() for window in text]
    with progress("evaluating", model.n_blocks * len(windows) + len(windows)) as advance:
        hidden = list(model.embed(windows))
        for index in range(model.n_blocks):
            with model.block(index) as block, block.replaced(weights_of(block)):
                for number, state in enumerate(hidden):
                    hidden[number] = block.forward(state)
                    advance(1)
        losses = []
        with model.head():
            for state, window in zip(hidden, windows, strict=True):
                losses.append(model.token_losses(state, window).double().sum().item())
                advance(1)
    results, first = [], 0
    for name, text in texts.items():
        n_tokens = sum(len(window) - 1 for window in text)
        nll = math.fsum(losses[first : first + len(text)]) / n_tokens
        first += len(text)
        # 709.78 is where exp leaves the range of a float.
        perplexity = math.exp(nll) if nll < 709 else math.inf
        results.append(
            Perplexity(text=name, perplexity=perplexity, nll=nll, n_tokens=n_tokens, n_windows=len(text))
        )
    return results


def evaluate(
    model: str | Path,
    texts: Source | Sequence[Source] | Mapping[str, Source],
    *,
    window_length: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Perplexity]:
    """Perplexity of a model on each text.

    Args:
        model: hub id, local folder or GGUF file.
        texts: one path, or several (see `fedprllm.text.documents.read_documents`), named or not.
        window_length: tokens per window; 2048 or the model's limit by default.
        max_tokens: evaluate at most this many tokens of each text.
        bos: where to put a beginning-of-sequence token.
        dtype: precision of the forward pass.
        device: where to compute.
        progress: told of every window and block.

    Raises:
        DataError, ModelError: a text or the model cannot be used.
    """
    named = named_sources(texts)
    if not named:
        raise DataError("no text to evaluate on: give at least one")
    folder = resolve_model(model, progress=progress)
    walked = BlockwiseModel(folder, dtype, device)
    tokenizer = load_tokenizer(folder)
    length = window_length_for(walked, window_length)
    windows = {
        name: evaluation_windows(
            sources,
            tokenizer,
            window_length=length,
            bos=bos,
            max_tokens=max_tokens,
            vocabulary_size=walked.vocabulary_size,
        )
        for name, sources in named.items()
    }
    return perplexities(walked, windows, progress)
