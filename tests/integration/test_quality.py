"""The benefit of pruning together, on a small model with real training (`tests/fixtures/small-model`).

The model was trained on three sorts of text that ship with Python. When three participants with one sort each
prune it, the federated model is better on the others' text than any model pruned alone, and close to pooled
text. Everything is measured on text that the model has never seen.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedprllm import PruneConfig, prune
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.tokenizer import load_tokenizer
from tests.library_text import KINDS, library_text

LENGTH = 128


@pytest.fixture(scope="module")
def measured(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Mean loss in nats per token on each sort of text, by model."""
    tokenizer = load_tokenizer(small_model)

    def windows(text: str, n_windows: int) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"][: n_windows * LENGTH]).view(n_windows, LENGTH)

    participants = {name: windows(library_text(name)[50_000:80_000], 8) for name in KINDS}
    held_out = {name: list(windows(library_text(name, held_out=True), 24)) for name in KINDS}
    out = tmp_path_factory.mktemp("quality")

    def losses(folder: Path) -> list[float]:
        return [row.nll for row in perplexities(BlockwiseModel(folder), held_out)]

    found = {"dense": losses(small_model)}
    for name, options in {
        "one-shot": {},
        "iterative": {"strategy": "iterative"},
        "centralized": {"strategy": "centralized"},
        "local-only": {"strategy": "local-only"},
        "magnitude": {"criterion": "magnitude"},
    }.items():
        config = PruneConfig(sparsity=0.5, ties="magnitude", **options)
        result = prune(small_model, participants, config, out=out / name)
        for model, folder in result.model_dirs.items():
            found[name if len(result.model_dirs) == 1 else model] = losses(folder)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_model_was_trained(measured):
    """Far below the 6.24 nats of a uniform guess over 512 tokens, and magnitude pruning hurts."""
    assert max(measured["dense"]) < 0.5 * math.log(512)
    for dense, magnitude in zip(measured["dense"], measured["magnitude"], strict=True):
        assert math.exp(magnitude) > 1.2 * math.exp(dense)


def test_federated_beats_local_only_on_the_others_text(measured):
    others = [measured[name][column] for name in KINDS for column in range(3) if KINDS[column] != name]
    assert mean(measured["one-shot"]) < mean(others)


def test_federated_is_near_centralized(measured):
    dense, centralized = mean(measured["dense"]), mean(measured["centralized"])
    local = mean([mean(measured[name]) for name in KINDS])
    for strategy in ("one-shot", "iterative"):
        assert mean(measured[strategy]) - centralized < 0.5 * (local - dense)
        assert mean(measured[strategy]) < local
