"""Architectures of every kind agree with a naive run; `python -m benchmarks.zoo` tries all types."""

from __future__ import annotations

import warnings

import pytest

from benchmarks.zoo import Outcome, outcome_of, page
from tests.zoo import model_types

# Chosen for what they do differently: state space models, hybrids, convolutions, routers of every form,
# experts stored fused or one by one, latent attention, post-norms, ALiBi, learned positions, decoders of
# encoder-decoder models.
AGREE = [
    "afmoe",
    "bamba",
    "biogpt",
    "cohere2",
    "doge",
    "ernie4_5_moe",
    "falcon_mamba",
    "gemma2",
    "glm4_moe",
    "gpt_bigcode",
    "gptj",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "mamba2",
    "mpt",
    "nemotron",
    "olmo2",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
    "recurrent_gemma",
    "starcoder2",
    "whisper",
]
REFUSED = {
    "llama4_text": "fused mixture-of-experts weights of this form",
    "gemma3n_text": "hidden states of shape",
}


@pytest.mark.parametrize("model_type", [one for one in AGREE if one in model_types()])
def test_agrees_with_a_naive_run(model_type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = outcome_of(model_type, n_participants=2)
    assert outcome.kind == "agrees", outcome


@pytest.mark.parametrize("model_type", [one for one in REFUSED if one in model_types()])
def test_is_refused_in_words(model_type) -> None:
    outcome = outcome_of(model_type)
    assert outcome.kind == "refused"
    assert REFUSED[model_type] in outcome.words


def test_the_page_counts_and_names_every_type() -> None:
    outcomes = {
        "one": Outcome("agrees", ""),
        "two": Outcome("agrees", "8 experts a block"),
        "three": Outcome("refused", "because"),
        "four": Outcome("not built", "ValueError: none"),
    }
    text = page(outcomes)
    assert "Of 3 types that could be built, **2 agree**, 1 are" in text
    assert "In full, without remarks: one." in text
    for row in ("| two | 8 experts a block |", "| three | because |", "| four | ValueError: none |"):
        assert row in text
    assert "## Differ" not in text
