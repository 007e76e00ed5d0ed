"""Prune one language model together, while every participant keeps its text.

from fedprllm import PruneConfig, prune
result = prune("path/to/model", ["hospital_a.jsonl", "hospital_b.txt"], PruneConfig(sparsity=0.5), out="run")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedprllm.config import PruneConfig
from fedprllm.errors import (
    ConfigError,
    DataError,
    FedprllmError,
    FedprllmWarning,
    ModelError,
    RunBusy,
    RunError,
    SecureError,
    UpdateError,
)
from fedprllm.healing.config import HealConfig

if TYPE_CHECKING:
    from fedprllm.api import PruneResult, prune
    from fedprllm.evaluation.perplexity import evaluate
    from fedprllm.evaluation.results import Perplexity
    from fedprllm.healing.in_process import HealResult, heal
    from fedprllm.healing.records import HealRecord, RoundRecord
    from fedprllm.pruning.inputs import Documents, PooledData
    from fedprllm.pruning.records import BlockRecord, LinearRecord, ParticipantRecord, RunRecord

__version__ = "0.3.0"

# Names that need torch are imported when they are first used: ``fedprllm --help`` must answer at once.
_LAZY = {
    "PruneResult": "fedprllm.api",
    "prune": "fedprllm.api",
    "evaluate": "fedprllm.evaluation.perplexity",
    "Perplexity": "fedprllm.evaluation.results",
    "HealResult": "fedprllm.healing.in_process",
    "heal": "fedprllm.healing.in_process",
    "HealRecord": "fedprllm.healing.records",
    "RoundRecord": "fedprllm.healing.records",
    "Documents": "fedprllm.pruning.inputs",
    "PooledData": "fedprllm.pruning.inputs",
    "BlockRecord": "fedprllm.pruning.records",
    "LinearRecord": "fedprllm.pruning.records",
    "ParticipantRecord": "fedprllm.pruning.records",
    "RunRecord": "fedprllm.pruning.records",
}

__all__ = [
    "BlockRecord",
    "ConfigError",
    "DataError",
    "Documents",
    "FedprllmError",
    "FedprllmWarning",
    "HealConfig",
    "HealRecord",
    "HealResult",
    "LinearRecord",
    "ModelError",
    "ParticipantRecord",
    "Perplexity",
    "PooledData",
    "PruneConfig",
    "PruneResult",
    "RoundRecord",
    "RunBusy",
    "RunError",
    "RunRecord",
    "SecureError",
    "UpdateError",
    "evaluate",
    "heal",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fedprllm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
