"""Secret sharing against slow interpolation with fractions, and streams against published AES values."""

from __future__ import annotations

import itertools
import secrets
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprllm.secure import streams
from fedprllm.secure.shamir import PRIME, combine, split
from fedprllm.secure.streams import apply_streams

# AES-256 of the counters 0, 1, 2, ...; NIST: KeySbox known answers (AESAVS), and test cases 13 and 14 of the
# specification of GCM, whose tag and first block of ciphertext encrypt the counters 1 and 2.
AES_256 = {
    bytes(32).hex(): "dc95c078a2408989ad48a21492842087"
    "530f8afbc74536b9a963b4f1c4cb738b"
    "cea7403d4d606b6e074ec5d3baf39d18",
    "c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558": "46f2fb342d6f0ab477476fc501242c5f",
}


@pytest.mark.parametrize("key", AES_256)
def test_a_stream_is_aes_in_counter_mode(key: str) -> None:
    expected = bytes.fromhex(AES_256[key])
    words = np.zeros(len(expected) // 8, np.uint64)
    apply_streams(words, [(bytes.fromhex(key), True)])
    assert words.astype("<u8").tobytes() == expected


def test_a_stream_is_one_stream_whatever_the_length_of_its_parts(monkeypatch) -> None:
    key, other = secrets.token_bytes(32), secrets.token_bytes(32)
    whole = np.arange(100, dtype=np.uint64)
    apply_streams(whole, [(key, True), (other, False)])
    monkeypatch.setattr(streams, "_CHUNK", 7)
    parts = np.arange(100, dtype=np.uint64)
    apply_streams(parts, [(key, True), (other, False)])
    assert np.array_equal(whole, parts)
    apply_streams(parts, [(other, True), (key, False)])
    assert np.array_equal(parts, np.arange(100, dtype=np.uint64))


def test_sums_wrap_around() -> None:
    words = np.array([0, 2**64 - 1], np.uint64)
    apply_streams(words, [(bytes(32), True)])
    first, second = (
        int.from_bytes(bytes.fromhex(AES_256[bytes(32).hex()])[i : i + 8], "little") for i in (0, 8)
    )
    assert words.tolist() == [first, (second - 1) % 2**64]


def interpolated_at_zero(shares: dict[int, int]) -> int:
    """The value at 0 of the polynomial through the shares, with whole fractions until the very end."""
    value = Fraction(0)
    for x, y in shares.items():
        term = Fraction(y)
        for other in shares:
            if other != x:
                term *= Fraction(-other, x - other)
        value += term
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 5), st.randoms())
def test_any_threshold_of_shares_restores_the_secret(threshold: int, more: int, random) -> None:
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, threshold, threshold + more), start=1))
    chosen = {x: shares[x] for x in random.sample(sorted(shares), threshold)}
    assert combine(chosen) == secret
    assert interpolated_at_zero(chosen).to_bytes(32, "little") == secret


def test_one_share_less_restores_something_else() -> None:
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, 4, 6), start=1))
    for chosen in itertools.combinations(shares, 3):
        assert combine({x: shares[x] for x in chosen}) != secret


def test_shares_of_equal_secrets_differ() -> None:
    assert not set(split(bytes(32), 3, 5)) & set(split(bytes(32), 3, 5))
    assert all(share.bit_length() > 400 for share in split(bytes(32), 3, 5)), "as long as the field"
