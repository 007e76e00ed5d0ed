"""Masks: AES-256 in counter mode as a stream of words, added to an update modulo 2^64.

A key is used for one stream only, so the counter begins at 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedprllm.secure.words import Words

__all__ = ["apply_streams"]

_CHUNK = 2**17  # words: 1 MiB, which stays in the cache for all streams
_ZEROS = bytes(8 * _CHUNK)


class _Stream:
    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self._buffer = bytearray(8 * _CHUNK)

    def words(self, n: int) -> Words:
        """The next n words, little-endian; valid until the next call."""
        self._cipher.update_into(memoryview(_ZEROS)[: 8 * n], self._buffer)
        return np.frombuffer(self._buffer, "<u8", n)


def apply_streams(words: Words, keys: Iterable[tuple[bytes, bool]]) -> None:
    """Add streams to words in place, or subtract them, modulo 2^64.

    Args:
        words: The words, uint64 [n].
        keys: Keys of 32 bytes, each with whether its stream is added.
    """
    streams = [(_Stream(key), added) for key, added in keys]
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        for stream, added in streams:
            (np.add if added else np.subtract)(part, stream.words(len(part)), out=part)
