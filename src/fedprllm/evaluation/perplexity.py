"""Perplexity by the standard protocol of the pruning literature, computed block by block.

Documents are joined by blank lines, tokenized and cut into non-overlapping windows; perplexity is
``exp(mean negative log-likelihood of each window's tokens 1..)`` over all windows (Frantar & Alistarh 2023,
Sun et al. 2023). One detail differs: if the tokenizer adds a beginning-of-sequence token, every window starts
with one, because some models (Gemma) fail without it; ``bos="start"`` restores the literature's protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, DataError, ModelError
from fedprllm.evaluation.results import Perplexity
from fedprllm.models.block import UNCHANGED, Block, Weights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.progress import Progress, silent
from fedprllm.text.documents import say_left_out
from fedprllm.text.sources import Source, named_sources
from fedprllm.text.windows import Bos, evaluation_windows

__all__ = [
    "Perplexity",
    "evaluate",
    "losses_by_text",
    "perplexities",
    "perplexities_of",
    "window_length_for",
    "window_losses",
]

DEFAULT_WINDOW_LENGTH = 2048


def window_length_for(model: BlockwiseModel, asked: int | None) -> int:
    """The requested window length or, by default, 2048 tokens or the model's limit if that is lower.

    Args:
        model: The model.
        asked: Requested window length in tokens; None for the default.

    Raises:
        DataError: The requested window length exceeds the model's limit.
    """
    limit = model.max_window_length
    if asked is None:
        return min(DEFAULT_WINDOW_LENGTH, limit or DEFAULT_WINDOW_LENGTH)
    if limit is not None and asked > limit:
        raise DataError(
            f"window length {asked} exceeds the model's limit of {limit} tokens: choose {limit} or less"
        )
    return asked


def window_losses(
    model: BlockwiseModel,
    windows: Sequence[Int[Tensor, " tokens"]],
    progress: Progress = silent,
    weights_of: Callable[[Block], Weights] = lambda _: UNCHANGED,
) -> list[float]:
    """Negative log-likelihood of each window in nats: the sum over its tokens but the first.

    Args:
        model: The model.
        windows: Token windows.
        progress: Notified of every window and block.
        weights_of: As in `perplexities`.
    """
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
    return losses


def perplexities(
    model: BlockwiseModel,
    texts: Mapping[str, Sequence[Int[Tensor, " tokens"]]],
    progress: Progress = silent,
    weights_of: Callable[[Block], Weights] = lambda _: UNCHANGED,
) -> list[Perplexity]:
    """Compute the perplexity of a model on several texts in one walk over its blocks.

    Args:
        model: The model.
        texts: Token windows by name of the text.
        progress: Notified of every window and block.
        weights_of: Returns the weights that replace a block's own, by name, so that a pruned model can be
            measured without being written.

    Raises:
        ModelError: A loss is not finite.
    """
    return perplexities_of(model, texts, losses_by_text(model, texts, progress, weights_of))


def losses_by_text(
    model: BlockwiseModel,
    texts: Mapping[str, Sequence[Int[Tensor, " tokens"]]],
    progress: Progress = silent,
    weights_of: Callable[[Block], Weights] = lambda _: UNCHANGED,
) -> dict[str, list[float]]:
    """As `window_losses`, for several texts in one walk over the blocks."""
    windows = [window for text in texts.values() for window in text]
    losses = iter(window_losses(model, windows, progress, weights_of))
    return {name: list(islice(losses, len(text))) for name, text in texts.items()}


def perplexities_of(
    model: BlockwiseModel,
    texts: Mapping[str, Sequence[Int[Tensor, " tokens"]]],
    losses: Mapping[str, Sequence[float]],
) -> list[Perplexity]:
    """The perplexities that follow from the losses of every text's windows.

    Raises:
        ModelError: A loss is not finite.
    """
    results = []
    for name, text in texts.items():
        n_tokens = sum(len(window) - 1 for window in text)
        nll = math.fsum(losses[name]) / n_tokens
        if not math.isfinite(nll):
            raise ModelError(
                f"the loss on '{name}' is {nll}: numbers beyond the range of {str(model.dtype)[6:]} arose on "
                "the way. Compute in bfloat16 or float32 (--dtype); if it is the same there, the weights are "
                "damaged"
            )
        # exp overflows a float above 709.78.
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
    """Evaluate the perplexity of a model on each text.

    Args:
        model: Hub id, local folder or GGUF file.
        texts: One path, or several (see `fedprllm.text.documents.read_documents`), optionally by name.
        window_length: Tokens per window; by default 2048 or the model's limit if that is lower.
        max_tokens: Maximum number of tokens to evaluate in each text; all by default.
        bos: Where to put a beginning-of-sequence token.
        dtype: Precision of the forward pass.
        device: Device to compute on.
        progress: Notified of every window and block.

    Raises:
        ConfigError: An option has an unknown value.
        DataError: A text cannot be used, or none is given.
        ModelError: The model cannot be used.
    """
    window_length = PruneConfig(
        dtype=dtype, device=device, bos=bos, window_length=window_length
    ).window_length
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 2):
        raise ConfigError(f"max_tokens must be an integer of at least 2, found {max_tokens!r}")
    named = named_sources(texts)
    if not named:
        raise DataError("no text to evaluate on: expected at least one text file")
    folder = resolve_model(model, progress=progress)
    walked = BlockwiseModel(folder, dtype, device)
    tokenizer = load_tokenizer(folder)
    length = window_length_for(walked, window_length)
    say_left_out([source for sources in named.values() for source in sources])
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
