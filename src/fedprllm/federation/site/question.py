"""The question that a participant answers before the first computation of a run, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.method import Method
from fedprllm.pruning.participant import Participant
from fedprllm.sharing import update_bytes

__all__ = ["question_of"]


def question_of(
    job: Mapping[str, Any],
    method: Method[Any],
    model: BlockwiseModel,
    participant: Participant,
    n_runs: int,
    most_runs: int,
) -> dict[str, Any]:
    """What a run asks of a participant: names and numbers of the run, none of the text itself.

    Args:
        job: The coordinator's request.
        method: What is shared, and how it is decided upon.
        model: The participant's own copy, which was compared with the coordinator's.
        participant: Its windows.
        n_runs: Runs that the text will have been used in, this one included.
        most_runs: Runs that the participant grants to one text.
    """
    config, sharing = method.config, method.sharing
    blocks = job["blocks"]
    n_bytes = sum(update_bytes(sharing.shapes(model.linears[block])) for block in blocks)
    pattern = config.pattern if config.n_m else f"{config.sparsity:.0%} zeros"
    purpose = (
        "count outliers, to choose how much each block loses"
        if job["survey"]
        else f"prune to {pattern} ({config.strategy}, {config.criterion})"
    )
    return {
        "run": job["run"],
        "lines": [
            ["model", f"{Path(job['model']).name}, the same as yours in every tensor and setting"],
            ["purpose", purpose],
            ["participants", ", ".join(sorted(job["participants"]))],
            ["leaves you", f"{sharing.noun}: {sharing.content}"],
            ["size", f"{_size(n_bytes)} for {len(blocks)} of {model.n_blocks} blocks"],
            [
                "made of",
                f"{len(participant.windows)} windows of {participant.windows.shape[1]} tokens "
                f"({participant.n_tokens:,} tokens), chosen here",
            ],
            ["your text", f"used in {n_runs} of {most_runs} runs, this one included"],
        ],
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"
