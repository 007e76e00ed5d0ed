"""What participants share about a block. `fedprllm.deciding` covers how the server decides from the sums.

A way of sharing is a handful of functions plus an entry in `SHARING`.

| kind | what a participant shares for each block |
|---|---|
| mask | its prune masks, one bit per weight |
| statistics | the sums of squares of each distinct input |
| gram | ``X^T X`` of each distinct input |
| weights | its pruned weights |
| channels | ``X^T X`` of the input of each MLP's second Linear |
| heads | ``X^T X`` of the input of each attention's output projection |
| parts | both of these |
| influence | how far the block turns hidden states, one number |
| experts | for each expert, what it adds to its tokens and their number |
| outliers | the number of outlying scores, before pruning starts |
"""

from __future__ import annotations

from fedprllm.sharing.block_influence import INFLUENCE
from fedprllm.sharing.channel_inputs import CHANNELS, HEADS, PARTS
from fedprllm.sharing.expert_outputs import EXPERTS
from fedprllm.sharing.gram_matrices import GRAM
from fedprllm.sharing.input_sums import STATISTICS
from fedprllm.sharing.interface import Seen, Sharing, Totals, update_bytes
from fedprllm.sharing.outlier_counts import OUTLIERS
from fedprllm.sharing.prune_masks import MASKS
from fedprllm.sharing.pruned_weights import WEIGHTS
from fedprllm.sharing.target import Target

__all__ = ["SHARING", "Seen", "Sharing", "Target", "Totals", "update_bytes"]

SHARING: dict[str, Sharing] = {
    row.kind: row
    for row in (
        MASKS,
        STATISTICS,
        GRAM,
        WEIGHTS,
        OUTLIERS,
        CHANNELS,
        HEADS,
        PARTS,
        INFLUENCE,
        EXPERTS,
    )
}
