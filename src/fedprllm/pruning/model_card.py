"""The model card of a pruned model: what it is, how it was made and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprllm.evaluation.results import Perplexity
from fedprllm.files import write_text
from fedprllm.pruning.records import Reduction, RunRecord

__all__ = ["write_model_card"]

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, {tag}, fedprllm]
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
Method: FedPrLLM (arXiv 2505.13547). Created with fedprllm {version}.
"""


_ZEROS = {
    "tag": "sparse",
    "unchanged": "Embedding and head are unchanged; pruned weights are exact zeros in a standard Hugging "
    "Face checkpoint.",
    "saving": "The zeros save memory and time only in software that exploits them (sparse kernels, sparse "
    "file formats).",
}
_SMALLER = {
    "tag": "smaller",
    "unchanged": "Embedding and head are unchanged. It is a smaller dense model in a standard Hugging Face "
    "checkpoint.",
    "saving": "Whatever runs the dense model runs this one, faster and in less memory.",
}


def write_model_card(folder: Path, record: RunRecord) -> None:
    """Write the model card, ``README.md``, into a pruned model's folder.

    Args:
        folder: The model's folder.
        record: The result of the run.
    """
    config = record.config
    participants = record.participants.values()
    n, source = len(participants), _public_name(record.model.source)
    smaller = record.reduction
    text = _CARD.format(
        **(_ZEROS if smaller is None else _SMALLER),
        title=f"{Path(source).name}, "
        + (f"{record.sparsity:.0%} sparse" if smaller is None else f"{smaller.of_blocks:.0%} smaller"),
        source=source,
        outcome=f"pruned to {record.sparsity:.1%} zeros in the Linear layers of its decoder blocks"
        if smaller is None
        else record.outcome,
        participants=f"{n} participants that kept their text local" if n > 1 else "one participant",
        strategy=config.strategy,
        criterion=config.criterion,
        goal=f"pattern | {config.pattern}" if smaller is None else f"structure removed | {config.structure}",
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
    write_text(folder / "README.md", text)


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
