"""What participants share of a block, and what the server makes of the sum.

A way of sharing is a handful of functions and a line in `SHARING`. Updates are additive: the server
needs nothing but their sum over participants, so a secure sum can take the place of the plain one.

| name | a participant shares of each block | the server |
|---|---|---|
| mask | its prune masks, one bit per weight | counts votes (FedPrLLM) |
| statistics | sums of squares of each distinct input | scores as if all text were in one place |
| gram | ``X^T X`` of each distinct input | prunes and corrects weights (SparseGPT) |
| weights | its pruned weights | averages what was retained (FedSpaLLM) |
"""

from __future__ import annotations

from fedprllm.sharing.base import (
    BlockDecision,
    Contribution,
    Sharing,
    Totals,
    local_decision,
    update_bytes,
)
from fedprllm.sharing.masks import MASKS
from fedprllm.sharing.outliers import SURVEYS
from fedprllm.sharing.statistics import GRAM, STATISTICS
from fedprllm.sharing.weights import WEIGHTS

__all__ = [
    "SHARING",
    "SURVEYS",
    "BlockDecision",
    "Contribution",
    "Sharing",
    "Totals",
    "local_decision",
    "update_bytes",
]

SHARING: dict[str, Sharing[BlockDecision]] = {
    "mask": MASKS,
    "statistics": STATISTICS,
    "gram": GRAM,
    "weights": WEIGHTS,
}
