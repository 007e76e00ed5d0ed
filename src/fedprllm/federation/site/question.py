"""The question, in plain words, that a participant answers before a run's first computation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.pruning.method import Method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import payloads

__all__ = ["question_of"]


def question_of(
    job: Mapping[str, Any],
    method: Method[Any],
    model: BlockwiseModel,
    participant: Participant,
    n_runs: int,
    most_runs: int,
) -> dict[str, Any]:
    """Describe what a run asks of a participant, without anything of the text itself.

    Args:
        job: The coordinator's request.
        method: What is shared, and how it becomes a decision.
        model: The participant's own copy of the model, already compared with the coordinator's.
        participant: The participant with its windows.
        n_runs: Number of runs that will have used the text, including this one.
        most_runs: Number of runs that may use one text.

    Returns:
        The run's id as ``run``, and ``lines`` of a label and a text each, for display.
    """
    config, sharing = method.config, method.sharing
    blocks = job["blocks"]
    per_block = payloads(model, config, sharing.kind, len(job["participants"]))
    n_bytes = sum(per_block[block] for block in blocks)
    purpose = (
        "count outliers, to choose how much each block loses"
        if job["survey"]
        else f"prune to {config.goal} ({config.strategy}, {config.criterion})"
    )
    return {
        "run": job["run"],
        "lines": [
            ["model", f"{Path(job['model']).name}, identical to yours in every tensor and setting"],
            ["purpose", purpose],
            ["participants", ", ".join(sorted(job["participants"]))],
            ["you send", f"{sharing.noun}: {sharing.content}"],
            ["seen by", "the server only as a sum over participants" if config.secure else "the server"],
            ["size", f"{_size(n_bytes)} for {len(blocks)} of {model.n_blocks} blocks"],
            [
                "computed from",
                f"{len(participant.windows)} windows of {participant.windows.shape[1]} tokens "
                f"({participant.n_tokens:,} tokens), chosen here",
            ],
            ["your text", f"used in {n_runs} of {most_runs} runs, including this one"],
        ],
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.1f} kB"
