"""Votes as words: several small counts in each 64-bit word, with room for the sum over all participants.

With ``b`` bits for a count, a word holds ``64 // b`` counts. Of n counts in k words, word w holds counts
``w, w + k, w + 2 k, ...``, the first one in its lowest bits; unused bits are 0. Sums of words are the words
of the sums as long as no count needs more than ``b`` bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counts", "Words", "n_words", "pack_counts", "unpack_counts"]

Words = NDArray[np.uint64]
Counts = NDArray[np.unsignedinteger[Any]]

_WORD_BITS = 64


def n_words(n_counts: int, bits: int) -> int:
    """Number of words for counts of ``bits`` bits."""
    return -(-n_counts // (_WORD_BITS // bits))


def pack_counts(counts: NDArray[np.generic], bits: int) -> Words:
    """Pack counts, each below ``2^bits``.

    Args:
        counts: Whole numbers or truth values, [n].
        bits: Bits for a count, 1 to 64.
    """
    size = n_words(len(counts), bits)
    words = np.zeros(size, np.uint64)
    for place in range(_WORD_BITS // bits):
        part = counts[place * size : (place + 1) * size]
        words[: len(part)] |= part.astype(np.uint64) << np.uint64(place * bits)
    return words


def unpack_counts(words: Words, bits: int, n: int) -> Counts:
    """Reverse `pack_counts` for n counts; they come in the smallest type that holds ``bits`` bits."""
    size, lowest = len(words), np.uint64(2**bits - 1)
    counts: Counts = np.empty(n, np.min_scalar_type(2**bits - 1))
    for place in range(_WORD_BITS // bits):
        part = counts[place * size : (place + 1) * size]
        part[:] = (words[: len(part)] >> np.uint64(place * bits)) & lowest
    return counts
