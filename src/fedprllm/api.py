"""``prune``: several participants prune one model together, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprllm.calibration import fingerprint
from fedprllm.config import PruneConfig
from fedprllm.evaluation import Perplexity, perplexities
from fedprllm.federation.allocation import allocated, allocation_record, sampled, survey_in_process
from fedprllm.federation.checks import check_pattern_divides, check_update_size, needed_bytes
from fedprllm.federation.fingerprints import model_digest, tensor_fingerprints
from fedprllm.federation.in_process import prune_in_process
from fedprllm.hidden import HiddenMemory, HiddenStates
from fedprllm.inputs import (
    ParticipantInputs,
    PooledData,
    Source,
    evaluation_texts,
    make_participants,
    name_participants,
    pool,
)
from fedprllm.model_card import write_model_card
from fedprllm.models.blocks import BlockwiseModel
from fedprllm.models.source import resolve_model
from fedprllm.participant import Participant
from fedprllm.progress import Progress, silent
from fedprllm.runs import Run, versions
from fedprllm.sharing import SHARING, SURVEYS, update_bytes
from fedprllm.strategies import STRATEGIES
from fedprllm.votes import StoredVotes

__all__ = ["PooledData", "PruneResult", "prune"]


@dataclass(frozen=True)
class PruneResult:
    """What a complete run left.

    Attributes:
        out: the run's folder.
        model_dirs: the pruned models by name: one called ``model``, or under ``local-only`` one for each
            participant.
        votes: votes by weight name, an integer tensor of the weight's shape, read when asked for.
        sparsity: fraction of zeros by weight name.
        config: the resolved configuration.
        evaluation: perplexities by model (``dense`` and the names of `model_dirs`), if texts were given.
        details: everything else the run recorded: ``result.json``.
    """

    out: Path
    model_dirs: dict[str, Path]
    votes: Mapping[str, Tensor]
    sparsity: dict[str, float]
    config: PruneConfig
    evaluation: dict[str, list[dict[str, Any]]]
    details: dict[str, Any]

    @property
    def model_dir(self) -> Path:
        """Folder of the pruned model; of the first participant's under ``local-only``."""
        return next(iter(self.model_dirs.values()))

    @classmethod
    def load(cls, out: str | Path) -> PruneResult:
        """Read the result of a complete run from its folder."""
        out = Path(out)
        details = _read_result(out)
        votes = {
            name: out / "votes" / f"block-{record['block']:04d}.safetensors"
            for record in details["blocks"]
            for name in record["linears"]
        }
        sparsity = {
            name: linear["n_zeros"] / (linear["shape"][0] * linear["shape"][1])
            for record in details["blocks"]
            for name, linear in record["linears"].items()
        }
        return cls(
            out=out,
            model_dirs={name: out / folder for name, folder in details["models"].items()},
            votes=StoredVotes(votes),
            sparsity=sparsity,
            config=PruneConfig(**details["config"]),
            evaluation=details["evaluation"],
            details=details,
        )


def _read_result(out: Path) -> dict[str, Any]:
    from fedprllm.errors import RunError
    from fedprllm.files import read_json

    path = out / "result.json"
    if not path.exists():
        state = "the run is not complete: run its command again" if (out / "run.json").exists() else "no run"
        raise RunError(f"{out} has no result.json: {state}")
    result: dict[str, Any] = read_json(path)
    return result


def prune(
    model: str | Path,
    participants: ParticipantInputs,
    config: PruneConfig | None = None,
    *,
    out: str | Path,
    eval_texts: Sequence[Source] | Mapping[str, Source] = (),
    progress: Progress = silent,
) -> PruneResult:
    """Prune a model together.

    A run that was killed continues at the last finished block when it is called again with the same
    arguments, and ends with the same bits; a complete run is not computed again.

    Args:
        model: hub id, local Hugging Face folder, or GGUF file.
        participants: one item for each participant, by name or in any order: a path, a list of paths
            (see `fedprllm.documents.read_documents`), or token ids, int [n_windows, window_length], all
            of which are used; or `PooledData`, text to be dealt out.
        config: how to prune; the paper's best by default.
        out: folder of the run; made if it does not exist.
        eval_texts: texts on which the dense and the pruned model are evaluated, none by default.
        progress: told what goes on (see `fedprllm.progress`).

    Returns:
        The result; ``result.model_dir`` loads with ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ConfigError, DataError, ModelError: bad input, found before the long computation.
        RunError: the folder belongs to another run, or the disk is full.
    """
    config = config or PruneConfig()
    named = name_participants(participants)
    folder = resolve_model(model, progress=progress)
    walked = BlockwiseModel(folder, config.dtype, config.device)
    check_pattern_divides(walked, config)
    check_update_size(walked, config)
    people, config = make_participants(walked, named, config)
    samples = sampled(config, [person.name for person in people], walked.n_blocks)
    tests = evaluation_texts(walked, eval_texts, config)
    identity = {
        "config": config.model_dump(mode="json"),
        "model": {
            "source": str(model),
            "fingerprint": model_digest(tensor_fingerprints(walked, progress)).hex(),
        },
        "participants": {person.name: person.describe() for person in people},
        "evaluation": {name: fingerprint(torch.cat(text)) for name, text in tests.items()},
        "versions": versions(),
    }
    with Run(Path(out), identity, needed_bytes(walked, people, config)) as run:
        if run.result is None:
            _run(walked, people, samples, config, run, tests, identity, progress)
    return PruneResult.load(out)


def _run(
    model: BlockwiseModel,
    people: list[Participant],
    samples: dict[str, list[int]],
    config: PruneConfig,
    run: Run,
    tests: Mapping[str, Sequence[Tensor]],
    identity: Mapping[str, Any],
    progress: Progress,
) -> None:
    strategy = STRATEGIES[config.strategy]
    walkers = [pool(people)] if strategy.pools_text else people
    memory = HiddenMemory(run.spilled_folder, config.memory_limit)
    for walker in walkers:
        walker.hidden = HiddenStates(memory, walker.name)
    samples = {walker.name: samples.get(walker.name, list(range(model.n_blocks))) for walker in walkers}
    outliers = survey_in_process(model, walkers, config, samples, run, progress)
    linears = {name: allocated(model, counts, config) for name, counts in outliers.items()}
    model.linears = linears.pop(None, model.linears)
    own = {name: of_blocks for name, of_blocks in linears.items() if name}
    prune_in_process(model, walkers, config, run, progress, samples, own)
    memory.clear()
    if strategy.server_votes or strategy.pools_text:
        models = {"model": run.model_dir()}
    else:
        models = {person.name: run.model_dir(person.name) for person in people}
    evaluation: dict[str, list[Perplexity]] = {}
    if tests:
        evaluation["dense"] = perplexities(model, tests, progress)
        for name, folder in models.items():
            pruned = BlockwiseModel(folder, config.dtype, config.device)
            evaluation[name] = perplexities(pruned, tests, progress)
    result = {
        **identity,
        "models": {name: str(folder.relative_to(run.folder)) for name, folder in models.items()},
        "n_prunable": model.n_prunable,
        "n_participants": len(walkers),
        **_traffic(model, samples, config, identity["participants"]),
        "outlier_ratios": allocation_record(outliers),
        "evaluation": {name: [p.as_dict() for p in values] for name, values in evaluation.items()},
        "blocks": run.records(),
    }
    for folder in models.values():
        write_model_card(folder, result)
    run.finish(result)


def _traffic(
    model: BlockwiseModel,
    samples: Mapping[str, Sequence[int]],
    config: PruneConfig,
    people: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The payload of what each participant shares, block by block and in total."""
    strategy = STRATEGIES[config.strategy]
    surveys = [SURVEYS[config.share].shapes] if config.allocation != "uniform" else []
    shapes = SHARING[config.share].shapes
    per_block = [update_bytes(shapes(linears)) * strategy.server_votes for linears in model.linears]
    survey = [
        sum(update_bytes(of(linears)) for of in surveys) * strategy.server_votes for linears in model.linears
    ]
    shared = {name: samples[name] if strategy.server_votes else [] for name in samples if name in people}
    sent = {
        name: {
            "n_blocks": len(blocks),
            "update_bytes": sum(per_block[block] + survey[block] for block in blocks),
        }
        for name, blocks in shared.items()
    }
    n_rounds = model.n_blocks if strategy.follows_server else 1
    return {
        "participants": {name: {**person, **sent.get(name, {})} for name, person in people.items()},
        "rounds": (n_rounds + len(surveys)) * strategy.server_votes,
        "update_bytes_per_block": per_block,
        "survey_bytes_per_block": survey,
    }
