"""A packed model comes back bit by bit, takes little space, and a damaged one is refused."""

from __future__ import annotations

import hashlib
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedprllm import ConfigError, ModelError, PruneConfig, RunError, prune
from fedprllm.cli.app import app
from fedprllm.packing import archive, values
from fedprllm.packing.archive import pack, unpack
from fedprllm.packing.values import pack_values, unpack_values

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]


def same_files(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def model_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(64, 48) * (torch.rand(64, 48) < 0.5)
    tensors = {str(dtype).removeprefix("torch."): (weight * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "zeros": torch.zeros(7)}
    tensors["odd"] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1.0])
    found = model_folder(tmp_path / "model", tensors)
    (found / "chat").mkdir()
    (found / "chat" / "template.jinja").write_text("{{ x }}")
    (found / "empty.txt").write_text("")
    return found


def test_everything_comes_back_bit_by_bit(folder, tmp_path):
    packed = pack(folder, tmp_path / "model.fedpack")
    assert packed.n_files == 4
    assert packed.n_packed_bytes == (tmp_path / "model.fedpack").stat().st_size
    assert unpack(tmp_path / "model.fedpack", tmp_path / "again") == packed
    same_files(folder, tmp_path / "again")


def test_packing_twice_gives_the_same_bytes(folder, tmp_path):
    for name in ("one", "other"):
        pack(folder, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_pruned_model_comes_back_and_is_smaller(small_model, tmp_path):
    windows = torch.randint(4, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    result = prune(small_model, [windows], PruneConfig(sparsity=0.5), out=tmp_path / "run")
    packed = pack(result.model_dir, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    same_files(result.model_dir, tmp_path / "again")
    assert packed.n_packed_bytes < 0.65 * packed.n_bytes


def test_half_of_the_values_of_a_bfloat16_matrix_take_less_than_0_41(tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) * 0.02
    weight[weight.abs() < weight.abs().median()] = 0
    found = model_folder(tmp_path / "model", {"weight": weight.to(torch.bfloat16)})
    packed = pack(found, tmp_path / "packed")
    assert packed.n_packed_bytes < 0.41 * packed.n_bytes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.lists(st.one_of(st.just(0), st.integers(0, 255)), max_size=400),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    floating=st.booleans(),
)
def test_any_values_come_back(data, itemsize, floating):
    raw = bytes(data[: len(data) - len(data) % itemsize])
    packed = bytearray()
    pack_values(raw, itemsize, floating=floating, write=packed.extend)
    view = memoryview(bytes(packed))
    place = 0

    def read(n_bytes: int) -> bytes:
        nonlocal place
        place += n_bytes
        return bytes(view[place - n_bytes : place])

    assert unpack_values(read, len(raw) // itemsize, itemsize, floating=floating) == raw
    assert place == len(packed)


def test_chunks_do_not_show(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "CHUNK_VALUES", 1000)
    monkeypatch.setattr(archive, "_PLAIN_CHUNK", 7)
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    same_files(folder, tmp_path / "again")


def by_the_specification(files: dict[str, bytes], tensor: tuple[bytes, list[int]]) -> bytes:
    """A packed model built by hand, as docs/packed-format.md says, without compression."""

    def segment(data: bytes) -> bytes:
        return struct.pack("<BI", 0, len(data)) + data

    header, bits = tensor
    content = struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(bits)}H", *bits)
    sizes = [len(data) for data in files.values()] + [len(content)]
    out = struct.pack("<8sHHIQ", b"FEDPACK\0", 1, 0, len(files) + 1, sum(sizes))
    for name, data in files.items():
        out += struct.pack("<HBQ", len(name), 0, len(data)) + name.encode() + segment(data)
        out += hashlib.sha256(data).digest()
    name = "model.safetensors"
    out += struct.pack("<HBQ", len(name), 1, len(content)) + name.encode()
    out += struct.pack("<Q", len(header)) + segment(header)
    kept = [value for value in bits if value]
    mask = sum(1 << place for place, value in enumerate(bits) if value)
    rotated = [(value << 1 | value >> 15) & 0xFFFF for value in kept]
    out += struct.pack("<I", len(kept)) + segment(mask.to_bytes((len(bits) + 7) // 8, "little"))
    out += segment(bytes(value & 0xFF for value in rotated)) + segment(bytes(value >> 8 for value in rotated))
    out += hashlib.sha256(content).digest()
    return out + hashlib.sha256(out).digest()


HEADER = b'{"w":{"dtype":"BF16","shape":[9],"data_offsets":[0,18]}}'
BITS = [0, 0x3F80, 0x8000, 0, 0, 0xBF80, 0, 0x7FC0, 1]


def test_the_format_is_the_specified_one(tmp_path):
    data = by_the_specification({"config.json": b"{}"}, (HEADER, BITS))
    (tmp_path / "packed").write_bytes(data)
    unpack(tmp_path / "packed", tmp_path / "model")
    content = struct.pack("<Q", len(HEADER)) + HEADER + np.array(BITS, "<u2").tobytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == content
    assert (tmp_path / "model" / "config.json").read_bytes() == b"{}"
    # So few bytes are shorter without compression, except for the header.
    pack(tmp_path / "model", tmp_path / "again")
    start = data.index(struct.pack("<I", 5) + struct.pack("<BI", 0, 2))
    assert data[start:-32] in (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//b", "", ".", "a\\b", "C:x", "a\0b", "A"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    """``A`` lies inside, but before ``config.json`` was written: names are in order and never twice."""
    data = by_the_specification({"config.json": b"{}", name: b"x"}, (HEADER, BITS))
    (tmp_path / "packed").write_bytes(data)
    with pytest.raises(ModelError, match="cannot be the next file's name"):
        unpack(tmp_path / "packed", tmp_path / "sub" / "model")
    assert not list((tmp_path / "sub").iterdir())
    assert not (tmp_path / "x").exists()


def test_every_flipped_byte_is_noticed(tmp_path):
    data = bytearray(by_the_specification({"config.json": b"{}"}, (HEADER, BITS)))
    for place in range(len(data)):
        data[place] ^= 0x10
        (tmp_path / "packed").write_bytes(bytes(data))
        with pytest.raises((ModelError, RunError)):
            unpack(tmp_path / "packed", tmp_path / "model")
        assert not (tmp_path / "model").exists()
        data[place] ^= 0x10


def test_every_cut_is_noticed(tmp_path):
    data = by_the_specification({"config.json": b"{}"}, (HEADER, BITS))
    for length in (*range(0, len(data), 7), len(data) - 1):
        (tmp_path / "packed").write_bytes(data[:length])
        with pytest.raises(ModelError, match="damaged or not a packed model"):
            unpack(tmp_path / "packed", tmp_path / "model")
    (tmp_path / "packed").write_bytes(data + b"x")
    with pytest.raises(ModelError, match="checksum"):
        unpack(tmp_path / "packed", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_nothing_is_decompressed_beyond_its_length():
    bomb = values.pack_bytes(bytes(50_000_000))
    assert len(bomb) < 100_000
    stream = bytearray(bomb)

    def read(n_bytes: int) -> bytes:
        data = bytes(stream[:n_bytes])
        del stream[:n_bytes]
        return data

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="expected a segment of"):
        values.unpack_bytes(read, 200_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:20], "bytes"),
        (lambda data: struct.pack("<Q", 2**40) + data[8:], "expected a header of at most"),
        (lambda data: data[:8] + b"[" + data[9:], "not that of a safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"F33"'), "type F33 is unknown"),
        (lambda data: data + b"more", "bytes of tensors, found"),
    ],
)
def test_a_damaged_model_is_not_packed(tmp_path, damage, words):
    found = model_folder(tmp_path / "model", {"w": torch.ones(5, 5)})
    path = found / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=words):
        pack(found, tmp_path / "packed")
    assert not list(tmp_path.glob("*pack*"))


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="not a model's folder"):
        pack(tmp_path, tmp_path / "packed")
    with pytest.raises(ConfigError, match="lies in the folder"):
        pack(folder, folder / "packed")
    with pytest.raises(ConfigError, match="there is no file"):
        unpack(tmp_path / "none", tmp_path / "out")
    pack(folder, tmp_path / "packed")
    with pytest.raises(ConfigError, match="exists: name a folder"):
        unpack(tmp_path / "packed", folder)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """80 MB of weights in one tensor: far less than that on top of the libraries, in both directions."""
    found = model_folder(tmp_path / "model", {"w": torch.randn(20_000_000)})
    code = (
        "import resource, sys; from pathlib import Path; from fedprllm.packing.archive import pack, unpack\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "a, b, c = map(Path, sys.argv[1:]); pack(a, b); unpack(b, c)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    arguments = [str(found), str(tmp_path / "packed"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ, check=True
    )
    assert int(done.stdout) < 3 * 4 * values.CHUNK_VALUES * 4 // 1024 + 40_000
    same_files(found, tmp_path / "again")


def test_the_commands(folder, tmp_path):
    result = CliRunner().invoke(app, ["pack", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model.fedpack").exists()
    assert "fedprllm unpack" in result.output
    result = CliRunner().invoke(
        app, ["unpack", str(tmp_path / "model.fedpack"), str(tmp_path / "again")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    same_files(folder, tmp_path / "again")
