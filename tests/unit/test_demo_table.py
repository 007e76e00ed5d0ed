"""The demonstration's table: what is averaged, and that no sparse model is called smaller or faster."""

from __future__ import annotations

import math

import pytest

from fedprllm.demo import compare
from fedprllm.demo.compare import demo_sizes, demo_speeds, demo_summary
from fedprllm.demo.speed import tokens_per_second
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import write_sealed
from fedprllm.progress import silent


def rows(**perplexity: float) -> list[Perplexity]:
    return [
        Perplexity(text=text, perplexity=value, nll=math.log(value), n_tokens=10, n_windows=1)
        for text, value in perplexity.items()
    ]


def test_models_made_alone_are_shown_on_their_own_and_on_the_others_text():
    comparison = {
        name: rows(a=1.0, b=2.0)
        for name in (
            "dense",
            "dense, healed",
            "federated",
            "federated, healed",
            "centralized",
            "federated, gram",
            "federated, smaller",
        )
    }
    for way, extra in (("local-only", 0.0), ("local-only, smaller", 2.0)):
        comparison[f"{way}: a"] = rows(a=10.0 + extra, b=20.0 + extra)
        comparison[f"{way}: b"] = rows(a=30.0 + extra, b=40.0 + extra)
    found = demo_summary(comparison)
    assert found["smaller: alone, own text"] == [12.0, 42.0, 27.0]
    assert found["smaller: alone, others'"] == [32.0, 22.0, 27.0]
    assert found["masks: alone, own text"] == [10.0, 40.0, 25.0]
    assert list(found)[-1] == "smaller: together"
    assert found["smaller: together"] == [1.0, 2.0, 1.5]


def test_only_a_smaller_model_has_another_size(tmp_path, small_model):
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    (smaller / "model.safetensors").write_bytes(bytes(1_500_000))
    models = {"dense": small_model, "sparse": small_model, "smaller": smaller}
    compare._weigh(tmp_path / "sizes.json", models)
    found = demo_sizes(tmp_path)
    n_bytes = sum(path.stat().st_size for path in small_model.glob("*.safetensors"))
    sparse = {found[name] for name in ("masks: together", "masks: together, healed", "Gram: together")}
    assert {found["dense"]} == sparse == {f"{n_bytes / 1e6:.0f}"}
    assert found["smaller: together"] == "2"
    compare._weigh(tmp_path / "sizes.json", {})  # what is known is not looked up again
    assert demo_sizes(tmp_path) == found


def test_every_kind_of_model_has_a_speed(tmp_path, small_model):
    found = tokens_per_second({"dense": small_model, "smaller": small_model}, silent, n_tokens=2)
    assert found.keys() == {"dense", "smaller"}
    assert all(rate > 0 for rate in found.values())
    write_sealed(tmp_path / "speeds.json", {"dense": 9.96, "sparse": 10.0, "smaller": 12.04})
    shown = demo_speeds(tmp_path)
    assert (shown["dense"], shown["masks: together, healed"], shown["smaller: together"]) == (
        "10.0",
        "10.0",
        "12.0",
    )
    assert shown.keys() == compare._SHOWN.keys()


@pytest.mark.parametrize("way", [way for way in compare._WAYS if "smaller" in way])
def test_the_smaller_model_is_a_configuration_that_can_be_run(way):
    config = compare.PruneConfig(
        **{"sparsity": 0.5, "windows": 4, "window_length": 512, **compare._WAYS[way]}
    )
    assert config.share == "channels"
    assert config.sparsity == 0
