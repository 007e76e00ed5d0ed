"""Shamir's secret sharing: any ``threshold`` of n shares restore a secret, fewer say nothing about it.

The secret is the constant term of a random polynomial of degree ``threshold - 1`` over the integers modulo
``2^521 - 1``; share x is its value at x.

Source: Shamir, How to share a secret (Communications of the ACM, 1979).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "combine", "split"]

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, n_shares: int) -> list[int]:
    """Split a secret of 32 bytes; element i is the share at x = i + 1.

    The coefficients come from the operating system's generator.
    """
    assert len(secret) == SECRET_BYTES, "the field is chosen for secrets of this size"
    assert 1 <= threshold <= n_shares, (threshold, n_shares)
    coefficients = [
        int.from_bytes(secret, "little"),
        *(secrets.randbelow(PRIME) for _ in range(threshold - 1)),
    ]
    return [_evaluate(coefficients, x) for x in range(1, n_shares + 1)]


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def combine(shares: Mapping[int, int]) -> bytes:
    """Restore a secret from exactly as many shares as its threshold, by x.

    With wrong shares the result is another number; its holder must compare it with what was announced.
    """
    basis = _at_zero(tuple(sorted(shares)))
    secret = int(sum(share * basis[x] for x, share in shares.items()) % PRIME)
    return (secret % (1 << 8 * SECRET_BYTES)).to_bytes(SECRET_BYTES, "little")


@lru_cache(maxsize=64)
def _at_zero(points: tuple[int, ...]) -> dict[int, int]:
    """The value at 0 of each Lagrange polynomial on the given points."""
    basis: dict[int, int] = {}
    for x in points:
        numerator = denominator = 1
        for other in points:
            if other != x:
                numerator = numerator * -other % PRIME
                denominator = denominator * (x - other) % PRIME
        basis[x] = numerator * pow(denominator, -1, PRIME) % PRIME
    return basis
