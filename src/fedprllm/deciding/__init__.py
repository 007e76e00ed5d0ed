"""How the server decides from the sums of what participants shared.

A decision is a function ``(totals, block, target) -> BlockDecision`` and a row in `DECISIONS`, under the kind
of update that it needs the sums of. The first row of a kind is its default.

| kind shared | decision | |
|---|---|---|
| mask | vote | prune the most-voted weights (FedPrLLM) |
| statistics | score | score as if all text were in one place |
| gram | sparsegpt | prune and correct the weights that stay |
| weights | average | average what was retained (FedSpaLLM) |

A survey comes before pruning and decides how much each block is to lose; a decision names the survey that
goes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedprllm.config import PruneConfig
from fedprllm.core.groups import GroupName
from fedprllm.core.owl import Outliers
from fedprllm.deciding.average import by_average
from fedprllm.deciding.count import count_pooled, count_shared
from fedprllm.deciding.decision import BlockDecision
from fedprllm.deciding.score import by_pooled_score, own_decision
from fedprllm.deciding.solve import by_sparsegpt
from fedprllm.deciding.vote import by_votes
from fedprllm.models.block import Block
from fedprllm.sharing import Target, Totals

__all__ = ["DECISIONS", "BlockDecision", "Decision", "Survey", "decision_of", "own_decision"]


@dataclass(frozen=True)
class Survey:
    """How outliers are counted before pruning starts.

    Attributes:
        kind: What participants share for it.
        decide: The outliers of a block, from the sums over participants.
    """

    kind: str
    decide: Callable[[Totals, Block, Target], Outliers]


_COUNTS = Survey("outliers", count_shared)
_SUMS = Survey("statistics", count_pooled)


@dataclass(frozen=True)
class Decision:
    """How the server decides about a block.

    Attributes:
        name: The word for it.
        decide: What the block loses, from the sums over participants.
        group: The comparison group of the decision, from the configuration.
        only_zeroes: It zeroes weights and changes no other, so that masks tell all of it; with scaling it
            changes the others too.
        survey: How outliers are counted before, for sparsity by outliers (OWL).
    """

    name: str
    decide: Callable[[Totals, Block, Target], BlockDecision]
    group: Callable[[PruneConfig], GroupName]
    only_zeroes: bool = False
    survey: Survey = _COUNTS


def _local(config: PruneConfig) -> GroupName:
    return config.local_group


def _server(config: PruneConfig) -> GroupName:
    return config.server_group


def _layer(config: PruneConfig) -> GroupName:  # noqa: ARG001  one signature for all decisions
    return "layer"


DECISIONS: dict[str, tuple[Decision, ...]] = {
    "mask": (Decision("vote", by_votes, _server, only_zeroes=True),),
    "statistics": (Decision("score", by_pooled_score, _local, only_zeroes=True, survey=_SUMS),),
    "gram": (
        # The first one is the default.
        Decision("sparsegpt", by_sparsegpt, _layer, survey=_SUMS),
    ),
    "weights": (Decision("average", by_average, _server),),
}


def decision_of(config: PruneConfig) -> Decision:
    """The decision that a configuration asks for."""
    return DECISIONS[config.share][0]
