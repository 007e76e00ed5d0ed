"""A block's stored votes are read back as counted, in the orientation of the checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors import safe_open
from torch import nn

from fedprllm.core.bitplanes import PackedVotes, pack
from fedprllm.models.block import Linear
from fedprllm.pruning.stored_votes import StoredVotes, save_votes


def test_votes_come_back_as_counted(tmp_path):
    plain = Linear("a.weight", "a", (5, 9), False, torch.float32, "a.weight", nn.Linear(9, 5))
    transposed = replace(plain, name="b.weight", transposed=True)
    unvoted = replace(plain, name="c.weight")
    linears = {linear.name: linear for linear in (plain, transposed, unvoted)}
    expected, votes = {}, {}
    for seed, name in enumerate(("a.weight", "b.weight")):
        masks = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
        votes[name] = PackedVotes(45)
        votes[name].add(*map(pack, masks))
        expected[name] = masks.sum(dim=0)
    path = tmp_path / "block.safetensors"
    save_votes(path, votes | {"a.weight.mask": votes["a.weight"]}, linears)
    stored = StoredVotes(dict.fromkeys(expected, path))
    assert list(stored) == ["a.weight", "b.weight"]
    assert stored["a.weight"].dtype == torch.uint8
    assert torch.equal(stored["a.weight"].long(), expected["a.weight"])
    assert torch.equal(stored["b.weight"].long(), expected["b.weight"].T)
    with safe_open(path, framework="pt") as opened:
        assert sorted(opened.keys()) == ["a.weight", "b.weight"]
        assert opened.get_tensor("a.weight").shape == (2, 6)  # two bits for three votes, 45 weights


def test_without_votes_there_is_no_file(tmp_path):
    linear = Linear("a.weight", "a", (5, 9), False, torch.float32, "a.weight", nn.Linear(9, 5))
    save_votes(tmp_path / "block.safetensors", {}, {"a.weight": linear})
    assert not list(tmp_path.iterdir())
