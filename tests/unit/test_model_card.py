"""The model card: metadata as model hubs read it."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import ModelCard

from fedprllm import Perplexity, prune
from fedprllm.pruning.model_card import write_model_card


def test_the_model_card_inherits_license_and_language_and_states_perplexities(tiny, windows, tmp_path):
    model = tmp_path / "dense"
    shutil.copytree(tiny("llama"), model)
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [chat]\n---\n# Dense\n"
    (model / "README.md").write_text(card)
    result = prune(model, [windows(0), windows(1)], out=tmp_path / "run")
    data = ModelCard.load(result.model_dir / "README.md").data
    assert (data.license, data.language, data.tags) == (
        "apache-2.0",
        ["en", "de"],
        ["pruned", "sparse", "fedprllm"],
    )
    assert data.base_model is None, "a folder is no name that others know"
    rows = [
        Perplexity(text=text, perplexity=value, nll=2.5, n_tokens=9, n_windows=1)
        for text, value in {"held out": 12.34567, "north": 8.5}.items()
    ]
    record = result.record.model_copy(update={"evaluation": {"dense": rows, "model": rows}})
    record = record.model_copy(update={"model": record.model.model_copy(update={"source": "some/model"})})
    write_model_card(result.model_dir, record)
    data = ModelCard.load(result.model_dir / "README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", "some/model")
    measured = [(one.dataset_name, one.metric_value) for one in data.eval_results]
    assert measured == [("held out", 12.3457), ("north", 8.5)]


@pytest.mark.parametrize("card", ["", "---\n: [\n---\n", "---\nlicense: [\n---\n", "no metadata"])
def test_a_card_that_cannot_be_read_is_inherited_nothing_from(card, tiny, windows, tmp_path):
    model = tmp_path / "dense"
    shutil.copytree(tiny("llama"), model)
    (model / "README.md").write_text(card)
    result = prune(model, [windows(0)], out=tmp_path / "run")
    assert ModelCard.load(result.model_dir / "README.md").data.license is None
