"""What pruning together is for, on a small model that was really trained (`tests/fixtures/small-model`).

It knows three kinds of text that come with Python. Pruned by three participants who hold one kind each, the
federated model is better on the others' text than what each could make alone, and near what pooled text
gives. All is measured on text that the model never saw.
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
    """Mean loss in nats per token on each kind of text, by model."""
    tokenizer = load_tokenizer(small_model)

    def windows(text: str, n_windows: int) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"][: n_windows * LENGTH]).view(n_windows, LENGTH)

    people = {kind: windows(library_text(kind)[50_000:80_000], 8) for kind in KINDS}
    held_out = {kind: list(windows(library_text(kind, held_out=True), 24)) for kind in KINDS}
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
        result = prune(small_model, people, config, out=out / name)
        for model, folder in result.model_dirs.items():
            found[name if len(result.model_dirs) == 1 else model] = losses(folder)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_model_was_trained(measured):
    """A uniform guess over its 512 tokens costs 6.24 nats; half the weights are not there for nothing."""
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
