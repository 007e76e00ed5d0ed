"""Zero-shot tasks with lm-eval, an optional extra, on local task data or data from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.errors import ConfigError, ModelError, did_you_mean
from fedprllm.models.source import resolve_model

__all__ = ["zero_shot"]


def zero_shot(
    model: str | Path,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Evaluate a model on lm-eval tasks.

    Args:
        model: Hub id, local folder or GGUF file.
        tasks: Names of lm-eval tasks or groups.
        task_folder: Folder with additional task files (YAML).
        limit: Number of examples per task; all by default.
        dtype: Precision of the forward pass.
        device: Device to compute on.
        batch_size: Number of examples per batch.

    Returns:
        One row per task and metric with the keys ``task``, ``metric``, ``value`` and ``stderr`` (NaN if
        lm-eval reports none).

    Raises:
        ConfigError: A task is unknown.
        ModelError: lm-eval is not installed, or the model cannot be used.
    """
    PruneConfig(dtype=dtype, device=device)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ModelError(
            "--tasks needs lm-eval, which is not installed: pip install 'fedprllm[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"unknown task {did_you_mean(task, _nearest(task, manager.all_tasks))}")
    loaded = HFLM(str(resolve_model(model)), dtype=dtype, device=device, batch_size=batch_size)
    results = simple_evaluate(
        loaded, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000
    )
    return [
        {
            "task": task,
            "metric": metric.removesuffix(",none"),
            "value": float(value),
            "stderr": _number(values.get(metric.replace(",", "_stderr,", 1))),
        }
        for task, values in results["results"].items()
        for metric, value in values.items()
        if isinstance(value, (int, float)) and "_stderr" not in metric and "," in metric
    ]


def _nearest(task: str, known: Sequence[str]) -> list[str]:
    """Up to 20 of the thousands of task names, preferably those that start with the same letters."""
    alike = [name for name in known if name.startswith(task[:3])]
    return sorted(alike or known)[:20]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
