"""How the server decides what to prune from the sums of what participants shared.

A decision is a function ``(totals, block, target) -> BlockDecision`` plus an entry in `DECISIONS`, under the
kind of update whose sums it needs. The first entry of a kind is its default; the option `aggregation` selects
another.

| kind shared | decision | meaning |
|---|---|---|
| mask | vote | prune the most-voted weights (FedPrLLM) |
| statistics | score | score as if all text were in one place |
| statistics | trimmed score | the same, from means that leave out the extremes of each channel |
| gram | admm | prune gradually, and refit the remaining weights |
| gram | sparsegpt | prune column by column, and correct the remaining weights |
| gram | alps | as admm, until the mask stands still: slower, a little better |
| weights | average | average the retained weights (FedSpaLLM) |
| channels, heads, parts | narrow | remove channels or heads of every block, and refit what reads the others |
| influence | drop | drop the blocks that turn hidden states least |
| experts | remove | remove the experts of each block that add least to their tokens |

A survey runs before pruning and determines how much to prune from each block; a decision names its survey.
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
from fedprllm.deciding.experts import by_experts
from fedprllm.deciding.influence import by_influence
from fedprllm.deciding.narrow import by_channels
from fedprllm.deciding.score import by_pooled_score, own_decision
from fedprllm.deciding.solve import by_admm, by_alps, by_sparsegpt
from fedprllm.deciding.trim import by_trimmed_score, count_trimmed
from fedprllm.deciding.vote import by_votes
from fedprllm.models.block import Block
from fedprllm.sharing import Target, Totals
from fedprllm.sharing.block_influence import INFLUENCE
from fedprllm.sharing.channel_inputs import CHANNELS, HEADS, PARTS
from fedprllm.sharing.expert_outputs import EXPERTS
from fedprllm.sharing.interface import Linears, all_linears

__all__ = ["DECISIONS", "BlockDecision", "Decision", "Survey", "decision_of", "own_decision"]


@dataclass(frozen=True)
class Survey:
    """How outliers are counted before pruning starts.

    Attributes:
        kind: Kind of update that participants share for it.
        decide: Returns the outliers of a block, given the sums over participants.
    """

    kind: str
    decide: Callable[[Totals, Block, Target], Outliers]


_COUNTS = Survey("outliers", count_shared)
_SUMS = Survey("statistics", count_pooled)
_TRIMMED = Survey("statistics", count_trimmed)


@dataclass(frozen=True)
class Decision:
    """How the server decides about a block.

    Attributes:
        name: Name of the decision.
        decide: Decides what to prune from a block, given the sums over participants.
        group: Returns the decision's comparison group, given the configuration.
        only_zeroes: Whether the decision only zeroes weights, so that masks describe it completely. With
            weight scaling it changes the other weights too.
        survey: Survey that counts outliers before pruning if sparsity is allocated by OWL.
        aggregation: Value of the option `aggregation` that selects the decision.
        keeps_apart: Whether the decision and its survey need each update, not only their sums.
        changes: Returns the Linears whose remaining weights the decision changes.
    """

    name: str
    decide: Callable[[Totals, Block, Target], BlockDecision]
    group: Callable[[PruneConfig], GroupName]
    only_zeroes: bool = False
    survey: Survey = _COUNTS
    aggregation: str = "sum"
    keeps_apart: bool = False
    changes: Callable[[Linears], Linears] = all_linears


def _local(config: PruneConfig) -> GroupName:
    return config.local_group


def _server(config: PruneConfig) -> GroupName:
    return config.server_group


def _layer(config: PruneConfig) -> GroupName:  # noqa: ARG001  one signature for all decisions
    return "layer"


DECISIONS: dict[str, tuple[Decision, ...]] = {
    "mask": (Decision("vote", by_votes, _server, only_zeroes=True),),
    "statistics": (
        Decision("score", by_pooled_score, _local, only_zeroes=True, survey=_SUMS),
        Decision(
            "trimmed score",
            by_trimmed_score,
            _local,
            only_zeroes=True,
            survey=_TRIMMED,
            aggregation="trimmed",
            keeps_apart=True,
        ),
    ),
    "gram": (
        # The first one is the default.
        Decision("admm", by_admm, _layer, survey=_SUMS),
        Decision("sparsegpt", by_sparsegpt, _layer, survey=_SUMS),
        Decision("alps", by_alps, _layer, survey=_SUMS),
    ),
    "weights": (Decision("average", by_average, _server),),
    "influence": (Decision("drop", by_influence, _layer, changes=INFLUENCE.observes),),
    "experts": (Decision("remove", by_experts, _layer, changes=EXPERTS.observes),),
    **{
        row.kind: (Decision("narrow", by_channels, _layer, changes=row.observes),)
        for row in (CHANNELS, HEADS, PARTS)
    },
}


def decision_of(config: PruneConfig) -> Decision:
    """The decision that a configuration selects."""
    rows = [row for row in DECISIONS[config.share] if row.aggregation == config.aggregation]
    return next((row for row in rows if row.name == config.solver), rows[0])
