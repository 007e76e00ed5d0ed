"""The wire format of an update: what one participant shares about one block in one run.

``docs/wire-format.md`` specifies the format byte by byte. This module writes and reads it.
An update has exactly one encoding: the reader accepts a message only if the writer would have produced
the same bytes. A message holds names and numbers. Nothing in it is executed or names a class.

The reader checks the length first, then the checksum, the fields, the table of tensors and the values, and
builds tensors only after every check has passed. The checksum detects accidents, not forgeries: the
connection authenticates the sender.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from fedprllm.errors import UpdateError, did_you_mean
from fedprllm.sharing import SHARING
from fedprllm.sharing.interface import COUNTS, SINGLE, Wire

__all__ = [
    "DIGEST_BYTES",
    "GRADIENTS",
    "MASKED",
    "PARAMETERS",
    "VERSION",
    "Expectation",
    "Update",
    "decode",
    "encode",
    "max_message_bytes",
    "payload_bytes",
]

VERSION = 2
MAX_PARTICIPANT_BYTES = 128
MAX_NAME_BYTES = 255
MAX_TENSORS = 4096
MAX_DIMS = 4

_MAGIC = b"FEDPRLLM"
# magic, version, flags, total length, run id, model fingerprint, block, n_tokens, kind,
# length of participant, number of tensors
_FIXED = struct.Struct("<8sHHQ16s32sIQBBH")
_ENTRY = struct.Struct("<BBB")  # length of name, encoding, number of dimensions
DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_U32 = 2**32 - 1
_MAX_TOKENS = 2**63 - 1
_CHECKED_AT_ONCE = 2**16  # values; bounds the memory needed to check a payload
_SHOWN_CHARACTERS = 80

_CUT_OFF = "the message ends too early; send it whole, as encode returned it"
_RENAME = "choose another name"
_SAME_VERSION = "use the same version of fedprllm on both sides"
_OLDER = f"{_SAME_VERSION}, and begin a run that an older version left unfinished again"

# Control characters, line breaks and direction marks. Names are printed in ledgers and logs, where these
# characters could make one name look like another, or like a separate line.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class _Encoding(NamedTuple):
    dtype: torch.dtype
    carrier: str  # little-endian numpy type that holds the bits of one value


_ENCODINGS: dict[int, _Encoding] = {
    1: _Encoding(torch.bool, "u1"),
    2: _Encoding(torch.float32, "<i4"),
    # 3 was float64 in version 1.
    4: _Encoding(torch.float16, "<i2"),
    5: _Encoding(torch.bfloat16, "<i2"),
    6: _Encoding(torch.int64, "<i8"),
}
_CODES = {encoding.dtype: code for code, encoding in _ENCODINGS.items()}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# An update under masks: words that say nothing by themselves (`fedprllm.secure`).
MASKED = "masked"
GRADIENTS, PARAMETERS = "gradients", "parameters"
_KINDS: dict[str, Wire] = {kind: row.wire for kind, row in SHARING.items()}
_KINDS[MASKED] = Wire(6, COUNTS, COUNTS)
# Healing: a round's sums of gradients and losses, and the parameters that the next round begins with.
_KINDS[GRADIENTS] = Wire(12, COUNTS, COUNTS)
_KINDS[PARAMETERS] = Wire(13, SINGLE, SINGLE)
_KIND_NAMES = {kind.code: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, eq=False)
class Update:
    """What one participant shares about one block. :func:`encode` checks it.

    Attributes:
        run_id: UUID of the run, 16 bytes.
        participant: Name of the participant, 1 to 128 bytes of UTF-8 without control characters.
        block: Index of the decoder layer.
        kind: ``mask`` (True = pruned), ``statistics`` (sums of squares per input), ``gram``,
            ``weights``, ``outliers`` (number of outlying scores), ``masked`` (words under masks),
            ``gradients`` (sums of a round of healing, whose number is ``block``) or ``parameters``.
        model_fingerprint: Digest of the model that the update was computed from, 32 bytes.
        tensors: The content, by name, in any order.
        n_tokens: Number of calibration tokens that the update was computed from.
    """

    run_id: bytes
    participant: str
    block: int
    kind: str
    model_fingerprint: bytes
    tensors: Mapping[str, torch.Tensor]
    n_tokens: int


@dataclass(frozen=True)
class Expectation:
    """What the receiver asked for. An update that differs in any respect is refused.

    Attributes:
        run_id: UUID of the run, 16 bytes.
        model_fingerprint: Digest of the model, 32 bytes.
        block: Index of the decoder layer.
        kind: Kind of the update, as in :class:`Update`.
        shapes: Shape of every tensor, by name. The update must hold exactly these tensors.
        participant: Name of the sender, or None for any sender.
    """

    run_id: bytes
    model_fingerprint: bytes
    block: int
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    participant: str | None = None


class _Entry(NamedTuple):
    """One row of the table of tensors."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        return _payload_bytes(self.dtype, self.shape)


def encode(update: Update) -> bytes:
    """Encode an update. Each update has exactly one encoding.

    Args:
        update: The update. Its tensors may be on any device and have any strides.

    Returns:
        The message: 116 bytes, the participant's name, ``3 + len(name) + 4 * ndim`` bytes per tensor, and
        the values. A mask of n weights takes ``ceil(n / 8)`` bytes.

    Raises:
        UpdateError: A field violates the format, so every reader would refuse the message.
    """
    kind = _kind(update.kind)
    _check_length("run_id", update.run_id, 16)
    _check_length("model_fingerprint", update.model_fingerprint, 32)
    _check_range("block", update.block, 0, _MAX_U32)
    _check_range("n_tokens", update.n_tokens, 0, _most_tokens(update.kind))
    _check_range("number of tensors", len(update.tensors), 1, MAX_TENSORS)
    participant = _to_utf8("participant", update.participant, MAX_PARTICIPANT_BYTES)

    table: list[bytes] = []
    payloads: list[memoryview] = []
    for name in sorted(update.tensors):  # by code point, which is also the order of the UTF-8 bytes
        tensor, utf8 = update.tensors[name], _to_utf8("tensor name", name, MAX_NAME_BYTES)
        entry = _Entry(name, tensor.dtype, tuple(tensor.shape))
        _check_entry(update.kind, entry)
        table += [_ENTRY.pack(len(utf8), _CODES[entry.dtype], tensor.ndim), utf8]
        table += [struct.pack(f"<{tensor.ndim}I", *entry.shape)]
        payloads.append(_pack(update.kind, name, tensor))

    body = b"".join([participant, *table])
    payload_bytes = sum(payload.nbytes for payload in payloads)
    total_bytes = _FIXED.size + len(body) + payload_bytes + DIGEST_BYTES
    fixed = _FIXED.pack(
        *(_MAGIC, VERSION, 0, total_bytes, update.run_id, update.model_fingerprint, update.block),
        *(update.n_tokens, kind.code, len(participant), len(update.tensors)),
    )
    digest = hashlib.sha256(fixed + body)
    for payload in payloads:
        digest.update(payload)
    return b"".join([fixed, body, *payloads, digest.digest()])


def decode(data: bytes | bytearray | memoryview, *, expect: Expectation | None, max_bytes: int) -> Update:
    """Decode a message from an untrusted sender.

    A refused message costs no memory beyond the table of tensors and a fixed buffer. An accepted message
    costs its tensors; a mask takes one byte per weight in memory, eight times its length in the message.

    Args:
        data: The message and nothing else. It is copied, so the tensors do not keep it alive.
        expect: What was asked for, or None to accept any valid update for display.
        max_bytes: Length of the longest message to accept, from :func:`max_message_bytes`.

    Returns:
        The update. :func:`encode` turns it back into ``data``.

    Raises:
        UpdateError: ``data`` is not a valid message, or not the one that was asked for. The error names the
            field, what was expected and what was found.
    """
    view = memoryview(data).cast("B")
    _check_envelope(view, max_bytes)
    header, n_tensors, table_offset = _read_header(view)
    if expect is not None:
        _check_header(header, n_tensors, expect)
    entries, offset = _read_table(view, header.kind, n_tensors, table_offset)
    if expect is not None:
        _check_shapes(entries, expect.shapes)

    content_bytes = offset + sum(entry.payload_bytes for entry in entries) + DIGEST_BYTES
    if content_bytes != len(view):
        remedy = "the tensors in the table must fill the message exactly; send what encode returned"
        raise _refuse("payload", f"{content_bytes} bytes in total, by the table", len(view), remedy)
    payloads = []
    for entry in entries:
        payloads.append(view[offset : offset + entry.payload_bytes])
        offset += entry.payload_bytes
        _check_payload(header.kind, entry, payloads[-1])
    tensors = {entry.name: _unpack(entry, part) for entry, part in zip(entries, payloads, strict=True)}
    return replace(header, tensors=tensors)


def payload_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Number of bytes that the values of tensors take in a message, which ends with them and a digest."""
    return sum(_payload_bytes(tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values())


def max_message_bytes(expect: Expectation) -> int:
    """Length in bytes of the longest message that can satisfy ``expect``.

    Raises:
        UpdateError: The kind of ``expect`` is unknown.
    """
    name_bytes = MAX_PARTICIPANT_BYTES if expect.participant is None else len(expect.participant.encode())
    total_bytes = _FIXED.size + name_bytes + DIGEST_BYTES
    for name, shape in expect.shapes.items():
        dtypes = _allowed_dtypes(expect.kind, name)
        total_bytes += _ENTRY.size + len(name.encode()) + 4 * len(shape)
        total_bytes += max(_payload_bytes(dtype, shape) for dtype in dtypes)
    return total_bytes


# ---- reading -----------------------------------------------------------------------------------------


def _check_envelope(view: memoryview, max_bytes: int) -> None:
    """Check the length, the magic, the version, the flags and the checksum."""
    if len(view) > max_bytes:
        raise _refuse("length", f"at most {max_bytes} bytes", len(view), "send only what the run asks for")
    if len(view) < _FIXED.size + DIGEST_BYTES:
        raise _refuse("length", f"at least {_FIXED.size + DIGEST_BYTES} bytes", len(view), _CUT_OFF)
    magic, version, flags, total_bytes = struct.unpack_from("<8sHHQ", view)
    if magic != _MAGIC:
        raise _refuse("magic", _MAGIC, magic, "this is not an update of fedprllm")
    if version != VERSION:
        remedy = _OLDER if version < VERSION else _SAME_VERSION
        raise _refuse("version", VERSION, version, remedy)
    if flags != 0:
        raise _refuse("flags", 0, flags, _SAME_VERSION)
    if total_bytes != len(view):
        remedy = "the message was truncated or extended in transit; send it again"
        raise _refuse("total length", f"{len(view)} bytes, as received", total_bytes, remedy)
    expected, found = hashlib.sha256(view[:-DIGEST_BYTES]).digest(), bytes(view[-DIGEST_BYTES:])
    if found != expected:
        raise _refuse("checksum", expected, found, "the message was damaged in transit; send it again")


def _read_header(view: memoryview) -> tuple[Update, int, int]:
    """Read the fixed fields: the update without tensors, the number of tensors, the offset of their table."""
    fields = _FIXED.unpack_from(view)
    run_id, fingerprint, block, n_tokens, code, participant_bytes, n_tensors = fields[4:]
    if code not in _KIND_NAMES:
        raise _refuse("kind", _listed(_KIND_NAMES), code, _SAME_VERSION)
    _check_range("n_tokens", n_tokens, 0, _most_tokens(_KIND_NAMES[code]))
    _check_range("number of tensors", n_tensors, 1, MAX_TENSORS)
    participant, offset = _read_text(
        "participant", view[:-DIGEST_BYTES], _FIXED.size, participant_bytes, MAX_PARTICIPANT_BYTES
    )
    header = Update(run_id, participant, block, _KIND_NAMES[code], fingerprint, {}, n_tokens)
    return header, n_tensors, offset


def _check_header(header: Update, n_tensors: int, expect: Expectation) -> None:
    """Compare the header with what was asked for, before anything of variable size is read."""
    remedies = {
        "run_id": "the update belongs to another run; send the one for this run",
        "model_fingerprint": "its model has other weights; all participants must start from the same model",
        "block": "the update is for another block; send the one for the requested block",
        "kind": "the run shares another kind of update; use the run's configuration",
        "participant": "the update names another sender; send it under the participant's own name",
    }
    for field, remedy in remedies.items():
        expected, found = getattr(expect, field), getattr(header, field)
        if found != expected and expected is not None:
            raise _refuse(field, expected, found, remedy)
    if n_tensors != len(expect.shapes):
        remedy = f"the block has {', '.join(sorted(expect.shapes))}"
        raise _refuse("number of tensors", len(expect.shapes), n_tensors, remedy)


def _read_table(view: memoryview, kind: str, n_tensors: int, offset: int) -> tuple[list[_Entry], int]:
    """Read the table of tensors at ``offset``. Returns its entries and the offset of the payload."""
    view = view[:-DIGEST_BYTES]
    entries: list[_Entry] = []
    for index in range(n_tensors):
        if len(view) < offset + _ENTRY.size:
            raise _refuse("number of tensors", n_tensors, f"room for {index}", _CUT_OFF)
        name_bytes, code, ndim = _ENTRY.unpack_from(view, offset)
        name, offset = _read_text("tensor name", view, offset + _ENTRY.size, name_bytes, MAX_NAME_BYTES)
        if code not in _ENCODINGS:
            codes = {code: str(encoding.dtype) for code, encoding in _ENCODINGS.items()}
            raise _refuse(f"encoding of {name!r}", _listed(codes), code, _SAME_VERSION)
        if len(view) < offset + 4 * ndim:
            raise _refuse(f"shape of {name!r}", f"{ndim} sizes", "fewer", _CUT_OFF)
        entry = _Entry(name, _ENCODINGS[code].dtype, struct.unpack_from(f"<{ndim}I", view, offset))
        _check_entry(kind, entry)
        if entries and name <= entries[-1].name:
            expected = f"a name after {entries[-1].name!r}"
            raise _refuse("order of tensors", expected, repr(name), "sort them by name, without repetition")
        entries.append(entry)
        offset += 4 * ndim
    return entries, offset


def _check_shapes(entries: list[_Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for entry in entries:
        if entry.name not in shapes:
            names = ", ".join(sorted(shapes))
            raise _refuse("tensor name", f"one of {names}", entry.name, "the block has no such tensor")
        expected = tuple(shapes[entry.name])
        if entry.shape != expected:
            remedy = "the tensor belongs to another model or kind of update; use the run's"
            raise _refuse(f"shape of {entry.name!r}", expected, entry.shape, remedy)


def _check_payload(kind: str, entry: _Entry, payload: memoryview) -> None:
    """Check the values in place, in steps, so that a refused message is never copied."""
    if entry.dtype == torch.bool:
        used_bits = math.prod(entry.shape) % 8
        if used_bits and payload[-1] >> used_bits:
            remedy = "the unused bits of the last byte must be zero"
            raise _refuse(f"padding of {entry.name!r}", 0, payload[-1] >> used_bits, remedy)
        return
    step = _CHECKED_AT_ONCE * entry.dtype.itemsize
    for start in range(0, len(payload), step):
        _check_values(kind, entry.name, _numbers(entry.dtype, payload[start : start + step]))


def _unpack(entry: _Entry, payload: memoryview) -> torch.Tensor:
    if entry.dtype != torch.bool:
        return _numbers(entry.dtype, payload).reshape(entry.shape)
    stored = np.frombuffer(payload, np.uint8)
    bits = np.unpackbits(stored, count=math.prod(entry.shape), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(entry.shape)


def _numbers(dtype: torch.dtype, payload: memoryview) -> torch.Tensor:
    """Copy numbers out of a message: there they may be unaligned and read-only, in a tensor they may not."""
    stored = np.frombuffer(payload, _ENCODINGS[_CODES[dtype]].carrier)
    return torch.from_numpy(stored.astype(stored.dtype.newbyteorder("="))).view(dtype)


# ---- rules of both sides -----------------------------------------------------------------------------


def _pack(kind: str, name: str, tensor: torch.Tensor) -> memoryview:
    """Return the payload of one tensor, without copying if its memory already has the right layout."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bool:
        return np.packbits(values.numpy(), bitorder="little").data
    _check_values(kind, name, values)
    carrier = _ENCODINGS[_CODES[values.dtype]].carrier
    return values.view(_INTEGERS[values.dtype.itemsize]).numpy().astype(carrier, copy=False).data


def _check_values(kind: str, name: str, values: torch.Tensor) -> None:
    low, high = (extreme.item() for extreme in torch.aminmax(values))  # NaN propagates to both
    if not (math.isfinite(low) and math.isfinite(high)):
        found = next(value for value in (low, high) if not math.isfinite(value))
        remedy = "the calibration overflowed; try --dtype float32"
        raise _refuse(f"values of {name!r}", "finite numbers", found, remedy)
    if _KINDS[kind].not_negative and low < 0:
        raise _refuse(
            f"values of {name!r}", f"{_KINDS[kind].not_negative}, 0 or more", low, "send them as computed"
        )
    grid = _KINDS[kind].grid
    if grid is not None and not grid.holds(values.reshape(-1)):
        expected = f"multiples of 2^-{grid.fraction_bits} below 2^{grid.magnitude_bits}"
        raise _refuse(f"values of {name!r}", expected, f"others from {low} to {high}", _SAME_VERSION)


def _check_entry(kind: str, entry: _Entry) -> None:
    dtypes = _allowed_dtypes(kind, entry.name)
    if entry.dtype not in dtypes:
        remedy = f"an update of kind '{kind}' allows no other type for this name"
        raise _refuse(f"encoding of {entry.name!r}", " or ".join(map(str, dtypes)), entry.dtype, remedy)
    _check_range(f"number of dimensions of {entry.name!r}", len(entry.shape), 1, MAX_DIMS)
    for size in entry.shape:
        _check_range(f"shape of {entry.name!r}", size, 1, _MAX_U32)


def _allowed_dtypes(kind: str, name: str) -> tuple[torch.dtype, ...]:
    return _kind(kind).mask_dtypes if name.endswith(".mask") else _kind(kind).dtypes


def _kind(name: str) -> Wire:
    if name not in _KINDS:
        raise UpdateError(f"unknown kind of update {did_you_mean(name, _KINDS)}")
    return _KINDS[name]


def _most_tokens(kind: str) -> int:
    return 0 if kind == MASKED else _MAX_TOKENS


def _payload_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    n_values = math.prod(shape)
    return (n_values + 7) // 8 if dtype == torch.bool else n_values * dtype.itemsize


def _to_utf8(field: str, text: str, limit: int) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise _refuse(field, "text that UTF-8 can hold", repr(text), _RENAME) from None
    _read_text(field, memoryview(raw), 0, len(raw), limit)
    return raw


def _read_text(field: str, view: memoryview, offset: int, n_bytes: int, limit: int) -> tuple[str, int]:
    """Read a name of ``n_bytes`` at ``offset``. Returns the name and the offset after it."""
    _check_range(f"length of {field}", n_bytes, 1, limit)
    raw = bytes(view[offset : offset + n_bytes])
    if len(raw) < n_bytes:
        raise _refuse(field, f"{n_bytes} bytes", len(raw), _CUT_OFF)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise _refuse(field, "valid UTF-8", raw, _RENAME) from None
    if _UNPRINTABLE.search(text):
        raise _refuse(field, "no control or direction characters", repr(text), _RENAME)
    return text, offset + n_bytes


def _check_length(field: str, value: bytes, n_bytes: int) -> None:
    if not isinstance(value, bytes) or len(value) != n_bytes:
        raise _refuse(field, f"{n_bytes} bytes", repr(value), "pass raw bytes, not hexadecimal digits")


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise _refuse(field, f"an integer from {low} to {high}", value, "the format allows no others")


def _listed(names: Mapping[int, str]) -> str:
    return " or ".join(f"{code} ({name})" for code, name in names.items())


def _refuse(field: str, expected: object, found: object, remedy: str) -> UpdateError:
    return UpdateError(f"update, {field}: expected {_show(expected)}, found {_show(found)}: {remedy}")


def _show(value: object) -> str:
    """Format a value, truncated: the sender chooses what was found, and errors are logged."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
