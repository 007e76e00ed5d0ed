"""What pruning together is for, on a really trained small model.

A byte-level Llama is trained on three kinds of standard-library text, once (kept in the cache of pytest).
Pruned by three participants who hold one kind each, the federated model is better on the others' text
than what each could make alone, and near what pooled text gives.
"""

from __future__ import annotations

import hashlib
import html.entities
import inspect
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fedprllm import PruneConfig, prune
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.models.blockwise import BlockwiseModel

LENGTH = 128


def texts() -> dict[str, bytes]:
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    names = (
        "argparse",
        "ast",
        "datetime",
        "inspect",
        "pathlib",
        "statistics",
        "tarfile",
        "typing",
        "zipfile",
    )
    numbers = (
        f"{n * n * 7919 % 100003:06d};{n % 97:02d};{(n * 31) % 1000:03d}.{n % 10}\n" for n in range(9000)
    )
    entities = "".join(f"&{name} {ord(c[0]):x}\n" for name, c in sorted(html.entities.html5.items()))
    return {
        "prose": "\n\n".join(topics[name] for name in sorted(topics)).encode()[:200_000],
        "code": "".join((library / f"{name}.py").read_text() for name in names).encode()[:200_000],
        "tables": ("".join(numbers) + entities).encode()[:200_000],
    }


def windows_of(text: bytes) -> torch.Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def split(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tenth window is held out: never trained on, never calibrated on."""
    held_out = torch.arange(len(windows)) % 10 == 9
    return windows[~held_out], windows[held_out]


def train(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    data = [split(windows_of(text))[0] for text in texts().values()]
    n_steps = 160
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=n_steps)
    for _ in range(n_steps):
        batch = torch.cat([windows[torch.randint(len(windows), (6,))] for windows in data])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(pytestconfig: pytest.Config) -> Path:
    key = hashlib.sha256(
        (inspect.getsource(train) + inspect.getsource(texts) + torch.__version__).encode()
    ).hexdigest()
    folder = Path(pytestconfig.cache.mkdir("trained")) / key[:16]
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.{os.getpid()}")
        train(new)
        new.rename(folder)
    return folder


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    parts = {name: split(windows_of(text)) for name, text in texts().items()}
    people = {name: part[0][:8] for name, part in parts.items()}
    held_out = {name: list(part[1][:24]) for name, part in parts.items()}
    out = tmp_path_factory.mktemp("quality")

    def losses(folder: Path) -> list[float]:
        return [row.nll for row in perplexities(BlockwiseModel(folder), held_out)]

    found = {"dense": losses(trained)}
    for strategy in ("one-shot", "iterative", "centralized", "local-only"):
        config = PruneConfig(sparsity=0.5, strategy=strategy, ties="magnitude")
        result = prune(trained, people, config, out=out / strategy)
        for name, folder in result.model_dirs.items():
            found[strategy if len(result.model_dirs) == 1 else name] = losses(folder)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_model_was_trained(measured):
    # A uniform guess over bytes costs 5.5 nats.
    assert max(measured["dense"]) < 2.6


def test_federated_beats_local_only_on_the_others_text(measured):
    names = ["prose", "code", "tables"]
    others = [measured[name][column] for name in names for column in range(3) if names[column] != name]
    assert mean(measured["one-shot"]) < mean(others)


def test_federated_is_near_centralized(measured):
    dense, centralized = mean(measured["dense"]), mean(measured["centralized"])
    local = mean([mean(measured[name]) for name in ("prose", "code", "tables")])
    for strategy in ("one-shot", "iterative"):
        assert mean(measured[strategy]) - centralized < 0.5 * (local - dense)
        assert mean(measured[strategy]) < local
