"""A decision about a block: what is pruned, and the resulting weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedprllm.core.masks import MaskViews, PruneMask
from fedprllm.models.block import Block, Linear, PrunedWeights, Weights

__all__ = ["UNREACHED", "BlockDecision"]

UNREACHED = "no text reached this expert, so its weights were compared by magnitude"


@dataclass
class BlockDecision:
    """What is pruned from a block, decided by one participant or by the server.

    Attributes:
        masks: Prune mask of each Linear, [out, in]; none of a Linear from which no single weights are pruned.
        weights: The pruned weights, in the orientation and precision of the checkpoint; they may be created
            only on access (`PrunedWeights`).
        notes: Deviations from the requested settings, one sentence each.
        influence: Mean of ``1 - cos(input, output)`` over tokens, if blocks are to be dropped.
        expert_scores: Mean of what each expert adds to its tokens, if experts are to be removed.
        removed_experts: Numbers of the experts to remove, in order.
    """

    masks: dict[str, PruneMask]
    weights: Weights
    notes: list[str] = field(default_factory=list)
    influence: float | None = None
    expert_scores: list[float] | None = None
    removed_experts: list[int] = field(default_factory=list)

    def keeps(self, linear: Linear) -> bool:
        """Whether the pruned block still has a Linear; those of removed experts are gone."""
        if not self.removed_experts or linear.expert is None:
            return True
        return linear.expert[1] not in self.removed_experts

    @classmethod
    def of_masks(cls, block: Block, masks: dict[str, PruneMask]) -> BlockDecision:
        """The decision that zeroes the weights the masks prune and changes no others."""
        return cls(masks, PrunedWeights(block, MaskViews(masks)))

    @staticmethod
    def kept(linear: Linear, pruned: PruneMask) -> PruneMask:
        """A mask in the form in which it is kept: those of experts, which are most of a block, packed."""
        return pruned.packed() if linear.family else pruned

    @property
    def n_ties(self) -> int:
        """Number of pruned weights that the tie rule chose."""
        return sum(pruned.n_ties for pruned in self.masks.values())

    def take_effect(self, block: Block) -> None:
        """Overwrite the block's original weights with the pruned ones.

        Anything derived from the original weights, such as the message that sends the decision to the
        participants, must be made before this call.
        """
        for name in self.weights:
            self.weights.write(name, block.tensors[name])
        self.weights = self.weights.written(block)
