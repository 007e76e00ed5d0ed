"""How much to prune each block (OWL): determined on the unpruned model before pruning starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from fedprllm.config import PruneConfig
from fedprllm.core.layer_sampling import sample_blocks
from fedprllm.core.owl import Outliers, allocate
from fedprllm.errors import ConfigError
from fedprllm.files import write_sealed
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.progress import Progress
from fedprllm.pruning.aggregate import Aggregate
from fedprllm.pruning.method import Method, deciding_group, survey_method
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import secure_sums
from fedprllm.pruning.run_folder import Run
from fedprllm.pruning.walk import Walker

if TYPE_CHECKING:
    from fedprllm.pruning.secure_sums import SecureSums

__all__ = ["allocated", "outlier_ratios", "sampled", "survey_in_process"]

Sample = Mapping[str, Sequence[int]]


def survey_in_process(
    model: BlockwiseModel,
    participants: Sequence[Participant],
    config: PruneConfig,
    samples: Sample,
    run: Run,
    progress: Progress,
) -> dict[str | None, list[Outliers]]:
    """Count the outliers of each block, once per run.

    Args:
        model: The unpruned model.
        participants: The participants that walk through the model, in the order of their names.
        config: The resolved configuration.
        samples: The blocks that each participant surveys, by name.
        run: An open run, which stores the counts.
        progress: Notified of every step.

    Returns:
        Outliers by block: over all participants under the key None or, with ``local-only``, per participant
        under its name. Empty if the allocation is uniform.
    """
    if config.allocation == "uniform":
        return {}
    path = run.folder / "allocation.json"
    method = survey_method(config)
    groups = _surveyed_together(config, participants)
    kept = run.kept(path.name, "the outliers are counted")
    if kept is None:
        counts = {}
        with progress("counting outliers", model.n_blocks * len(participants)) as advance:
            for name, members in groups.items():
                walkers = [Walker(one, method, model.n_blocks, samples[one.name]) for one in members]
                secure = secure_sums(samples, model.n_blocks, config, survey=True)
                counts[name or ""] = [
                    (found.n_outliers, found.n_scores)
                    for found in _survey(model, walkers, method, advance, secure)
                ]
        write_sealed(path, counts)
        kept = counts
    return {name: [Outliers(*pair) for pair in kept[name or ""]] for name in groups}


def _surveyed_together(
    config: PruneConfig, participants: Sequence[Participant]
) -> dict[str | None, Sequence[Participant]]:
    if config.strategy == "local-only":
        return {participant.name: [participant] for participant in participants}
    return {None: participants}


def _survey(
    model: BlockwiseModel,
    walkers: Sequence[Walker],
    method: Method[Outliers],
    advance: Callable[[int], None],
    secure: SecureSums | None,
) -> list[Outliers]:
    for walker in walkers:
        walker.enter(model)
    found = []
    for index in range(model.n_blocks):
        with model.block(index) as block:
            aggregate = Aggregate(block, method, secure)
            for walker in walkers:
                contribution = walker.contribute(block)
                if contribution.update is not None:
                    aggregate.add(walker.name, contribution.update, walker.participant.n_tokens)
                walker.advance(block, contribution.weights)
                advance(1)
            found.append(aggregate.decide())
    return found


def allocated(
    model: BlockwiseModel, outliers: Sequence[Outliers], config: PruneConfig
) -> dict[str, Fraction]:
    """Sparsity of every Linear by weight name; blocks with more outliers get a lower sparsity."""
    shares = allocate(
        [found.ratio for found in outliers],
        [[linear.shape for linear in of_block.values()] for of_block in model.linears],
        deciding_group(config),
        config.sparsity,
        config.owl_lambda,
    )
    return {
        name: share
        for of_block, of_shares in zip(model.linears, shares, strict=True)
        for name, share in zip(of_block, of_shares, strict=True)
    }


def outlier_ratios(outliers: Mapping[str | None, Sequence[Outliers]]) -> dict[str, list[float]]:
    """Fraction of outliers in each block for the result; with ``local-only``, per participant."""
    return {name or "model": [found.ratio for found in counts] for name, counts in outliers.items()}


def sampled(config: PruneConfig, names: Sequence[str], n_blocks: int) -> dict[str, list[int]]:
    """The blocks that each participant prunes and shares, by name.

    Raises:
        ConfigError: All participants together prune fewer blocks than the model has, or a name is unknown.
    """
    fractions = config.block_fractions(names)
    samples = sample_blocks(fractions, n_blocks, config.seed)
    if samples is None:
        total = float(sum(fractions.values()))
        raise ConfigError(
            f"block_fraction {config.block_fraction} leaves some blocks without a participant: the "
            f"{len(names)} participants together prune {total:g} times the model's {n_blocks} blocks "
            "(rounded down for each), expected at least 1: raise block_fraction, or add participants"
        )
    return samples
