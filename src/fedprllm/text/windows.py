"""From text to token windows.

Documents are joined by blank lines and cut. Token ids are int64; a window is a row of ``window_length`` of
them. How windows are chosen: docs/method.md, "How calibration windows are chosen".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fedprllm.core.ties import generator
from fedprllm.errors import ConfigError, DataError, did_you_mean
from fedprllm.text.documents import Part, joined, parts_of
from fedprllm.text.encoding import Encoder, Tokenizer, adds_bos
from fedprllm.text.sampling import SMALL, draw_units, read_at_most
from fedprllm.text.sources import Source, describe

__all__ = ["Bos", "Tokenizer", "adds_bos", "evaluation_windows", "fingerprint", "token_windows"]

Bos = Literal["auto", "every", "start", "never"]
_SEPARATOR = "\n\n"
_READ_PER_TOKEN = 16  # characters that are held for every token asked for
_UNIT_PER_TOKEN = 8  # characters of a piece of a long document for every token of a window


def token_windows(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    n_windows: int,
    window_length: int,
    seed: int,
    bos: Bos,
    vocabulary_size: int | None = None,
    none_allowed: bool = False,
) -> Int[Tensor, "n_windows window_length"]:
    """Cut text into calibration windows that do not overlap.

    Documents are joined by a blank line, since few are as long as a window. All of them are taken in order
    if ``n_windows`` is 0; otherwise a seeded random choice is, and no more is encoded than it needs. Text for
    fewer windows than asked gives fewer: the number is the caller's to see.

    Args:
        sources: What `read_documents` reads, pooled.
        tokenizer: Any of transformers.
        n_windows: Most windows to return; 0 means all.
        window_length: Tokens per window, a BOS token included.
        seed: Of the order and of the choice.
        bos: ``auto``: in every window if the tokenizer adds one by itself, otherwise none (Gemma needs it in
            every window); ``every``; ``start``: before the joined text only; ``never``.
        vocabulary_size: Rows of the model's embedding; ids beyond it are refused.
        none_allowed: Return no window, rather than raise, where the text is too short for one.

    Raises:
        DataError: A source cannot be read, all text is too short for one window, or a token id lies outside
            the embedding.
        ConfigError: A BOS token is asked for and the tokenizer has none, or a number is out of range.
        ModelError: The tokenizer gives nothing for a text.
    """
    _check_lengths(window_length)
    if n_windows < 0:
        raise ConfigError(f"n_windows must be at least 0 (0 takes all text), found {n_windows}")
    place = _bos_place(tokenizer, bos)
    cutter = _Cutter(Encoder(tokenizer, vocabulary_size), window_length, place)
    if n_windows:
        windows, n_tokens = _chosen(sources, cutter, n_windows, seed)
    else:
        windows, n_tokens = cutter.cut(cutter.encoder.encode_all(joined(parts_of(sources))))
    if not len(windows) and not none_allowed:
        raise DataError(
            f"text too short for one window: {_described(sources)} give {n_tokens} tokens, one window needs "
            f"{window_length - (place != 'never')}. Add text or use a smaller --window-length"
        )
    return windows


def evaluation_windows(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    window_length: int,
    bos: Bos,
    max_tokens: int | None = None,
    vocabulary_size: int | None = None,
) -> list[Int[Tensor, " tokens"]]:
    """Cut text into the windows on which the literature measures perplexity (GPTQ, SparseGPT, Wanda).

    All documents in order, joined by blank lines, in windows that do not overlap; the last, partial one is
    dropped. Blank documents count here: the published numbers on WikiText-2 join them too. Text shorter than
    one window gives a single shorter window.

    Args:
        sources: What `read_documents` reads, pooled.
        tokenizer: Any of transformers.
        window_length: Tokens per window, a BOS token included.
        bos: As in `token_windows`; the literature's protocol for Llama is ``start``.
        max_tokens: Use only this many tokens from the beginning of the text; the rest is not read.
        vocabulary_size: Rows of the model's embedding; ids beyond it are refused.

    Raises:
        DataError: A source cannot be read, all text is shorter than two tokens, or a token id lies outside
            the embedding.
        ConfigError: A BOS token is asked for and the tokenizer has none, or a number is out of range.
        ModelError: The tokenizer gives nothing for a text.
    """
    _check_lengths(window_length, max_tokens)
    place = _bos_place(tokenizer, bos)
    encoder = Encoder(tokenizer, vocabulary_size)
    text = joined(parts_of(sources, keep_blank=True))
    ids = encoder.encode_all(text) if max_tokens is None else encoder.encode_beginning(text, max_tokens)
    length = min(window_length, len(ids) + (place != "never"))
    if length < 2:
        raise DataError(
            f"text too short to measure a perplexity: {_described(sources)} give {len(ids)} tokens, at least "
            "2 are needed. Add text"
        )
    return list(_Cutter(encoder, length, place).cut(ids)[0])


def fingerprint(windows: Int[Tensor, "n_windows window_length"]) -> str:
    """SHA-256, in hex, of the shape and the ids as little-endian int64."""
    values = windows.cpu().numpy().astype("<i8")
    return hashlib.sha256(np.array(values.shape, dtype="<i8").tobytes() + values.tobytes()).hexdigest()


def _described(sources: Sequence[Source]) -> str:
    return ", ".join(map(describe, sources)) or "no source"


def _check_lengths(window_length: int, max_tokens: int | None = None) -> None:
    if window_length < 2:
        raise ConfigError(f"window_length must be at least 2 tokens, found {window_length}")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, found {max_tokens}")


_Place = Literal["every", "start", "never"]


def _bos_place(tokenizer: Tokenizer, bos: Bos) -> _Place:
    if bos not in get_args(Bos):
        raise ConfigError(f"unknown value of bos: {did_you_mean(bos, get_args(Bos))}")
    if bos == "auto":
        return "every" if adds_bos(tokenizer) else "never"
    if bos != "never" and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"bos '{bos}' needs a beginning-of-sequence token, and this tokenizer has none: use auto or never"
        )
    return bos


class _Cutter:
    """Cuts token ids into windows, with a BOS token where it belongs."""

    def __init__(self, encoder: Encoder, window_length: int, place: _Place) -> None:
        self.encoder, self.window_length, self._place = encoder, window_length, place
        self._bos = encoder.tokenizer.bos_token_id
        if place != "never" and self._bos is not None:
            encoder.check(np.array([self._bos]))

    @property
    def n_text(self) -> int:
        """Tokens of text in a window."""
        return self.window_length - (self._place == "every")

    def cut(self, ids: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, "n_windows window_length"], int]:
        """Windows that do not overlap, the last, partial one dropped; and the number of tokens."""
        n_tokens = len(ids)
        if self._place == "start":
            ids = F.pad(ids, (1, 0), value=self._bos)
        windows = ids[: len(ids) // self.n_text * self.n_text].view(-1, self.n_text)
        return (F.pad(windows, (1, 0), value=self._bos) if self._place == "every" else windows), n_tokens

    def cut_each(self, texts: Sequence[Int[Tensor, " tokens"]]) -> Int[Tensor, "n_windows window_length"]:
        """One window from each text of `n_text` tokens."""
        if self._place == "start":
            texts = [texts[0][:-1], *texts[1:]]  # makes room for the BOS token
        return self.cut(torch.cat(list(texts)))[0]


def _chosen(
    sources: Sequence[Source], cutter: _Cutter, n_windows: int, seed: int
) -> tuple[Int[Tensor, "n_windows window_length"], int]:
    n_held = _READ_PER_TOKEN * n_windows * cutter.window_length
    small, large = read_at_most(parts_of(sources), max(SMALL, n_held))
    random = generator("calibration windows", seed)
    if large is None:
        documents = _whole(small)
        documents = [documents[i] for i in torch.randperm(len(documents), generator=random)]
        n_tokens = n_windows * cutter.window_length
        windows, n_tokens = cutter.cut(_encode_enough(cutter.encoder, documents, n_tokens))
        return _some(windows, n_windows, random), n_tokens
    while True:
        units = draw_units(
            large, unit_length=_UNIT_PER_TOKEN * cutter.window_length, n_characters=n_held, seed=seed
        )
        drawn = _window_by_window(cutter, units, n_windows, seed)
        if len(drawn) == n_windows:
            return cutter.cut_each(drawn), n_windows * cutter.n_text
        if sum(map(len, units)) < n_held:
            break  # they are all there are
        large, n_held = parts_of(sources), 8 * n_held
    # Where text is short for so many windows, what is left over in the units counts too.
    windows, n_tokens = cutter.cut(cutter.encoder.encode_all(joined(parts_of(sources))))
    return _some(windows, n_windows, random), n_tokens


def _whole(parts: Sequence[Part]) -> list[str]:
    documents: list[list[str]] = []
    for part in parts:
        if part.starts:
            documents.append([])
        documents[-1].append(part.text)
    return ["".join(document) for document in documents]


def _some(
    windows: Int[Tensor, "_ window_length"], n_windows: int, random: torch.Generator
) -> Int[Tensor, "n_windows window_length"]:
    """At most ``n_windows`` windows, a random choice in their order."""
    if n_windows >= len(windows):
        return windows
    kept = torch.randperm(len(windows), generator=random)[:n_windows]
    return windows[kept.sort().values]


def _encode_enough(encoder: Encoder, documents: Sequence[str], n_tokens: int) -> Int[Tensor, " tokens"]:
    """Token ids of the first documents, joined: as many as give ``n_tokens``, or all of them."""
    n_characters = list(accumulate(len(document) + len(_SEPARATOR) for document in documents))
    characters_per_token = 2.0
    while True:
        wanted = math.ceil(characters_per_token * n_tokens)
        n_documents = 1 + sum(end < wanted for end in n_characters[:-1])
        ids = encoder.encode(_SEPARATOR.join(documents[:n_documents]))
        if len(ids) >= n_tokens or n_documents >= len(documents):
            return ids
        # A tenth more than the rate so far, so that every turn asks for a tenth more text at least.
        characters_per_token = 1.1 * n_characters[n_documents - 1] / max(len(ids), 1)


def _window_by_window(
    cutter: _Cutter, units: Sequence[str], n_windows: int, seed: int
) -> list[Int[Tensor, " tokens"]]:
    """The text of one window from each unit, from a random token on; short units are joined for it."""
    random = generator("calibration places", seed)
    windows: list[Tensor] = []
    held: list[str] = []
    enough = 0.0  # characters that probably hold a window
    for unit in units:
        held.append(unit)
        if (n_characters := sum(map(len, held))) < enough:
            continue
        ids = cutter.encoder.encode(_SEPARATOR.join(held))
        if len(ids) < cutter.n_text:
            enough = 1.1 * n_characters / max(len(ids), 1) * cutter.n_text
            continue
        first = int(torch.randint(len(ids) - cutter.n_text + 1, (), generator=random))
        windows.append(ids[first : first + cutter.n_text])
        held, enough = [], 0.0
        if len(windows) == n_windows:
            break
    return windows
