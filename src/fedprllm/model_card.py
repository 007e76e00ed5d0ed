"""The model card of a pruned model: what it is, how it was made, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprllm.files import write_text

__all__ = ["write_model_card"]

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, sparse, fedprllm]
---
# {title}

{source}, pruned to {sparsity:.1%} zeros in the Linear layers of its decoder blocks by {people}. Embedding
and head are untouched; pruned weights are exact zeros in an ordinary Hugging Face checkpoint.

| | |
|---|---|
| base model | {source} |
| strategy | {strategy} |
| criterion | {criterion} |
| pattern | {pattern} |
| comparison groups | local {local_group}, server {server_group} |
| weight scaling | {scaled} |
| ties | by {ties} |
| calibration | {windows} windows, {tokens:,} tokens |
| prunable weights | {n_prunable:,} |
| zeros among them | {n_zeros:,} |

{evaluation}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

The zeros save memory and time only in software that uses them (sparse kernels, sparse file formats).
Method: FedPrLLM (arXiv 2505.13547). Made with fedprllm {version}.
"""


def write_model_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Write README.md into a pruned model's folder.

    Args:
        folder: the model's folder.
        result: the run's result, as `fedprllm.runs.Run.finish` takes it.
    """
    config = result["config"]
    people = result["participants"].values()
    linears = [linear for record in result["blocks"] for linear in record["linears"].values()]
    n_zeros = sum(linear["n_zeros"] for linear in linears)
    n = len(people)
    text = _CARD.format(
        title=f"{Path(result['model']['source']).name}, {n_zeros / result['n_prunable']:.0%} sparse",
        source=result["model"]["source"],
        sparsity=n_zeros / result["n_prunable"],
        people=f"{n} participants who kept their text" if n > 1 else "one participant",
        strategy=config["strategy"],
        criterion=config["criterion"],
        pattern=config["pattern"],
        local_group=config["local_group"],
        server_group=config["server_group"],
        scaled="(m - votes) / m" if config["scale_weights"] else "none",
        ties=config["ties"],
        windows=sum(person["n_windows"] for person in people),
        tokens=sum(person["n_windows"] * person["window_length"] for person in people),
        n_prunable=result["n_prunable"],
        n_zeros=n_zeros,
        evaluation=_evaluation(result["evaluation"]),
        folder=folder.name,
        version=result["versions"]["fedprllm"],
    )
    write_text(folder / "README.md", text)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """A table of perplexities, one row per text, or nothing."""
    if not evaluation:
        return ""
    names = list(evaluation)
    rows = [f"| text | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for number, first in enumerate(evaluation[names[0]]):
        values = [float(evaluation[name][number]["perplexity"]) for name in names]
        rows.append(f"| {first['text']} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "## Perplexity\n\n" + "\n".join(rows) + "\n\n"
