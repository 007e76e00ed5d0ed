"""The model card of a pruned model: what it is, how it was made and how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprllm.evaluation.results import Perplexity
from fedprllm.files import write_text
from fedprllm.pruning.records import Reduction, RunRecord

__all__ = ["write_model_card"]

_NAME = "README.md"
_CARD = """---
{header}
---
# {title}

{source}, {outcome} by {participants}.
{unchanged}

| | |
|---|---|
| base model | {source} |
| strategy | {strategy} |
| criterion | {criterion} |
| {goal} |
| comparison groups | local {local_group}, server {server_group} |
| weight scaling | {scaled} |
| tie rule | {ties} |
| calibration | {windows} windows, {tokens:,} tokens |
{size}| prunable weights | {n_prunable:,} |
| zeros among them | {n_zeros:,} |

{evaluation}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{saving}

## Limits

Pruning changes what a model does, and not evenly: what it rarely had to do suffers most. Before you use it,
check what matters to you, for instance bias, refusals and languages other than those of the calibration
text. {zeros_cost}

Method: FedPrLLM (arXiv 2505.13547). Created with fedprllm {version}.
"""


_ZEROS = {
    "tag": "sparse",
    "unchanged": "Embedding and head are unchanged; pruned weights are exact zeros in a standard Hugging "
    "Face checkpoint.",
    "zeros_cost": "Fine-tuning it as usual fills the zeros again.",
    "saving": "The zeros save memory and time only in software that exploits them (sparse kernels, sparse "
    "file formats).",
}
_SMALLER = {
    "tag": "smaller",
    "unchanged": "Embedding and head are unchanged. It is a smaller dense model in a standard Hugging Face "
    "checkpoint.",
    "zeros_cost": "It has the limits of the model it was made from.",
    "saving": "Whatever runs the dense model runs this one, faster and in less memory.",
}


def write_model_card(folder: Path, record: RunRecord, dense: Path | None = None) -> None:
    """Write the model card, ``README.md``, into a pruned model's folder.

    Args:
        folder: The model's folder.
        record: The result of the run.
        dense: Folder of the dense model, whose card says license and language; by default, the card that the
            pruned model has already.
    """
    config = record.config
    participants = record.participants.values()
    n, source = len(participants), _public_name(record.model.source)
    smaller = record.reduction
    words = _ZEROS if smaller is None else _SMALLER
    title = f"{Path(source).name}, " + (
        f"{record.sparsity:.0%} sparse" if smaller is None else f"{smaller.of_blocks:.0%} smaller"
    )
    text = _CARD.format(
        **words,
        header=_header(record, title, words["tag"], (folder if dense is None else dense) / _NAME),
        title=title,
        source=source,
        outcome=f"pruned to {record.sparsity:.1%} zeros in the Linear layers of its decoder blocks"
        if smaller is None
        else record.outcome,
        participants=f"{n} participants that kept their text local" if n > 1 else "one participant",
        strategy=config.strategy,
        criterion=config.criterion,
        goal=f"pattern | {config.pattern}"
        if smaller is None
        else f"structure removed | {_structure(record)}",
        local_group=config.local_group,
        server_group=config.server_group,
        scaled="(m - votes) / m" if config.scale_weights else "none",
        ties=config.ties,
        windows=record.n_windows,
        tokens=record.n_windows * max((one.window_length for one in participants), default=0),
        size=_size(smaller),
        n_prunable=record.n_prunable,
        n_zeros=record.n_zeros,
        evaluation=_evaluation(record.evaluation),
        folder=folder.name,
        version=record.versions["fedprllm"],
    )
    write_text(folder / _NAME, text)


def _header(record: RunRecord, title: str, tag: str, inherited: Path) -> str:
    """The card's metadata in YAML, as model hubs read it."""
    from huggingface_hub import EvalResult, ModelCardData

    from fedprllm.models.source import is_hub_id

    source = record.model.source
    measured = record.evaluation.get("model", [])
    data = ModelCardData(
        **_inherited(inherited),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", tag, "fedprllm"],
        base_model=source if is_hub_id(source) and not Path(source).exists() else None,
        model_name=title if measured else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=row.text,
                dataset_config=row.text,  # results of one type and configuration would be merged
                metric_type="perplexity",
                metric_value=round(row.perplexity, 4),
            )
            for row in measured
            if math.isfinite(row.perplexity)
        ]
        or None,
    )
    text: str = data.to_yaml()
    return text


def _inherited(card: Path) -> dict[str, Any]:
    """License and language that a model's card names; empty if it has none that can be read."""
    from huggingface_hub import ModelCard

    try:
        text = card.read_text(encoding="utf-8")
        if not text.startswith("---"):  # without metadata, the library warns
            return {}
        known: Any = ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001  whatever the libraries make of somebody's card
        return {}
    names = ("license", "license_name", "license_link", "language")
    return {name: getattr(known, name) for name in names if getattr(known, name, None)}


def _structure(record: RunRecord) -> str:
    """The row that says what was removed, and how it was chosen."""
    row, choice = f"structure removed | {record.config.structure}", record.choice
    if choice is None or len(choice.candidates) < 2:
        return row
    return f"{row}, of {len(choice.candidates)} measured the one with the lowest loss on held-out text"


def _size(smaller: Reduction | None) -> str:
    """Rows with the number of parameters and bytes before and after; empty if no part was removed."""
    if smaller is None:
        return ""
    (before, after), (bytes_before, bytes_after) = smaller.n_parameters, smaller.n_bytes
    return (
        f"| parameters | {after:,} of {before:,} |\n"
        f"| weight files | {bytes_after / 1e6:,.1f} of {bytes_before / 1e6:,.1f} MB |\n"
    )


def _public_name(source: str) -> str:
    """A hub id as it is; of a path only its last part, because the rest is about the machine it is on."""
    path = Path(source).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else source


def _evaluation(evaluation: Mapping[str, Sequence[Perplexity]]) -> str:
    """A table of perplexities with one row per text; empty if none were measured."""
    if not evaluation:
        return ""
    names = list(evaluation)
    rows = [f"| text | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for number, first in enumerate(evaluation[names[0]]):
        values = [evaluation[name][number].perplexity for name in names]
        rows.append(f"| {first.text} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "## Perplexity\n\n" + "\n".join(rows) + "\n\n"
