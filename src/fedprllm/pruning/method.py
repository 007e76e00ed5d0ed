"""How a run prunes: the table rows selected by its configuration, combined."""

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
from fedprllm.errors import ConfigError
from fedprllm.models.block import Block
from fedprllm.pruning.strategies import STRATEGIES, Strategy
from fedprllm.sharing import SHARING, Sharing, Target, Totals

__all__ = ["Method", "deciding_group", "pruning_method", "survey_method"]

_Decided = TypeVar("_Decided")


@dataclass(frozen=True)
class Method(Generic[_Decided]):
    """What participants share during the walk and what is decided from the sums.

    Attributes:
        target: How much of each Linear to prune.
        strategy: Determines whose decision a participant walks on with.
        sharing: What leaves a participant.
        decide: Turns the sums over participants into a decision about the block or, in a survey, into the
            block's outliers.
        uses_inputs: Whether calibration text is needed at all.
        keeps_apart: Whether the decision needs each update, not only their sums.
    """

    target: Target
    strategy: Strategy
    sharing: Sharing
    decide: Callable[[Totals, Block, Target], _Decided]
    uses_inputs: bool
    keeps_apart: bool = False

    @property
    def config(self) -> PruneConfig:
        """The resolved configuration."""
        return self.target.config

    @property
    def walks_densely(self) -> bool:
        """Whether participants walk on with the unpruned block.

        This is the case if they neither decide for themselves nor wait for the server.
        """
        strategy = self.strategy
        return strategy.server_votes and not (self.sharing.shares_decision or strategy.follows_server)

    def empty(self, block: Block) -> Totals:
        """Empty sums for a block."""
        totals = self.sharing.zeros(block.linears, block.device)
        return replace(totals, apart=[]) if self.keeps_apart else totals

    def vote_weight(self, n_tokens: int) -> int:
        """Weight of the votes of a participant with ``n_tokens`` calibration tokens."""
        return n_tokens if self.config.weighting == "tokens" else 1

    def with_sparsities(self, sparsities: Mapping[str, Fraction]) -> Method[_Decided]:
        """The same method with an individual sparsity for each of the given Linears."""
        return replace(self, target=Target(self.config, sparsities))


def pruning_method(config: PruneConfig) -> Method[BlockDecision]:
    """The method that a run prunes with.

    Raises:
        ConfigError: The run still has to choose what it removes, which only a run in one process can.
    """
    if config.smaller is not None:
        raise ConfigError(
            f"smaller {config.smaller:g} leaves the structure to be chosen, which only 'fedprllm prune' can: "
            "name the structure, for instance mlp=0.2"
        )
    decision = decision_of(config)
    return Method(
        Target(config),
        STRATEGIES[config.strategy],
        SHARING[config.share],
        decision.decide,
        CRITERIA[config.criterion].uses_inputs,
        decision.keeps_apart,
    )


def survey_method(config: PruneConfig) -> Method[Outliers]:
    """The method that counts outliers before pruning: a walk over the unpruned model with Wanda's score."""
    decision = decision_of(config)
    survey = decision.survey
    config = config.model_copy(update={"strategy": "one-shot", "criterion": "wanda"})
    return Method(
        Target(config),
        STRATEGIES[config.strategy],
        SHARING[survey.kind],
        survey.decide,
        uses_inputs=True,
        keeps_apart=decision.keeps_apart,
    )


def deciding_group(config: PruneConfig) -> GroupName:
    """The comparison group used by the decision that becomes the model."""
    own = not STRATEGIES[config.strategy].server_votes and SHARING[config.share].shares_decision
    return config.local_group if own else decision_of(config).group(config)
