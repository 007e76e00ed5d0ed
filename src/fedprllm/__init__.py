"""Prune one language model together, while every participant keeps its text.

from fedprllm import PruneConfig, prune
result = prune("path/to/model", ["hospital_a.jsonl", "hospital_b.txt"], PruneConfig(sparsity=0.5), out="run")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fedprllm.config import PruneConfig
from fedprllm.errors import (
    ConfigError,
    DataError,
    FedprllmError,
    ModelError,
    RunError,
    UpdateError,
)

if TYPE_CHECKING:
    from fedprllm.api import PruneResult, prune
    from fedprllm.evaluation.perplexity import Perplexity, evaluate

# A walk allocates gigabytes for every block, and in pages of 4 kB Linux takes longer to hand them out than a
# CPU to fill them. torch reads this when it first allocates; it asks for large pages where there are any.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DataError",
    "FedprllmError",
    "ModelError",
    "Perplexity",
    "PruneConfig",
    "PruneResult",
    "RunError",
    "UpdateError",
    "evaluate",
    "prune",
]

_LAZY = {
    "PruneResult": "fedprllm.api",
    "prune": "fedprllm.api",
    "Perplexity": "fedprllm.evaluation.perplexity",
    "evaluate": "fedprllm.evaluation.perplexity",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for: ``fedprllm --help`` must answer at once."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fedprllm' has no attribute '{name}'")
