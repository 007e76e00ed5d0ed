"""Files written tensor by tensor are what the safetensors library writes from memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedprllm.models.tensor_file import Made, made, write_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (10 * values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_the_library(dtype, tmp_path):
    tensors = {"b": random(3, 5, dtype=dtype), "a": random(7, dtype=dtype), "none": random(0, 4, dtype=dtype)}
    tensors["scalar"] = random(dtype=dtype)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_precision_in_one_file_is_read_back(tmp_path):
    tensors = {f"ä{dtype}": random(3, 1 + n, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    write_tensors(tmp_path / "file", tensors, {"format": "pt", "ö": '"quoted"'})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "ö": '"quoted"'}


def test_views_are_written_as_they_look(tmp_path):
    whole = random(6, 4)
    write_tensors(tmp_path / "file", {"t": whole.T, "every second": whole[::2]}, {})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["t"], whole.T)
    assert torch.equal(found["every second"], whole[::2])


def test_one_part_is_in_memory_at_a_time(tmp_path):
    """Each part of a tensor is gone when the next is made, and no tensor is made before its turn."""
    alive = 0

    class Part:
        def __init__(self, value: Tensor) -> None:
            nonlocal alive
            alive += 1
            assert alive == 1
            self.value = value

        def cpu(self) -> Tensor:
            return self.value

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def parts() -> Iterator[Part]:
        for number in range(3):
            yield Part(random(2, 4) + number)

    tensors = {name: Made((6, 4), torch.float32, parts) for name in "ab"}
    write_tensors(tmp_path / "file", tensors, {})
    expected = torch.cat([random(2, 4) + number for number in range(3)])
    assert all(torch.equal(found, expected) for found in load_file(tmp_path / "file").values())
    assert alive == 0


def test_a_tensor_in_parts_is_the_same_in_memory():
    whole = random(6, 4)
    assert made(whole) is whole
    assert torch.equal(made(Made((6, 4), whole.dtype, lambda: whole.split(2))), whole)
    assert made(Made.like(whole, lambda: whole)) is not None
    stacked = Made((3, 2, 4), whole.dtype, lambda: whole.split(2))
    assert torch.equal(made(stacked), whole.reshape(3, 2, 4))


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    def fails() -> Iterator[Tensor]:
        yield random(2, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "file", {"a": Made((4, 4), torch.float32, fails)}, {})
    with pytest.raises(AssertionError, match="'a' is not what its shape says"):
        write_tensors(tmp_path / "file", {"a": Made((4, 4), torch.float32, lambda: [random(2, 4)])}, {})
    assert list(tmp_path.iterdir()) == []
