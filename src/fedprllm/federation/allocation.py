"""How much each block loses (OWL): counted on the unpruned model before pruning starts, then fixed.

The result is noted in the Linears of the model, where everything that follows reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedprllm.config import PruneConfig
from fedprllm.core.allocation import Outliers, allocate
from fedprllm.core.groups import GroupName
from fedprllm.core.weights import sample_blocks
from fedprllm.errors import ConfigError
from fedprllm.files import read_json, write_json
from fedprllm.models.blocks import BlockwiseModel, Linear
from fedprllm.participant import Participant
from fedprllm.progress import Progress
from fedprllm.runs import Run
from fedprllm.sharing import SURVEYS
from fedprllm.strategies import STRATEGIES

__all__ = [
    "allocated",
    "allocation_record",
    "sampled",
    "survey_config",
    "survey_in_process",
]

Linears = list[dict[str, Linear]]


def survey_config(config: PruneConfig) -> PruneConfig:
    """The configuration of a survey: everyone walks the unpruned model once, and looks at its inputs."""
    return config.model_copy(update={"strategy": "one-shot", "criterion": "wanda"})


def survey_in_process(
    model: BlockwiseModel,
    participants: Sequence[Participant],
    config: PruneConfig,
    samples: Mapping[str, Sequence[int]],
    run: Run,
    progress: Progress,
) -> dict[str | None, list[Outliers]]:
    """Count the outliers of each block, once for a run.

    Args:
        model: unpruned.
        participants: who walks.
        config: the resolved configuration.
        samples: the blocks that each of them looks at.
        run: an open run, which keeps the counts.
        progress: told of every step.

    Returns:
        Outliers by block, over all participants under the name None; under ``local-only`` those of each
        participant. Nothing if all blocks are pruned alike.
    """
    if config.allocation == "uniform":
        return {}
    path = run.folder / "allocation.json"
    together = STRATEGIES[config.strategy].server_votes or STRATEGIES[config.strategy].pools_text
    groups = {None: participants} if together else {person.name: [person] for person in participants}
    if not path.exists():
        counts = {}
        with progress("counting outliers", model.n_blocks * len(participants)) as advance:
            for name, people in groups.items():
                counts[name or ""] = [
                    (found.n_outliers, found.n_scores)
                    for found in _survey(model, people, survey_config(config), samples, advance)
                ]
        write_json(path, counts)
    kept = read_json(path)
    return {name: [Outliers(*pair) for pair in kept[name or ""]] for name in groups}


def _survey(
    model: BlockwiseModel,
    people: Sequence[Participant],
    config: PruneConfig,
    samples: Mapping[str, Sequence[int]],
    advance: Any,
) -> list[Outliers]:
    survey = SURVEYS[config.share]
    for person in people:
        person.enter(model)
    found = []
    for index in range(model.n_blocks):
        with model.block(index) as block:
            totals = survey.zeros(block)
            for person in people:
                if index in samples[person.name]:
                    statistics = person.observe(block, survey.observation, walk_on=True)
                    update = survey.contribute(block, statistics, config, person.fingerprint).update
                    totals.add(update)
                else:
                    person.advance(block, {})
                advance(1)
            found.append(survey.decide(totals, block, config))
    return found


def allocated(model: BlockwiseModel, outliers: Sequence[Outliers], config: PruneConfig) -> Linears:
    """The Linears of each block, each with its own sparsity."""
    shares = allocate(
        [found.ratio for found in outliers],
        [[linear.shape for linear in of_block.values()] for of_block in model.linears],
        _deciding_group(config),
        config.sparsity,
        config.owl_lambda,
    )
    return [
        {
            name: replace(linear, sparsity=share)
            for (name, linear), share in zip(of_block.items(), of_shares, strict=True)
        }
        for of_block, of_shares in zip(model.linears, shares, strict=True)
    ]


def _deciding_group(config: PruneConfig) -> GroupName:
    """The comparison group of the decision that becomes the model."""
    if config.share == "gram":
        return "layer"
    server_decides = STRATEGIES[config.strategy].server_votes and config.share != "statistics"
    return config.server_group if server_decides else config.local_group


def allocation_record(outliers: Mapping[str | None, Sequence[Outliers]]) -> dict[str, list[float]]:
    """For the result: the share of outliers by block, of each participant under ``local-only``."""
    return {name or "model": [found.ratio for found in counts] for name, counts in outliers.items()}


def sampled(config: PruneConfig, names: Sequence[str], n_blocks: int) -> dict[str, list[int]]:
    """The blocks that each participant prunes and shares.

    Raises:
        ConfigError: there are more blocks than all of them prune together; somebody unknown is named.
    """
    fractions = config.block_fractions(names)
    samples = sample_blocks(fractions, n_blocks, config.seed)
    if samples is None:
        total = float(sum(fractions.values()))
        raise ConfigError(
            f"block_fraction {config.block_fraction} leaves blocks without anybody: {len(names)} "
            f"participants prune {total:g} times the {n_blocks} blocks of the model, rounded down for each; "
            "expected at least 1: raise it, or take more participants"
        )
    return samples
