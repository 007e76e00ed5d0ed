"""One job of the coordinator that heals: opens or continues the run, conducts its rounds, writes the model.

It has the same exchanges as a run that prunes block by block: the rounds take the place of blocks, sums of
gradients that of updates, and parameters that of decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprllm.core.zeros import count_zeros
from fedprllm.errors import ConfigError
from fedprllm.evaluation.perplexity import window_length_for
from fedprllm.federation.coordinator.gradients import Gradients, Healing
from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.coordinator.results import Publication
from fedprllm.federation.coordinator.rounds import Ask, Coordinator
from fedprllm.federation.plan import RunPlan
from fedprllm.federation.protocol.channel import Channel
from fedprllm.federation.protocol.results import Manifest
from fedprllm.healing.config import HealConfig
from fedprllm.healing.records import HealRecord, left_dense, pruned_from
from fedprllm.healing.result import heal_record, write_healed, write_healed_card
from fedprllm.healing.round_sums import round_bytes
from fedprllm.healing.run_folder import HealingRun
from fedprllm.healing.server import HealingServer
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.checkpoint import Checkpoint
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.skeleton import build_skeleton
from fedprllm.models.source import resolve_model
from fedprllm.models.tunable import TunableParameters
from fedprllm.pruning.preflight import check_message
from fedprllm.pruning.run_folder import versions

__all__ = ["HealingJob", "conduct_healing", "healed_model"]


def healed_model(plan: RunPlan, runs: Path) -> str:
    """The model that a plan heals: a hub id, or a path on the server.

    Args:
        plan: The run.
        runs: Folder that holds all runs.

    Raises:
        ConfigError: It is the result of a run that is not complete.
    """
    if not plan.of:
        return plan.model
    folder = runs / plan.of
    if not (folder / "result.json").exists():
        raise ConfigError(
            f"of names the run '{plan.of}', which is not complete in {runs}: run it first, or correct "
            "the name"
        )
    return str(folder / "model")


@dataclass
class HealingJob:
    """What one job needs.

    Attributes:
        plan: The run.
        names: Participants that take part.
        folder: The run's folder.
        run_id: Id of the run, 16 bytes.
        of: Id of the run whose result is healed, in hexadecimal digits; empty if it is another model.
        channel: Transport to the participants.
        stopped: Called between steps. True ends the job.
        revoked: Called between steps. Names participants whose part ends.
        max_message_mb: Longest message that sites and server accept, in MB; None for no limit.
        wait_s: Most seconds to wait for a job that was just killed to release the folder.
    """

    plan: RunPlan
    names: Sequence[str]
    folder: Path
    run_id: bytes
    of: str
    channel: Channel
    stopped: Callable[[], bool]
    revoked: Callable[[], Collection[str]]
    max_message_mb: float | None
    wait_s: float


def conduct_healing(job: HealingJob) -> None:
    """Heal until the run is complete.

    Raises:
        ConfigError, ModelError: The plan cannot be run.
        QuorumLost, Interrupted: As `Coordinator.conduct`.
    """
    config = job.plan.healing
    assert config is not None, "the plan heals"
    source = healed_model(job.plan, job.folder.parent)
    if job.plan.of and "exclude" not in config.model_fields_set:
        # What was left dense gets no scale.
        config = config.model_copy(update={"exclude": left_dense(job.folder.parent / job.plan.of)})
    model = BlockwiseModel(resolve_model(source), config.dtype, config.device, config.exclude)
    config = config.model_copy(update={"window_length": window_length_for(model, config.window_length)})
    tunable = TunableParameters(model)
    if job.max_message_mb is not None:
        check_message("a round", round_bytes(tunable.n), job.max_message_mb)
    fingerprints = model_identity(model)
    identity: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "model": {"source": source, "fingerprint": model_digest(fingerprints).hex()},
        "participants": {name: {} for name in job.names},
        "evaluation": {},
        "versions": versions(),
        "run_id": job.run_id.hex(),
    }
    with HealingRun(job.folder, identity, model.checkpoint.n_bytes).when_free(job.wait_s) as run:
        if run.is_complete:
            run.check_result()
        else:
            _conduct(job, config, model, tunable, fingerprints, identity, run)


def _conduct(
    job: HealingJob,
    config: HealConfig,
    model: BlockwiseModel,
    tunable: TunableParameters,
    fingerprints: Mapping[str, str],
    identity: Mapping[str, Any],
    run: HealingRun,
) -> None:
    folder, digest = run.folder / "federation", model_digest(fingerprints)
    samples = {name: list(range(config.rounds + 1)) for name in sorted(job.names)}
    masks = None
    if config.secure:
        contributors = {number: sorted(job.names) for number in range(config.rounds + 1)}
        masks = Masks(folder / "secure" / job.run_id.hex(), contributors, job.plan.max_colluding)

    def updates(number: int) -> Path:
        return folder / "updates" / f"block-{number:04d}"

    run.reopen_model()
    gradients = Gradients(tunable.n, config, job.run_id, digest, updates, masks)
    server = HealingServer(tunable.initial(), config)
    healing = Healing(gradients, server, run, job.run_id, digest)
    dense = pruned_from(run.folder.parent / job.plan.of) if config.loss == "dense" else None
    ask = Ask(job.run_id, config.reading, fingerprints, samples, heal=config, of=job.of, dense=dense)
    coordinator = Coordinator(
        ask, gradients, healing, job.plan, job.names, run, job.channel, folder, job.stopped, job.revoked
    )
    coordinator.conduct()
    healing.finish()
    write_healed(run.unfinished_model_dir(), model, tunable, server.result)
    run.publish_model()
    participants = {name: _described(name, config, healing) for name in job.names}
    about = {**identity, "participants": participants, "dense": dense}
    record = heal_record(about, model, tunable.n, server, healing.records, run)
    write_healed_card(run.model_dir(), model.folder, record)
    still_in = list(coordinator.participants)
    receivers = list(job.names) if job.plan.left_out_receive else still_in
    _publish(job, model, fingerprints, record, run, receivers)
    run.finish(record)
    coordinator.finish()


def _described(name: str, config: HealConfig, healing: Healing) -> dict[str, Any]:
    n_rounds = sum(name in (record.participants or ()) for record in healing.records)
    return {
        "sources": ["kept by the participant"],
        "window_length": config.window_length,
        "n_blocks": n_rounds,
    }


def _publish(
    job: HealingJob,
    model: BlockwiseModel,
    fingerprints: Mapping[str, str],
    record: HealRecord,
    run: HealingRun,
    receivers: Sequence[str],
) -> None:
    """Let participants fetch the result: the parameters, from which each makes its own copy of the model."""
    checkpoint = Checkpoint(run.model_dir(), build_skeleton(run.model_dir(), model.dtype))
    publication = Publication(run.folder)
    manifest = Manifest(
        run=job.run_id.hex(),
        name=job.plan.name,
        model=record.model.source if not job.plan.of else job.plan.of,
        fingerprints=dict(fingerprints),
        blocks=publication.decision_digests(1),
        tensors=checkpoint.fingerprints(checkpoint.names),
        n_prunable=model.n_prunable,
        n_zeros=sum(
            count_zeros(tensor)
            for linears in model.linears
            for tensor in model.checkpoint.load(linears).values()
        ),
        card=(run.model_dir() / "README.md").read_text(encoding="utf-8"),
        exclude=list(record.config.exclude),
        healed=True,
        of=job.of,
    )
    publication.publish(manifest, receivers)
