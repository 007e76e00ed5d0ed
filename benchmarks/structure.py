"""Smaller dense models: what they cost in perplexity, and how much faster they are.

Every participant has one kind of text (see `benchmarks.solvers`). The perplexity is the geometric mean over
held-out text of all kinds; with ``--alone``, every participant also makes a smaller model from its own text
only, which is measured on its own and on the others' kinds. Speed is measured in transformers with random
weights, because it depends on the shapes only: a prompt of 256 tokens, and 8 tokens one by one. With
``--smaller``, a structure is also chosen, and every candidate is measured on the evaluation text too, so that
one sees whether the choice was right.

    python -m benchmarks.structure [--texts FOLDER] [--windows 16] [--length 512] [--alone] [--quick]
                                   [--structures mlp=0.27 ...] [--smaller 0.1 0.2]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import alternate, given, machine
from benchmarks.solvers import losses_of, texts_of
from fedprllm import PruneConfig, prune
from fedprllm.demo.compare import demo_model
from fedprllm.models.source import resolve_model

# Of the block parameters of SmolLM2-135M, a tenth and a fifth in the MLPs, which hold three quarters of them;
# a tenth by dropping blocks; and a third of the query heads.
_STRUCTURES = ("mlp=0.125", "mlp=0.27", "depth=3", "heads=3")
_SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "1B (Llama 3.2)": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
_PROMPT, _GENERATED = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file [SmolLM2-135M]")
    parser.add_argument("--texts", type=Path, default=None, help="folder of texts")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--structures", nargs="*", default=list(_STRUCTURES))
    parser.add_argument("--smaller", nargs="*", type=float, default=[], help="fractions to choose for")
    parser.add_argument("--alone", action="store_true", help="compare with each participant's own text")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the timings; 0 leaves them out")
    parser.add_argument("--shapes", nargs="*", default=list(_SHAPES), choices=list(_SHAPES))
    parser.add_argument("--speed-only", action="store_true", help="measure no perplexity")
    parser.add_argument("--dtype", default="float32", help="precision of the forward passes [float32]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few windows, to check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.length, options.repeats = 2, 64, min(options.repeats, 1)
    rows, choices = ([], []) if options.speed_only else _quality(options)
    result = {
        "benchmark": "structure",
        "quick": options.quick,
        "options": given(),
        "windows": options.windows,
        "window_length": options.length,
        "device": options.device,
        "dtype": options.dtype,
        "rows": rows,
        "choices": choices,
        "speed": _speed(options) if options.repeats else [],
        "machine": machine(),
    }
    print(json.dumps(result))


# Quality -------------------------------------------------------------------------------------------------


_Row = dict[str, Any]


def _quality(options: argparse.Namespace) -> tuple[list[_Row], list[_Row]]:
    """Rows about structures that are named, and about those that are chosen."""
    model = resolve_model(options.model or demo_model())
    with tempfile.TemporaryDirectory() as temporary:
        texts, held_out = texts_of(options.texts, Path(temporary))
        dense = losses_of(model, held_out, options.length, options)
        rows: list[_Row] = [{"structure": "none", "fewer parameters": 0.0, **_means(dense, dense)}]
        for structure in options.structures:
            for strategy in ("iterative", "local-only") if options.alone else ("iterative",):
                config = _config(options, structure=structure, strategy=strategy)
                found = prune(model, texts, config, out=Path(temporary) / f"{structure}-{strategy}")
                assert found.record.reduction is not None
                fewer = {"fewer parameters": round(found.record.reduction.of_blocks, 3)}
                for name, folder in found.model_dirs.items():
                    losses = losses_of(folder, held_out, options.length, options)
                    own = name if strategy == "local-only" else None
                    about = {"structure": structure, "text of": own or "all", **fewer}
                    rows.append(about | _means(losses, dense, own))
                    print(rows[-1], file=sys.stderr)
        choices: list[_Row] = []
        for fraction in options.smaller:
            choices += _choices(fraction, model, texts, held_out, dense, options, Path(temporary))
        return rows, choices


def _choices(
    fraction: float,
    model: Path,
    texts: Mapping[str, Path],
    held_out: Mapping[str, Path],
    dense: Mapping[str, float],
    options: argparse.Namespace,
    temporary: Path,
) -> list[_Row]:
    """Every candidate, as the participants' held-out windows and as the evaluation text see it."""
    chosen = prune(model, texts, _config(options, smaller=fraction), out=temporary / f"smaller-{fraction}")
    choice, rows = chosen.record.choice, []
    assert choice is not None
    for one in choice.candidates:
        found = chosen
        if one.structure != choice.chosen.structure:
            config = _config(options, structure=one.structure)
            found = prune(model, texts, config, out=temporary / f"{one.structure}-{fraction}")
        row = {
            "smaller": fraction,
            "structure": one.structure,
            "fewer parameters": round(one.of_blocks, 3),
            "held-out windows": round(one.perplexity, 2),
            **_means(losses_of(found.model_dir, held_out, options.length, options), dense),
            "chosen": "yes" if found is chosen else "",
        }
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def _config(options: argparse.Namespace, **method: Any) -> PruneConfig:
    """The options of reading and computing, with a method."""
    return PruneConfig(
        **{"strategy": "iterative", **method},
        windows=options.windows,
        window_length=options.length,
        dtype=options.dtype,
        device=options.device,
    )


def _means(losses: Mapping[str, float], dense: Mapping[str, float], own: str | None = None) -> dict[str, Any]:
    """Geometric means of perplexities: over all kinds of text, on one's own and on the others'."""

    def mean(values: Mapping[str, float], kinds: Callable[[str], bool]) -> float:
        chosen = [value for kind, value in values.items() if kinds(kind)]
        return round(math.exp(sum(chosen) / len(chosen)), 2)

    found = {"perplexity": mean(losses, lambda _: True), "dense": mean(dense, lambda _: True)}
    if own is not None:
        found |= {"own text": mean(losses, lambda kind: kind == own)}
        found |= {"others' text": mean(losses, lambda kind: kind != own)}
    return found


# Speed ---------------------------------------------------------------------------------------------------


def _speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    # Threads that wait for each other would count as work where the cores are busy.
    torch.set_num_threads(1)
    shapes = options.shapes[:1] if options.quick else options.shapes
    return [_ratios(name, options) for name in shapes]


def _ratios(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """How many times faster the smaller models are, from alternating runs."""
    shape = _SHAPES[name]
    prompt = torch.randint(0, shape["vocab_size"], (1, _PROMPT), device=options.device)
    dense = _random(shape, options.device)
    row: dict[str, Any] = {"shape": name}
    for words, part in (("10 %", 0.1), ("20 %", 0.2)):
        models = {
            "dense": dense,
            "small": _random({**shape, "intermediate_size": _width(shape, part)}, options.device),
        }
        for work, function in (("prefill", _prefill), ("decode", _decode)):
            timings = alternate(
                {key: _bound(function, model, prompt) for key, model in models.items()}, options.repeats
            )
            # CPU seconds hold on a busy machine too.
            dense_s, small_s = (timings[key].cpu_seconds for key in ("dense", "small"))
            row[f"{work}, {words} smaller"] = round(dense_s / small_s, 3)
            row[f"{work}, dense: CPU seconds"] = round(dense_s, 3)
    print(row, file=sys.stderr)
    return row


def _bound(function: Callable[[Any, Any], object], model: Any, prompt: Any) -> Callable[[], object]:
    return lambda: function(model, prompt)


def _width(shape: Mapping[str, Any], part: float) -> int:
    """Width of the MLPs with which the blocks have this much fewer parameters, a multiple of 32."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    key_width = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = hidden * (2 * hidden + 2 * key_width + 3 * wide)
    return int((wide - part * block / (3 * hidden)) / 32) * 32


def _random(shape: Mapping[str, Any], device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()


@torch.no_grad()
def _prefill(model: Any, prompt: torch.Tensor) -> object:
    return model(prompt, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def _decode(model: Any, prompt: torch.Tensor) -> object:
    return model.generate(
        prompt[:, :8], max_new_tokens=_GENERATED, min_new_tokens=_GENERATED, do_sample=False, pad_token_id=0
    )


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The section's tables."""
    columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in result["rows"]]
    precision = result.get("dtype", "float32")
    windows = f"{result['windows']} windows of {result['window_length']} tokens"
    title = f"{windows}, forward passes in {precision} on {result['device']}"
    speed = "times as fast as the dense model, in CPU seconds of one thread, in transformers, float32"
    choices = "structures to choose among; perplexity on the evaluation text, and on held-out windows"
    found = ((title, rows), (choices, result.get("choices")), (speed, result["speed"]))
    return {name: each for name, each in found if each}


def regret(result: dict[str, Any]) -> float:
    """Largest ratio of a chosen structure's perplexity to the lowest among its candidates."""
    ratios = []
    for row in result["choices"]:
        if row["chosen"]:
            same = [one["perplexity"] for one in result["choices"] if one["smaller"] == row["smaller"]]
            ratios.append(row["perplexity"] / min(same))
    return max(ratios)


def damage(result: dict[str, Any], structure: str) -> float:
    """By how much a structure raises the perplexity, on average over the kinds of text."""
    row = next(row for row in result["rows"] if row["structure"] == structure)
    return float(row["perplexity"] - row["dense"])


def time(result: dict[str, Any], work: str) -> float:
    """Longest time of a model that is a fifth smaller, relative to the dense one of the same shape."""
    return max(1 / row[f"{work}, 20 % smaller"] for row in result["speed"])


if __name__ == "__main__":
    main()
