"""78,000 corrupted messages: the reader accepts exactly the valid ones and raises only `UpdateError`.

A second reader in this file decides which are valid. It is slow, simple and written only from
docs/wire-format.md. Most messages get a new checksum after they are corrupted, so that every check is
reached.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
import tracemalloc
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from fedprllm.errors import UpdateError
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.update import Expectation, Update, decode, encode, max_message_bytes

N_PER_KIND = 6_000  # thirteen kinds
MAX_BYTES = 2**16  # limit for a message and for the memory that a refusal may take
RUN_ID = bytes(range(16))
FINGERPRINT = bytes(range(32))
EXTREMES = [0, 1, 2, 3, 4, 5, 127, 128, 255, 4095, 4096, 4097, 2**15, 2**16 - 1]
EXTREMES += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
FORBIDDEN = {*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F}
FORBIDDEN |= {*range(0x2028, 0x202F), *range(0x2066, 0x206A)}


def _update(kind: str, tensors: dict[str, torch.Tensor], **changes: object) -> Update:
    n_tokens = 0 if kind == "masked" else 4096
    fields = {"run_id": RUN_ID, "participant": "site-a", "block": 7, "kind": kind, "n_tokens": n_tokens}
    return Update(**{**fields, "model_fingerprint": FINGERPRINT, "tensors": tensors, **changes})


def _tensors(kind: str, n_rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, up = torch.randn(n_rows, 7, generator=generator), torch.randn(3, 9, generator=generator)
    if kind == "mask":
        return {"attn.q": q > 0, "mlp.up": up > 0}
    if kind == "statistics":
        return {"attn.q": q.square(), "mlp.up": up[0].round().abs() * 2.0**-64}
    if kind in ("gram", "channels", "heads", "parts"):
        return {"attn.q": torch.round(q * 2**22) / 2**22, "mlp.up": up[0].round()}
    if kind == "outliers":
        return {"outliers": (q[:, 0] > 0).sum()[None], "more": (up > 0).sum(dim=1)}
    if kind == "influence":
        return {"influence": q.square().sum()[None], "more": up[0].abs().round() * 2.0**-64}
    if kind == "experts":
        return {"counts": (q > 0).sum(dim=1), "sums": (up.abs() * 2**24).to(torch.int64)}
    if kind == "gradients":
        return {"words": (q * 2**40).to(torch.int64), "more": torch.tensor([-1, 2**63 - 1])}
    if kind == "parameters":
        return {"parameters": q[0], "more": up}
    if kind == "masked":
        return {"attn.q": (q * 2**62).to(torch.int64), "windows": torch.tensor([-1, 2**63 - 1])}
    return {"q": q.bfloat16(), "q.mask": q > 0, "up": up.half(), "v": q[0]}


def _expectation(update: Update) -> Expectation:
    shapes = {name: tuple(tensor.shape) for name, tensor in update.tensors.items()}
    return Expectation(RUN_ID, FINGERPRINT, update.block, update.kind, shapes, update.participant)


# ---- the second reader -------------------------------------------------------------------------------


Tensor = tuple[bytes, int, tuple[int, ...], bytes]  # name, encoding, shape, payload


class Bad(Exception):
    """The message violates a rule."""


def _require(condition: bool) -> None:
    if not condition:
        raise Bad


def _values(code: int, raw: bytes) -> list[Fraction]:
    numbers = _numbers(code, raw)
    _require(all(map(math.isfinite, numbers)))
    return [Fraction(number) for number in numbers]


KINDS = ["mask", "statistics", "gram", "weights", "outliers", "masked"]  # in the order of their codes
KINDS += ["channels", "heads", "parts", "influence", "experts", "gradients", "parameters"]
# kind -> (b, e): values are multiples of 2^-b and below 2^e
GRIDS = {2: (64, 48), 3: (22, 34), 5: (0, 53), 7: (22, 34), 8: (22, 34), 9: (22, 34), 10: (64, 48)}
GRIDS[11] = (0, 53)


def _numbers(code: int, raw: bytes) -> list[float]:
    if code == 5:
        return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
    letter, size = {2: ("f", 4), 4: ("e", 2), 6: ("q", 8)}[code]
    return list(struct.unpack(f"<{len(raw) // size}{letter}", raw))


def _text(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Bad from None
    _require(not FORBIDDEN & set(map(ord, text)))
    return text


def _codes_of(kind: int, name: bytes) -> set[int]:
    if kind == 4:
        return {1} if name.endswith(b".mask") else {2, 4, 5}
    return {1: {1}, 5: {6}, 6: {6}, 11: {6}, 12: {6}}.get(kind, {2})


def is_valid(data: bytes, expect: Expectation | None) -> bool:
    """Whether ``data`` follows every MUST of the specification and matches the request."""
    try:
        _read(data, expect)
    except Bad:
        return False
    return True


def _read(data: bytes, expect: Expectation | None) -> list[Tensor]:
    rest = data[:-32]

    def take(n_bytes: int) -> bytes:
        nonlocal rest
        _require(len(rest) >= n_bytes)
        taken, rest = rest[:n_bytes], rest[n_bytes:]
        return taken

    def number(n_bytes: int) -> int:
        return int.from_bytes(take(n_bytes), "little")

    _require(len(data) <= MAX_BYTES)
    _require(hashlib.sha256(rest).digest() == data[-32:])
    _require(take(8) == b"FEDPRLLM" and number(2) == 2 and number(2) == 0 and number(8) == len(data))
    run_id, fingerprint, block, n_tokens, kind = take(16), take(32), number(4), number(8), number(1)
    participant_bytes, n_tensors = number(1), number(2)
    _require(1 <= kind <= 13 and n_tokens < (1 if kind == 6 else 2**63))
    _require(1 <= participant_bytes <= 128 and 1 <= n_tensors <= 4096)
    participant = _text(take(participant_bytes))
    table: list[tuple[bytes, int, tuple[int, ...]]] = []
    for _ in range(n_tensors):
        name_bytes, code, ndim = take(3)
        name = take(name_bytes)
        _require(name_bytes > 0 and bool(_text(name)))
        _require(code in _codes_of(kind, name) and 1 <= ndim <= 4)
        shape = struct.unpack(f"<{ndim}I", take(4 * ndim))
        _require(0 not in shape)
        _require(not table or table[-1][0] < name)
        table.append((name, code, shape))
    tensors = []
    for name, code, shape in table:
        n_values = math.prod(shape)
        raw = take(-(-n_values // 8) if code == 1 else n_values * {2: 4, 4: 2, 5: 2, 6: 8}[code])
        if code == 1:
            _require(int.from_bytes(raw, "little") < 2**n_values)
        else:
            values = _values(code, raw)
            _require(kind not in (2, 5, 10, 11) or min(values) >= 0)
            if kind in GRIDS:
                bits, limit = GRIDS[kind]
                _require(all((v * 2**bits).denominator == 1 and abs(v) < 2**limit for v in values))
        tensors.append((name, code, shape, raw))
    _require(not rest)
    if expect is not None:
        found = (run_id, fingerprint, block, KINDS[kind - 1], participant)
        _require(found == (RUN_ID, FINGERPRINT, expect.block, expect.kind, expect.participant))
        _require({name.decode(): shape for name, _, shape in table} == expect.shapes)
    return tensors


# ---- corrupting messages -----------------------------------------------------------------------------


def _sealed(message: bytes, rng: random.Random) -> bytes:
    """Usually correct the length and checksum, sometimes only the checksum or neither."""
    if len(message) < 52 or rng.random() < 0.1:
        return message
    body = bytearray(message[:-32])
    if rng.random() < 0.95:
        struct.pack_into("<Q", body, 12, len(message))
    return bytes(body) + hashlib.sha256(body).digest()


def _bits(message: bytes, rng: random.Random) -> bytes:
    changed = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncated(message: bytes, rng: random.Random) -> bytes:
    return message[: rng.randrange(len(message))]


def _appended(message: bytes, rng: random.Random) -> bytes:
    return message + rng.randbytes(rng.randint(1, 40))


def _slice(message: bytes, rng: random.Random) -> bytes:
    """Cut out, repeat or overwrite a stretch of the message."""
    start = rng.randrange(len(message))
    stop = min(len(message), start + rng.randint(1, 24))
    middle = rng.choice([b"", message[start:stop] * 2, rng.randbytes(stop - start), bytes(stop - start)])
    return message[:start] + middle + message[stop:]


def _number(message: bytes, rng: random.Random) -> bytes:
    """Write an extreme number at a random place: sizes, counts, lengths, versions."""
    size = rng.choice([1, 1, 2, 4, 4, 8])
    offset = rng.randrange(len(message) - size)
    value = rng.choice(EXTREMES) % 2 ** (8 * size)
    return message[:offset] + value.to_bytes(size, "little") + message[offset + size :]


FIELDS = [(0, 8), (8, 2), (10, 2), (12, 8), (20, 16), (36, 32), (68, 4), (72, 8), (80, 1), (81, 1), (82, 2)]


def _field(message: bytes, rng: random.Random) -> bytes:
    """Change one fixed field, such as the run, model, block, kind or a count."""
    offset, size = rng.choice(FIELDS)
    near = int.from_bytes(message[offset : offset + size], "little") + rng.choice([-1, 1])
    value = rng.choice([near, near, rng.choice(EXTREMES), rng.getrandbits(8 * size)]) % 2 ** (8 * size)
    return message[:offset] + value.to_bytes(size, "little") + message[offset + size :]


def _table(message: bytes, rng: random.Random) -> bytes:
    """Change one byte of the tensor table: names, encodings, shapes."""
    offset = 84 + rng.randrange(min(len(message) - 84, 60))
    value = rng.choice([message[offset] ^ 1, rng.randrange(8), rng.randrange(256)])
    return message[:offset] + bytes([value]) + message[offset + 1 :]


def _value(message: bytes, rng: random.Random) -> bytes:
    """Write NaN, infinity, a negative number or one bits near the end of the payload."""
    pattern = rng.choice(
        ["0000c07f", "00000010", "807f", "80ff", "007c", "000000000000f0ff", "0000803f", "bf", "80", "ff"]
    )
    raw = bytes.fromhex(pattern)
    offset = len(message) - 32 - rng.randint(len(raw), 32)
    return message[:offset] + raw + message[offset + len(raw) :]


def _updated(message: bytes, rng: random.Random) -> bytes:
    """A well-formed message with other tensors or from another participant."""
    update = decode(message, expect=None, max_bytes=MAX_BYTES)
    tensors = dict(update.tensors)
    name = rng.choice(list(tensors))
    change = rng.randrange(5)
    if change == 0:
        tensors[name] = tensors[name].reshape(1, *tensors[name].shape)
    elif change == 1:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif change == 2:
        tensors[rng.choice(["a", "z", "é"]) + name] = tensors.pop(name)
    elif change == 3:
        tensors[name] = tensors[name].flip(0)
    else:
        return encode(_update(update.kind, tensors, participant=rng.choice(["site-b", "é", "x" * 128])))
    return encode(_update(update.kind, tensors))


def _swapped(message: bytes, rng: random.Random) -> bytes:
    """Exchange the names of two tensors, or give both the same."""
    names = list(decode(message, expect=None, max_bytes=MAX_BYTES).tensors)
    one, other = (f"{name}".encode() for name in rng.sample(names, 2))
    if rng.random() < 0.5:
        return message.replace(one, other, 1)
    return (
        message.replace(one, b"\0" * len(one), 1).replace(other, one, 1).replace(b"\0" * len(one), other, 1)
    )


def _forged(message: bytes, rng: random.Random) -> bytes:
    """Change a tensor just enough to violate a rule, with consistent table, payload and counts."""
    tensors = _read(message, None)
    index = rng.randrange(len(tensors))
    name, code, shape, raw = tensors[index]
    other_code = rng.choice([1, 2, 3, 4, 5, 6])
    other_bytes = (
        -(-math.prod(shape) // 8) if other_code == 1 else math.prod(shape) * (0, 0, 4, 8, 2, 2, 8)[other_code]
    )
    tensors[index : index + 1] = rng.choice(
        [
            [],
            [tensors[index]] * 2,
            [(name, code, (0, *shape[1:]), b"")],
            [(name, code, (*shape, 0), b"")],
            [(name, code, (1,) * rng.randint(1, 4) + shape, raw)],
            [(name, code, (), raw[:1])],
            [(name, code, (math.prod(shape),), raw)],
            [(rng.choice([b"", b"\n", b"\xff", b"a" * 255, name + b".mask"]), code, shape, raw)],
            [(name, other_code, shape, bytes(other_bytes))],
        ]
    )
    change = rng.randrange(8)
    if change == 0:
        rng.shuffle(tensors)
    elif change == 1:
        tensors = []
    table, payload = b"", b""
    for name, code, shape, raw in tensors:
        table += bytes([len(name), code, len(shape)]) + name + struct.pack(f"<{len(shape)}I", *shape)
        payload += raw
    return message[:82] + struct.pack("<H", len(tensors)) + message[84:90] + table + payload + bytes(32)


BREAKS: list[Callable[[bytes, random.Random], bytes]] = [
    _bits, _truncated, _appended, _slice, _number, _field, _field, _table, _table, _value, _updated, _swapped,
    _forged, _forged,
]  # fmt: skip

REACHED = [
    "length", "magic", "version", "flags", "total length", "checksum", "run_id", "model_fingerprint", "block",
    "kind", "n_tokens", "participant", "length of participant", "number of tensors", "tensor name", "payload",
    "length of tensor name", "encoding of", "number of dimensions of", "shape of", "order of tensors",
]  # fmt: skip


def test_every_kind_is_among_the_corrupted_messages() -> None:
    assert sorted(wire._KINDS) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_valid_messages_are_accepted(kind: str) -> None:
    update = _update(kind, _tensors(kind))
    message, asked = encode(update), _expectation(update)
    assert is_valid(message, asked)
    for first in (message, message[:-1], b""):  # what the libraries allocate once is not the reader's
        _decode(first, asked, measured=False)
    rng = random.Random(f"wire {kind}")
    n_accepted, complaints = 0, set()
    for index in range(N_PER_KIND):
        broken = rng.choice(BREAKS)(message, rng)
        if len(broken) > 130 and rng.random() < 0.2:
            broken = rng.choice([_bits, _number, _field, _table])(broken, rng)
        broken = _sealed(broken, rng)
        expect = asked if rng.random() < 0.7 else None
        found = _decode(broken, expect, measured=index % 50 == 0)
        valid = is_valid(broken, expect)
        assert isinstance(found, Update) == valid, f"{broken.hex()} valid: {valid}, found: {found}"
        if isinstance(found, Update):
            assert encode(found) == broken
            n_accepted += 1
        else:
            complaints.add(str(found).removeprefix("update, ").split(":")[0].split(" '")[0])
    specific = {"mask": ["padding of"], "masked": []}.get(kind, ["values of"])
    assert not {*REACHED, *specific} - complaints  # the corruption reaches every check
    assert 100 < n_accepted < N_PER_KIND / 2


def _decode(message: bytes, expect: Expectation | None, *, measured: bool) -> Update | UpdateError:
    if measured:
        tracemalloc.start()
    try:
        return decode(message, expect=expect, max_bytes=MAX_BYTES)
    except UpdateError as refusal:
        return refusal
    finally:
        if measured:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak_bytes <= MAX_BYTES


@pytest.mark.parametrize(
    ("kind", "n_rows"), [("mask", 500_000), ("statistics", 16_000), ("gram", 16_000), ("weights", 30_000)]
)
def test_a_large_broken_message_takes_less_memory_than_itself(kind: str, n_rows: int) -> None:
    update = _update(kind, _tensors(kind, n_rows))
    message, asked = encode(update), _expectation(update)
    assert len(message) > 400_000
    limit = max_message_bytes(asked)
    rng = random.Random(f"large {kind}")
    n_refused = 0
    for _ in range(60):
        broken = _sealed(rng.choice([_number, _field, _table, _value])(message, rng), rng)
        broken = _sealed(_table(broken, rng), rng)
        tracemalloc.start()
        try:
            found = decode(broken, expect=rng.choice([asked, None]), max_bytes=limit)
        except UpdateError:
            n_refused += 1
            assert tracemalloc.get_traced_memory()[1] < len(message)
        else:
            assert tracemalloc.get_traced_memory()[1] < 9 * limit  # a bit becomes a byte
            assert encode(found) == broken
        finally:
            tracemalloc.stop()
    assert n_refused > 20


def test_huge_claims_cost_nothing() -> None:
    message = bytearray(encode(_update("mask", {"q": torch.ones(8, 8, dtype=torch.bool)})))
    shape_at = 84 + len("site-a") + 3 + 1
    for offset, claim in [(shape_at, b"\xff" * 8), (82, b"\x00\x10"), (81, b"\x80"), (90, b"\xff")]:
        broken = bytearray(message)
        broken[offset : offset + len(claim)] = claim
        broken[-32:] = hashlib.sha256(broken[:-32]).digest()
        found = _decode(bytes(broken), None, measured=True)
        assert isinstance(found, UpdateError)
        assert "checksum" not in str(found)
