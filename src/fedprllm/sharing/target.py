"""How much of each Linear is pruned, and which of its weights are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from fedprllm.config import PruneConfig
from fedprllm.core.groups import Grouping, GroupName
from fedprllm.models.block import Linear

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """What a run prunes: its configuration, plus the sparsity of each Linear if they differ.

    Attributes:
        config: The resolved configuration.
        sparsities: Sparsity by weight name; Linears not listed use the configuration's sparsity.
    """

    config: PruneConfig
    sparsities: Mapping[str, Fraction] = field(default_factory=dict)

    def sparsity(self, linear: Linear) -> float | Fraction:
        """The fraction of a Linear's weights that is pruned."""
        return self.sparsities.get(linear.name, self.config.sparsity)

    def local_grouping(self, linear: Linear) -> Grouping:
        """Comparison groups in which a participant ranks weights."""
        return self._grouping(self.config.local_group, linear)

    def server_grouping(self, linear: Linear) -> Grouping:
        """Comparison groups in which the server ranks weights."""
        return self._grouping(self.config.server_group, linear)

    def _grouping(self, group: GroupName, linear: Linear) -> Grouping:
        return Grouping(group, self.sparsity(linear), self.config.n_m)
