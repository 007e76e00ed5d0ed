"""``prune``: several participants prune one model together, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedprllm.config import PruneConfig
from fedprllm.deciding import decision_of
from fedprllm.errors import ConfigError, RunError
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.evaluation.results import Perplexity
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.further import note_on_further_layers
from fedprllm.models.in_memory import model_folder, source_name
from fedprllm.models.side_files import left_out
from fedprllm.models.source import resolve_model
from fedprllm.progress import Progress, silent
from fedprllm.pruning.candidates import Candidates, find_candidates
from fedprllm.pruning.choice import check_held_out, choose
from fedprllm.pruning.in_process import prune_in_process, walking
from fedprllm.pruning.inputs import (
    ParticipantInputs,
    PooledData,
    Source,
    check_outside,
    evaluation_texts,
    identity_of,
    make_participants,
    name_participants,
    say_notes,
    sources_of,
)
from fedprllm.pruning.method import pruning_method
from fedprllm.pruning.model_card import write_model_card
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import (
    check_pattern_divides,
    check_secure,
    check_structure,
    check_update_size,
    needed_bytes,
    payloads,
)
from fedprllm.pruning.records import RunRecord
from fedprllm.pruning.reduction import reduction
from fedprllm.pruning.result_writer import without_dropped
from fedprllm.pruning.run_folder import Run
from fedprllm.pruning.stored_votes import StoredVotes
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.pruning.survey import allocated, outlier_ratios, sampled, survey_in_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PooledData", "PruneResult", "prune"]

_MOST_NAMED = 8  # files in a note


@dataclass(frozen=True)
class PruneResult:
    """What a complete run left.

    Attributes:
        out: The run's folder.
        model_dirs: Folders of the pruned models by name: one called ``model``, or one for each
            participant under ``local-only``.
        votes: Votes by weight name, an integer tensor of the weight's shape, read when asked for.
        sparsity: Fraction of zeros by weight name.
        config: The resolved configuration.
        evaluation: Perplexities by model (``dense`` and the names of `model_dirs`), if texts were given.
        record: Everything else the run recorded: ``result.json``.
    """

    out: Path
    model_dirs: dict[str, Path]
    votes: Mapping[str, Tensor]
    sparsity: dict[str, float]
    config: PruneConfig
    evaluation: dict[str, list[Perplexity]]
    record: RunRecord

    @property
    def model_dir(self) -> Path:
        """Folder of the pruned model; of the first participant's under ``local-only``."""
        return next(iter(self.model_dirs.values()))

    @classmethod
    def load(cls, out: str | Path) -> PruneResult:
        """Read the result of a complete run from its folder.

        Raises:
            RunError: The folder is not that of a complete run, or its record is damaged.
        """
        out = Path(out)
        path = out / "result.json"
        if not path.exists():
            unfinished = (out / "run.json").exists()
            state = "the run is not complete: run its command again" if unfinished else "no run"
            raise RunError(f"{out} has no result.json: {state}")
        record = RunRecord.read(path)
        votes = {
            name: out / "votes" / f"block-{of_block.block:04d}.safetensors"
            for of_block in record.blocks
            for name in of_block.linears
        }
        digests = {
            out / name: digest
            for of_block in record.blocks
            for name, digest in (of_block.files or {}).items()
        }
        return cls(
            out=out,
            model_dirs={name: out / folder for name, folder in record.models.items()},
            votes=StoredVotes(votes, digests),
            sparsity={
                name: linear.sparsity
                for of_block in record.blocks
                for name, linear in of_block.linears.items()
            },
            config=record.config,
            evaluation=record.evaluation,
            record=record,
        )


def prune(
    model: str | Path | PreTrainedModel,
    participants: ParticipantInputs,
    config: PruneConfig | None = None,
    *,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_texts: Source | Sequence[Source] | Mapping[str, Source] = (),
    progress: Progress = silent,
) -> PruneResult:
    """Prune one model together: several participants, each with its own text, in this process.

    FedPrLLM (arXiv 2505.13547), with the ways of sharing and deciding that `PruneConfig` names. A run that
    was killed continues at the last finished block when it is called again with the same arguments, and ends
    with the same bits; a complete run is not computed again.

    Args:
        model: Hub id, local Hugging Face folder, GGUF file, or a transformers model in memory.
        participants: One item for each participant, in a list or by name. An item is one path (a string or
            `Path`), a list of paths, `Documents`, a ``datasets.Dataset`` with a column ``text``, or token ids
            (torch or numpy integers [n_windows, window_length], all of which are used). `PooledData` is text
            in one place, to be dealt out.
        config: How to prune; the paper's best settings by default.
        out: Folder of the run, made if it does not exist.
        tokenizer: Of a model in memory, where participants hold text.
        eval_texts: Texts on which the dense and the pruned model are evaluated; none by default.
        progress: Called with what is done and how many steps it takes (see `fedprllm.progress`).

    Returns:
        The result; ``result.model_dir`` loads with ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ConfigError, DataError, ModelError: Bad input, found before the long computation.
        RunError: The folder belongs to another run or is in use, the disk is full, or a file of a complete
            run is missing or damaged.
        SecureError: With ``secure``, a sum would consist of too few updates.
        UpdateError: A participant's sums are out of proportion, or, with ``secure``, the sum is.

    Warns:
        FedprllmWarning: A participant has too little text, files of its folder were left out, or a file of an
            unfinished run was damaged and is computed again.
    """
    config = config or PruneConfig()
    if not isinstance(config, PruneConfig):
        raise ConfigError(
            f"config must be a PruneConfig, found {type(config).__name__}: PruneConfig(**options)"
        )
    if not isinstance(out, (str, Path)):
        raise ConfigError(f"out must be the path of a folder, found {type(out).__name__}")
    with model_folder(model, tokenizer) as folder:
        return _prune(folder, source_name(model), participants, config, Path(out), eval_texts, progress)


def _prune(
    model: str | Path,
    source: str,
    participants: ParticipantInputs,
    config: PruneConfig,
    out: Path,
    eval_texts: Source | Sequence[Source] | Mapping[str, Source],
    progress: Progress,
) -> PruneResult:
    named = name_participants(participants)
    check_outside(out, sources_of(named, eval_texts))
    folder = resolve_model(model, progress=progress)
    walked = BlockwiseModel(folder, config.dtype, config.device, config.exclude)
    n = named.n_participants if isinstance(named, PooledData) else len(named)
    found = None if config.smaller is None else find_candidates(walked, config, n)
    if found is None:
        check_pattern_divides(walked, config)
        check_structure(walked, config)
        check_update_size(walked, config)
    members, config = make_participants(walked, named, config)
    say_notes(members)
    samples = sampled(config, [member.name for member in members], walked.n_blocks)
    if found is not None:
        check_held_out(members)
    for one in [config] if found is None else map(config.with_structure, found.structures):
        check_secure(walked, one, samples)
    tests = evaluation_texts(walked, eval_texts, config)
    identity = identity_of(config, source, walked, members, tests, progress)
    with Run(out, identity, needed_bytes(walked, members, config)) as run:
        if run.is_complete:
            run.check_result()
        else:
            _run(walked, members, samples, config, found, run, tests, identity, progress)
    return PruneResult.load(out)


def _run(
    model: BlockwiseModel,
    members: list[Participant],
    samples: Mapping[str, Sequence[int]],
    config: PruneConfig,
    found: Candidates | None,
    run: Run,
    tests: Mapping[str, Sequence[Tensor]],
    identity: Mapping[str, Any],
    progress: Progress,
) -> None:
    choice = None
    if found is not None:
        choice = choose(model, members, samples, found, config, run, progress)
        config = config.with_structure(choice.chosen.structure)
        identity = {**identity, "config": config.model_dump(mode="json")}
    strategy = STRATEGIES[config.strategy]
    with walking(model, members, samples, config, run) as (walkers, samples):
        outliers = survey_in_process(model, walkers, config, samples, run, progress)
        method = pruning_method(config)
        methods = {None: method} | {
            name: method.with_sparsities(allocated(model, counts, config))
            for name, counts in outliers.items()
        }
        prune_in_process(model, walkers, methods, run, progress, samples)
    if strategy.server_votes or strategy.pools_text:
        models = {"model": run.model_dir()}
    else:
        models = {member.name: run.model_dir(member.name) for member in members}
    evaluation: dict[str, list[Perplexity]] = {}
    if tests:
        evaluation["dense"] = perplexities(model, tests, progress)
        for name, folder in models.items():
            pruned = BlockwiseModel(folder, config.dtype, config.device)
            evaluation[name] = perplexities(pruned, tests, progress)
    blocks = without_dropped(run.records(), config)
    folders = {name: str(folder.relative_to(run.folder)) for name, folder in models.items()}
    record = RunRecord.model_validate(
        {
            **identity,
            "models": folders,
            "n_prunable": sum(block.n_weights for block in blocks),
            "reduction": reduction(model, next(iter(models.values()))),
            "choice": choice,
            "coverage": model.coverage,
            "n_participants": len(walkers),
            **_traffic(model, samples, config, identity["participants"]),
            "outlier_ratios": outlier_ratios(outliers),
            "evaluation": evaluation,
            "blocks": blocks,
            "files": run.model_files(folders),
            "notes": [*_left_out(model, config), *(note for member in members for note in member.notes)]
            or None,
        }
    )
    for folder in models.values():
        write_model_card(folder, record, model.folder)
    run.finish(record)


def _left_out(model: BlockwiseModel, config: PruneConfig) -> list[str]:
    """Notes about what the pruned model lacks that belongs to the dense one, or lies beside it."""
    removes = {"depth", "experts"} & config.structures.keys()
    return [*_files_left_out(model), *(note_on_further_layers(model) if removes else [])]


def _files_left_out(model: BlockwiseModel) -> list[str]:
    names = left_out(model.folder)
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [f"not copied to the pruned model, because not part of it: {', '.join(names[:_MOST_NAMED])}{more}"]


def _traffic(
    model: BlockwiseModel,
    samples: Mapping[str, Sequence[int]],
    config: PruneConfig,
    participants: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The payload of what each participant shares, block by block and in total."""
    strategy = STRATEGIES[config.strategy]
    surveyed = config.allocation != "uniform"
    n = len(samples)
    per_block = payloads(model, config, config.share, n) if strategy.server_votes else [0] * model.n_blocks
    survey = (
        payloads(model, config, decision_of(config).survey.kind, n)
        if surveyed and strategy.server_votes
        else [0] * model.n_blocks
    )
    shared = {
        name: samples[name] if strategy.server_votes else [] for name in samples if name in participants
    }
    sent = {
        name: {
            "n_blocks": len(blocks),
            "update_bytes": sum(per_block[block] + survey[block] for block in blocks),
        }
        for name, blocks in shared.items()
    }
    n_rounds = model.n_blocks if strategy.follows_server else 1
    return {
        "participants": {name: {**one, **sent.get(name, {})} for name, one in participants.items()},
        "rounds": (n_rounds + surveyed) * strategy.server_votes,
        "update_bytes_per_block": per_block,
        "survey_bytes_per_block": survey,
    }
