"""Each mistake is refused with a message that names it, before any computation or output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedprllm import ConfigError, DataError, FedprllmError, ModelError, PruneConfig, evaluate, prune
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.inputs import PooledData


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch, request):
    if "computes" not in request.keywords:
        monkeypatch.setattr(BlockwiseModel, "block", lambda *_: pytest.fail("computed"))


def refused(kind: type[FedprllmError], pattern: str, tmp_path: Path, *args, **options) -> None:
    with pytest.raises(kind, match=pattern):
        prune(*args, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), found 1"),
        ({"sparsity": -0.1}, r"found -0\.1"),
        ({"sparsity": "half"}, "sparsity: .*found 'half'"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"pattern": "4:2"}, "0 < N < M.*found '4:2'"),
        ({"pattern": "2-4"}, "found '2-4'"),
        ({"pattern": "2:4", "sparsity": 0.7}, r"implies sparsity 0\.5, found sparsity 0\.7"),
        ({"local_group": "rows"}, "unknown value of local_group: 'rows'; did you mean 'row'"),
        ({"server_group": "colum"}, "did you mean 'column'"),
        ({"strategy": "oneshot"}, "did you mean 'one-shot'"),
        ({"criterion": "wnda"}, "did you mean 'wanda'"),
        ({"ties": "first"}, "unknown value of ties: 'first'.*Available: index, random, magnitude"),
        ({"dtype": "fp16"}, "Available: float32, bfloat16, float16"),
        ({"windows": -1}, "windows: .*found -1"),
        ({"sparsty": 0.5}, "unknown option 'sparsty'; did you mean 'sparsity'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_configuration(options, pattern):
    with pytest.raises(ConfigError, match=pattern):
        PruneConfig(**options)


def test_configuration_is_immutable():
    with pytest.raises(Exception, match="frozen"):
        PruneConfig().sparsity = 0.7


@pytest.mark.parametrize(
    ("participants", "pattern"),
    [
        ([], "no participants"),
        ({}, "no participants"),
        ("hospital.txt", "must be a list"),
        (torch.zeros(2, 16, dtype=torch.int64), "found one tensor: wrap it in a list"),
        ([torch.zeros(2, 16)], r"participant-0.*must be integers \[n_windows, window_length\]"),
        ([torch.zeros(16, dtype=torch.int64)], r"must be integers"),
        ([torch.zeros(0, 16, dtype=torch.int64)], "at least one window"),
        ([torch.zeros(2, 1, dtype=torch.int64)], "at least 2 tokens"),
        ([torch.zeros(2, 65, dtype=torch.int64)], "window length 65 exceeds the model's limit of 64 tokens"),
        ([torch.full((2, 16), 128)], "vocabulary has 0 to 127"),
        ([torch.full((2, 16), -1)], "ids from -1"),
    ],
)
def test_participants(tiny, tmp_path, participants, pattern):
    refused(DataError, pattern, tmp_path, tiny("llama"), participants)
    assert not (tmp_path / "run").exists()


def test_text_files(small_model, tmp_path):
    text = tmp_path / "hospital_a.txt"
    refused(DataError, "hospital_a.txt", tmp_path, small_model, [text])
    text.write_text("")
    refused(DataError, "hospital_a.txt holds no text", tmp_path, small_model, [text])
    text.write_bytes(b"abc\x00\xff" * 100)
    refused(DataError, "hospital_a.txt", tmp_path, small_model, [text])
    text.write_text("Once upon a time.")
    refused(DataError, "too short for one window", tmp_path, small_model, [text])
    text.write_text("Once upon a time there was a little girl. " * 100)
    refused(
        DataError,
        "fewer windows|windows.*participants",
        tmp_path,
        small_model,
        PooledData([text], 100, "iid"),
        config=PruneConfig(window_length=512, windows=0),
    )
    assert not (tmp_path / "run").exists()


def test_text_without_a_tokenizer(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    refused(ModelError, "no usable tokenizer", tmp_path, tiny("llama"), [tmp_path / "a.txt"])


@pytest.mark.parametrize(
    ("options", "kind", "pattern"),
    [
        ({"partition": "ii"}, ConfigError, "did you mean 'iid'"),
        ({"n_participants": 0}, ConfigError, "at least 1, found 0"),
        ({"alpha": 0.0}, ConfigError, "alpha must be positive"),
        ({"paths": []}, DataError, "no data"),
    ],
)
def test_pooled_data(options, kind, pattern):
    with pytest.raises(kind, match=pattern):
        PooledData(**({"paths": ["a.txt"], "n_participants": 2} | options))


def test_pattern_that_does_not_divide(tiny, windows, tmp_path):
    config = PruneConfig(pattern="2:5")
    refused(
        ConfigError,
        r"2:5 does not divide the 32 inputs of 'model\.layers\.0",
        tmp_path,
        tiny("llama"),
        [windows(0)],
        config=config,
    )


def test_missing_model(windows, tmp_path):
    refused(ModelError, "nowhere", tmp_path, tmp_path / "nowhere", [windows(0)])


def test_unknown_device(tiny, windows, tmp_path):
    refused(
        ModelError,
        "cannot compute on device 'gpu'",
        tmp_path,
        tiny("llama"),
        [windows(0)],
        config=PruneConfig(device="gpu"),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny, windows, tmp_path, value):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(
        ModelError,
        r"'model\.layers\.1\.mlp\.up_proj\.weight' contains NaN or infinity in 1 of",
        tmp_path,
        tmp_path / "model",
        [windows(0)],
    )


@pytest.mark.computes
def test_activations_that_are_not_finite(tiny, windows, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(
        ModelError,
        r"inputs of 'model\.layers\.1\.mlp\.down_proj\.weight'.*participant 'participant-0'",
        tmp_path,
        tmp_path / "model",
        [windows(0)],
    )


def test_more_blocks_than_the_configuration_says(tiny, windows, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    pattern = r"holds weights of 3 blocks \('model\.layers\.2'\), and its config\.json says 2"
    refused(ModelError, pattern, tmp_path, tmp_path / "model", [windows(0)])


def test_output_among_the_text(small_model, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Once upon a time. " * 50)
    for texts in ([tmp_path / "texts"], [str(tmp_path / "texts" / ".." / "texts")]):
        with pytest.raises(ConfigError, match=r"lies in .*texts, which is read as text.*--out"):
            prune(small_model, texts, out=tmp_path / "texts" / "run")
    with pytest.raises(ConfigError, match="lies in"):
        prune(small_model, PooledData(tmp_path / "texts", 2), out=tmp_path / "texts")
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a.txt"]


@pytest.mark.computes
def test_a_loss_beyond_the_range_of_float16(small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] *= 1e4
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "a.txt").write_text("Once upon a time. " * 50)
    assert evaluate(tmp_path / "model", tmp_path / "a.txt", window_length=16)[0].nll > 0
    with pytest.raises(ModelError, match=r"loss on 'a' is (inf|nan).*range of float16.*bfloat16 or float32"):
        evaluate(tmp_path / "model", tmp_path / "a.txt", window_length=16, dtype="float16")


def test_model_without_decoder_blocks(tmp_path, windows):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    refused(ModelError, ".", tmp_path, tmp_path / "model", [windows(0)])


def test_experts_that_cannot_be_taken_apart_are_refused(tmp_path, windows):
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    refused(ModelError, "fused mixture-of-experts", tmp_path, tmp_path / "model", [windows(0)])


def test_centralized_needs_one_window_length(tiny, windows, tmp_path):
    participants = [windows(0), windows(1, 2, 12)]
    refused(
        DataError,
        "one length, found",
        tmp_path,
        tiny("llama"),
        participants,
        config=PruneConfig(strategy="centralized"),
    )


def test_evaluation_without_text(tiny):
    with pytest.raises(DataError, match="no text"):
        evaluate(tiny("llama"), [])
