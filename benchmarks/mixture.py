"""Pruning a trained mixture together: its experts specialize in the kinds of text that participants have.

The small model of the tests is upcycled (every expert starts as a copy of its MLP with a little noise; there
are 16, and each token reaches 2) and trained on three kinds of text that come with Python. Three participants
with one kind each prune it by half. Losses are measured on text that was neither trained nor calibrated on.
Training takes a few minutes on one core; the model is kept in a cache.

    python -m benchmarks.mixture [--steps 600] [--cache FOLDER] [--experts N]

With ``--experts N``, N whole experts of every block are removed instead: by all participants together, by
each of them alone, and at random.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from benchmarks._harness import SEED, machine
from fedprllm import PruneConfig, prune
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fewer_experts import write_fewer_experts
from fedprllm.models.tokenizer import load_tokenizer
from tests.conftest import SMALL_MODEL
from tests.library_text import KINDS, library_text

N_EXPERTS, TOP_K = 16, 2
_LENGTH = 128
_WINDOWS_PER_KIND = 4  # of a training step
_LEARNING_RATE = 2e-3
_N_RANDOM = 3
_NOISE = 0.1  # of the standard deviation of a weight
_RUNS: dict[str, dict[str, Any]] = {
    "together, one-shot": {},
    "together, iterative": {"strategy": "iterative"},
    "all text in one place": {"strategy": "centralized"},
    "alone": {"strategy": "local-only"},
    "magnitude": {"criterion": "magnitude"},
}


def upcycled(dense: PreTrainedModel) -> PreTrainedModel:
    """A mixture whose experts are noisy copies of the MLPs of a dense model."""
    config = dense.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
    )
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            **{name: getattr(config, name) for name in names.split()},
            num_local_experts=N_EXPERTS,
            num_experts_per_tok=TOP_K,
            output_router_logits=True,
            router_aux_loss_coef=0.001,
            sliding_window=None,
        )
    )
    model.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for block, old in zip(model.model.layers, dense.model.layers, strict=True):
            gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            _copy_with_noise(block.mlp.experts.gate_up_proj, gate_up, generator)
            _copy_with_noise(block.mlp.experts.down_proj, old.mlp.down_proj.weight, generator)
    return model


def _copy_with_noise(experts: torch.Tensor, weight: torch.Tensor, generator: torch.Generator) -> None:
    experts.copy_(weight + _NOISE * weight.std() * torch.randn(experts.shape, generator=generator))


def train(model: PreTrainedModel, texts: Mapping[str, torch.Tensor], n_steps: int) -> None:
    """Train all weights; each step sees as many windows of every kind of text."""
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=n_steps, pct_start=0.1
    )
    for step in range(n_steps):
        batch = torch.cat([_draw(text) for text in texts.values()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(
                f"step {step + 1} of {n_steps}: perplexity {math.exp(loss.item()):.1f}",
                file=sys.stderr,
                flush=True,
            )


def _draw(text: torch.Tensor) -> torch.Tensor:
    starts = torch.randint(len(text) - _LENGTH, (_WINDOWS_PER_KIND,))
    return torch.stack([text[start : start + _LENGTH] for start in starts])


def trained(cache: Path, n_steps: int) -> Path:
    """The folder of the trained mixture, which is made once."""
    folder = cache / f"mixture-{N_EXPERTS}x{TOP_K}-{n_steps}"
    if not (folder / "model.safetensors").exists():
        tokenizer = load_tokenizer(SMALL_MODEL)
        torch.manual_seed(SEED)
        model = upcycled(AutoModelForCausalLM.from_pretrained(SMALL_MODEL))
        texts = {kind: torch.tensor(tokenizer(library_text(kind))["input_ids"]) for kind in KINDS}
        train(model, texts, n_steps)
        model.config.output_router_logits = False
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def runs_of(n_removed: int | None) -> Iterator[tuple[str, Sequence[str], PruneConfig]]:
    """Yield the name of every run, its participants and its configuration."""
    if n_removed is None:
        for name, options in _RUNS.items():
            yield name, tuple(KINDS), PruneConfig(sparsity=0.5, ties="magnitude", **options)
        return
    config = PruneConfig(structure=f"experts={n_removed}")
    yield "together", tuple(KINDS), config
    for kind in KINDS:
        yield f"alone: {kind}", (kind,), config


def measure(folder: Path, n_removed: int | None) -> dict[str, dict[str, float]]:
    """Mean loss in nats per token on each kind of held-out text, by model."""
    tokenizer = load_tokenizer(folder)

    def windows(text: str, n_windows: int) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"][: n_windows * _LENGTH]).view(n_windows, _LENGTH)

    texts = {name: windows(library_text(name)[50_000:120_000], 32) for name in KINDS}
    held_out = {name: list(windows(library_text(name, held_out=True), 24)) for name in KINDS}

    def losses(model: Path) -> dict[str, float]:
        rows = perplexities(BlockwiseModel(model), held_out)
        return {name: round(row.nll, 4) for name, row in zip(held_out, rows, strict=True)}

    found = {"dense": losses(folder)}
    for name, kinds, config in runs_of(n_removed):
        with tempfile.TemporaryDirectory() as out:
            result = prune(folder, {kind: texts[kind] for kind in kinds}, config, out=Path(out, "run"))
            for model, pruned in result.model_dirs.items():
                found[name if len(result.model_dirs) == 1 else f"{name}: {model}"] = losses(pruned)
            removed = [block.removed_experts for block in result.record.blocks]
            print(name, found, removed, result.record.deviations(), file=sys.stderr, flush=True)
    for seed in range(_N_RANDOM if n_removed else 0):
        with tempfile.TemporaryDirectory() as out:
            write_at_random(Path(out), folder, n_removed or 0, seed)
            found[f"at random: {seed}"] = losses(Path(out))
    return found


def write_at_random(out: Path, folder: Path, n_removed: int, seed: int) -> None:
    """Write the model without some experts of each block that nobody chose."""
    model, generator = BlockwiseModel(folder), torch.Generator().manual_seed(seed)
    removed = [
        torch.randperm(N_EXPERTS, generator=generator)[:n_removed].tolist() for _ in range(model.n_blocks)
    ]
    write_fewer_experts(out, model, removed)


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Loss on each kind of text, and the mean increase, by model."""
    return {
        "": [
            {"model": name, **losses, "increase": result["increase"][name]}
            for name, losses in result["losses"].items()
        ]
    }


def loss(result: Mapping[str, Any], name: str) -> float:
    """Mean loss of a model over the kinds of text."""
    losses = result["losses"][name].values()
    return float(sum(losses) / len(losses))


def worst_increase(result: Mapping[str, Any], start: str) -> float:
    """Largest increase of the loss on any kind of text, over the models whose name has this beginning."""
    dense = result["losses"]["dense"]
    return float(
        max(
            losses[kind] - dense[kind]
            for name, losses in result["losses"].items()
            if name.startswith(start)
            for kind in losses
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="keeps the model")
    parser.add_argument("--experts", type=int, help="experts of every block to remove")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain nothing from more
    losses = measure(trained(options.cache, options.steps), options.experts)
    mean = {name: sum(row.values()) / len(row) for name, row in losses.items()}
    increase = {name: round(value - mean["dense"], 4) for name, value in mean.items()}
    print(json.dumps({"losses": losses, "increase": increase, "machine": machine()}))


if __name__ == "__main__":
    main()
