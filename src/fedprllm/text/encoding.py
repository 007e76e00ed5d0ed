"""Token ids of text of any length, encoded in pieces that give the ids of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedprllm.errors import DataError, ModelError

__all__ = ["Encoder", "Tokenizer", "adds_bos", "break_before"]

_PIECE = 2**16  # characters encoded at once, at most twice as many
_OVERLAP = 2**10  # characters that a piece has in common with the one before
_AROUND = 4  # tokens that must agree on both sides of the place where two pieces meet
_BREAKS = ("\n\n", "\n", " ")


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers has it."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Encode a text; ``input_ids`` of the result are its token ids."""


@dataclass(frozen=True)
class _Encoded:
    """One piece: its text, its token ids, and where in the text they begin and end, if that is known."""

    text: str
    ids: Int[np.ndarray, " tokens"]
    places: Any  # an `Encoding` of the package tokenizers, or None

    def boundaries(self, tokens: Iterable[int], low: int, high: int) -> dict[int, int]:
        """Token by the character it begins with, from ``low`` to ``high``; stops at the first outside."""
        found: dict[int, int] = {}
        for token in tokens:
            start, end = self.places.token_to_chars(token) or (0, 0)
            if not low <= start <= high:
                break
            if end > start:
                # The bytes of one character are several tokens with one place: the first of them counts.
                found[start] = min(token, found.get(start, token))
        return found


class Encoder:
    """A tokenizer for texts of any length, whose ids are checked against the model.

    Text longer than about 100,000 characters is encoded in pieces that overlap by 1,024 characters. Two
    neighbors are joined where both begin a token at the same character and agree on the tokens around it,
    so that the ids are those of the whole text. Tokenizers that do not tell places (not "fast") meet at a
    line break instead, where the ids may differ from those of the whole by the tokens at that break.

    Args:
        tokenizer: Any of transformers.
        vocabulary_size: Rows of the model's embedding, if the ids are for a model.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._overlap = _OVERLAP if getattr(tokenizer, "is_fast", False) else 0

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """Token ids of a text, int64.

        Raises:
            DataError: An id lies outside the model's embedding.
        """
        return self.encode_all([text])

    def encode_all(self, blocks: Iterable[str]) -> Int[Tensor, " tokens"]:
        """Token ids of a text that comes in blocks, int64.

        Raises:
            DataError: An id lies outside the model's embedding.
        """
        return torch.from_numpy(np.concatenate([*self.stream(blocks)]).astype(np.int64))

    def encode_beginning(self, blocks: Iterable[str], n_tokens: int) -> Int[Tensor, " tokens"]:
        """The first ``n_tokens`` ids of a text that comes in blocks; no more blocks are read than needed.

        Raises:
            DataError: An id lies outside the model's embedding.
        """
        found: list[np.ndarray] = []
        for ids in self.stream(blocks):
            found.append(ids)
            if sum(map(len, found)) >= n_tokens:
                break
        return torch.from_numpy(np.concatenate(found)[:n_tokens].astype(np.int64))

    def stream(self, blocks: Iterable[str]) -> Iterator[Int[np.ndarray, " tokens"]]:
        """Token ids of a text that comes in blocks, int32, in stretches.

        Raises:
            DataError: An id lies outside the model's embedding.
        """
        previous: _Encoded | None = None
        first = 0
        for text, n_overlap in _pieces(blocks, self._overlap):
            current = self._encoded(text)
            if previous is not None:
                meeting = _meeting(previous, current, n_overlap)
                if meeting is None:
                    # A run without a common token boundary: the overlap stays with the piece before.
                    current = self._encoded(text[n_overlap:])
                    meeting = len(previous.ids), 0
                yield previous.ids[first : meeting[0]]
                first = meeting[1]
            previous = current
        assert previous is not None
        yield previous.ids[first:]

    def _encoded(self, text: str) -> _Encoded:
        # verbose=False: the text is longer than the model's limit on purpose.
        encoded = self.tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        self.check(ids)
        places = getattr(encoded, "encodings", None)
        return _Encoded(text, ids, places[0] if places else None)

    def check(self, ids: Int[np.ndarray, " tokens"]) -> None:
        """Refuse ids that the model's embedding does not hold.

        Raises:
            DataError: Names the tokenizer and the size of the embedding.
        """
        if self._vocabulary_size is not None and ids.size and ids.max() >= self._vocabulary_size:
            raise DataError(
                f"{_named(self.tokenizer)} gives token id {ids.max()}, the embedding of the model holds 0 to "
                f"{self._vocabulary_size - 1}: use the tokenizer that belongs to the model"
            )


def _pieces(blocks: Iterable[str], overlap: int) -> Iterator[tuple[str, int]]:
    """Pieces of a text, and how many characters each has in common with the one before."""
    text, n_overlap = "", 0
    for block in blocks:
        text += block
        start = 0
        while len(text) - start >= 2 * _PIECE:
            end = break_before(text, start + _PIECE // 2, start + _PIECE)
            yield text[start:end], n_overlap
            start, n_overlap = end - overlap, overlap
        text = text[start:]
    yield text, n_overlap


def break_before(text: str, low: int, high: int) -> int:
    """The place after the last blank line between two places; or else line break, or space, or ``high``."""
    for separator in _BREAKS:
        if (found := text.rfind(separator, low, high)) >= 0:
            return found + len(separator)
    return high


def _meeting(previous: _Encoded, current: _Encoded, n_overlap: int) -> tuple[int, int] | None:
    """Where two neighbors meet: the end of the one and the beginning of the other, in tokens.

    Returns:
        The two places, or None if the tokens of the overlap do not tell where.
    """
    if not n_overlap:
        return len(previous.ids), 0
    if previous.places is None or current.places is None:
        return None
    shift = len(previous.text) - n_overlap
    before = previous.boundaries(reversed(range(len(previous.ids))), shift, len(previous.text))
    after = current.boundaries(range(len(current.ids)), 0, n_overlap)
    common = [place for place in after if place + shift in before]
    for place in sorted(common, key=lambda place: (abs(place - n_overlap // 2), place)):
        end, begin = before[place + shift], after[place]
        if _agree(previous.ids, end, current.ids, begin):
            return end, begin
    return None


def _agree(first: np.ndarray, end: int, second: np.ndarray, begin: int) -> bool:
    if min(end, begin) < _AROUND:
        return False
    around = first[end - _AROUND : end + _AROUND]
    return bool(np.array_equal(around, second[begin - _AROUND : begin + _AROUND]))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text by itself.

    Raises:
        ModelError: It gives no token for the letter a.
    """
    ids = tokenizer("a")["input_ids"]
    if not len(ids):
        raise ModelError(
            f"{_named(tokenizer)} gives no token for the text 'a': expected at least one. Its files are "
            "incomplete, or belong to another kind of tokenizer"
        )
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _named(tokenizer: Tokenizer) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f"the tokenizer of {name}" if name else "the tokenizer"
