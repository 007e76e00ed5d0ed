"""The text decoder of a multimodal model is pruned like any other; everything around it stays as it is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedprllm import PruneConfig, prune
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.find import beside_text
from tests.multimodal import CONFIGS, save_multimodal
from tests.naive_run import Whole, differences

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = PruneConfig(window_length=16)


@pytest.fixture(params=sorted(CONFIGS))
def folder(request, tmp_path):
    save_multimodal(request.param, tmp_path / "model")
    return tmp_path / "model"


def test_it_agrees_with_a_naive_run_of_the_whole_model(folder, windows, tmp_path):
    participants = [windows(0), windows(1)]
    result = prune(folder, {"north": participants[0], "south": participants[1]}, CONFIG, out=tmp_path / "run")
    assert differences(folder, participants, result) == []
    source = load_file(folder / "model.safetensors")
    pruned = {}
    for shard in result.model_dir.glob("*.safetensors"):
        pruned |= load_file(shard)
    assert pruned.keys() == source.keys()
    words = ("vis", "audio", "projector", "connector")
    towers = [name for name in source if any(word in name for word in words)]
    assert len(towers) > 20
    assert all(torch.equal(source[name], pruned[name]) for name in towers)


def test_its_towers_are_neither_read_nor_reached_by_text(folder, windows, monkeypatch):
    model = BlockwiseModel(folder)
    state = model.skeleton.state_dict(keep_vars=True)
    beside = {name for name, tensor in state.items() if id(tensor) in beside_text(model.skeleton)}
    assert len(beside) > 20
    load, read = model.checkpoint.load, []

    def noting(names):
        read.extend(names)
        return load(names)

    monkeypatch.setattr(model.checkpoint, "load", noting)
    (hidden,) = model.embed(windows(0, 1))
    assert torch.isfinite(hidden).all()
    assert read
    assert not beside & set(read)


def test_its_loss_is_that_of_the_whole_model(folder, windows):
    window = windows(0, 1)[0]
    with torch.no_grad():
        logits = Whole(folder).model(input_ids=window[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")
    model = BlockwiseModel(folder)
    (hidden,) = model.embed([window])
    for index in range(model.n_blocks):
        with model.block(index) as block:
            hidden = block.forward(hidden)
    with model.head():
        torch.testing.assert_close(model.token_losses(hidden, window), expected, rtol=1e-4, atol=1e-5)
