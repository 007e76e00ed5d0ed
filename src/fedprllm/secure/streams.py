"""Masks: AES-256 in counter mode as a stream of words, added to an update modulo 2^64.

A key is used for one stream only, so the counter begins at 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedprllm.secure.words import Words

__all__ = ["apply_streams"]

# Words at a time: 128 KiB. A part of the update and the one buffer for all streams stay in the cache.
_CHUNK = 2**14
_ZEROS = memoryview(bytes(8 * _CHUNK))


def apply_streams(words: Words, keys: Iterable[tuple[bytes, bool]]) -> None:
    """Add streams to words in place, or subtract them, modulo 2^64.

    Args:
        words: The words, uint64 [n].
        keys: Keys of 32 bytes, each with whether its stream is added.
    """
    streams = [
        (Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor(), np.add if added else np.subtract)
        for key, added in keys
    ]
    buffer = bytearray(8 * min(len(words), _CHUNK))
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        stream = np.frombuffer(buffer, "<u8", len(part))
        for cipher, add in streams:
            cipher.update_into(_ZEROS[: part.nbytes], buffer)
            add(part, stream, out=part)
