"""One job of the coordinator: opens or continues a run, conducts it and writes its result.

A run is a sequence of jobs over one folder. Each job records how it ended in ``federation/outcome.json``.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedprllm.config import PruneConfig
from fedprllm.core.owl import Outliers
from fedprllm.errors import ConfigError, FedprllmError, RunError
from fedprllm.evaluation.perplexity import window_length_for
from fedprllm.federation.coordinator.ballots import Ballots
from fedprllm.federation.coordinator.decisions import BlockDecider, Pruning, Surveying
from fedprllm.federation.coordinator.healing import HealingJob, conduct_healing
from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.coordinator.results import Publication
from fedprllm.federation.coordinator.rounds import Ask, Coordinator
from fedprllm.federation.plan import RunPlan
from fedprllm.federation.protocol.channel import Channel, Interrupted, QuorumLost
from fedprllm.federation.protocol.results import Manifest
from fedprllm.files import free_bytes, is_full, read_sealed, write_json, write_text
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.skeleton import build_skeleton
from fedprllm.models.source import resolve_model
from fedprllm.pruning.method import Method, pruning_method, survey_method
from fedprllm.pruning.model_card import write_model_card
from fedprllm.pruning.preflight import (
    check_message_size,
    check_pattern_divides,
    check_structure,
    check_update_size,
    decision_bytes,
    needed_bytes,
)
from fedprllm.pruning.records import (
    BlockRecord,
    ParticipantRecord,
    RunRecord,
    SurveyRecord,
    SurveyRun,
)
from fedprllm.pruning.reduction import reduction
from fedprllm.pruning.result_writer import without_dropped
from fedprllm.pruning.run_folder import Run, versions
from fedprllm.pruning.strategies import STRATEGIES
from fedprllm.pruning.survey import allocated, outlier_ratios, sampled

__all__ = ["conduct_run", "run_id_of"]

_ID_BYTES = 16
_LOCK_WAIT_S = 30.0  # a job that was just killed may still hold the lock
_Decided = TypeVar("_Decided")


def run_id_of(folder: Path) -> bytes:
    """Id of a run, 16 bytes, drawn when its folder is first used."""
    path = folder / ".run-id"
    try:
        # Once the run has begun, its identity says so as well, with a digest.
        return bytes.fromhex(read_sealed(folder / "run.json")["run_id"])
    except (FileNotFoundError, RunError, KeyError):
        pass
    try:
        found = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (FileNotFoundError, ValueError):
        found = b""
    if len(found) == _ID_BYTES:
        return found
    drawn = uuid.uuid4()
    write_text(path, drawn.hex)
    return drawn.bytes


def conduct_run(
    plan: RunPlan,
    names: Sequence[str],
    runs: Path,
    job: str,
    channel: Channel,
    stopped: Callable[[], bool] = lambda: False,
    max_message_mb: float | None = None,
    revoked: Callable[[], Collection[str]] = tuple,
) -> str:
    """Work on a run until it is complete or cannot continue, and record the outcome.

    Args:
        plan: The run.
        names: All participants of the federation. The plan may name fewer.
        runs: Folder that holds all runs.
        job: Name of this job, recorded in the outcome.
        channel: Transport to the participants.
        stopped: Called between steps. True ends the job.
        max_message_mb: Longest message that sites and server accept, in MB (10^6 bytes). None for no limit.
        revoked: Called between steps. Names participants whose part ends, also while the run goes on.

    Returns:
        The recorded outcome: ``complete``, ``interrupted``, ``quorum lost``, ``disk full`` or ``error``.
    """
    folder = runs / plan.name
    try:
        about = {"job": job, "plan": plan.model_dump(mode="json")}
        write_json(folder / "federation" / "plan.json", about)
        _conduct(plan, names, folder, channel, stopped, max_message_mb, revoked)
        outcome, reason = "complete", ""
    except Interrupted as interruption:
        outcome, reason = "interrupted", str(interruption)
    except QuorumLost as error:
        outcome, reason = "quorum lost", str(error)
    except (FedprllmError, OSError) as error:
        outcome, reason = _failure(error, folder)
    # If the disk has no room even for this, whoever watches the run sees that it is full.
    with contextlib.suppress(OSError, RunError):
        write_json(folder / "federation" / "outcome.json", {"job": job, "outcome": outcome, "reason": reason})
    return outcome


def _failure(error: FedprllmError | OSError, folder: Path) -> tuple[str, str]:
    """The outcome of a job that failed, and why."""
    if is_full(error):
        return "disk full", (
            f"the server's disk is full: {free_bytes(folder) / 1e6:.0f} MB are free where {folder} is; free "
            "some space, and the same command continues; what was decided is kept"
        )
    if isinstance(error, OSError):
        return "error", f"{error.filename or folder}: {error.strerror or error}"
    return "error", str(error)


def _conduct(
    plan: RunPlan,
    names: Sequence[str],
    folder: Path,
    channel: Channel,
    stopped: Callable[[], bool],
    max_message_mb: float | None,
    revoked: Callable[[], Collection[str]],
) -> None:
    taking_part = _taking_part(plan, names)
    if plan.heal is not None:
        of = run_id_of(folder.parent / plan.of).hex() if plan.of else ""
        conduct_healing(
            HealingJob(
                plan,
                taking_part,
                folder,
                run_id_of(folder),
                of,
                channel,
                stopped,
                revoked,
                max_message_mb,
                _LOCK_WAIT_S,
            )
        )
        return
    config = plan.config
    model = BlockwiseModel(resolve_model(plan.model), config.dtype, config.device, config.exclude)
    check_pattern_divides(model, config)
    check_structure(model, config)
    check_update_size(model, config, len(taking_part))
    if max_message_mb is not None:
        check_message_size(model, config, max_message_mb, len(taking_part))
    config = config.model_copy(update={"window_length": window_length_for(model, config.window_length)})
    sampled(config, taking_part, model.n_blocks)
    fingerprints = model_identity(model)
    run_id = run_id_of(folder)
    identity: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "model": {"source": plan.model, "fingerprint": model_digest(fingerprints).hex()},
        "participants": {name: {} for name in taking_part},
        "evaluation": {},
        "versions": versions(),
        "run_id": run_id.hex(),
    }
    run = Run(folder, identity, needed_bytes(model, [], config) + decision_bytes(model, config))
    with run.when_free(_LOCK_WAIT_S):
        if run.is_complete:
            run.check_result()
        else:
            conducting = _Conducting(
                model, config, fingerprints, plan, taking_part, channel, stopped, revoked
            )
            outliers = conducting.survey(run, identity)
            conducting.prune(run, run_id, identity, outliers)


@dataclass
class _Conducting:
    """What a run and its preceding survey have in common."""

    model: BlockwiseModel
    config: PruneConfig
    fingerprints: Mapping[str, str]
    plan: RunPlan
    names: Sequence[str]
    channel: Channel
    stopped: Callable[[], bool]
    revoked: Callable[[], Collection[str]]

    def _ballots(self, method: Method[_Decided], run_id: bytes, folder: Path) -> Ballots[_Decided]:
        def updates(block: int) -> Path:
            return folder / "updates" / f"block-{block:04d}"

        masks = None
        if self.config.secure:
            contributors = {
                block: [name for name, blocks in self.samples.items() if block in blocks]
                for block in range(self.model.n_blocks)
            }
            masks = Masks(folder / "secure" / run_id.hex(), contributors, self.plan.max_colluding)
        return Ballots(self.model, method, run_id, model_digest(self.fingerprints), updates, masks)

    @property
    def samples(self) -> dict[str, list[int]]:
        """The blocks that each participant prunes, by name."""
        return sampled(self.config, sorted(self.names), self.model.n_blocks)

    def _coordinator(
        self, ask: Ask, ballots: Ballots[Any], decider: BlockDecider, run: Run, folder: Path
    ) -> Coordinator:
        return Coordinator(
            ask,
            ballots,
            decider,
            self.plan,
            self.names,
            run,
            self.channel,
            folder,
            self.stopped,
            self.revoked,
        )

    def survey(self, run: Run, identity: Mapping[str, Any]) -> list[Outliers]:
        """Count the outliers of every block in a run of its own, below the run's folder.

        Returns:
            Outliers by block. Empty if the allocation needs none.
        """
        if self.config.allocation == "uniform":
            return []
        run_id = run_id_of(run.folder / "survey")
        method = survey_method(self.config)
        with Run(run.folder / "survey", {**identity, "run_id": run_id.hex()}) as counting:
            counting.forget_damaged(restarts=False)
            if not counting.is_complete:
                folder = run.folder / "federation"
                ask = Ask(run_id, method.config, self.fingerprints, self.samples, survey=True)
                ballots = self._ballots(method, run_id, folder)
                decider = Surveying(ballots, counting)
                coordinator = self._coordinator(ask, ballots, decider, counting, folder)
                coordinator.conduct()
                counting.finish(SurveyRun(blocks=counting.survey_records()))
                coordinator.finish()
            return [Outliers(*record.outliers) for record in counting.survey_records()]

    def prune(
        self, run: Run, run_id: bytes, identity: Mapping[str, Any], outliers: Sequence[Outliers]
    ) -> None:
        """Prune every block, publish the model, and write the result."""
        run.reopen_model()
        run.forget_damaged(restarts=False)
        method = pruning_method(self.config)
        if outliers:
            method = method.with_sparsities(allocated(self.model, outliers, self.config))
        folder = run.folder / "federation"
        ballots = self._ballots(method, run_id, folder)
        decider = Pruning(ballots, run, run_id, model_digest(self.fingerprints))
        ask = Ask(run_id, self.config, self.fingerprints, self.samples, outliers=outliers)
        coordinator = self._coordinator(ask, ballots, decider, run, folder)
        coordinator.conduct()
        decider.finish()
        record = _finish(run, self.model, identity, outliers)
        self._publish(run, run_id, record, coordinator.participants)
        run.finish(record)
        coordinator.finish()

    def _publish(self, run: Run, run_id: bytes, record: RunRecord, still_in: Iterable[str]) -> None:
        """Let participants fetch the result."""
        checkpoint = Checkpoint(run.model_dir(), build_skeleton(run.model_dir(), self.model.dtype))
        removed = [block.removed_experts or [] for block in record.blocks]
        publication = Publication(run.folder)
        manifest = Manifest(
            run=run_id.hex(),
            name=self.plan.name,
            model=self.plan.model,
            fingerprints=dict(self.fingerprints),
            blocks=publication.decision_digests(self.model.n_blocks),
            tensors=checkpoint.fingerprints(checkpoint.names),
            n_prunable=record.n_prunable,
            n_zeros=record.n_zeros,
            dropped=[block.block for block in record.blocks if block.dropped],
            removed_experts=removed if any(removed) else [],
            card=(run.model_dir() / "README.md").read_text(encoding="utf-8"),
            exclude=list(self.config.exclude),
        )
        publication.publish(manifest, self.names if self.plan.left_out_receive else list(still_in))


def _taking_part(plan: RunPlan, names: Sequence[str]) -> list[str]:
    unknown = sorted(set(plan.participants) - set(names))
    if unknown:
        raise ConfigError(
            f"participant '{unknown[0]}' is not in this federation, which has {', '.join(sorted(names))}: "
            "correct the run's participants"
        )
    taking_part = sorted(plan.participants or names)
    if plan.quorum > len(taking_part):
        raise ConfigError(
            f"a quorum of {plan.quorum} cannot be reached by {len(taking_part)} participants: lower the "
            "quorum or name more participants"
        )
    return taking_part


def _finish(
    run: Run, model: BlockwiseModel, identity: Mapping[str, Any], outliers: Sequence[Outliers]
) -> RunRecord:
    """Write the model card and return the result, in the same format as a run in one process."""
    records = run.records()
    surveyed = Run(run.folder / "survey", {}).survey_records()
    config = identity["config"]
    blocks = without_dropped(records, PruneConfig(**config))
    participants = _participants_of(records, surveyed, config["window_length"])
    n_rounds = model.n_blocks if STRATEGIES[config["strategy"]].follows_server else 1
    record = RunRecord.model_validate(
        {
            **identity,
            "participants": participants,
            "models": {"model": str(run.model_dir().relative_to(run.folder))},
            "n_prunable": sum(block.n_weights for block in blocks),
            "reduction": reduction(model, run.model_dir()),
            "coverage": model.coverage,
            "n_participants": len(participants),
            "rounds": n_rounds + bool(surveyed),
            "update_bytes_per_block": [_longest(record) for record in records],
            "survey_bytes_per_block": [_longest(record) for record in surveyed] or [0] * len(records),
            "outlier_ratios": outlier_ratios({None: outliers} if outliers else {}),
            "evaluation": {},
            "blocks": blocks,
            "files": run.model_files({"model": run.model_dir().name}),
        }
    )
    write_model_card(run.model_dir(), record, model.folder)
    return record


def _longest(record: BlockRecord | SurveyRecord) -> int:
    """Length in bytes of the longest update of a block."""
    return max((record.update_bytes or {}).values(), default=0)


def _participants_of(
    records: Sequence[BlockRecord], surveyed: Sequence[SurveyRecord], window_length: int
) -> dict[str, ParticipantRecord]:
    """Summarize each participant whose updates counted, using only what the updates themselves state."""
    n_tokens: dict[str, int | None] = {}  # under masks, they are not known
    n_blocks: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for record in records:
        for name in record.update_bytes or {}:
            n_tokens.setdefault(name, (record.n_tokens or {}).get(name))
        n_blocks.update(list(record.update_bytes or {}))
    for received in (*records, *surveyed):
        n_bytes.update(received.update_bytes or {})
    return {
        name: ParticipantRecord(
            sources=["kept by the participant"],
            n_windows=None if tokens is None else tokens // window_length,
            window_length=window_length,
            n_blocks=n_blocks[name],
            update_bytes=n_bytes[name],
        )
        for name, tokens in n_tokens.items()
    }
