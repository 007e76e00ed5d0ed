"""A packed message comes back bit by bit and shorter; no bytes of a stranger cost more than was asked for."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprllm import ModelError, UpdateError
from fedprllm.core.masks import PruneMask
from fedprllm.deciding import BlockDecision
from fedprllm.federation.protocol.decision import decided_weights, encode_decision
from fedprllm.models.block import GivenWeights
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.packing import message as packing
from fedprllm.packing.message import is_packed, pack_message, unpack_message

HEAD = struct.Struct("<8sBIQI")


def half_zeros(n: int, dtype: str = "<u2") -> bytes:
    generator = np.random.default_rng(0)
    values = (generator.normal(size=n).astype("<f4") * 0.02).view("<u4") >> (16 if dtype == "<u2" else 0)
    return (values * (generator.random(n) < 0.5)).astype(dtype).tobytes()


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(st.one_of(st.just(0), st.integers(0, 255)), max_size=600),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    n_before=st.integers(0, 9),
    n_after=st.integers(0, 9),
)
def test_any_message_comes_back(data, itemsize, n_before, n_after):
    n_values = max(0, len(data) - n_before - n_after) // itemsize * itemsize
    message = bytes(data[: n_before + n_values + n_after])
    n_after = len(message) - n_before - n_values if len(message) >= n_before else 0
    n_before = min(n_before, len(message))
    packed = pack_message(message, n_before, n_after, itemsize)
    assert len(packed) <= len(message)
    assert unpack_message(packed, len(message)) == message


def test_half_of_the_weights_take_less_than_0_41():
    message = b"h" * 100 + half_zeros(2**20) + b"d" * 32
    packed = pack_message(message, 100, 32, 2)
    assert len(packed) < 0.41 * len(message)
    assert unpack_message(packed, len(message)) == message


def test_a_message_that_gains_nothing_stays_as_it_is():
    message = np.random.default_rng(0).bytes(5000)
    assert pack_message(message, 10, 10, 1) is message
    assert unpack_message(message, 1) is message  # whoever reads it checks its length


def test_chunks_do_not_show(monkeypatch):
    message = b"h" * 5 + half_zeros(5000) + b"d" * 3
    whole = pack_message(message, 5, 3, 2)
    monkeypatch.setattr(packing, "CHUNK_VALUES", 512)
    pieces = pack_message(message, 5, 3, 2)
    assert pieces != whole
    assert unpack_message(pieces, len(message)) == message


def test_the_format_is_the_specified_one():
    def segment(data: bytes) -> bytes:
        return struct.pack("<BI", 0, len(data)) + data

    bits = [0, 0x3F80, 0x8000, 0, 0, 0xBF80, 0, 0x7FC0, 1]
    kept = [value for value in bits if value]
    rotated = [(value << 1 | value >> 15) & 0xFFFF for value in kept]
    mask = sum(1 << place for place, value in enumerate(bits) if value)
    data = b"FEDPMSG\0" + struct.pack("<BIQI", 2, 4, 18, 2) + segment(b"head")
    data += struct.pack("<I", len(kept)) + segment(mask.to_bytes(2, "little"))
    data += segment(bytes(value & 0xFF for value in rotated)) + segment(
        bytes(value >> 8 for value in rotated)
    )
    data += segment(b"ok")
    assert unpack_message(data, 24) == b"head" + struct.pack("<9H", *bits) + b"ok"


def packed_message() -> tuple[bytes, bytes]:
    message = b"h" * 20 + half_zeros(4000) + b"d" * 32
    return message, pack_message(message, 20, 32, 2)


def test_no_damage_goes_unnoticed_or_costs_more_than_the_message():
    """A flipped bit gives an error, or a message whose checksum does not match; never a longer one."""
    message, packed = packed_message()
    for place in range(0, len(packed), max(1, len(packed) // 200)):
        damaged = bytearray(packed)
        damaged[place] ^= 1 << (place % 8)
        try:
            found = unpack_message(bytes(damaged), len(message))
        except ModelError:
            continue
        assert len(found) <= len(message) or not is_packed(damaged)
    for n_bytes in (9, HEAD.size, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ModelError, match="ends too early"):
            unpack_message(packed[:n_bytes], len(message))
    with pytest.raises(ModelError, match="behind its end"):
        unpack_message(packed + b"x", len(message))


@pytest.mark.parametrize("itemsize", [0, 3, 16])
def test_another_size_of_values_is_refused(itemsize):
    with pytest.raises(ModelError, match="cannot be values"):
        unpack_message(HEAD.pack(b"FEDPMSG\0", itemsize, 0, 16, 0), 1000)


def test_a_message_longer_than_asked_for_is_refused_before_it_is_unpacked():
    message, packed = packed_message()
    with pytest.raises(ModelError, match=f"at most {len(message) - 1} bytes, found {len(message)}"):
        unpack_message(packed, len(message) - 1)


def test_a_segment_that_grows_is_not_decompressed():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    data = HEAD.pack(b"FEDPMSG\0", 1, 10, 10**6, 10) + struct.pack("<BI", 1, 10) + bomb[:10]
    data_of_values = HEAD.pack(b"FEDPMSG\0", 1, 0, 10**6, 0) + struct.pack("<BI", 0, 0)
    data_of_values += struct.pack("<BI", 1, len(bomb)) + bomb
    tracemalloc.start()
    for hostile in (data, data_of_values):
        with pytest.raises(ModelError):
            unpack_message(hostile, 2 * 10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6, "no more than was declared is decompressed"


# Decisions ---------------------------------------------------------------------------------------


def decision_with_zeros(block, dtype=None) -> BlockDecision:
    """A decision that changes the weights it keeps, as solvers do."""
    generator = torch.Generator().manual_seed(0)
    masks, weights = {}, {}
    for name, linear in block.linears.items():
        gone = torch.rand(linear.shape, generator=generator) < 0.5
        masks[name] = PruneMask(gone, 0)
        stored = block.tensors[name]
        changed = (stored * 1.125).masked_fill(linear.stored(gone), 0)
        weights[name] = changed.to(stored.dtype)
    return BlockDecision(masks, GivenWeights(weights))


def test_a_decision_travels_without_its_zeros(small_model):
    with BlockwiseModel(small_model).block(0) as block:
        decision = decision_with_zeros(block)
        sent = encode_decision(decision, block, bytes(16), bytes(32))
        n_bytes = sum(weight.nbytes for weight in decision.weights.values())
        assert is_packed(sent)
        assert len(sent) < 0.6 * n_bytes
        found = decided_weights(sent, block, bytes(16), bytes(32))
        for name, weight in decision.weights.items():
            assert torch.equal(found[name], weight)
        for spoiled in (sent[:-1], sent[:40], sent[:60] + b"x" + sent[61:], sent + b"x"):
            with pytest.raises(UpdateError):
                decided_weights(spoiled, block, bytes(16), bytes(32))


def test_a_mask_with_a_pattern_travels_shorter(small_model):
    with BlockwiseModel(small_model).block(0) as block:
        masks = {}
        for name, linear in block.linears.items():
            gone = torch.zeros(linear.shape, dtype=torch.bool)
            generator = torch.Generator().manual_seed(1)
            fours = torch.rand((linear.shape[0], linear.shape[1] // 4, 4), generator=generator)
            gone.view(fours.shape).scatter_(2, fours.argsort(dim=2)[..., :1], True)
            masks[name] = PruneMask(gone, 0)
        sent = encode_decision(BlockDecision.of_masks(block, masks), block, bytes(16), bytes(32))
        n_bits = sum(linear.n_weights for linear in block.linears.values())
        assert is_packed(sent)
        assert len(sent) < 0.75 * n_bits / 8
        found = decided_weights(sent, block, bytes(16), bytes(32))
        for name, pruned in masks.items():
            expected = block.matrix(name).masked_fill(pruned.mask, 0)
            assert torch.equal(block.linears[name].view(found), expected)
