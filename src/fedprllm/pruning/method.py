"""How a run prunes: the rows of the tables that its configuration names, brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, TypeVar

from fedprllm.config import PruneConfig
from fedprllm.core.criteria import CRITERIA
from fedprllm.core.groups import GroupName
from fedprllm.core.owl import Outliers
from fedprllm.deciding import BlockDecision, decision_of
from fedprllm.models.block import Block
from fedprllm.pruning.strategies import STRATEGIES, Strategy
from fedprllm.sharing import SHARING, Sharing, Target, Totals

__all__ = ["Method", "deciding_group", "pruning_method", "survey_method"]

_Decided = TypeVar("_Decided")


@dataclass(frozen=True)
class Method(Generic[_Decided]):
    """What participants share while walking, and what is decided from the sums.

    Attributes:
        target: How much of each Linear is to be pruned.
        strategy: Whose decision a participant walks on with.
        sharing: What leaves a participant.
        decide: What is made of the sums over participants: a decision about the block, or of a survey its
            outliers.
        uses_inputs: Whether text is needed at all.
    """

    target: Target
    strategy: Strategy
    sharing: Sharing
    decide: Callable[[Totals, Block, Target], _Decided]
    uses_inputs: bool

    @property
    def config(self) -> PruneConfig:
        """The resolved configuration."""
        return self.target.config

    @property
    def walks_densely(self) -> bool:
        """Whether participants walk on with the unpruned block.

        They do where they neither decide for themselves nor wait for the server.
        """
        strategy = self.strategy
        return strategy.server_votes and not (self.sharing.shares_decision or strategy.follows_server)

    def vote_weight(self, n_tokens: int) -> int:
        """What the votes of a participant count that has this many calibration tokens."""
        return n_tokens if self.config.weighting == "tokens" else 1

    def with_sparsities(self, sparsities: Mapping[str, Fraction]) -> Method[_Decided]:
        """The same method with a sparsity of its own for every Linear that is named."""
        return replace(self, target=Target(self.config, sparsities))


def pruning_method(config: PruneConfig) -> Method[BlockDecision]:
    """How a run prunes."""
    return Method(
        Target(config),
        STRATEGIES[config.strategy],
        SHARING[config.share],
        decision_of(config).decide,
        CRITERIA[config.criterion].uses_inputs,
    )


def survey_method(config: PruneConfig) -> Method[Outliers]:
    """How outliers are counted before pruning: one walk over the unpruned model, with Wanda's score."""
    survey = decision_of(config).survey
    config = config.model_copy(update={"strategy": "one-shot", "criterion": "wanda"})
    return Method(
        Target(config), STRATEGIES[config.strategy], SHARING[survey.kind], survey.decide, uses_inputs=True
    )


def deciding_group(config: PruneConfig) -> GroupName:
    """The comparison group of the decision that becomes the model."""
    own = not STRATEGIES[config.strategy].server_votes and SHARING[config.share].shares_decision
    return config.local_group if own else decision_of(config).group(config)
