"""The bytes of an update: golden bytes, one spelling per update, every rule broken once."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fedprllm.errors import UpdateError
from fedprllm.federation.protocol.update import Expectation, Update, decode, encode, max_message_bytes

SPECIFICATION = Path(__file__).parents[2] / "docs" / "wire-format.md"
RUN_ID = bytes(range(16))
FINGERPRINT = bytes(range(0xA0, 0xC0))
NO_LIMIT = 2**40

GOLDEN = bytes.fromhex(
    "46454450524c4c4d 0200 0000 9b00000000000000"
    "000102030405060708090a0b0c0d0e0f"
    "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf"
    "02000000 0008000000000000 01 06 0200"
    "736974652d61"
    "06 01 02 6d6c702e7570 02000000 05000000"
    "01 01 02 71 03000000 03000000"
    "0303 1101"
    "d6e2aeef087b5c02f1e1f02fd4e8bb014cf1ded06e62552edc44ea62bbbae543"
)

# name -> (dtype, values, their bytes)
GOLDEN_VALUES = {
    "bits": (torch.bool, [1, 0, 0, 0, 0, 0, 0, 1, 0, 1], "81 02"),
    "float32": (torch.float32, [1.0, 0.0, 2.5], "0000803f 00000000 00002040"),
    "float16": (torch.float16, [1.0, -2.0], "003c 00c0"),
    "bfloat16": (torch.bfloat16, [1.0, -2.0], "803f 00c0"),
    "word": (torch.int64, [1, -2, 2**56], "0100000000000000 feffffffffffffff 0000000000000001"),
}
CODES = {torch.bool: 1, torch.float32: 2, torch.float16: 4, torch.bfloat16: 5, torch.int64: 6}
KINDS = {"mask": 1, "statistics": 2, "gram": 3, "weights": 4, "outliers": 5, "masked": 6}
# kind -> (b, e): values are multiples of 2^-b and below 2^e
GRIDS = {"statistics": (64, 48), "gram": (22, 34), "outliers": (0, 53)}

SMOLLM2_BLOCK = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def mask_update(**changes: object) -> Update:
    tensors = {
        "q": torch.eye(3, dtype=torch.bool),
        "mlp.up": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool),
    }
    update = Update(RUN_ID, "site-a", 2, "mask", FINGERPRINT, tensors, 2048)
    return replace(update, **changes)


def update_of(kind: str, **tensors: torch.Tensor) -> Update:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return Update(RUN_ID, "site-a", 2, kind, FINGERPRINT, named, 0 if kind == "masked" else 1)


def expectation_of(update: Update, **changes: object) -> Expectation:
    shapes = {name: tuple(tensor.shape) for name, tensor in update.tensors.items()}
    expect = Expectation(
        update.run_id, update.model_fingerprint, update.block, update.kind, shapes, update.participant
    )
    return replace(expect, **changes)


def sealed(message: bytes) -> bytes:
    """The message with the length and the checksum it needs, as a forger would send it."""
    body = bytearray(message[:-32])
    struct.pack_into("<Q", body, 12, len(message))
    return bytes(body) + hashlib.sha256(body).digest()


def written(update: Update) -> bytes:
    """Slow transcription of docs/wire-format.md."""
    table, payload = b"", b""
    for name in sorted(update.tensors, key=lambda name: name.encode()):
        tensor = update.tensors[name]
        raw = name.encode()
        table += bytes([len(raw), CODES[tensor.dtype], tensor.ndim]) + raw
        table += b"".join(size.to_bytes(4, "little") for size in tensor.shape)
        flat = tensor.reshape(-1)
        if tensor.dtype == torch.bool:
            number = sum(2**i for i, value in enumerate(flat.tolist()) if value)
            payload += number.to_bytes(math.ceil(len(flat) / 8), "little")
        elif tensor.dtype == torch.bfloat16:
            payload += b"".join(struct.pack("<f", value)[2:] for value in flat.tolist())
        else:
            code = {torch.float16: "e", torch.float32: "f", torch.int64: "q"}[tensor.dtype]
            payload += b"".join(struct.pack(f"<{code}", value) for value in flat.tolist())
    participant = update.participant.encode()
    middle = update.run_id + update.model_fingerprint
    middle += update.block.to_bytes(4, "little") + update.n_tokens.to_bytes(8, "little")
    middle += bytes([KINDS[update.kind], len(participant)]) + len(update.tensors).to_bytes(2, "little")
    middle += participant + table + payload
    total = 20 + len(middle) + 32
    body = b"FEDPRLLM" + bytes([2, 0, 0, 0]) + total.to_bytes(8, "little") + middle
    return body + hashlib.sha256(body).digest()


def assert_same(found: Update, expected: Update) -> None:
    for field in ("run_id", "participant", "block", "kind", "model_fingerprint", "n_tokens"):
        assert getattr(found, field) == getattr(expected, field)
    assert list(found.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


# ---- the bytes ---------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    update = mask_update()
    assert encode(update) == GOLDEN
    assert_same(decode(GOLDEN, expect=expectation_of(update), max_bytes=len(GOLDEN)), update)


@pytest.mark.parametrize("case", GOLDEN_VALUES)
def test_golden_values(case: str) -> None:
    dtype, values, expected = GOLDEN_VALUES[case]
    kind = {"bits": "mask", "float32": "statistics", "word": "masked"}.get(case, "weights")
    message = encode(update_of(kind, x=torch.tensor(values, dtype=dtype)))
    raw = bytes.fromhex(expected)
    assert message[-32 - len(raw) : -32] == raw
    assert message[84 + 6 :][:8] == bytes([1, CODES[dtype], 1]) + b"x" + len(values).to_bytes(4, "little")
    assert message[80] == KINDS[kind]
    assert decode(message, expect=None, max_bytes=NO_LIMIT).tensors["x"].tolist() == values


def test_the_example_of_the_specification_is_the_golden_message() -> None:
    lines = re.findall(
        r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)",
        SPECIFICATION.read_text(encoding="utf-8"),
        re.M,
    )
    example = b""
    for offset, digits in lines:
        assert int(offset, 16) == len(example), f"the line of offset {offset}"
        example += bytes.fromhex(digits)
    assert example == GOLDEN


DTYPES_OF_KIND = {
    "mask": [torch.bool],
    "statistics": [torch.float32],
    "gram": [torch.float32],
    "weights": [torch.float32, torch.float16, torch.bfloat16],
    "outliers": [torch.int64],
    "masked": [torch.int64],
}
names = st.text(st.sampled_from("abz._é語😀 "), min_size=1, max_size=12)


@st.composite
def updates(draw: st.DrawFn) -> Update:
    kind = draw(st.sampled_from(list(KINDS)))
    tensors = {}
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        masks = kind == "weights" and draw(st.booleans())
        dtype = torch.bool if masks else draw(st.sampled_from(DTYPES_OF_KIND[kind]))
        shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        values = torch.randn(shape, generator=generator)
        values = values.square() if kind in ("statistics", "outliers") else values
        values = 2**40 * values if dtype == torch.int64 else values
        values = (values * 2**22).round() / 2**22 if kind == "gram" else values
        tensors[f"{name}.mask" if masks else name] = values > 0 if dtype == torch.bool else values.to(dtype)
    block, n_tokens = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**63 - 1))
    n_tokens = 0 if kind == "masked" else n_tokens
    ids = draw(st.binary(min_size=48, max_size=48))
    return Update(ids[:16], draw(names), block, kind, ids[16:], tensors, n_tokens)


@settings(deadline=None)
@given(updates())
def test_every_update_is_written_as_specified_and_read_back(update: Update) -> None:
    message = encode(update)
    assert message == written(update)
    expect = expectation_of(update)
    assert len(message) <= max_message_bytes(expect)
    found = decode(message, expect=expect, max_bytes=max_message_bytes(expect))
    assert_same(found, update)
    assert_same(decode(message, expect=None, max_bytes=len(message)), update)
    assert encode(found) == message


@settings(deadline=None)
@given(updates(), st.randoms())
def test_the_order_of_insertion_does_not_change_the_bytes(update: Update, random: object) -> None:
    items = list(update.tensors.items())
    random.shuffle(items)
    assert encode(replace(update, tensors=dict(items))) == encode(update)


def test_strides_and_gradients_do_not_change_the_bytes() -> None:
    weights = torch.randn(6, 4)
    plain = encode(update_of("weights", x=weights, x__mask=weights > 0))
    turned = weights.t().contiguous().t()
    assert not turned.is_contiguous()
    assert encode(update_of("weights", x=turned.requires_grad_(), x__mask=turned > 0)) == plain


def test_any_kind_of_buffer_is_read_and_copied() -> None:
    update = update_of("statistics", x=torch.arange(5.0))
    buffer = bytearray(encode(update))
    found = decode(buffer, expect=None, max_bytes=len(buffer))
    view = memoryview(b"." + bytes(buffer))[1:]
    assert_same(decode(view, expect=None, max_bytes=len(view)), update)
    buffer[:] = bytes(len(buffer))
    assert_same(found, update)
    found.tensors["x"].add_(1)  # writable, as every other tensor


# ---- size and memory ---------------------------------------------------------------------------------


def test_a_mask_takes_one_bit_per_weight_and_less_than_a_thousandth_more() -> None:
    tensors = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SMOLLM2_BLOCK.items()}
    update = mask_update(participant="p" * 128, tensors=tensors)
    one_bit_each = sum(tensor.numel() for tensor in tensors.values()) / 8
    assert one_bit_each == 442_368
    assert one_bit_each < len(encode(update)) <= 1.001 * one_bit_each


def test_the_longest_message_is_known_before() -> None:
    update = mask_update(participant="é" * 64)
    assert len(encode(update)) == max_message_bytes(expectation_of(update))
    assert len(encode(update)) == max_message_bytes(expectation_of(update, participant=None))
    for kind, dtype in {"statistics": torch.float32, "weights": torch.float32, "masked": torch.int64}.items():
        update = update_of(kind, x=torch.ones(3, 5, dtype=dtype))
        assert len(encode(update)) == max_message_bytes(expectation_of(update))
    with pytest.raises(UpdateError, match="unknown kind of update 'masks'; did you mean 'mask'"):
        max_message_bytes(expectation_of(mask_update(), kind="masks"))


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_refused_payload_is_never_copied_whole() -> None:
    values = torch.ones(2**21)
    message = bytearray(encode(update_of("gram", x=values)))
    struct.pack_into("<f", message, len(message) - 36, math.nan)
    forged = sealed(bytes(message))

    def refuse() -> None:
        with pytest.raises(UpdateError, match="values of 'x': expected finite numbers, found nan"):
            decode(forged, expect=None, max_bytes=NO_LIMIT)

    refuse()  # what is imported or cached on first use is not the message's
    assert peak_bytes(refuse) < 2**20 < len(forged)


def test_an_accepted_payload_is_copied_once() -> None:
    message = encode(update_of("gram", x=torch.ones(2**21)))
    mask = encode(mask_update(tensors={"x": torch.ones(2**21, dtype=torch.bool)}))
    assert peak_bytes(lambda: decode(message, expect=None, max_bytes=NO_LIMIT)) < len(message) + 2**20
    assert peak_bytes(lambda: decode(mask, expect=None, max_bytes=NO_LIMIT)) < 8 * len(mask) + 2**20


# ---- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "update",
    [
        mask_update(participant="é" * 64),
        mask_update(block=2**32 - 1, n_tokens=2**63 - 1),
        mask_update(block=0, n_tokens=0),
        mask_update(tensors={"n" * 255: torch.ones(1, 1, 1, 1, dtype=torch.bool)}),
        mask_update(tensors={f"{i}": torch.ones(1, dtype=torch.bool) for i in range(4096)}),
        update_of("statistics", x=torch.tensor([-0.0, 2.0**-64, 2.0**48 - 2.0**24])),
        update_of("gram", x=torch.tensor([-1.0, 2.0**-22, 2.0**34 - 2.0**10, 2.0**10 - 2.0**34])),
        update_of("outliers", x=torch.tensor([0, 2**53 - 1])),
        update_of("masked", x=torch.tensor([-(2**63), 2**63 - 1])),
    ],
    ids=[
        "participant",
        "largest",
        "smallest",
        "name and dims",
        "tensors",
        "statistics",
        "gram",
        "outliers",
        "masked",
    ],
)
def test_the_limits_themselves_are_allowed(update: Update) -> None:
    message = encode(update)
    assert_same(decode(message, expect=expectation_of(update), max_bytes=len(message)), update)


ONE_BIT = torch.ones(1, dtype=torch.bool)
UNWRITABLE = {
    "run id": (mask_update(run_id=bytes(15)), "run_id: expected 16 bytes"),
    "run id as text": (mask_update(run_id="0" * 16), "run_id: expected 16 bytes"),
    "fingerprint": (mask_update(model_fingerprint=bytes(33)), "model_fingerprint: expected 32 bytes"),
    "negative block": (mask_update(block=-1), "block: expected an integer from 0 to 4294967295, found -1"),
    "large block": (mask_update(block=2**32), "block: expected"),
    "tokens": (mask_update(n_tokens=2**63), "n_tokens: expected"),
    "fractional tokens": (mask_update(n_tokens=1.5), "n_tokens: expected an integer"),
    "kind": (mask_update(kind="masks"), "unknown kind of update 'masks'; did you mean 'mask'"),
    "masked tokens": (
        replace(update_of("masked", x=torch.tensor([1])), n_tokens=1),
        "n_tokens: expected an integer from 0 to 0, found 1",
    ),
    "no participant": (mask_update(participant=""), "length of participant: expected an integer from 1"),
    "long participant": (mask_update(participant="é" * 65), "length of participant: .*found 130"),
    "control": (mask_update(participant="a\nb"), "participant: expected no control"),
    "direction": (mask_update(participant="a\u202eb"), "participant: expected no control"),
    "surrogate": (mask_update(participant="\ud800"), "participant: expected text that UTF-8 can hold"),
    "no tensors": (mask_update(tensors={}), "number of tensors: expected an integer from 1 to 4096"),
    "tensors": (mask_update(tensors={f"{i}": ONE_BIT for i in range(4097)}), "number of tensors.*4097"),
    "no name": (mask_update(tensors={"": ONE_BIT}), "length of tensor name: expected"),
    "long name": (mask_update(tensors={"n" * 256: ONE_BIT}), "length of tensor name.*found 256"),
    "control in name": (mask_update(tensors={"\x7f": ONE_BIT}), "tensor name: expected no control"),
    "no dims": (mask_update(tensors={"x": torch.tensor(True)}), "number of dimensions of 'x'.*found 0"),
    "five dims": (mask_update(tensors={"x": ONE_BIT.reshape(1, 1, 1, 1, 1)}), "dimensions of 'x'.*found 5"),
    "empty": (mask_update(tensors={"x": ONE_BIT[:0]}), "shape of 'x': expected an integer from 1.*found 0"),
    "float mask": (update_of("mask", x=torch.ones(1)), "encoding of 'x': expected torch.bool, found"),
    "half sums": (
        update_of("statistics", x=torch.ones(1).half()),
        "encoding of 'x': expected torch.float32, found torch.float16",
    ),
    "floating words": (update_of("masked", x=torch.ones(1)), "encoding of 'x': expected torch.int64"),
    "floating counts": (update_of("outliers", x=torch.ones(1)), "encoding of 'x': expected torch.int64"),
    "integers": (update_of("gram", x=torch.ones(1).int()), "encoding of 'x'.*found torch.int32"),
    "double weights": (update_of("weights", x=torch.ones(1).double()), "encoding of 'x'"),
    "mask without the name": (update_of("weights", x=ONE_BIT), "encoding of 'x'"),
    "weights named mask": (update_of("weights", x__mask=torch.ones(1)), "encoding of 'x.mask'"),
    "nan": (update_of("gram", x=torch.tensor([0.0, math.nan])), "values of 'x': expected finite.*found nan"),
    "infinity": (update_of("weights", x=torch.tensor([0, math.inf]).half()), "values of 'x'.*found inf"),
    "brain infinity": (update_of("weights", x=torch.tensor([-math.inf]).bfloat16()), "'x'.*found -inf"),
    "negative": (
        update_of("statistics", x=torch.tensor([1.0, -0.5])),
        "values of 'x'.*0 or more, found -0.5",
    ),
    "negative count": (update_of("outliers", x=torch.tensor([-1])), "values of 'x'.*0 or more, found -1"),
    "between": (
        update_of("statistics", x=torch.tensor([1.0, 2.0**-65])),
        r"values of 'x': expected multiples of 2\^-64 below 2\^48",
    ),
    "between products": (
        update_of("gram", x=torch.tensor([1.0, -(2.0**-23)])),
        r"values of 'x': expected multiples of 2\^-22 below 2\^34",
    ),
    "too large": (update_of("statistics", x=torch.tensor([2.0**48])), "values of 'x': expected multiples"),
    "large product": (update_of("gram", x=torch.tensor([-(2.0**34)])), "values of 'x': expected multiples"),
    "large count": (update_of("outliers", x=torch.tensor([2**53])), "values of 'x': expected multiples"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_an_update_that_breaks_a_rule_is_not_written(case: str) -> None:
    update, complaint = UNWRITABLE[case]
    with pytest.raises(UpdateError, match=complaint):
        encode(update)


# ---- refusals of the reader --------------------------------------------------------------------------

STATISTICS = encode(update_of("statistics", x=torch.ones(2)))  # payload of 8 bytes at -40
MASKED = encode(update_of("masked", x=torch.tensor([1])))
WEIGHTS = encode(update_of("weights", x=torch.ones(2).half(), x__mask=torch.ones(2, dtype=torch.bool)))


def edited(offset: int, replacement: bytes, message: bytes = GOLDEN) -> bytes:
    """A sealed message with some bytes overwritten."""
    offset %= len(message)
    changed = message[:offset] + replacement + message[offset + len(replacement) :]
    assert len(changed) == len(message)
    return sealed(changed)


UNREADABLE = {
    "nothing": (b"", "length: expected at least 116 bytes, found 0"),
    "short": (GOLDEN[:115], "length: expected at least 116 bytes, found 115"),
    "cut": (GOLDEN[:-1], "total length: expected 154 bytes, as received, found 155"),
    "extended": (GOLDEN + b"\0", "total length: expected 156 bytes, as received, found 155"),
    "claims more": (GOLDEN[:12] + b"\xff" * 8 + GOLDEN[20:], "total length.*found 18446744073709551615"),
    "flipped": (GOLDEN[:-33] + b"\0" + GOLDEN[-32:], "checksum: expected"),
    "checksum": (GOLDEN[:-1] + b"\0", "checksum: expected .*, found d6e2.*00: .*send it again"),
    "magic": (edited(0, b"X"), "magic: expected 46454450524c4c4d, found 58"),
    "version": (edited(8, b"\3"), "version: expected 2, found 3: use the same version of fedprllm on both"),
    "version 1": (edited(8, b"\1"), "version: expected 2, found 1: .*begin a run that an older version"),
    "flags": (edited(10, b"\0\1"), "flags: expected 0, found 256"),
    "tokens": (edited(72, b"\0" * 7 + b"\x80"), "n_tokens: expected"),
    "tokens under masks": (edited(72, b"\1", MASKED), "n_tokens: expected an integer from 0 to 0, found"),
    "kind 0": (edited(80, b"\0"), r"kind: expected 1 \(mask\) or .*, found 0"),
    "kind 99": (edited(80, b"\x63"), "kind: expected .*, found 99"),
    "no participant": (edited(81, b"\0"), "length of participant: .* from 1 to 128, found 0"),
    "long participant": (edited(81, b"\x81"), "length of participant: .*found 129"),
    "participant beyond the end": (edited(81, b"\x50"), "participant: expected 80 bytes, found 39"),
    "control in participant": (edited(84, b"\x1b"), "participant: expected no control"),
    "bad UTF-8": (edited(84, b"\xff"), "participant: expected valid UTF-8"),
    "overlong UTF-8": (edited(84, b"\xc1\xa1"), "participant: expected valid UTF-8"),
    "surrogate": (edited(84, b"\xed\xa0\x80"), "participant: expected valid UTF-8"),
    "no tensors": (edited(82, b"\0\0"), "number of tensors: expected an integer from 1 to 4096, found 0"),
    "too many tensors": (edited(82, b"\1\x10"), "number of tensors: .*found 4097"),
    "more tensors than fit": (edited(82, b"\3\0"), "tensor name: expected 3 bytes, found 1"),
    "fewer tensors": (edited(82, b"\1\0"), "payload: expected 141 bytes in total, by the table, found 155"),
    "no name": (edited(90, b"\0"), "length of tensor name: expected an integer from 1 to 255, found 0"),
    "name beyond the end": (edited(90, b"\xff"), "tensor name: expected 255 bytes, found 30"),
    "control in name": (edited(93, b"\0"), "tensor name: expected no control"),
    "encoding 0": (edited(91, b"\0"), r"encoding of 'mlp.up': expected 1 \(torch.bool\) or .*found 0"),
    "encoding 3": (edited(91, b"\3"), "encoding of 'mlp.up': .*found 3"),
    "encoding 7": (edited(91, b"\7"), "encoding of 'mlp.up': .*found 7"),
    "floats in a mask": (edited(91, b"\2"), "encoding of 'mlp.up': expected torch.bool, found torch.float32"),
    "bits in statistics": (edited(91, b"\1", STATISTICS), "encoding of 'x': expected torch.float32, found"),
    "half in statistics": (edited(91, b"\4", STATISTICS), "encoding of 'x': expected torch.float32, found"),
    "words in statistics": (edited(91, b"\6", STATISTICS), "encoding of 'x': expected torch.float32, found"),
    "words in weights": (edited(91, b"\6", WEIGHTS), "encoding of 'x': expected torch.float32 or"),
    "bits in weights": (edited(91, b"\1", WEIGHTS), "encoding of 'x': expected torch.float32 or"),
    "no dims": (edited(92, b"\0"), "number of dimensions of 'mlp.up': expected an integer from 1 to 4"),
    "five dims": (edited(92, b"\5"), "number of dimensions of 'mlp.up': .*found 5"),
    "dims beyond the end": (sealed(GOLDEN[:104] + bytes(32)), "shape of 'mlp.up': expected 2 sizes"),
    "size 0": (edited(99, bytes(4)), "shape of 'mlp.up': expected an integer from 1 to 4294967295, found 0"),
    "size 2^32-1": (edited(99, b"\xff" * 8), "payload: expected 2305843008139952282 bytes"),
    "other order": (edited(93, b"z"), "order of tensors: expected a name after 'zlp.up', found 'q'"),
    "payload short": (sealed(GOLDEN[:-33] + bytes(32)), "payload: expected 155 bytes .*found 154"),
    "payload long": (sealed(GOLDEN + b"\0"), "payload: expected 155 bytes .*found 156"),
    "padding": (edited(-33, b"\5"), "padding of 'q': expected 0, found 2"),
    "padding inside": (edited(-35, b"\x83"), "padding of 'mlp.up': expected 0, found 32"),
    "nan": (edited(-36, b"\0\0\xc0\x7f", STATISTICS), "values of 'x': expected finite numbers, found nan"),
    "infinity": (edited(-36, b"\0\0\x80\x7f", STATISTICS), "values of 'x': expected finite.*found inf"),
    "negative": (edited(-36, b"\0\0\x80\xbf", STATISTICS), "values of 'x': expected sums.*found -1"),
    "off the grid": (edited(-36, b"\0\0\0\x1f", STATISTICS), "values of 'x': expected multiples of 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_message_that_breaks_a_rule_is_not_read(case: str) -> None:
    message, complaint = UNREADABLE[case]
    with pytest.raises(UpdateError, match=complaint):
        decode(message, expect=None, max_bytes=NO_LIMIT)


FORBIDDEN = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F]
FORBIDDEN += [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]


def test_no_forbidden_character_is_written_or_read() -> None:
    for code_point in FORBIDDEN:
        character = chr(code_point)
        with pytest.raises(UpdateError, match="participant: expected no control"):
            encode(mask_update(participant=character))
        stand_in = "x" * len(character.encode())
        message = encode(mask_update(participant=stand_in))
        with pytest.raises(UpdateError, match="participant: expected no control"):
            decode(edited(84, character.encode(), message), expect=None, max_bytes=NO_LIMIT)


@pytest.mark.parametrize("code_point", [0x20, 0x7E, 0xA0, 0x200D, 0x2010, 0x2027, 0x202F, 0x2065, 0x206A])
def test_their_neighbours_are_allowed(code_point: int) -> None:
    update = mask_update(participant=chr(code_point))
    assert_same(decode(encode(update), expect=expectation_of(update), max_bytes=NO_LIMIT), update)


def test_the_same_name_twice_is_refused() -> None:
    twice = mask_update(tensors={"a": ONE_BIT, "b": ONE_BIT})
    message = encode(twice).replace(b"\x01\x01\x01b", b"\x01\x01\x01a")
    with pytest.raises(UpdateError, match="order of tensors: expected a name after 'a', found 'a'"):
        decode(sealed(message), expect=None, max_bytes=NO_LIMIT)


def test_a_table_that_ends_too_early_is_refused() -> None:
    message = sealed(GOLDEN[:90] + bytes(32))
    with pytest.raises(UpdateError, match="number of tensors: expected 2, found room for 0"):
        decode(message, expect=None, max_bytes=NO_LIMIT)


UNEXPECTED = {
    "run": ({"run_id": bytes(16)}, "run_id: expected 0{32}, found 000102.*belongs to another run"),
    "model": ({"model_fingerprint": bytes(32)}, "model_fingerprint: expected 0{64}, found a0.*other weights"),
    "block": ({"block": 3}, "block: expected 3, found 2"),
    "kind": ({"kind": "weights"}, "kind: expected weights, found mask"),
    "participant": ({"participant": "site-b"}, "participant: expected site-b, found site-a"),
    "missing": ({"shapes": {"q": (3, 3), "mlp.up": (2, 5), "v": (1, 1)}}, "number of tensors: expected 3"),
    "name": ({"shapes": {"q": (3, 3), "v": (2, 5)}}, "tensor name: expected one of q, v, found mlp.up"),
    "shape": ({"shapes": {"q": (3, 3), "mlp.up": (5, 2)}}, r"'mlp.up': expected \(5, 2\), found \(2, 5\)"),
    "dims": ({"shapes": {"q": (9,), "mlp.up": (2, 5)}}, r"shape of 'q': expected \(9,\), found \(3, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNEXPECTED)
def test_a_valid_message_that_was_not_asked_for_is_refused(case: str) -> None:
    changes, complaint = UNEXPECTED[case]
    with pytest.raises(UpdateError, match=complaint):
        decode(GOLDEN, expect=expectation_of(mask_update(), **changes), max_bytes=NO_LIMIT)


def test_anybody_may_write_when_no_participant_is_named() -> None:
    expect = expectation_of(mask_update(), participant=None)
    assert decode(GOLDEN, expect=expect, max_bytes=NO_LIMIT).participant == "site-a"


def test_a_message_over_the_limit_is_refused_before_anything_else() -> None:
    with pytest.raises(UpdateError, match="length: expected at most 154 bytes, found 155"):
        decode(b"X" + GOLDEN[1:], expect=None, max_bytes=154)


def test_what_the_sender_wrote_cannot_flood_the_error() -> None:
    update = mask_update(tensors={"n" * 255: ONE_BIT})
    with pytest.raises(UpdateError) as refusal:
        decode(encode(update), expect=expectation_of(update, shapes={"q": (1,)}), max_bytes=NO_LIMIT)
    assert "n" * 80 + "…" in str(refusal.value)
    assert len(str(refusal.value)) < 250
