"""A decision about a block: what it loses, and the weights that are left."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedprllm.core.masks import PruneMask
from fedprllm.models.block import Block, GivenWeights, PrunedWeights, Weights

__all__ = ["BlockDecision"]


@dataclass
class BlockDecision:
    """What a block loses: one participant's own decision, or the server's.

    Attributes:
        masks: The prune mask of each Linear, [out, in].
        weights: The pruned weights, in the orientation and precision of the checkpoint; each may be made only
            when it is asked for (`PrunedWeights`).
        notes: Deviations from the requested settings, in words.
    """

    masks: dict[str, PruneMask]
    weights: Weights
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_masks(cls, block: Block, masks: dict[str, PruneMask]) -> BlockDecision:
        """The decision that zeroes what the masks prune and changes nothing else."""
        return cls(masks, PrunedWeights(block, {name: pruned.mask for name, pruned in masks.items()}))

    @property
    def n_ties(self) -> int:
        """Number of weights that were pruned by the tie rule."""
        return sum(pruned.n_ties for pruned in self.masks.values())

    def take_effect(self, block: Block) -> None:
        """Write the pruned weights over the block's own, which are not needed any more.

        Whatever is derived from the block's own weights (such as the message that tells participants of the
        decision) has to be made before.
        """
        for name in self.weights:
            self.weights.write(name, block.tensors[name])
        self.weights = GivenWeights({name: block.tensors[name] for name in self.weights})
