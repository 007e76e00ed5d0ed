"""What participants share of a block. How the server decides from the sums is `fedprllm.deciding`.

A way of sharing is a handful of functions and a row in `SHARING`.

| kind | a participant shares of each block |
|---|---|
| mask | its prune masks, one bit per weight |
| statistics | sums of squares of each distinct input |
| gram | ``X^T X`` of each distinct input |
| weights | its pruned weights |
| outliers | the number of scores that stand out, before pruning starts |
"""

from __future__ import annotations

from fedprllm.sharing.gram_matrices import GRAM
from fedprllm.sharing.input_sums import STATISTICS
from fedprllm.sharing.interface import Seen, Sharing, Totals, update_bytes
from fedprllm.sharing.outlier_counts import OUTLIERS
from fedprllm.sharing.prune_masks import MASKS
from fedprllm.sharing.pruned_weights import WEIGHTS
from fedprllm.sharing.target import Target

__all__ = ["SHARING", "Seen", "Sharing", "Target", "Totals", "update_bytes"]

SHARING: dict[str, Sharing] = {row.kind: row for row in (MASKS, STATISTICS, GRAM, WEIGHTS, OUTLIERS)}
